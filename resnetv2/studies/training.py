"""Training runs that can be compared: one a variant and seed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data.batches import Batches, ImageData
from ..names import DTYPES
from ..training.environment import reproducible
from ..training.evaluate import evaluate
from ..training.metrics import EpochMetrics
from ..training.step import Step
from . import finished
from .histories import Comparison, History
from .options import StudyOptions


def gradient_norm(module: nn.Module | Iterable[Tensor]) -> Tensor:
    """Euclidean norm of all parameters' gradients together, a scalar; 0 where there are none."""
    parameters = module.parameters() if isinstance(module, nn.Module) else module
    gradients = [p.grad for p in parameters if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


def train_variant(
    make: Callable[[], nn.Module],
    data: ImageData,
    options: StudyOptions,
    seed: int = 0,
    name: str = "",
) -> History:
    """Train what `make` builds by SGD for `options.epochs`, testing after each.

    A loss that stops being finite ends the run and is recorded in `History.diverged`.
    Two calls with the same arguments on the same machine give the same numbers but for times.
    """
    device, dtype = options.place, DTYPES[options.dtype]
    hide = None if options.progress is None else not options.progress
    with reproducible(device, seed):
        model = make().to(device)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.SGD(
            model.parameters(),
            lr=options.lr,
            momentum=options.momentum,
            weight_decay=options.weight_decay,
        )
        step = Step(model, optimizer, dtype=dtype)
        batches = Batches(data, options.batch_size, seed, device)
        history = History(name, seed, sum(p.numel() for p in model.parameters()))
        for epoch in range(1, options.epochs + 1):
            model.train()
            step.reset()
            started = time.perf_counter()
            norms, rate = [], options.lr
            bar = tqdm(
                batches.training(epoch),
                total=batches.steps,
                desc=f"{name}, seed {seed}, epoch {epoch}/{options.epochs}",
                unit="batch",
                leave=False,
                disable=hide,
            )
            for index, (images, labels) in enumerate(bar):
                rate = options.rate((epoch - 1) * batches.steps + index, batches.steps)
                step(images, labels, rate)
                norms.append(gradient_norm(model))
            loss_sum, correct, seen = step.sums.tolist()
            train_loss = loss_sum / seen
            seconds = time.perf_counter() - started
            test_loss, test_accuracy = evaluate(model, batches, dtype=dtype)
            history.epochs.append(
                EpochMetrics(
                    epoch=epoch,
                    lr=rate,
                    train_loss=train_loss,
                    train_accuracy=correct / seen,
                    test_loss=test_loss,
                    test_accuracy=test_accuracy,
                    seconds=seconds,
                    images_per_second=seen / seconds,
                )
            )
            history.gradient_norms.append(float(torch.stack(norms).double().mean()))
            if not math.isfinite(train_loss):
                history.diverged = epoch
                break
    return history


def compare(
    variants: Mapping[str, Callable[[], nn.Module]],
    data: ImageData,
    options: StudyOptions,
    settings: Mapping[str, StudyOptions] | None = None,
) -> Comparison:
    """Train every variant with every seed, seed by seed so that all see the same machine.

    Nets that a study finished before it was stopped are not trained again (``finished``).

    Args:
        variants: model factories by name.
        data: the same for all.
        options: how they are trained.
        settings: options of single variants that differ from it, made by `dataclasses.replace`.
    """
    settings = settings or {}
    histories: dict[str, list[History]] = {name: [] for name in variants}
    hide = None if options.progress is None else not options.progress
    runs = [(name, seed) for seed in range(options.seeds) for name in variants]
    for name, seed in tqdm(runs, desc="runs", unit="run", leave=False, disable=hide):
        mine = settings.get(name, options)
        history = finished.find(name, seed, data, mine)
        if history is None:
            history = train_variant(variants[name], data, mine, seed, name)
            finished.keep(history, data, mine)
        histories[name].append(history)
    return Comparison(histories, options.target)
