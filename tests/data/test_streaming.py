"""Image folders, decoded once or streamed: what is listed, read and drawn, and what is said of
files and folders that cannot be used."""

import multiprocessing
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from resnetv2.data import host, streaming
from resnetv2.data._torchvision import import_torchvision
from resnetv2.data.batches import Batches, ImageData
from resnetv2.data.datasets import load_data
from resnetv2.data.imagefiles import EXTENSIONS, decode, list_folders, read_rgb
from resnetv2.data.streaming import (
    Decoder,
    FolderData,
    Gatherer,
    load_batches,
    random_crop,
    random_numbers,
)
from resnetv2.errors import InputError


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


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 training and 7 test images of noise, each of another size."""
    root = tmp_path_factory.mktemp("photographs")
    numbers = np.random.default_rng(0)
    for part, count in (("train", 26), ("val", 7)):
        for index in range(count):
            folder = root / part / ("cat", "dog")[index % 2]
            folder.mkdir(parents=True, exist_ok=True)
            shape = (20 + index, 40 - index, 3)
            image = numbers.integers(0, 256, shape, dtype=np.uint8)
            Image.fromarray(image).save(folder / f"{index:02}.png")
    return root


@pytest.fixture(scope="module")
def streamed(photographs: Path) -> FolderData:
    data = load_data(f"imagefolder:{photographs}", image_size=16)
    assert isinstance(data, FolderData)
    return data


def epoch(data: FolderData, batch_size: int = 8, **options: object) -> list[torch.Tensor]:
    """Images and labels of epoch 3, batch after batch."""
    start = options.pop("start", 0)
    batches = Batches(data, batch_size, 5, **options)  # type: ignore[arg-type]
    return [tensor for batch in batches.training(3, start) for tensor in batch]  # type: ignore[arg-type]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


def test_images_of_one_size_are_decoded_once(tmp_path: Path) -> None:
    write_images(tmp_path, {"train": (5, 4), "test": (5, 4)})
    data = load_data(f"imagefolder:{tmp_path}")
    assert isinstance(data, ImageData)
    assert data.classes == ("cat", "dog")
    assert data.train.images.shape == (4, 4, 5, 3)
    assert data.train.images.dtype == torch.uint8
    assert data.train.images[:, 0, 0, 0].tolist() == [10, 11, 20, 21]
    assert data.train.labels.tolist() == [0, 0, 1, 1]
    assert (data.crop_padding, data.flip) == (4, True)
    assert (data.cache, data.cache_reason) == ("memory", "of one size, 4.47e-07 GiB")


def test_memory_resizes_images_of_different_sizes(tmp_path: Path) -> None:
    write_images(tmp_path, {"train": (9, 4), "test": (5, 6)})
    data = load_data(f"imagefolder:{tmp_path}", image_size=8, cache="memory")
    assert data.train.images.shape == data.test.images.shape == (4, 8, 8, 3)
    assert data.train.images[:, 4, 4, 1].tolist() == [10, 11, 20, 21]
    assert data.cache_reason == "asked for"


def test_auto_streams_images_of_different_sizes(photographs: Path) -> None:
    data = load_data(f"imagefolder:{photographs}", image_size=16)
    assert isinstance(data, FolderData)
    assert (len(data.train), len(data.test), data.classes) == (26, 7, ("cat", "dog"))
    assert (data.channels, data.image_size, data.cache) == (3, (16, 16), "stream")
    assert data.cache_reason.startswith("images differ in size: ")
    assert data.cache_reason.endswith("02.png is 38x22, others are 40x20")


def test_auto_streams_what_memory_cannot_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 images of 192 bytes: 1,536 are 60 % of 2,560."""
    write_images(tmp_path, {"train": (8, 8), "test": (8, 8)})
    name = f"imagefolder:{tmp_path}"
    for available, cache in ((2560, "memory"), (2559, "stream")):
        monkeypatch.setattr("resnetv2.data.datasets.available_memory", lambda n=available: n)
        assert load_data(name).cache == cache
    data = load_data(name)
    assert data.image_size == (8, 8)
    assert "8 images of 8x8 take 1.43e-06 GiB, more than 60% of" in data.cache_reason
    monkeypatch.setattr("resnetv2.data.host.available_memory", lambda: 1600)
    with pytest.raises(InputError, match=r"8 images of 8x8 take .*, more than 90% of .* of memory"):
        load_data(name, cache="memory")


