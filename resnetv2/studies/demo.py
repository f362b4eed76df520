"""The memory modes on this machine, in half a minute: one deep net, eagerly and in three modes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from ..errors import InputError
from ..measuring.steps import GradientStep
from ..models import PreActResNet
from ..names import DTYPES, EAGER
from ..planning.memory import plan
from ..training.environment import device_name, package_versions, reproducible, select_device
from .results import Result, Table
from .visualizer import COLOURS, Picture

MODES = (EAGER, "recompute", "invert", "segment")
_ROUNDS = 3  # at least
_CPU_BATCH = 2
_GPU_BATCH = 128

# What each mode does, as the beginning of a sentence that its figures end.
_DOES = {
    EAGER: "eager PyTorch keeps the input of every norm and every convolution",
    "recompute": "recompute keeps what convolutions wrote, and computes norm and activation again",
    "invert": "invert walks the residual stream backwards instead of storing it",
    "segment": "segment keeps the stream every few blocks, and walks back within a segment that it "
    "has run again",
}


def demo(
    depth: int = 1001,
    batch_size: int | None = None,
    *,
    seconds: float = 10.0,
    device: str = "auto",
    progress: bool | None = None,
) -> Result:
    """Measure a training step of a CIFAR bottleneck net eagerly and in three memory modes.

    Images and labels are random: neither memory nor time depends on them.

    Args:
        depth: layers, 9n+2.
        batch_size: images a step. Default: 2 on a CPU; on a GPU 128, or what fits half of its
            free memory eagerly.
        seconds: of timing; there are at least three rounds, in which every mode takes a step.
        device: as for ``resnetv2.train``.
        progress: show a bar; None means only on a terminal.

    Raises:
        InputError: there is no such net or device, or a number is not above 0.
    """
    for name, value in (("batch_size", batch_size), ("seconds", seconds)):
        if value is not None and not value > 0:
            raise InputError(f"{name} must be above 0, got {value}")
    place = select_device(device)
    halves = place.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = "bf16" if halves else "fp32"
    started = time.perf_counter()
    with reproducible(place, 0):
        batch = batch_size or _fitting_batch(depth, dtype, place)
        steps = {mode: _step(depth, mode, batch, dtype, place) for mode in MODES}
        bar = tqdm(desc="demo", unit="step", leave=False, disable=_hidden(progress))
        peaks, losses = {}, {}
        for mode, step in steps.items():
            step()  # faults its pages in, and compiles kernels
            assert step.loss is not None
            losses[mode], peaks[mode] = float(step.loss), step.peak_beyond_gradients() / 1e6
            bar.update(2)
        times: dict[str, list[float]] = {mode: [] for mode in MODES}
        end = time.perf_counter() + seconds
        while len(times[EAGER]) < _ROUNDS or time.perf_counter() < end:
            for mode, step in steps.items():
                times[mode].append(1e3 * step.seconds())
                bar.update()
        bar.close()
    result = _result(depth, batch, dtype, device_name(place), peaks, times, losses)
    result.seconds = round(time.perf_counter() - started, 1)
    return result


def _hidden(progress: bool | None) -> bool | None:
    return None if progress is None else not progress


def _fitting_batch(depth: int, dtype: str, place: torch.device) -> int:
    if place.type != "cuda":
        return _CPU_BATCH
    free, _ = torch.cuda.mem_get_info(place)
    batch = _GPU_BATCH
    an_image = plan(depth, 1, block="bottleneck", dtype=dtype, device="cuda").eager
    while batch > 1 and 2 * batch * an_image > free:
        batch //= 2
    return batch


def _step(depth: int, mode: str, batch: int, dtype: str, place: torch.device) -> GradientStep:
    """The same weights, images and labels for each mode."""
    torch.manual_seed(0)
    fused = "auto" if place.type == "cuda" else "aten"  # not the kernels in an interpreter
    options: dict[str, Any] = {"backend": fused, "memory": mode}
    if mode == EAGER:
        options = {"backend": EAGER}
    try:
        model = PreActResNet.from_depth(depth, "bottleneck", **options)
    except ValueError as error:
        raise InputError(str(error)) from error
    images, labels = torch.randn(batch, 3, 32, 32), torch.arange(batch) % 10
    return GradientStep.of_net(model, images.to(place), labels.to(place), DTYPES[dtype])


def _result(
    depth: int,
    batch: int,
    dtype: str,
    device: str,
    peaks: Mapping[str, float],
    times: Mapping[str, Sequence[float]],
    losses: Mapping[str, float],
) -> Result:
    """Tables, sentences and the picture. peaks in MB, times in ms."""
    middle = {mode: statistics.median(values) for mode, values in times.items()}
    # Of eager within a round: both have seen the same machine.
    ratios = {
        mode: sorted(a / b for a, b in zip(values, times[EAGER], strict=True))
        for mode, values in times.items()
    }
    rows = [
        [
            *(mode, peaks[mode], peaks[mode] / peaks[EAGER]),
            *(middle[mode], statistics.median(ratios[mode]), losses[mode]),
        ]
        for mode in MODES
    ]
    rounds = len(times[EAGER])
    images = f"{batch} image{'s' if batch > 1 else ''} of 32x32"
    conditions = f"ResNet-{depth} (bottleneck), {images}, {dtype}, {device}"
    return Result(
        tables=[
            Table(
                "A training step",
                ("mode", "peak MB", "of eager", "ms a step", "of eager", "loss"),
                rows,
            )
        ],
        conclusions=[_sentence(mode, peaks, middle, ratios) for mode in MODES],
        figures={"demo": draw(peaks, middle, f"A training step: {conditions}")},
        notes=[
            f"{conditions}; peak: allocated by forward and backward beyond parameters and "
            f"gradients; time: median of {rounds} rounds in which every mode takes a step, and of "
            "the ratios within a round."
        ],
        name="demo",
        title="The memory of a deep net's training step, and what it costs to save it",
        question="What does a step take when less is kept from forward to backward?",
        settings={
            "depth": depth,
            "batch_size": batch,
            "dtype": dtype,
            "rounds": rounds,
            "device": device,
            "threads": torch.get_num_threads(),
            "versions": package_versions(),
        },
    )


def _sentence(
    mode: str,
    peaks: Mapping[str, float],
    times: Mapping[str, float],
    ratios: Mapping[str, Sequence[float]],
) -> str:
    """ratios: of eager's time, in rising order."""
    if mode == EAGER:
        return f"{_DOES[mode]}: {peaks[mode]:.1f} MB, {times[mode]:.0f} ms."
    less = peaks[EAGER] / peaks[mode]
    change = statistics.median(ratios[mode]) - 1
    how = f"in {abs(change):.0%} {'more' if change > 0 else 'less'} time"
    if ratios[mode][0] <= 1 <= ratios[mode][-1]:
        how = "in a time that these rounds do not tell from eager's"
    return f"{_DOES[mode]}: {peaks[mode]:.1f} MB, {less:.1f} times less, {how}."


