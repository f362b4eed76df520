"""Data sets: what is loaded, how batches are made of it, and what is said when it cannot be."""

from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from resnetv2._torchvision import import_torchvision
from resnetv2.data import (
    Batches,
    ImageData,
    InputError,
    Split,
    as_image_data,
    create_synthetic_dataset,
    load_data,
)


def numbered(count: int = 10, size: int = 6, **options: object) -> ImageData:
    """Images whose every pixel value is unique within the image, labelled by position."""
    pixels = torch.arange(size * size * 3, dtype=torch.float32).reshape(size, size, 3)
    images = pixels + 1000 * torch.arange(count).reshape(-1, 1, 1, 1)
    split = Split(images, torch.arange(count))
    classes = tuple(map(str, range(count)))
    return ImageData("numbered", split, split, classes, **options)  # type: ignore[arg-type]


def write_images(
    root: Path, sizes: dict[str, tuple[int, int]], classes: tuple[str, ...] = ("cat", "dog")
) -> None:
    """Two images a class in root/<part>, grey level 10 * (class + 1) + index."""
    for part, (width, height) in sizes.items():
        for label, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for index in range(2):
                image = np.full((height, width, 3), 10 * (label + 1) + index, dtype=np.uint8)
                Image.fromarray(image).save(root / part / name / f"{index}.png")


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


def test_batches_follow_the_seed() -> None:
    data = numbered(count=20)
    first, again, other = (list(Batches(data, 5, s).training()) for s in (1, 1, 2))
    assert all(
        torch.equal(a, b) for a, b in zip(first, again, strict=True) for a, b in [(a[0], b[0])]
    )
    assert any(not torch.equal(a[1], b[1]) for a, b in zip(first, other, strict=True))


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


def test_cifar_without_a_network_names_the_alternatives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_torchvision()
    from torchvision.datasets import cifar

    def no_network(*args: object, **options: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(cifar, "download_and_extract_archive", no_network)
    with pytest.raises(InputError, match=r"no route to host.*use digits, imagefolder:PATH or "):
        load_data("cifar10", root=tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mnist", "unknown data set 'mnist': choose from digits, cifar10"),
        ("digits:8", "unknown data set 'digits:8'"),
        ("imagefolder:", "imagefolder needs a path"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_data(name)
