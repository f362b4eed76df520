"""Images that come a batch at a time, from files or from the host's memory, by worker processes.

The random crop and flip of a streamed image are functions of (seed, epoch, number of the image):
neither workers nor ranks nor a resumed run change a pixel.
"""

import multiprocessing
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import InputError
from ._torchvision import import_torchvision
from .host import decoding_threads
from .imagefiles import TEST_MARGIN, Files, read_rgb, resize_and_crop

# How long a worker outlives a request to end, and the training process' death; torchrun waits for
# 30 before it kills.
_WORKERS_GRACE_SECONDS = 20

# RandomResizedCrop's: shares of the area and width over height (Szegedy et al. 2015, section 6).
CROP_AREA = (0.08, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)

# The use of random numbers is part of their seed, so that no two uses share a stream.
ORDER, CROPS, IMAGE = range(3)

_STATISTICS_IMAGES = 1024


def random_numbers(seed: int, *key: int) -> np.random.Generator:
    """The generator of `key`, by NumPy's SeedSequence: independent for every seed and key."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


@dataclass(frozen=True)
class FolderData:
    """A training and a test set of image files that are decoded when a batch needs them.

    Training images are cropped at random to between 8 % and all of their area, of a ratio between
    3/4 and 4/3, resized to `size` x `size` and half of them mirrored, if `flip`. Test images are
    resized to 256/224 of `size` on their shorter side and cropped to the centre square.
    `cache_reason` says why they are streamed.
    """

    name: str
    train: Files
    test: Files
    classes: tuple[str, ...]
    size: int
    cache_reason: str
    flip: bool = True

    cache: ClassVar[str] = "stream"
    channels: ClassVar[int] = 3
    white: ClassVar[int] = 255

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of a batch's images in pixels."""
        return self.size, self.size

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (3,) of 0..255, float32, of up to 1,024 training images
        evenly spread over the files, cropped as for a test."""
        return self._statistics

    @cached_property
    def _statistics(self) -> tuple[Tensor, Tensor]:
        count = min(len(self.train), _STATISTICS_IMAGES)
        chosen = np.arange(count) * len(self.train) // count
        decoder = Decoder(self.train, self.size)

        def sums(index: int) -> np.ndarray[Any, Any]:
            pixels = np.asarray(decoder.image(index), dtype=np.int64).reshape(-1, 3)
            return np.stack([pixels.sum(0), np.square(pixels).sum(0)])

        with ThreadPoolExecutor(decoding_threads()) as pool:
            # Sums of integers are exact, and so the same in any order.
            both = np.sum(list(pool.map(sums, chosen.tolist())), axis=0)
        mean, square = both / (count * self.size**2)
        std = np.sqrt(np.maximum(square - mean**2, 0))
        std[std == 0] = 1  # a constant channel
        return torch.from_numpy(mean).float(), torch.from_numpy(std).float()


class Decoder(Dataset[Any]):
    """Batches of decoded files: `decoder[indices]` is uint8 (B, size, size, 3) and labels (B,).

    Args:
        files: what indices refer to.
        size: height and width in pixels.
        draw: (seed, epoch) of random crops and flips; None decodes as for a test.
        crop, flip: whether these are drawn.

    A file that cannot be read is an InputError that is returned: raised, the DataLoader would
    wrap it in its worker's traceback.
    """

    def __init__(
        self,
        files: Files,
        size: int,
        draw: tuple[int, int] | None = None,
        crop: bool = True,
        flip: bool = True,
    ) -> None:
        self.files, self.size, self.draw, self.crop, self.flip = files, size, draw, crop, flip

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor] | InputError:
        images = np.empty((len(indices), self.size, self.size, 3), dtype=np.uint8)
        try:
            for place, index in enumerate(indices):
                images[place] = self.image(int(index))
        except InputError as error:
            return error
        return torch.from_numpy(images), self.files.labels[torch.as_tensor(indices)]

    def image(self, index: int) -> Any:
        """The PIL image of one file as it comes into a batch."""
        import_torchvision()
        from torchvision.transforms import functional

        image = read_rgb(self.files.path(index))
        numbers = None if self.draw is None else random_numbers(*self._key(self.draw, index))
        box = random_crop(image.height, image.width, numbers) if numbers is not None else None
        mirrored = numbers is not None and numbers.random() < 0.5
        if box is not None and self.crop:
            image = functional.resized_crop(image, *box, [self.size, self.size])
        else:
            image = resize_and_crop(image, self.size, margin=TEST_MARGIN)
        return functional.hflip(image) if mirrored and self.flip else image

    @staticmethod
    def _key(draw: tuple[int, int], index: int) -> tuple[int, int, int, int]:
        seed, epoch = draw
        return seed, IMAGE, epoch, index


class Gatherer(Dataset[Any]):
    """Batches of tensors on the host: `gatherer[indices]` is (images[indices], labels[indices])."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen = torch.as_tensor(indices)
        return self.images[chosen], self.labels[chosen]


def load_batches(
    dataset: Dataset[Any],
    batches: Sequence[np.ndarray[Any, np.dtype[np.int64]]],
    workers: int,
    pin_memory: bool,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels of each of `batches`, arrays of indices, in order.

    Raises:
        InputError: a file that cannot be read, or a worker process that was killed.
    """
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=batches,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        # Its own, or every epoch would draw from the global generator.
        generator=torch.Generator().manual_seed(0),
    )
    iterator = iter(loader)
    try:
        while True:
            try:
                batch = next(iterator, None)
            except RuntimeError as error:
                if not str(error).startswith("DataLoader worker"):
                    raise
                raise InputError(
                    f"a worker process that loads images died ({' '.join(str(error).split())}), "
                    f"most likely for want of memory: use fewer than {workers} workers, or smaller "
                    "batches"
                ) from error
            if batch is None:
                return
            if isinstance(batch, InputError):
                raise batch
            yield batch
    finally:
        # Workers end with their iterator, which the traceback of an error would keep alive.
        del iterator


def random_crop(height: int, width: int, numbers: np.random.Generator) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random crop, as torchvision's RandomResizedCrop draws them.

    The area is uniform in `CROP_AREA`, the logarithm of the ratio in `CROP_RATIO`; after ten crops
    that do not fit, the centre, cut to the nearest ratio.
    """
    least, most = CROP_RATIO
    for _ in range(10):
        area = height * width * numbers.uniform(*CROP_AREA)
        ratio = np.exp(numbers.uniform(np.log(least), np.log(most)))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = numbers.integers(height - h + 1), numbers.integers(width - w + 1)
            return int(top), int(left), h, w
    w, h = width, height
    if width < least * height:
        h = max(1, round(width / least))
    elif width > most * height:
        w = max(1, round(height * most))
    return (height - h) // 2, (width - w) // 2, h, w


def _start_worker(worker: int) -> None:
    """Let the training process save its run and stop: a terminal's Ctrl-C and torchrun's SIGTERM
    come to the workers too, whose death would be that process' error. But end with it.

    A worker of PyTorch's asks for its parent's number when it begins: one whose parent was killed
    by then would wait for orders of the process that took it over, for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_WORKERS_GRACE_SECONDS))
    threading.Thread(target=_end_after_parent, daemon=True).start()


def _end_after_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    signal.alarm(_WORKERS_GRACE_SECONDS)


def _as_it_is(batch: Any) -> Any:
    return batch