def test_memory_is_shared_by_the_processes_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone = host.available_memory()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    shared = host.available_memory()
    assert alone is not None
    assert shared is not None
    assert shared == pytest.approx(alone / 4, rel=0.2)  # others take and give back meanwhile


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_do_not_change_what_is_decoded(tmp_path: Path, threads: int) -> None:
    numbers = np.random.default_rng(1)
    pixels = numbers.integers(0, 256, (200, 5, 4, 3), dtype=np.uint8)
    for index, image in enumerate(pixels):
        folder = tmp_path / "train" / ("a", "b")[index // 100]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{index:03}.png")
    write_images(tmp_path, {"test": (4, 5)}, ("a", "b"))
    files, _, _ = list_folders(str(tmp_path))
    options = {"expected": (4, 5), "image_size": None, "shape": (5, 4), "threads": threads}
    assert np.array_equal(decode(files, "", **options), pixels)  # type: ignore[arg-type]
    for index in (199, 70, 130):
        Path(files.path(index)).write_bytes(b"")
        with pytest.raises(
            InputError,
            match=f"{min(index, 70):03}.png: empty file" if index < 199 else "199.png: empty file",
        ):
            decode(files, "", **options)  # type: ignore[arg-type]


def test_files_are_listed_as_imagefolder_does(tmp_path: Path) -> None:
    import_torchvision()
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import IMG_EXTENSIONS

    assert IMG_EXTENSIONS == EXTENSIONS
    write_images(tmp_path, {"train": (4, 4), "test": (4, 4)}, ("b", "a", "c d"))
    for name in ("a/x/1.JPG", "a/x y/1.jpeg", "a/z.webp", "a/9.tiff", "b/0/0/0.bmp", "b/10.pgm"):
        file = tmp_path / "train" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (tmp_path / "train" / "a" / "notes.txt").write_text("not an image")
    expected = ImageFolder(tmp_path / "train")
    for name in (".DS_Store", "a/._0.png", "a/.thumbnails/0.png", ".ipynb_checkpoints/0.png"):
        file = tmp_path / "train" / name
        file.parent.mkdir(exist_ok=True)
        file.touch()
    files, _, classes = list_folders(str(tmp_path))
    assert list(classes) == expected.classes
    found = [(files.path(i), int(files.labels[i])) for i in range(len(files))]
    assert found == expected.samples
    assert len(found) == 12


def test_test_is_taken_before_val(tmp_path: Path) -> None:
    write_images(tmp_path, {"train": (4, 4), "val": (4, 4)})
    assert list_folders(str(tmp_path))[1].root == str(tmp_path / "val")
    write_images(tmp_path, {"test": (4, 4)})
    assert list_folders(str(tmp_path))[1].root == str(tmp_path / "test")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_and_workers_share_one_process_batches(
    streamed: FolderData, world_size: int, workers: int
) -> None:
    whole = epoch(streamed)
    assert len(whole) == 6
    shares = [
        epoch(streamed, workers=workers, world_size=world_size, rank=rank)
        for rank in range(world_size)
    ]
    assert all(len(share[0]) == 8 // world_size for share in shares)
    assert same(whole, [torch.cat(parts) for parts in zip(*shares, strict=True)])


def test_workers_end_with_a_process_that_is_killed_as_they_begin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """PyTorch's own watch begins later; none of them is left to wait for ever."""
    begin, (parent, child) = streaming._start_worker, os.pipe()

    def begin_late(worker: int) -> None:
        begin(worker)
        while os.getppid() == training:
            time.sleep(0.01)

    monkeypatch.setattr(streaming, "_WORKERS_GRACE_SECONDS", 1)
    monkeypatch.setattr(streaming, "_start_worker", begin_late)
    data = Gatherer(torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64))
    process = os.fork()
    if process == 0:
        os.setpgid(0, 0)
        training = os.getpid()
        threading.Timer(0.2, os.kill, (training, signal.SIGKILL)).start()
        next(load_batches(data, [np.arange(4)] * 4, 2, pin_memory=False))
    os.close(child)
    assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL
    # Every process that is left holds the other end.
    ended, _, _ = select.select([parent], [], [], 60)
    os.close(parent)
    if not ended:
        os.killpg(process, signal.SIGKILL)
    assert ended, "a worker lives a minute after its training process was killed"


@pytest.mark.parametrize("start", [0, 1, 2, 4])
def test_an_epoch_goes_on_from_any_step(streamed: FolderData, start: int) -> None:
    whole = epoch(streamed, drop_last=False)
    assert [len(labels) for labels in whole[1::2]] == [8, 8, 8, 2]
    assert same(whole[2 * start :], epoch(streamed, start=start, drop_last=False))


def test_skipped_batches_are_not_decoded(
    streamed: FolderData, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    monkeypatch.setattr(
        "resnetv2.data.streaming.read_rgb", lambda path: decoded.append(path) or read_rgb(path)
    )
    batches = Batches(streamed, 8)
    decoded.clear()
    next(batches.training(start=2))
    assert len(decoded) == 8


def test_epochs_and_seeds_differ(streamed: FolderData) -> None:
    seen = []
    for seed in (0, 1):
        batches = Batches(streamed, 26, seed)
        for number in (1, 2):
            ((images, labels),) = batches.training(number)
            assert len(labels) == 26
            # Sorted, so that another order alone is no difference.
            seen.append(images.sum((1, 2, 3)).sort().values)
    assert all(not torch.equal(seen[i], seen[j]) for i in range(4) for j in range(i))


@pytest.mark.parametrize("world_size", [1, 2, 4, 9])
def test_test_images_are_resized_cropped_and_shared(streamed: FolderData, world_size: int) -> None:
    """16 pixels of a shorter side of 18; of seven images, each is in one share."""
    import_torchvision()
    from torchvision.transforms import functional

    shares = [
        list(Batches(streamed, 36, rank=rank, world_size=world_size).testing(3))
        if world_size != 9
        else list(Batches(streamed, 18, rank=rank, world_size=9).testing(3))
        for rank in range(world_size)
    ]
    counts = [sum(len(labels) for _, labels in share) for share in shares]
    assert max(counts) - min(counts) <= 1
    images = torch.cat([images for share in shares for images, _ in share])
    labels = torch.cat([labels for share in shares for _, labels in share])
    assert labels.tolist() == streamed.test.labels.tolist()
    mean, std = streamed.statistics()
    for index, image in enumerate(images):
        pil = Image.open(streamed.test.path(index))
        cropped = functional.center_crop(functional.resize(pil, 18), [16])
        expected = (torch.from_numpy(np.array(cropped)).float() - mean) / std
        assert torch.equal(image.permute(1, 2, 0), expected)


def test_statistics_are_those_of_the_centre_crops(streamed: FolderData) -> None:
    decoder = Decoder(streamed.train, 16)
    pixels = np.stack([np.asarray(decoder.image(i)) for i in range(26)]).reshape(-1, 3)
    mean, std = streamed.statistics()
    assert mean.tolist() == pytest.approx(pixels.mean(0).tolist(), rel=1e-6)
    assert std.tolist() == pytest.approx(pixels.std(0).tolist(), rel=1e-6)


def test_statistics_are_of_a_sample(streamed: FolderData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resnetv2.data.streaming._STATISTICS_IMAGES", 4)
    sample = FolderData("", streamed.train, streamed.test, streamed.classes, 16, "")
    decoder = Decoder(streamed.train, 16)
    pixels = np.stack([np.asarray(decoder.image(i)) for i in (0, 6, 13, 19)]).reshape(-1, 3)
    assert sample.statistics()[0].tolist() == pytest.approx(pixels.mean(0).tolist(), rel=1e-6)


def test_random_crops_have_the_shares_and_ratios_asked_for() -> None:
    """Of a large square, nearly all first draws fit: areas are uniform in 8 % to 100 %."""
    boxes = np.array([random_crop(1000, 1000, random_numbers(0, i)) for i in range(4000)])
    top, left, height, width = boxes.T
    assert np.all((top >= 0) & (left >= 0) & (top + height <= 1000) & (left + width <= 1000))
    areas, ratios = height * width / 1e6, width / height
    assert 0.079 < areas.min() < 0.09
    assert areas.max() > 0.95
    assert 0.749 < ratios.min() < 0.76
    assert 1.32 < ratios.max() < 1.335
    # torchvision's own, with its own random numbers, agrees in distribution.
    import_torchvision()
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    image = torch.empty(1, 1000, 1000)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)]
    )
    for ours, other in zip(boxes.T, theirs.T, strict=True):
        quantiles = np.linspace(0.1, 0.9, 9)
        assert np.quantile(ours, quantiles) == pytest.approx(np.quantile(other, quantiles), abs=45)


