"""Classes of image files by what a run has trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..data.imagefiles import TEST_MARGIN, image_files, read_pixels
from ..errors import InputError
from .environment import reproducible
from .evaluate import TrainedNet, load_run

_BATCH = 64


class FromPixels(nn.Module):
    """A net behind the normalisation of its run's images.

    Args:
        net: logits from normalised images. scale: what a pixel is multiplied by; mean, std: (C,),
            of the run's training images.
    """

    scale: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, scale: float, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("scale", torch.tensor(scale))
        self.register_buffer("mean", mean[:, None, None])
        self.register_buffer("std", std[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, C, H, W), float32, pixels from 0 to 255."""
        return self.net((images * self.scale - self.mean) / self.std)


def from_pixels(trained: TrainedNet) -> FromPixels:
    """The net of a run for pixels from 0 to 255, in evaluation mode; for a run on tensors of the
    caller's own, for their values.

    Raises:
        InputError: the checkpoint is of a version that does not say how images are normalised.
    """
    pixels = trained.state["run"].get("pixels")
    if pixels is None:
        raise InputError(
            f"{trained.checkpoint} does not say how its images are normalised: an older version "
            "has written it; train one step more with this one (--resume)"
        )
    scale = 1.0 if pixels["white"] is None else pixels["white"] / 255
    mean, std = torch.tensor(pixels["mean"]), torch.tensor(pixels["std"])
    return FromPixels(trained.model, scale, mean, std).to(trained.device).eval()


class Prediction(NamedTuple):
    """The classes of one image, the most probable first.

    image: the file. classes: names. probabilities: from 0 to 1, of all classes their sum is 1.
    """

    image: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


@torch.no_grad()
def predict(
    run: str | Path,
    images: Sequence[str | Path],
    *,
    checkpoint: str | Path = "auto",
    top: int = 1,
    device: str | torch.device | None = None,
    warn: Callable[[str], object] = print,
) -> list[Prediction]:
    """Say what a run's net sees in image files.

    Each is resized and cropped as the run's test images are, and made grey where those are.

    Args:
        run, checkpoint, device, warn: as for ``evaluate_run``. images: files, or folders, of which
            all image files are taken. top: so many classes of each, at most all.

    Raises:
        InputError: as ``evaluate_run``; there is no such file, or it is no image; the run was
            trained on tensors, which no file says how to make.
    """
    if top < 1:
        raise InputError(f"top must be at least 1, got {top}")
    files = image_files(list(map(str, images)))
    trained = load_run(run, checkpoint, device=device, warn=warn)
    net = from_pixels(trained)
    facts: dict[str, Any] = trained.state["run"]
    if facts["pixels"]["white"] is None:
        raise InputError(
            f"{trained.checkpoint} was trained on tensors, not on image files: give the model what "
            "it was trained on"
        )
    channels, height, width = trained.image
    margin = TEST_MARGIN if facts["cache"] == "stream" else 1.0
    names = facts["pixels"]["classes"]
    found = []
    with reproducible(trained.device, trained.config.seed):
        for first in range(0, len(files), _BATCH):
            some = files[first : first + _BATCH]
            pixels = [read_pixels(file, channels, (height, width), margin) for file in some]
            batch = torch.stack(pixels)
            probabilities = trained.logits(net, batch.float()).softmax(1).cpu()
            for file, row in zip(some, probabilities, strict=True):
                values, order = row.topk(min(top, len(names)))
                chosen = tuple(names[i] for i in order.tolist())
                found.append(Prediction(file, chosen, tuple(values.tolist())))
    return found
