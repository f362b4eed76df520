"""Data sets in memory: what is loaded, how batches are made of it, and what is said when it cannot
be. Image folders are in test_streaming.py."""

import hashlib
import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

from resnetv2.data._torchvision import import_torchvision
from resnetv2.data.batches import Batches, ImageData, Split, _fits
from resnetv2.data.datasets import as_image_data, create_synthetic_dataset, load_data
from resnetv2.data.streaming import CROPS, IMAGE, ORDER, random_numbers
from resnetv2.errors import InputError


def numbered(count: int = 10, size: int = 6, **options: object) -> ImageData:
    """Images whose every pixel value is unique within the image, labelled by position."""
    pixels = torch.arange(size * size * 3, dtype=torch.float32).reshape(size, size, 3)
    images = pixels + 1000 * torch.arange(count).reshape(-1, 1, 1, 1)
    split = Split(images, torch.arange(count))
    classes = tuple(map(str, range(count)))
    return ImageData("numbered", split, split, classes, **options)  # type: ignore[arg-type]


def test_digits_are_split_once_and_stratified() -> None:
    data = load_data("digits")
    assert (len(data.train), len(data.test)) == (1437, 360)
    assert data.train.images.dtype == torch.uint8
    assert (data.channels, data.image_size, len(data.classes)) == (1, (8, 8), 10)
    assert int(data.train.images.max()) == 16
    # 1,797 digits, 174 to 183 of each: a fifth of each in the test set.
    assert all(34 <= count <= 38 for count in torch.bincount(data.test.labels).tolist())
    assert torch.equal(data.test.labels, load_data("digits").test.labels)
    assert not data.flip


def test_digits_can_be_enlarged() -> None:
    data = load_data("digits", image_size=16)
    assert data.train.images.shape == (1437, 16, 16, 1)
    assert data.train.images.dtype == torch.uint8


def test_statistics_match_float64() -> None:
    data = load_data("digits")
    mean, std = data.statistics()
    pixels = data.train.images.double()
    assert mean.item() == pytest.approx(pixels.mean().item(), rel=1e-6)
    assert std.item() == pytest.approx(pixels.std(correction=0).item(), rel=1e-6)


def test_batches_are_normalised_channels_last_and_whole() -> None:
    data = as_image_data(create_synthetic_dataset(100, 4, image_size=8))
    batches = Batches(data, 32)
    epoch = list(batches.training())
    assert batches.steps == len(epoch) == 2
    for images, labels in epoch:
        assert images.shape == (32, 3, 8, 8)
        assert labels.shape == (32,)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert images.mean().abs() < 0.2
        assert abs(images.std() - 1) < 0.1


def test_a_batch_larger_than_the_data_set_is_one_step() -> None:
    batches = Batches(numbered(5), 64)
    ((images, labels),) = batches.training()
    assert len(images) == 5
    assert sorted(labels.tolist()) == [0, 1, 2, 3, 4]


def test_every_image_is_a_crop_of_itself_or_of_its_mirror_image() -> None:
    data = numbered(count=40, size=6, crop_padding=2, flip=True)
    batches = Batches(data, 40)
    mean, std = data.statistics()
    ((images, labels),) = batches.training()
    normalised = (data.train.images - mean) / std
    shifts, mirrored = set(), 0
    for image, label in zip(images.permute(0, 2, 3, 1), labels.tolist(), strict=True):
        matches = []
        for flip in (False, True):
            padded = torch.zeros(10, 10, 3)
            padded[2:8, 2:8] = normalised[label]
            for top in range(5):
                for left in range(5):
                    crop = padded[top : top + 6, left : left + 6]
                    if torch.equal(image, crop.flip(1) if flip else crop):
                        matches.append((flip, top, left))
        assert len(matches) == 1
        mirrored += matches[0][0]
        shifts.add(matches[0][1:])
    assert 10 <= mirrored <= 30
    assert len(shifts) >= 15


def test_test_images_are_in_order_and_untouched() -> None:
    data = numbered(count=7)
    mean, std = data.statistics()
    batches = list(Batches(data, 4).testing(batch_size=3))
    assert [len(labels) for _, labels in batches] == [3, 3, 1]
    images = torch.cat([images for images, _ in batches]).permute(0, 2, 3, 1)
    assert torch.equal(images, (data.test.images - mean) / std)