@pytest.mark.parametrize(("height", "width"), [(5, 100), (100, 5), (1, 1), (1, 3)])
def test_random_crops_of_narrow_images_fit(height: int, width: int) -> None:
    for index in range(50):
        top, left, h, w = random_crop(height, width, random_numbers(0, index))
        assert 0 <= top <= height - h
        assert 0 <= left <= width - w
        assert h >= 1
        assert w >= 1


def test_half_of_the_images_are_mirrored(tmp_path: Path) -> None:
    """An image whose red rises from left to right, in every crop, and whose green from the top."""
    ramp = np.repeat(np.linspace(0, 255, 64).astype(np.uint8)[None], 64, 0)
    image = Image.fromarray(np.stack([ramp, ramp.T, ramp], 2))
    for part, count in (("train", 50), ("test", 1)):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(count):
                image.save(tmp_path / part / name / f"{index}.png")
    data = load_data(f"imagefolder:{tmp_path}", image_size=8, cache="stream")
    options = {
        "whole": {},
        "unflipped": {"flip": False},
        "fixed": {"flip": False, "crop_padding": 0},
    }
    mirrored = {}
    for name, given in options.items():
        ((images, _),) = Batches(data, 100, **given).training()  # type: ignore[arg-type]
        mirrored[name] = int((images[:, 0, 4, 0] > images[:, 0, 4, -1]).sum())
        if name == "fixed":
            assert torch.equal(images, images[:1].expand_as(images))
        else:
            assert len(images.flatten(1).unique(dim=0)) > 90
    assert 30 <= mirrored["whole"] <= 70
    assert mirrored["unflipped"] == mirrored["fixed"] == 0