def draw(peaks: Mapping[str, float], times: Mapping[str, float], title: str) -> Picture:
    """Bars of a step's peak memory (MB) and time (ms), one each for a mode, eager's first.

    Args:
        peaks, times: by mode, with the same modes. title: one line above both panels.
    """
    picture = Picture(figsize=(9, 0.9 + 0.42 * len(peaks)), layout="constrained")
    panels = picture.subplots(1, 2, sharey=True)
    for axes, values, unit in zip(panels, (peaks, times), ("MB", "ms"), strict=True):
        names = list(values)
        colours = [COLOURS[-3] if name == EAGER else COLOURS[0] for name in names]
        bars = axes.barh(names, [values[name] for name in names], color=colours, height=0.62)
        labels = [f"{value:,.0f} {unit}" for value in values.values()]
        for number, name in enumerate(names):
            if name != EAGER:
                labels[number] += f" ({values[name] / values[EAGER]:.2g}x)"
        axes.bar_label(bars, labels, padding=4, fontsize=9)
        axes.set_xlim(0, 1.35 * max(values.values()))
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    panels[0].set_xlabel("peak memory of a step beyond parameters and gradients (MB)", fontsize=9)
    panels[1].set_xlabel("time of a step (ms)", fontsize=9)
    panels[0].invert_yaxis()  # shared: the first mode on top in both
    picture.suptitle(title, fontsize=10)
    return picture
