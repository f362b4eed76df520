"""Image data sets by name: in memory as tensors, or as folders of files that are streamed.

A data set that fits is decoded once into a uint8 tensor, which is faster than worker processes for
images of CIFAR's size; folders of larger images, or of images that differ in size, are decoded a
batch at a time. `Batches` makes batches of either.
"""

import contextlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

from ..errors import InputError
from ._torchvision import import_torchvision
from .batches import Batches, ImageData, Split
from .host import available_memory, check_memory, gibibytes
from .imagefiles import SizesDifferError, common_size, decode, list_folders, pixels, size_of
from .streaming import FolderData

DATASETS = "digits, cifar10, cifar100, imagefolder:PATH, synthetic"
CACHES = ("auto", "memory", "stream")

# Decoded images may take so much of the memory that there is; the rest is for the training.
_CACHE_SHARE = 0.6


def create_synthetic_dataset(
    num_samples: int = 800,
    num_classes: int = 10,
    image_size: int = 32,
    channels: int = 3,
    *,
    noise: float = 1.0,
    seed: int = 0,
) -> TensorDataset:
    """Images that can be learned without any data: one smooth pattern a class, plus white noise.

    Args:
        num_samples: number of images; the classes are as equally frequent as it allows.
        num_classes: number of classes.
        image_size: height and width in pixels.
        channels: channels an image.
        noise: standard deviation of the noise; the patterns' is 1.
        seed: the same seed gives bitwise the same data set.

    Returns:
        TensorDataset of images (num_samples, channels, image_size, image_size), float32, and labels
        (num_samples,), int64, in random order.

    Raises:
        InputError: a size is not positive, or the noise is negative.
    """
    sizes = {
        "num_samples": num_samples,
        "num_classes": num_classes,
        "image_size": image_size,
        "channels": channels,
    }
    for name, value in sizes.items():
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    if noise < 0:
        raise InputError(f"noise must not be negative, got {noise}")
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(num_classes, channels, 4, 4, generator=generator)
    patterns = F.interpolate(coarse, size=image_size, mode="bilinear", align_corners=False)
    deviation = patterns.std(dim=(1, 2, 3), keepdim=True, correction=0)
    patterns = patterns / deviation.clamp_min(1e-6)
    labels = torch.arange(num_samples) % num_classes
    labels = labels[torch.randperm(num_samples, generator=generator)]
    shape = (num_samples, channels, image_size, image_size)
    images = patterns[labels] + noise * torch.randn(shape, generator=generator)
    return TensorDataset(images, labels)


@overload
def load_data(
    name: str,
    *,
    root: str | Path = ...,
    image_size: int | None = ...,
    cache: Literal["memory"],
    progress: bool | None = ...,
    seed: int = ...,
) -> ImageData: ...


@overload
def load_data(
    name: str,
    *,
    root: str | Path = ...,
    image_size: int | None = ...,
    cache: str = ...,
    progress: bool | None = ...,
    seed: int = ...,
) -> ImageData | FolderData: ...


def load_data(
    name: str,
    *,
    root: str | Path = "data",
    image_size: int | None = None,
    cache: str = "auto",
    progress: bool | None = None,
    seed: int = 0,
) -> ImageData | FolderData:
    """Load a data set by name.

    Args:
        name: `digits` (scikit-learn's 1,797 handwritten digits, 8x8, no download), `cifar10` or
            `cifar100` (found under `root` or downloaded there), `imagefolder:PATH` (PATH/train and
            PATH/test, or PATH/val, with a folder of images for each class), or `synthetic`.
        root: where torchvision's CIFAR lies or goes.
        image_size: resize the shorter side to this many pixels and crop the centre square; of a
            streamed folder, the size of the random crops.
        cache: `memory` decodes an image folder once, `stream` when a batch needs its images.
            `auto` streams images that differ in size, or that would take more than 60 % of the
            memory available once decoded. The result's `cache` and `cache_reason` say what was
            taken and why. The two differ in their augmentation.
        progress: show a bar while images are decoded; None means only on a terminal.
        seed: of the synthetic images.

    Raises:
        InputError: an unknown name, a missing path, an empty folder, images of different sizes
            without an `image_size`, a file that is no image, ...
        ImportError: a package that the data set needs is missing.
    """
    kind, _, path = name.partition(":")
    if image_size is not None and image_size < 1:
        raise InputError(f"the image size must be at least 1, got {image_size}")
    if cache not in CACHES:
        raise InputError(f"unknown cache {cache!r}: choose from {', '.join(CACHES)}")
    if kind == "imagefolder":
        if not path:
            raise InputError(
                "imagefolder needs a path with a train and a test folder: imagefolder:PATH"
            )
        return _load_image_folder(Path(os.path.expanduser(path)), image_size, cache, progress)
    loaders: dict[str, Callable[[], ImageData]] = {
        "digits": _load_digits,
        "cifar10": lambda: _load_cifar("CIFAR10", Path(os.path.expanduser(root))),
        "cifar100": lambda: _load_cifar("CIFAR100", Path(os.path.expanduser(root))),
        "synthetic": lambda: _load_synthetic(image_size or 32, seed),
    }
    if name not in loaders:
        raise InputError(f"unknown data set {name!r}: choose from {DATASETS}")
    if cache == "stream":
        raise InputError(f"only imagefolder:PATH can be streamed; {name} is always in memory")
    data = replace(loaders[name](), cache_reason=f"{name} always is")
    if image_size is not None:
        data = replace(
            data, train=_resize(data.train, image_size), test=_resize(data.test, image_size)
        )
    return data