def test_the_global_generator_is_left_alone(streamed: FolderData) -> None:
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    epoch(streamed)
    assert torch.equal(torch.rand(2), expected)


def test_workers_end_with_a_loop_that_is_left_early(streamed: FolderData) -> None:
    before = len(multiprocessing.active_children())
    batches = Batches(streamed, 2, workers=2).training()
    next(batches)
    assert len(multiprocessing.active_children()) == before + 2
    del batches
    assert len(multiprocessing.active_children()) == before


SHADES = {
    "grey": (Image.new("L", (4, 4), 77), (77, 77, 77), "png"),
    "16-bit": (Image.fromarray(np.full((4, 4), 386, np.uint16)), (2, 2, 2), "png"),
    "16-bit-tiff": (Image.fromarray(np.full((4, 4), 77 * 257, np.uint16)), (77, 77, 77), "tiff"),
    "alpha": (Image.new("RGBA", (4, 4), (1, 2, 3, 128)), (1, 2, 3), "png"),
    "grey-alpha": (Image.new("LA", (4, 4), (9, 0)), (9, 9, 9), "png"),
    "palette": (Image.new("RGB", (4, 4), (5, 6, 7)).convert("P", palette=1), (5, 6, 7), "png"),
    "one-bit": (Image.new("1", (4, 4), 1), (255, 255, 255), "png"),
    "cmyk": (Image.new("CMYK", (4, 4), (255, 0, 0, 0)), (0, 255, 255), "tiff"),
}