def run(
    data: ImageData, batch_size: int, epoch: int = 1, start: int = 0, **options: Any
) -> list[torch.Tensor]:
    """Images and labels of an epoch, batch after batch."""
    batches = Batches(data, batch_size, **options).training(epoch, start)
    return [tensor for batch in batches for tensor in batch]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


def joined(shares: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    return [torch.cat(parts) for parts in zip(*shares, strict=True)]


def test_batches_follow_seed_and_epoch() -> None:
    data = numbered(count=20)
    runs = {
        (seed, epoch): run(data, 5, epoch, seed=seed) for seed in (0, 1, 2) for epoch in (1, 2, 3)
    }
    assert same(runs[1, 2], run(data, 5, 2, seed=1))
    orders = {tuple(torch.cat(tensors[1::2]).tolist()) for tensors in runs.values()}
    assert len(orders) == 9
    assert all(sorted(order) == list(range(20)) for order in orders)


def test_no_two_uses_share_random_numbers() -> None:
    """Neither a zero at the end of a key nor a sum of its parts makes two streams one."""
    keys = [
        (seed, use, epoch, *step)
        for seed in (0, 1, 2, 2**32, 2**40)
        for use in (ORDER, CROPS, IMAGE)
        for epoch in range(5)
        for step in ((), (0,), (1,), (2,))
    ]
    first = {tuple(random_numbers(*key).integers(2**32, size=4)) for key in keys}
    assert len(first) == len(keys)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_the_last_smaller_batch(world_size: int) -> None:
    """38 images in batches of 16: the last one has six."""
    data = numbered(count=38, crop_padding=2)
    whole = run(data, 16, drop_last=False)
    assert [len(labels) for labels in whole[1::2]] == [16, 16, 6]
    assert sorted(torch.cat(whole[1::2]).tolist()) == list(range(38))
    ranks = [{"rank": rank, "world_size": world_size} for rank in range(world_size)]
    assert same(whole[:4], joined([run(data, 16, **rank) for rank in ranks]))
    batches = [Batches(data, 16, drop_last=False, **rank) for rank in ranks]
    shares = [[tensor for batch in each.training() for tensor in batch] for each in batches]
    assert same(whole, joined(shares))
    assert [batches[0].size(step) for step in range(3)] == [16, 16, 6]
    last = [len(share[-1]) for share in shares]
    assert last == {1: [6], 2: [3, 3], 4: [1, 2, 1, 2]}[world_size]


@pytest.mark.parametrize("start", [0, 1, 3, 5])
@pytest.mark.parametrize("rank", [0, 1])
def test_an_epoch_goes_on_from_any_step(start: int, rank: int) -> None:
    data = numbered(count=20, crop_padding=1)
    options = {"rank": rank, "world_size": 2, "seed": 4}
    whole = run(data, 4, 7, **options)
    assert len(whole) == 10
    assert same(whole[2 * start :], run(data, 4, 7, start, **options))


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_stay_on_the_host_make_the_same_batches(
    workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = numbered(count=21, crop_padding=1)
    options = {"drop_last": False, "rank": 1, "world_size": 2, "workers": workers}
    resident = Batches(data, 8, **options)
    monkeypatch.setattr("resnetv2.data.batches._fits", lambda data, device: False)
    host = Batches(data, 8, **options)
    assert (resident.resident, host.resident) == (True, False)
    for first, second in zip(
        (*resident.training(2, 1), *resident.testing(3)),
        (*host.training(2, 1), *host.testing(3)),
        strict=True,
    ):
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])


def test_a_gpu_keeps_what_takes_half_of_its_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_data("digits")
    assert data.train.nbytes + data.test.nbytes == 1797 * 64
    for free, fits in ((2 * 1797 * 64, True), (2 * 1797 * 64 - 2, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 2 * free))
        assert _fits(data, torch.device("cuda")) == fits


@pytest.mark.parametrize("world_size", [1, 2, 4, 16])
def test_test_shares_hold_every_image_once(world_size: int) -> None:
    data = numbered(count=10)
    train = Split(data.train.images.repeat(2, 1, 1, 1), data.train.labels.repeat(2))
    data = replace(data, train=train)
    shares = [
        list(Batches(data, 16, rank=rank, world_size=world_size).testing(2))
        for rank in range(world_size)
    ]
    counts = [sum(len(labels) for _, labels in share) for share in shares]
    assert max(counts) - min(counts) <= 1
    (whole,) = Batches(data, 16).testing(10)
    images, labels = (
        torch.cat([batch[part] for share in shares for batch in share]) for part in (0, 1)
    )
    assert torch.equal(images, whole[0])
    assert labels.tolist() == list(range(10))


