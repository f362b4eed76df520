"""Image files in a folder a class: listed, read, and decoded into memory."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import InputError
from ._torchvision import import_torchvision
from .host import decoding_threads

# torchvision's ImageFolder's.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

_FILES_A_TASK = 64

# Smaller files keep Python busy rather than the decoder, and threads wait for each other: measured,
# two threads take longer than one up to 64x64 pixels and less from 96x96 on.
_PIXELS_FOR_THREADS = 96 * 96


@dataclass(frozen=True, eq=False)
class Files:
    """Image files under `root` and their labels (N,), int64 from 0.

    `names` (N,) are paths from `root` as bytes in one array. Of a million Python strings every
    worker process would soon have its own copy, because a reference count is written at each use.
    """

    root: str
    names: np.ndarray[Any, np.dtype[np.bytes_]]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.names[index]))


def list_folders(path: str) -> tuple[Files, Files, tuple[str, ...]]:
    """The files of PATH/train and of PATH/test (or PATH/val), and the classes.

    A folder of images in each is a class, subfolders included, with the extensions and in the
    order of torchvision's ImageFolder. Hidden files and folders and other files are passed over.

    Raises:
        InputError: a folder that is missing, unreadable, empty or in a loop of links; classes
            that only one of the two has; a single class.
    """
    needs = (
        "imagefolder:PATH needs PATH/train and PATH/test or PATH/val, each with a folder a class"
    )
    _check_folder(path, needs)
    parts = [os.path.join(path, "train")]
    _check_folder(parts[0], needs)
    tests = [os.path.join(path, name) for name in ("test", "val")]
    found = [folder for folder in tests if os.path.lexists(folder)]
    _check_folder(found[0] if found else tests[0], needs)
    parts.append(found[0])
    classes, others = (_classes(part) for part in parts)
    for has, lacks, missing in (
        (parts[0], parts[1], sorted(set(classes) - set(others))),
        (parts[1], parts[0], sorted(set(others) - set(classes))),
    ):
        if missing:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise InputError(
                f"classes differ: {lacks} lacks {', '.join(missing[:5])}{more}, which {has} has; "
                "each class needs its folder in both"
            )
    if len(classes) < 2:
        raise InputError(
            f"{parts[0]} has one class only, {classes[0]}: a classifier needs two or more"
        )
    train, test = (_list_files(part, classes) for part in parts)
    return train, test, tuple(classes)


def _check_folder(path: str, expected: str) -> None:
    if os.path.isdir(path):
        return
    try:
        os.stat(path)
        reason = "is a file, not a folder"
    except FileNotFoundError:
        reason = "does not exist"
    except (OSError, ValueError) as error:
        reason = f"cannot be opened ({getattr(error, 'strerror', None) or error})"
    raise InputError(f"{path} {reason}: {expected}")


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """The entries of a folder, but for hidden files."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise InputError(f"cannot read the folder {folder}: {error.strerror}") from error


def _classes(part: str) -> list[str]:
    classes = sorted(entry.name for entry in _entries(part) if entry.is_dir())
    if not classes:
        raise InputError(f"{part} holds no folders: it needs a folder of images for every class")
    return classes


def _list_files(part: str, classes: Sequence[str]) -> Files:
    names: list[bytes] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        folder = os.path.join(part, name)
        found = sorted(_walk(folder, (os.path.realpath(folder),)))
        if not found:
            raise InputError(
                f"{folder} holds no image: add some ({', '.join(EXTENSIONS)}) or remove the "
                "class from both train and test"
            )
        names += [os.fsencode(os.path.join(*file)[len(part) :].lstrip(os.sep)) for file in found]
        labels += [label] * len(found)
    return Files(part, np.array(names), torch.tensor(labels, dtype=torch.int64))