@pytest.mark.parametrize("mode", SHADES)
def test_every_mode_becomes_rgb(mode: str, tmp_path: Path) -> None:
    image, expected, suffix = SHADES[mode]
    image.save(tmp_path / f"image.{suffix}")
    rgb = read_rgb(str(tmp_path / f"image.{suffix}"))
    assert (rgb.mode, rgb.size, rgb.getpixel((1, 2))) == ("RGB", (4, 4), expected)


def test_a_transparent_palette_becomes_rgb_without_a_warning(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    pixels = np.arange(0, 240, 5, dtype=np.uint8).reshape(4, 4, 3)
    image = Image.fromarray(pixels).convert("P", palette=1)
    image.save(tmp_path / "image.png", transparency=bytes(range(100, 116)))
    assert read_rgb(str(tmp_path / "image.png")).mode == "RGB"
    assert not recwarn.list


def test_cmyk_jpegs_become_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(tmp_path / "image.jpg")
    pixel = read_rgb(str(tmp_path / "image.jpg")).getpixel((4, 4))
    assert np.abs(np.subtract(pixel, (0, 255, 255))).max() <= 3


def test_rotation_in_exif_is_left_alone(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 4))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "image.jpg", exif=exif)
    assert read_rgb(str(tmp_path / "image.jpg")).size == (8, 4)


def truncated_jpeg(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, "jpeg")
    path.write_bytes(path.read_bytes()[:2000])


def truncated_png(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, "png")
    path.write_bytes(path.read_bytes()[:2000])


def flipped_bits(path: Path) -> None:
    Image.new("RGB", (64, 64)).save(path, "png")
    content = bytearray(path.read_bytes())
    content[45:60] = bytes(value ^ 0xFF for value in content[45:60])
    path.write_bytes(content)


def floating(path: Path) -> None:
    Image.new("F", (4, 4), 0.5).save(path, "tiff")


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "zero-bytes": (lambda path: path.write_bytes(b""), "empty file"),
    "text": (lambda path: path.write_text("hello"), "not an image, or damaged"),
    "truncated-jpeg": (truncated_jpeg, "image file is truncated"),
    "truncated-png": (truncated_png, ""),
    "flipped-bits": (flipped_bits, ""),
    "floating": (floating, r"pixels of 32 bits \(mode F\), save it with 8 or 16"),
}


@pytest.mark.parametrize("fault", BROKEN)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_file_is_named_in_one_line(
    streamed: FolderData, fault: str, workers: int, tmp_path: Path
) -> None:
    write, reason = BROKEN[fault]
    write_images(tmp_path, {"train": (4, 4), "test": (4, 4)})
    data = load_data(f"imagefolder:{tmp_path}", cache="stream")
    batches = Batches(data, 2, workers=workers)
    write(tmp_path / "train" / "cat" / "1.png")
    write(tmp_path / "test" / "cat" / "1.png")
    for part, images in (("train", batches.training), ("test", batches.testing)):
        expected = rf"^cannot read the image .*{part}/cat/1\.png: {reason}.*; replace or remove it$"
        with pytest.raises(InputError, match=expected) as raised:
            list(images())
        assert not multiprocessing.active_children()  # although `raised` holds their traceback
        assert "\n" not in str(raised.value)
    if workers == 0:
        with pytest.raises(
            InputError, match=rf"train/cat/1\.png: {reason}.*; replace or remove it$"
        ):
            load_data(f"imagefolder:{tmp_path}", image_size=4, cache="memory")