def test_offsets_and_flips_are_equally_frequent() -> None:
    """5 x 5 x 2 ways to crop and flip, 100 of each expected in 10 epochs. Of one seed in 30,000,
    a count would be five standard deviations off."""
    size, padding = 3, 2
    pixels = torch.arange(1.0, 1 + size * size).reshape(size, size, 1).repeat(500, 1, 1, 1)
    split = Split(pixels, torch.arange(500) % 2)
    data = ImageData("same", split, split, ("a", "b"), crop_padding=padding, flip=True)
    mean, std = data.statistics()
    padded = F.pad((pixels[0, :, :, 0] - mean) / std, [padding] * 4)
    ways = {}
    for flip in (False, True):
        for top in range(5):
            for left in range(5):
                crop = padded[top : top + size, left : left + size]
                ways[crop.flip(1) if flip else crop] = 0
    batches = Batches(data, 100)
    for epoch in range(10):
        for images, _ in batches.training(epoch):
            for way in ways:
                ways[way] += int((images[:, 0] == way).all((1, 2)).sum())
    assert sum(ways.values()) == 5000
    assert abs(sum(list(ways.values())[25:]) - 2500) < 5 * 1250**0.5
    assert all(abs(count - 100) < 5 * 100**0.5 for count in ways.values())


