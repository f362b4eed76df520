"""The text that a run prints: what is trained, a line an epoch, and how it ended."""

from __future__ import annotations

from pathlib import Path

from ..core.memory import format_bytes
from ..core.table import counted
from .metrics import EpochMetrics
from .state import RunState


def description(run: RunState) -> str:
    """The model, its data and its steps in a few lines."""
    facts, config = run.result.config, run.config
    channels, height, width = facts["image"]
    lines = [
        f"{facts['data']}: {facts['train_images']:,} training and {facts['test_images']:,} "
        f"test images, {channels}x{height}x{width}, {facts['classes']} classes; "
        f"augmentation: {facts['augmentation']}",
        f"{facts['model']}: {facts['parameters']:,} parameters, backend {config.backend}, "
        f"memory {config.memory}{_chosen(run)}, {config.dtype} on {facts['device_name']}",
    ]
    if run.world.size > 1:
        synced = "synchronised" if config.sync_bn else "each its own"
        lines.append(
            f"{run.world.size} processes, {config.batch_size // run.world.size} images each a "
            f"step, batch norm's moments {synced}"
        )
    lines.append(
        f"{counted(run.total, 'step')} of {config.batch_size} images, "
        f"{counted(run.epochs, 'epoch')}, schedule {config.schedule}, lr {config.lr:g}"
    )
    if run.resumed_at is not None:
        lines.append(f"going on after step {run.done:,} from {run.last_checkpoint}")
    return "\n".join(lines)


def _chosen(run: RunState) -> str:
    if run.predicted is None:
        return ""
    return f" ({run.predicted.mode}, predicted peak {format_bytes(run.predicted.peak)})"


def memory_line(run: RunState, measured: int | None) -> str:
    """The peak of memory "auto" after an epoch, beside the predicted one."""
    assert run.predicted is not None
    figure = "unknown here" if measured is None else format_bytes(measured)
    cuda = run.device.type == "cuda"
    what = "of the GPU's memory" if cuda else "resident memory that training took"
    return (
        f"memory auto took {run.predicted.mode}: predicted peak "
        f"{format_bytes(run.predicted.peak)}, measured {figure} ({what})"
    )


def epoch_line(entry: EpochMetrics, epochs: int) -> str:
    """An epoch's figures."""
    width = len(str(epochs))
    return (
        f"epoch {entry.epoch:{width}}/{epochs}  lr {entry.lr:<6.4g}"
        f"  train loss {entry.train_loss:.4f} accuracy {100 * entry.train_accuracy:6.2f} %"
        f"  test loss {entry.test_loss:.4f} accuracy {100 * entry.test_accuracy:6.2f} %"
        f"  {entry.seconds:.1f} s, {entry.images_per_second:,.0f} images/s"
    )


def stopped(run: RunState, folder: Path | None) -> str:
    """Where a signal has stopped the run, and how to go on."""
    return (
        f"stopped after step {run.done:,} of {run.total:,}; saved {run.last_checkpoint}; go on "
        f"with: resnetv2 train --out {folder} --resume auto"
    )


def diverged(run: RunState, step: int, what: str) -> str:
    """In which step the run was lost, and what to try."""
    kept = (
        f"the last good checkpoint is {run.last_checkpoint}"
        if run.last_checkpoint is not None
        else "there is no checkpoint before it"
    )
    return (
        f"the {what} in step {step:,} (epoch {step // run.epoch_steps + 1}): try a learning rate "
        f"below {run.config.lr:g}; {kept}"
    )


def summary(run: RunState, seconds: float, folder: Path | None) -> str:
    """How the run ended, after so many seconds of this call."""
    history = run.result.history
    best = max(history, key=lambda entry: entry.test_accuracy)
    trained = sum(entry.seconds for entry in history)
    images = sum(entry.seconds * entry.images_per_second for entry in history)
    text = (
        f"{counted(run.total, 'step')}, {counted(len(history), 'epoch')} in {_duration(seconds)}"
        + (" since it was resumed" if run.resumed_at is not None else "")
        + f", {images / trained:,.0f} images/s in training\n"
        f"test accuracy {100 * history[-1].test_accuracy:.2f} %"
    )
    if best.test_accuracy > history[-1].test_accuracy:
        text += f" (best: {100 * best.test_accuracy:.2f} % after epoch {best.epoch})"
    if folder is not None:
        text += f"\nwrote {folder}: config.yaml, metrics.jsonl, curves.png, checkpoints"
    return text


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [f"{hours} h" if hours else "", f"{minutes} min" if minutes or hours else ""]
    return " ".join([part for part in parts if part] + [f"{seconds} s"])