def _walk(folder: str, above: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(folder, name) of each image; `above` are the real paths of `folder` and those above it."""
    for entry in _entries(folder):
        if entry.is_dir():
            if entry.is_symlink():
                real = os.path.realpath(entry.path)
            else:
                real = os.path.join(above[-1], entry.name)
            if any(place == real or place.startswith(real + os.sep) for place in above):
                raise InputError(f"{entry.path} is a link to a folder above it: remove the link")
            yield from _walk(entry.path, (*above, real))
        elif entry.name.lower().endswith(EXTENSIONS):
            if not entry.is_file():
                raise InputError(f"{entry.path} is not a file (a broken link?): remove it")
            yield folder, entry.name


class SizesDifferError(InputError):
    """Images that should be of one size are not."""

    def __init__(self, path: str, size: tuple[int, int], expected: tuple[int, int]) -> None:
        super().__init__(
            f"images differ in size: {path} is {pixels(size)}, others are {pixels(expected)}"
        )


def common_size(*sets: Files) -> tuple[int, int]:
    """Width and height of all images, by their headers. Raises SizesDifferError."""
    expected = size_of(sets[0].path(0))
    for files in sets:
        for index in range(len(files)):
            size = size_of(files.path(index))
            if size != expected:
                raise SizesDifferError(files.path(index), size, expected)
    return expected


def decode(
    files: Files,
    title: str,
    *,
    expected: tuple[int, int] | None,
    image_size: int | None,
    shape: tuple[int, int],
    threads: int | None = None,
    progress: bool | None = None,
) -> Tensor:
    """All files decoded, uint8 (N, height, width, 3), the same for any number of threads.

    Args:
        files: what to decode.
        title: of the progress bar.
        expected: width and height that every file must have; None if they may differ.
        image_size: resize the shorter side to so many pixels and crop the centre square.
        shape: height and width of the result.
        threads: None is a few where there are cores and the first image is large enough.
        progress: None shows a bar on a terminal only.

    Raises:
        SizesDifferError: a file of another size than `expected`.
        InputError: a file that cannot be read; of several, the first.
    """
    from PIL import Image

    Image.preinit()  # or threads would all do so
    if threads is None:
        width, height = size_of(files.path(0))
        threads = decoding_threads() if width * height >= _PIXELS_FOR_THREADS else 1
    images = np.empty((len(files), *shape, 3), dtype=np.uint8)

    def task(first: int) -> int:
        last = min(first + _FILES_A_TASK, len(files))
        for index in range(first, last):
            image = read_rgb(files.path(index))
            if expected is not None and image.size != expected:
                raise SizesDifferError(files.path(index), image.size, expected)
            images[index] = resize_and_crop(image, image_size)
        return last - first

    hide = None if progress is None else not progress
    bar = tqdm(total=len(files), desc=title, unit="image", leave=False, disable=hide)
    with bar, ThreadPoolExecutor(threads) as pool:
        tasks = [pool.submit(task, first) for first in range(0, len(files), _FILES_A_TASK)]
        try:
            for done in tasks:
                bar.update(done.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return torch.from_numpy(images)


# The shorter side of a streamed test image, of the crop's size (He et al. 2016, section 5).
TEST_MARGIN = 256 / 224


def resize_and_crop(image: Any, image_size: int | None, margin: float = 1.0) -> Any:
    """Shorter side to `margin` times `image_size` pixels, then the centre square of `image_size`.

    None leaves it as it is, and so does its own size without a margin.
    """
    if image_size is None or (margin == 1 and image.size == (image_size, image_size)):
        return image
    import_torchvision()
    from torchvision.transforms import functional

    resized = functional.resize(image, round(margin * image_size))
    return functional.center_crop(resized, [image_size])


def read_pixels(path: str, channels: int, size: tuple[int, int], margin: float = 1.0) -> Tensor:
    """A file as a test image of a data set: uint8 (channels, height, width).

    Args:
        path: of the file. channels: 3, or 1 for grey. size: height and width; only where they
            are equal is an image of another size resized and cropped. margin: as above.

    Raises:
        InputError: it cannot be read, or it has another size than a data set that is not square.
    """
    height, width = size
    image = read_rgb(path)
    if height == width:
        image = resize_and_crop(image, height, margin)
    elif image.size != (width, height):
        raise InputError(f"{path} is {pixels(image.size)}, expected {pixels((width, height))}")
    if channels == 1:
        image = image.convert("L")
    return torch.from_numpy(np.array(image)).reshape(height, width, channels).permute(2, 0, 1)


def image_files(paths: Sequence[str]) -> list[str]:
    """The paths, with folders replaced by all image files in them, sorted.

    Raises:
        InputError: there is no such file, or a folder without images.
    """
    found = []
    for path in paths:
        if os.path.isdir(path):
            inside = sorted(os.path.join(*file) for file in _walk(path, (os.path.realpath(path),)))
            if not inside:
                raise InputError(f"{path} holds no image ({', '.join(EXTENSIONS)})")
            found += inside
        elif os.path.exists(path):
            found.append(path)
        else:
            raise InputError(f"there is no file {path}")
    return found


def read_rgb(path: str) -> Any:
    """The file as a PIL image of mode RGB.

    Grey, palette and CMYK images are converted, 16 bits a channel become 8, alpha is dropped.
    A rotation in EXIF data is left alone.
    """
    return _open(path, _to_rgb)


def size_of(path: str) -> tuple[int, int]:
    """Width and height of an image file, by its header."""
    size: tuple[int, int] = _open(path, lambda image: image.size)
    return size


def _open(path: str, use: Callable[[Any], Any]) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return use(image)
    except UnidentifiedImageError as error:
        reason = "empty file" if os.path.getsize(path) == 0 else "not an image, or damaged"
        raise InputError(f"cannot read the image {path}: {reason}; replace or remove it") from error
    # Pillow's formats fail in many ways on damaged files; all of them are about this one.
    except Exception as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise InputError(f"cannot read the image {path}: {reason}; replace or remove it") from error


def _to_rgb(image: Any) -> Any:
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        # convert() would cut off at 255 instead of scaling.
        grey = (np.asarray(image).astype(np.int64) + 128) // 257
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of 32 bits (mode {image.mode}), save it with 8 or 16")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def pixels(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
