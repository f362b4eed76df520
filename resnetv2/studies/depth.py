"""How deep the identity path carries a gradient, and what memory that takes.

Two families: the paper's CIFAR nets (three stages of 16, 32 and 64 channels, 6n+2 layers), and a
single stack of equal blocks, two layers each. Both are the library's fused nets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..blocks import PreActBlock
from ..core.table import counted
from ..data.batches import Batches, ImageData
from ..measuring.steps import GradientStep
from ..models import PreActResNet
from .harness import InputError, Result, StudyOptions, Table, gradient_norm, study
from .visualizer import ResNetV2Visualizer

VANISHING = 1e-3
MODES = ("eager", "recompute", "segment")
COLUMNS = (
    "layers",
    "blocks",
    "parameters",
    "gradient norm at the input",
    "vanishes",
    "gradient norm of the parameters",
    *(f"peak MB, {mode}" for mode in MODES),
    "eager / segment",
    "ms a step, segment",
)


def cifar_net(depth: int, data: ImageData, memory: str) -> PreActResNet:
    """The paper's CIFAR net of `depth` = 6n+2 layers."""
    return _net([(depth - 2) // 6] * 3, None, data, memory)


def stack(depth: int, width: int, data: ImageData, memory: str) -> PreActResNet:
    """`depth` / 2 blocks of `width` channels between a stem and a classifier."""
    return _net([depth // 2], width, data, memory)


def _net(layers: list[int], width: int | None, data: ImageData, memory: str) -> PreActResNet:
    """memory: a mode of `PreActResNet`, or "eager"."""
    modes = {"backend": "eager"} if memory == "eager" else {"memory": memory}
    return PreActResNet(
        PreActBlock,
        layers,
        len(data.classes),
        in_channels=data.channels,
        widths=None if width is None else [width],
        stem_width=width,
        **modes,  # type: ignore[arg-type]
    )


class Step(NamedTuple):
    """The results and the cost of one forward and backward of a net."""

    blocks: int
    parameters: int
    at_input: float
    of_parameters: float
    peak: float
    milliseconds: float


def measure(make: Callable[[str], PreActResNet], images: Tensor, labels: Tensor) -> list[object]:
    """A row of the table, without its layers; a mode that does not fit the GPU has no peak.

    The gradients are those of the mean cross-entropy at the initial weights; peak bytes are what a
    forward and backward allocate beyond the parameters and their gradients.
    """
    peaks: list[float | None] = []
    for mode in MODES:
        torch.manual_seed(0)
        try:
            step = _step(make(mode), images, labels)
        except torch.OutOfMemoryError:
            if mode == MODES[-1]:
                raise
            peaks.append(None)
            continue
        peaks.append(step.peak)
    return [
        step.blocks,
        step.parameters,
        step.at_input,
        step.at_input < VANISHING,
        step.of_parameters,
        *peaks,
        None if peaks[0] is None else peaks[0] / step.peak,
        step.milliseconds,
    ]


def _step(model: PreActResNet, images: Tensor, labels: Tensor) -> Step:
    """The second step for memory and the third for time: the first one faults its pages in."""
    x = images.clone(memory_format=torch.channels_last).requires_grad_()
    step = GradientStep.of_net(model, x, labels)
    step()
    assert x.grad is not None
    at_input, of_parameters = float(x.grad.norm()), float(gradient_norm(model))
    return Step(
        blocks=sum(len(stage) for stage in model.stages),
        parameters=sum(p.numel() for p in model.parameters()),
        at_input=at_input,
        of_parameters=of_parameters,
        peak=step.peak_beyond_gradients() / 1e6,
        milliseconds=1000 * step.seconds(),
    )


@study(
    "depth",
    title="Depth: how far the gradient reaches",
    question="Does the gradient reach the input of a very deep net, and what memory does it take?",
    defaults={
        "data": "digits",
        "root": "data",
        "image_size": None,
        "depth": (20, 50, 100, 110, 200, 500, 1000),
        "width": 64,
        "batch_size": 16,
    },
    presets={"paper": {"data": "cifar10", "batch_size": 128}},
)
def depth(options: StudyOptions) -> Result:
    """A depth of 6n+2 is a row of the CIFAR nets, an even one a row of the stacks."""
    for layers in options.depths:
        if layers % 2:
            raise InputError(f"depth must be even (and 6n+2 for a CIFAR net), got {layers}")
    data = options.load()
    batches = Batches(data, options.batch_size, 0, options.place)
    images, labels = next(batches.training())
    hide = None if options.progress is None else not options.progress
    depths, width = sorted(options.depths), options.width
    nets = [("CIFAR nets", d) for d in depths if d >= 8 and (d - 2) % 6 == 0]
    nets += [("Stacks", d) for d in depths]
    rows: dict[str, list[list[object]]] = {}
    for family, d in tqdm(nets, desc="depths", unit="net", leave=False, disable=hide):

        def make(mode: str, family: str = family, d: int = d) -> PreActResNet:
            return cifar_net(d, data, mode) if family != "Stacks" else stack(d, width, data, mode)

        rows.setdefault(family, []).append([d, *measure(make, images, labels)])
    titles = {
        "CIFAR nets": "CIFAR nets: three stages of 16, 32 and 64 channels",
        "Stacks": f"Stacks of blocks of {width} channels",
    }
    tables = [Table(titles[family], COLUMNS, lines) for family, lines in rows.items()]
    names = {table.title: table for table in tables}
    visualizer = ResNetV2Visualizer()

    def lines(column: str) -> dict[str, tuple[list[float], list[float]]]:
        found = {}
        for name, table in names.items():
            pairs = zip(table.column("layers"), table.column(column))
            known = [(layers, value) for layers, value in pairs if value is not None]
            found[name] = ([layers for layers, _ in known], [value for _, value in known])
        return found

    memory = {
        f"{name.partition(':')[0].partition(' of ')[0]}, {mode}": values
        for name in names
        for mode in MODES
        for values in [lines(f"peak MB, {mode}")[name]]
    }
    return Result(
        tables=tables,
        conclusions=[sentence for table in tables for sentence in _conclusions(table)],
        figures={
            "gradient-at-the-input": visualizer.plot_lines(
                lines("gradient norm at the input"),
                "layers",
                "gradient norm at the input",
                log="xy",
                threshold=VANISHING,
                title="Does the gradient reach the input of an untrained net?",
            ),
            "peak-memory": visualizer.plot_lines(
                memory,
                "layers",
                "peak of a step (MB)",
                log="xy",
                title=f"Memory of a training step of {counted(len(labels), 'image')}",
            ),
        },
        notes=[
            "Untrained weights, mean cross-entropy of one batch of training images, float32. "
            "A stack's layers are its blocks' convolutions. Peak: allocated by a forward and "
            "backward beyond parameters and gradients. eager: the same net child by child; "
            "recompute and segment: the library's memory modes. A dash: it did not fit the GPU.",
        ],
    )


def _conclusions(table: Table) -> list[str]:
    layers, norms = table.column("layers"), table.column("gradient norm at the input")
    lost = [d for d, gone in zip(layers, table.column("vanishes")) if gone]
    what = table.title.partition(":")[0]
    lowest = f"the least gradient norm at the input is {min(norms):.3g}"
    ends = f"between {layers[0]} and {layers[-1]}" if layers[1:] else f"at {layers[0]}"
    sentences = [
        f"{what}: the gradient falls below {VANISHING:g} at {', '.join(map(str, lost))} layers."
        if lost
        else f"{what}: no gradient vanishes {ends} layers; {lowest}, the threshold {VANISHING:g}."
    ]
    if len(layers) > 1:
        ratio = norms[-1] / norms[0]
        sentences.append(
            f"{what}: from {layers[0]} to {layers[-1]} layers the gradient norm at the input "
            f"changes by a factor of {ratio:.2f}."
        )
    eager, segment = table.column("peak MB, eager")[-1], table.column("peak MB, segment")[-1]
    if eager is None:
        return [
            *sentences,
            f"{what}: a step of {layers[-1]:,} layers does not fit this GPU eagerly; in segments "
            f"it peaks at {segment:.1f} MB.",
        ]
    sentences.append(
        f"{what}: a step of {layers[-1]:,} layers peaks at {eager:.1f} MB eagerly and at "
        f"{segment:.1f} MB in segments, {eager / segment:.1f} times less."
        if segment < eager
        else f"{what}: at {layers[-1]:,} layers segments save no memory ({segment:.1f} MB against "
        f"{eager:.1f} MB)."
    )
    return sentences