def test_a_bomb_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (100, 100)).save(tmp_path / "0.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match=r"0\.png: .*decompression bomb.*; replace or remove it"):
        read_rgb(str(tmp_path / "0.png"))


def test_a_file_without_permission_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As root, every file is readable: the system's refusal is feigned."""

    def refuse(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", "0.png")

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(InputError, match=r"cannot read the image .*0\.png: Permission denied;"):
        read_rgb(str(tmp_path / "0.png"))
    monkeypatch.setattr(os, "scandir", refuse)
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    with pytest.raises(InputError, match=r"cannot read the folder .*train: Permission denied$"):
        list_folders(str(tmp_path))


def test_a_worker_that_is_killed_is_one_line(
    streamed: FolderData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system's killer of processes that take too much memory sends SIGKILL."""
    parent = os.getpid()

    def die(path: str) -> object:
        if os.getpid() != parent:
            os.kill(os.getpid(), 9)
        return read_rgb(path)

    streamed.statistics()
    monkeypatch.setattr("resnetv2.data.streaming.read_rgb", die)
    with pytest.raises(
        InputError, match=r"worker process .* died .*fewer than 1 workers"
    ) as raised:
        epoch(streamed, workers=1)
    assert "\n" not in str(raised.value)


def folder(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).mkdir(parents=True, exist_ok=True)
        if path.count("/") == 1:
            Image.new("RGB", (4, 4)).save(root / path / "0.png")


def file_for_train(root: Path) -> None:
    (root / "train").touch()


def loop_of_train(root: Path) -> None:
    (root / "train").symlink_to(root / "train")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (file_for_train, r"train is a file, not a folder: "),
        (loop_of_train, r"train cannot be opened \(Too many levels of symbolic links\): "),
        (lambda root: folder(root, "train"), r"test does not exist: .* PATH/test or PATH/val"),
        (
            lambda root: folder(root, "train/a", *(f"val/{c}" for c in "abcdefgh")),
            r"classes differ: .*train lacks b, c, d, e, f and 2 more, which .*val has",
        ),
    ],
    ids=["train-is-a-file", "train-links-to-itself", "no-test", "classes-missing-in-train"],
)
def test_folders_that_cannot_be_used(
    make: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    """More of them, as commands, are in tests/support/bad_commands.py."""
    make(tmp_path)
    for cache in ("auto", "memory", "stream"):
        with pytest.raises(InputError, match=message) as raised:
            load_data(f"imagefolder:{tmp_path}", cache=cache)
        assert "\n" not in str(raised.value)


def test_the_path_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, message in (
        ("file/below", r"below cannot be opened \(Not a directory\)"),
        ("x" * 300, r"x cannot be opened \(File name too long\)"),
    ):
        with pytest.raises(InputError, match=message):
            load_data(f"imagefolder:{tmp_path / name}")


def test_oblong_images_are_streamed_with_an_image_size(tmp_path: Path) -> None:
    write_images(tmp_path, {"train": (6, 4), "test": (6, 4)})
    with pytest.raises(InputError, match=r"squares, and these are 6x4: give --image-size N"):
        load_data(f"imagefolder:{tmp_path}", cache="stream")
    data = load_data(f"imagefolder:{tmp_path}", cache="stream", image_size=4)
    assert (data.image_size, data.cache_reason) == ((4, 4), "asked for")


def test_only_folders_are_streamed() -> None:
    with pytest.raises(InputError, match="only imagefolder:PATH can be streamed; digits is"):
        load_data("digits", cache="stream")
    with pytest.raises(InputError, match="unknown cache 'disk': choose from auto, memory, stream"):
        load_data("digits", cache="disk")
    assert load_data("digits").cache_reason == "digits always is"
