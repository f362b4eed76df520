"""The test error of a model, and of a finished or unfinished run."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.batches import Batches
from ..data.datasets import load_data
from ..errors import InputError
from ..fuse.weights import difference
from ..kernels.dispatch import resolve_backend
from ..models import PreActResNet, standard_net
from ..names import DTYPES
from .checkpoint import Checkpoints, check_parts
from .config import TrainConfig, saved_config
from .environment import reproducible, select_device
from .parallel import World
from .step import compute_logits


def memory_format_of(config: TrainConfig) -> torch.memory_format:
    """The memory format of weights and images."""
    return torch.channels_last if config.channels_last else torch.contiguous_format


def evaluate_as(
    config: TrainConfig, model: nn.Module, batches: Batches, world: World | None = None
) -> tuple[float, float]:
    """``evaluate`` as a run of this configuration does it after each epoch."""
    return evaluate(
        model,
        batches,
        dtype=DTYPES[config.dtype],
        memory_format=memory_format_of(config),
        batch_size=min(500, max(1, config.batch_size // batches.world_size)),
        limit=config.limit_batches,
        world=world,
    )


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Batches,
    *,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.channels_last,
    batch_size: int = 500,
    limit: int | None = None,
    world: World | None = None,
) -> tuple[float, float]:
    """Mean cross entropy in nats and accuracy in 0..1 on the test set, in evaluation mode.

    Args:
        model: logits from images, on the device of ``batches``; its modes are left as they were.
        dtype, memory_format: as in training (``step.compute_logits``).
        batch_size: images at a time. limit: at most so many batches, see ``Batches.testing``.
        world: the processes that share the test set. All call it together.

    Raises:
        InputError: an image that cannot be read.
    """
    world = world or World()
    modes = {module: module.training for module in model.modules()}
    model.eval()
    device = batches.device
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for images, labels in batches.testing(batch_size, limit):
        logits = compute_logits(model, images, dtype, memory_format)
        sums[0] += F.cross_entropy(logits, labels, reduction="sum")
        sums[1] += (logits.argmax(1) == labels).sum()
        sums[2] += len(labels)
    for module, training in modes.items():
        module.training = training
    loss, correct, count = world.sum(sums).tolist()
    return loss / count, correct / count


def build_model(config: TrainConfig, classes: int, channels: int) -> nn.Module:
    """The net that a configuration describes.

    Raises:
        InputError: there is no such net, or memory "auto" has nothing to go by.
    """
    options: dict[str, Any] = {
        "num_classes": classes,
        "in_channels": channels,
        "memory": config.memory,
        "budget": config.budget,
        "backend": config.backend,
    }
    try:
        if config.model is not None:
            return standard_net(config.model).build(**options)
        return PreActResNet.from_depth(
            config.depth, block=config.block, stem=config.stem, **options
        )
    except ValueError as error:
        raise InputError(str(error)) from error


def check_backend(backend: str, device: torch.device) -> None:
    """Refuse a backend that cannot run on ``device``, before anything else is done.

    Raises:
        InputError: no such backend, or kernels without a GPU. ImportError: Triton is missing.
    """
    if backend == "eager":
        return
    try:
        chosen = resolve_backend(backend, device)
    except ValueError as error:
        raise InputError(str(error)) from error
    if chosen == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise InputError(
            f"backend triton needs a GPU, and the device is {device}: take --backend aten or auto"
        )


@dataclass(frozen=True)
class Evaluation:
    """The result of ``evaluate_run``.

    Args:
        checkpoint: the file; step, epoch: of the run when it was written.
        averaged: whether the weights are the run's moving average.
        loss, accuracy: on the test set. recorded: the accuracy that the run wrote down after the
            checkpoint's last whole epoch, None where the checkpoint is from the middle of one.
        images: of the test set.
    """

    checkpoint: Path
    step: int
    epoch: int
    averaged: bool
    loss: float
    accuracy: float
    recorded: float | None
    images: int


def evaluate_run(
    run: str | Path,
    checkpoint: str | Path = "auto",
    *,
    device: str | torch.device | None = None,
    progress: bool | None = None,
    warn: Callable[[str], object] = print,
    **options: Any,
) -> Evaluation:
    """Test what a run has trained, on the run's own test set.

    Args:
        run: the run's folder. checkpoint: ``auto`` for its newest, ``best``, or a file.
        device: instead of the run's.
        progress: show a bar while images are decoded; None means only on a terminal.
        warn: is called with a line for each checkpoint that cannot be used.
        options: further fields of ``TrainConfig`` that do not decide what the net computes, such as
            ``data`` (another data set of the same classes), ``root``, ``workers`` or ``backend``.

    Raises:
        InputError: no run or checkpoint there, a damaged one, one of another net or data set.
    """
    trained = load_run(run, checkpoint, device=device, warn=warn, **options)
    config, state, path = trained.config, trained.state, trained.checkpoint
    data = load_data(
        config.data,
        root=config.root,
        image_size=config.image_size,
        cache=config.cache,
        progress=progress,
        seed=config.seed,
    )
    if (trained.classes, trained.image[0]) != (len(data.classes), data.channels):
        raise InputError(
            f"{path} was trained on {trained.classes} classes of images with {trained.image[0]} "
            f"channels, {config.data} has {len(data.classes)} classes and {data.channels} "
            "channels: take data of the same kind"
        )
    place = trained.device
    with reproducible(place, config.seed):
        batches = Batches(data, config.batch_size, config.seed, place, workers=config.workers)
        loss, accuracy = evaluate_as(config, trained.model, batches)
    history = state.get("history", [])
    whole = bool(history) and state["run"].get("epoch_ends_at") == state["step"]
    return Evaluation(
        checkpoint=path,
        step=state["step"],
        epoch=len(history),
        averaged=trained.averaged,
        loss=loss,
        accuracy=accuracy,
        recorded=history[-1]["test_accuracy"] if whole else None,
        images=len(data.test),
    )


@dataclass(frozen=True)
class TrainedNet:
    """A net with the weights of a run's checkpoint, see ``load_run``.

    Args:
        model: on ``device``. config: the run's, with what was changed.
        checkpoint: the file; state: its content. averaged: the weights are the moving average.
        classes: how many; image: channels, height and width.
    """

    model: nn.Module
    config: TrainConfig
    device: torch.device
    checkpoint: Path
    state: dict[str, Any]
    averaged: bool
    classes: int
    image: tuple[int, int, int]

    def logits(self, model: nn.Module, images: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W), as the run's tests compute them.

        model: the net, or a module around it.
        """
        config = self.config
        dtype = DTYPES[config.dtype]
        return compute_logits(model, images.to(self.device), dtype, memory_format_of(config))