@pytest.mark.parametrize(
    ("options", "augmentation"),
    [
        ({}, "crops of images padded by 2, flips"),
        ({"crop_padding": 0}, "flips"),
        ({"flip": False}, "crops of images padded by 2"),
        ({"crop_padding": 1, "flip": True}, "crops of images padded by 1, flips"),
        ({"crop_padding": 0, "flip": False}, "none"),
    ],
    ids=["own", "no-crop", "no-flip", "other-padding", "none"],
)
def test_augmentation_can_be_chosen(options: dict[str, Any], augmentation: str) -> None:
    data = numbered(count=8, crop_padding=2)
    chosen = replace(data, **options)
    assert Batches(data, 8, **options).augmentation == augmentation
    assert same(run(data, 8, **options), run(chosen, 8))
    if augmentation != "crops of images padded by 2, flips":
        assert not same(run(data, 8, **options), run(data, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch size must be at least 1, got 0"),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"workers": -1}, "workers must not be negative, got -1"),
        ({"crop_padding": -1}, "crop_padding must not be negative, got -1"),
        ({"world_size": 3}, "a batch of 8 images cannot be divided by 3 processes: take a multip"),
        ({"world_size": 2, "rank": 2}, r"the rank must be in 0\.\.1, got 2"),
        (
            {"world_size": 4, "drop_last": False},
            "the last batch of 19 training images has 3, fewer than the 4 processes",
        ),
        (
            {"batch_size": 64, "world_size": 32},
            "the last batch of 19 training images has 19, fewer than the 32 processes",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Batches(numbered(19), **{"batch_size": 8, **options})


def test_wrong_places_in_a_run_are_named() -> None:
    batches = Batches(numbered(10), 3)
    for epoch, start in ((-1, 0), (1, -1), (1, 4)):
        with pytest.raises(
            InputError, match=rf"step in 0\.\.3 are needed, got {epoch} and {start}"
        ):
            batches.training(epoch, start)
    with pytest.raises(InputError, match="batch size must be at least 1, got 0"):
        list(batches.testing(0))
    assert list(batches.training(start=3)) == []


def test_synthetic_images() -> None:
    dataset = create_synthetic_dataset(50, 4, image_size=12, channels=2, seed=3)
    images, labels = dataset.tensors
    assert images.shape == (50, 2, 12, 12)
    assert images.dtype == torch.float32
    assert torch.bincount(labels).tolist() == [13, 13, 12, 12]
    assert torch.equal(images, create_synthetic_dataset(50, 4, 12, 2, seed=3).tensors[0])
    assert not torch.equal(images, create_synthetic_dataset(50, 4, 12, 2, seed=4).tensors[0])
    assert create_synthetic_dataset().tensors[0].shape == (800, 3, 32, 32)


def test_synthetic_classes_can_be_told_apart() -> None:
    images, labels = create_synthetic_dataset(400, 5, image_size=16).tensors
    means = torch.stack([images[:200][labels[:200] == label].mean(0) for label in range(5)])
    nearest = (images[200:, None] - means).square().sum((2, 3, 4)).argmin(1)
    assert (nearest == labels[200:]).float().mean() > 0.99


@pytest.mark.parametrize("name", ["num_samples", "num_classes", "image_size", "channels"])
def test_synthetic_sizes_must_be_positive(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} must be at least 1, got 0"):
        create_synthetic_dataset(**{name: 0})


def test_tensors_are_split_four_to_one() -> None:
    data = as_image_data(create_synthetic_dataset(50, image_size=4))
    assert (len(data.train), len(data.test), len(data.classes)) == (40, 10, 10)
    assert (data.crop_padding, data.flip) == (0, False)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ((torch.zeros(4, 3, 8), torch.zeros(4).long()), r"images must be \(N, C, H, W\)"),
        ((torch.zeros(4, 3, 8, 8), torch.zeros(4)), "labels must be int64"),
        ((torch.zeros(4, 3, 8, 8),), "TensorDataset"),
        ((torch.zeros(4, 3, 8, 8), torch.tensor([0, 1, -1, 1])), r"labels must be in 0\.\.1"),
    ],
    ids=["rank", "label-dtype", "no-labels", "negative-label"],
)
def test_wrong_tensors_are_named(tensors: tuple[torch.Tensor, ...], message: str) -> None:
    dataset = TensorDataset(*tensors)
    with pytest.raises(InputError, match=message):
        as_image_data((dataset, dataset))


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_comes_from_torchvision(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import_torchvision()
    from torchvision import datasets

    calls = []

    def dataset(root: Path, train: bool, download: bool) -> SimpleNamespace:
        calls.append((root, train, download))
        count = 6 if train else 2
        images = np.full((count, 32, 32, 3), count, dtype=np.uint8)
        return SimpleNamespace(data=images, targets=[1] * count, classes=["a", "b"])

    monkeypatch.setattr(datasets, name.upper(), dataset)
    data = load_data(name, root="somewhere")
    assert calls == [(Path("somewhere"), True, True), (Path("somewhere"), False, True)]
    assert (len(data.train), len(data.test), data.classes) == (6, 2, ("a", "b"))
    assert (data.crop_padding, data.flip) == (4, True)


def write_cifar(folder: Path) -> dict[str, str]:
    """A CIFAR-10 of ten images a batch. Returns the checksum of each file."""
    folder.mkdir(parents=True)
    batch = {"data": np.zeros((10, 3072), np.uint8), "labels": list(range(10))}
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    contents = {name: pickle.dumps(batch) for name in names}
    contents["batches.meta"] = pickle.dumps({"label_names": list("abcdefghij")})
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return {
        name: hashlib.md5(content, usedforsecurity=False).hexdigest()
        for name, content in contents.items()
    }


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        (None, None),
        ("test_batch", "batches-py has a damaged test_batch and could not be downloaded"),
        ("batches.meta", "batches-py has a damaged batches.meta and could not be downloaded"),
    ],
    ids=["whole", "damaged", "damaged-names"],
)
def test_a_damaged_cifar_is_described(
    damaged: str | None,
    message: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import_torchvision()
    from torchvision.datasets import CIFAR10, cifar

    def no_network(*args: object, **options: object) -> None:
        raise URLError("no route to host")

    folder = tmp_path / CIFAR10.base_folder
    sums = write_cifar(folder)
    monkeypatch.setattr(cifar, "download_and_extract_archive", no_network)
    for name in ("train_list", "test_list"):
        files = [[file, sums[file]] for file, _ in getattr(CIFAR10, name)]
        monkeypatch.setattr(CIFAR10, name, files)
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})
    if damaged is None:
        data = load_data("cifar10", root=tmp_path)
        assert (len(data.train), len(data.test)) == (50, 10)
        return
    (folder / damaged).write_bytes(b"half")
    with pytest.raises(InputError, match=message) as raised:
        load_data("cifar10", root=tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["digits", "synthetic"])
def test_images_that_memory_cannot_hold_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"images of 1000000x1000000 take .* more than 90% of the"):
        load_data(name, image_size=10**6)


def test_limited_test_set_has_images_of_all_classes() -> None:
    data = numbered(40)
    batches = Batches(data, 4)
    whole = torch.cat([labels for _, labels in batches.testing(4)])
    part = torch.cat([labels for _, labels in batches.testing(4, limit=2)])
    spread = torch.arange(8) * len(whole) // 8
    assert torch.equal(part, whole[spread])
    assert len(torch.cat([labels for _, labels in batches.testing(4, limit=100)])) == len(whole)