def as_image_data(
    data: TensorDataset | tuple[TensorDataset, TensorDataset] | ImageData, name: str = "tensors"
) -> ImageData:
    """Wrap tensors (images (N, C, H, W), labels (N,)) as `ImageData`, without augmentation.

    Of a single data set the last fifth is held out as the test set.
    """
    if isinstance(data, ImageData):
        return data
    if isinstance(data, TensorDataset):
        if len(data) < 2:
            raise InputError("a single data set is split in two and needs at least two images")
        cut = min(len(data) - 1, max(1, len(data) * 4 // 5))
        train, test = (
            TensorDataset(*(tensor[part] for tensor in data.tensors))
            for part in (slice(cut), slice(cut, None))
        )
    else:
        train, test = data
    training, testing = _tensor_split(train), _tensor_split(test)
    count = 1 + max(int(split.labels.max()) for split in (training, testing))
    classes = tuple(str(label) for label in range(count))
    return ImageData(name, training, testing, classes, crop_padding=0, flip=False, white=None)


def _tensor_split(dataset: TensorDataset) -> Split:
    if not isinstance(dataset, TensorDataset) or len(dataset.tensors) != 2:
        raise InputError("tensors come as TensorDataset(images (N, C, H, W), labels (N,))")
    images, labels = dataset.tensors
    if images.dim() != 4:
        raise InputError(f"images must be (N, C, H, W), got shape {tuple(images.shape)}")
    return Split(images.permute(0, 2, 3, 1).contiguous(), labels)


def _load_synthetic(image_size: int, seed: int) -> ImageData:
    count = 3000
    # The noise, the patterns and their sum.
    _check_images(3 * count, image_size, 3 * torch.float32.itemsize)
    return as_image_data(
        create_synthetic_dataset(count, image_size=image_size, seed=seed), "synthetic"
    )


def _load_digits() -> ImageData:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError(
            "the data set 'digits' needs scikit-learn: python -m pip install scikit-learn"
        ) from error
    digits = load_digits()
    train, test = train_test_split(
        np.arange(len(digits.target)), test_size=360, stratify=digits.target, random_state=0
    )
    images = torch.from_numpy(digits.images.astype(np.uint8)).unsqueeze(3)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    # A mirrored digit is another digit, or none; one pixel of shift is an eighth of the image.
    return ImageData(
        "digits",
        train=Split(images[train], labels[train]),
        test=Split(images[test], labels[test]),
        classes=tuple(map(str, digits.target_names)),
        crop_padding=1,
        flip=False,
        white=16,
    )


def _load_cifar(class_name: str, root: Path) -> ImageData:
    import_torchvision()
    from torchvision import datasets

    dataset = getattr(datasets, class_name)
    had_root = root.exists()
    if had_root and not root.is_dir():
        raise InputError(f"{root} is a file, expected the folder where {class_name} lies or goes")
    try:
        train, test = (dataset(root, train=training, download=True) for training in (True, False))
    # urllib's URLError is an OSError; torchvision raises RuntimeError for a damaged file.
    except (OSError, RuntimeError) as error:
        if not had_root:
            with contextlib.suppress(OSError):
                root.rmdir()
        # A URLError and an OSError hold their reason in an attribute.
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        reason = " ".join(str(reason).split())
        raise InputError(
            f"{_incomplete(dataset, root) or f'{class_name} is not under {root}'} and could not be "
            f"downloaded ({reason}). "
            "Without a network use digits, imagefolder:PATH or synthetic"
        ) from error

    def split(part: Any) -> Split:
        return Split(torch.from_numpy(part.data), torch.tensor(part.targets, dtype=torch.int64))

    return ImageData(class_name.lower(), split(train), split(test), tuple(train.classes))


def _incomplete(dataset: Any, root: Path) -> str | None:
    """Files of torchvision's CIFAR that `root` lacks or holds damaged; None without any file."""
    from torchvision.datasets.utils import check_integrity

    folder = root / dataset.base_folder
    if not folder.is_dir():
        return None
    meta = [(dataset.meta["filename"], dataset.meta["md5"])]
    missing, damaged = [], []
    for name, md5 in [*dataset.train_list, *dataset.test_list, *meta]:
        if not (folder / name).is_file():
            missing.append(name)
        elif not check_integrity(folder / name, md5):
            damaged.append(name)
    faults = [
        f"{what} {', '.join(names[:2])}" + (f" and {len(names) - 2} more" if names[2:] else "")
        for what, names in (("lacks", missing), ("has a damaged", damaged))
        if names
    ]
    return f"{folder} {' and '.join(faults)}" if faults else None


def _load_image_folder(
    path: Path, image_size: int | None, cache: str, progress: bool | None
) -> ImageData | FolderData:
    train, test, classes = list_folders(str(path))
    name = path.resolve().name
    reason = "asked for"
    if cache != "stream":
        expected = size_of(train.path(0))
        shape = (image_size, image_size) if image_size else expected[::-1]
        count = len(train) + len(test)
        needed = count * shape[0] * shape[1] * 3
        what = f"{count:,} images of {pixels(shape[::-1])}"
        available = available_memory()
        if cache == "memory":
            check_memory(needed, what, "--image-size makes them smaller, --cache stream reads them")
        if cache == "auto" and available is not None and needed > _CACHE_SHARE * available:
            reason = (
                f"{what} take {gibibytes(needed)}, more than {_CACHE_SHARE:.0%} of "
                f"{gibibytes(available)} available"
            )
        else:
            try:
                training, testing = (
                    Split(
                        decode(
                            files,
                            f"decoding {part}",
                            expected=None if cache == "memory" and image_size else expected,
                            image_size=image_size,
                            shape=shape,
                            progress=progress,
                        ),
                        files.labels,
                    )
                    for part, files in (("train", train), ("test", test))
                )
                if cache == "auto":
                    reason = f"of one size, {gibibytes(needed)}"
                return ImageData(name, training, testing, classes, cache_reason=reason)
            except SizesDifferError as error:
                if image_size is None:
                    raise InputError(f"{error}; --image-size N makes all NxN") from error
                reason = str(error)
    if image_size is None:
        try:
            width, height = common_size(train, test)
        except SizesDifferError as error:
            raise InputError(f"{error}; --image-size N makes all NxN") from error
        if width != height:
            raise InputError(
                f"images that are streamed are cropped to squares, and these are "
                f"{pixels((width, height))}: give --image-size N"
            )
        image_size = width
    return FolderData(name, train, test, classes, image_size, reason)


def _resize(split: Split, image_size: int) -> Split:
    """The shorter side to `image_size` pixels, then the centre square."""
    height, width, channels = split.images.shape[1:]
    if (height, width) == (image_size, image_size):
        return split
    _check_images(len(split), image_size, channels * split.images.element_size())
    scale = image_size / min(height, width)
    size = [max(image_size, round(side * scale)) for side in (height, width)]
    top, left = ((side - image_size) // 2 for side in size)
    resized = torch.empty(len(split), image_size, image_size, channels, dtype=split.images.dtype)
    # In float32 the whole would be four times its size.
    for target, chunk in zip(resized.split(1024), split.images.split(1024), strict=True):
        images = F.interpolate(
            chunk.permute(0, 3, 1, 2).float(), size=size, mode="bilinear", antialias=True
        )
        images = images[:, :, top : top + image_size, left : left + image_size]
        if not split.images.is_floating_point():
            images = images.round()
        target.copy_(images.permute(0, 2, 3, 1))
    return Split(resized, split.labels)


def _check_images(count: int, image_size: int, bytes_a_pixel: int) -> None:
    check_memory(
        count * image_size**2 * bytes_a_pixel,
        f"{count:,} images of {image_size}x{image_size}",
        "--image-size makes them smaller",
    )