def load_run(
    run: str | Path,
    checkpoint: str | Path = "auto",
    *,
    device: str | torch.device | None = None,
    warn: Callable[[str], object] = print,
    **options: Any,
) -> TrainedNet:
    """The net that a run has trained, with the weights that it tests; arguments and errors as of
    ``evaluate_run``."""
    folder = Path(run)
    if folder.is_file():
        raise InputError(
            f"{folder} is not the folder of a run: give that, and a checkpoint by --checkpoint"
        )
    if not folder.is_dir():
        raise InputError(f"{folder} is not the folder of a run: there is no such folder")
    if folder.name == "checkpoints":
        folder = folder.parent
    found = Checkpoints(folder / "checkpoints").load(checkpoint, warn)
    if found is None:
        raise InputError(f"{folder} has no checkpoint: nothing was trained there yet")
    path, state = found
    check_parts(state, path)
    config = saved_config(state["config"], path)
    if device is not None:
        options["device"] = str(device)
    config = replace(config, **options)
    facts = state["run"]
    if facts.get("own_model"):
        raise InputError(
            f"{path} holds a model of the caller's own ({facts.get('model')}): load it there"
        )
    classes, image = facts.get("classes"), facts.get("image")
    if not isinstance(classes, int) or not isinstance(image, list) or len(image) != 3:
        raise InputError(f"{path} does not say which classes and images it was trained on")
    place = select_device(config.device)
    check_backend(config.backend, place)
    with reproducible(place, config.seed):
        plain = replace(config, memory="recompute", budget=None)
        model = build_model(plain, classes, image[0])
        averaged = state.get("ema") is not None
        load_weights(model, averaged_weights(state) if averaged else state["model"], path)
        model.to(place, memory_format=memory_format_of(config))  # type: ignore[call-overload]
    return TrainedNet(
        model, config, place, path, state, averaged, classes, (image[0], image[1], image[2])
    )


def averaged_weights(state: dict[str, Any]) -> dict[str, Any]:
    """The moving average's state_dict, under the net's own names."""
    prefix = "module."
    return {
        name.removeprefix(prefix): value
        for name, value in state["ema"].items()
        if name.startswith(prefix)
    }


def load_weights(model: nn.Module, weights: dict[str, Any], path: Path) -> None:
    """Load a checkpoint's weights, or say in one line that they are another net's.

    Raises:
        InputError: names or shapes differ. The model is as before.
    """
    wrong = difference(model.state_dict(), weights)
    if wrong:
        raise InputError(f"{path} holds the weights of another net: {wrong}")
    model.load_state_dict(weights)
