"""The gradient's way through a net: its norm against the layer, captured by hooks.

He et al. 2016, equation (5): with identity shortcuts the loss's gradient at x_l is the one at x_L
plus what the residual functions add, so it can hardly vanish, however deep the net.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from ..data.batches import Batches
from .architecture import POST, PRE
from .harness import Capture, InputError, Result, StudyOptions, Table, study
from .variants import FULL_PREACTIVATION, ORIGINAL, ResidualNetwork
from .visualizer import ResNetV2Visualizer

VERSIONS = {POST: ORIGINAL, PRE: FULL_PREACTIVATION}


def layer_gradients(
    net: ResidualNetwork, images: torch.Tensor, labels: torch.Tensor
) -> tuple[list[float], list[float]]:
    """Gradient norms of the mean cross-entropy, from the first layer to the last.

    Returns:
        At the output of the stem and of every unit; and of the weights of every convolution.
    """
    stream: dict[str, nn.Module] = {"stem": net.stem}
    stream |= {f"unit {i}": unit for i, unit in enumerate(net.units, 1)}
    net.zero_grad(set_to_none=True)
    with Capture(stream) as captured:
        F.cross_entropy(net(images), labels).backward()
    weights = [
        float(module.weight.grad.norm())
        for module in net.modules()
        if isinstance(module, nn.Conv2d) and module.weight.grad is not None
    ]
    return [captured.gradient[name] for name in stream], weights


@study(
    "gradients",
    title="Gradients: from the last layer to the first",
    question="How does the gradient's norm change with the layer, in both versions and with depth?",
    defaults={
        "data": "digits",
        "root": "data",
        "image_size": None,
        "depth": (20, 50, 110),
        "width": 32,
        "batch_size": 64,
        "seeds": 3,
    },
    presets={"paper": {"data": "cifar10", "depth": (20, 56, 110, 164), "width": 64}},
)
def gradients(options: StudyOptions) -> Result:
    """Untrained nets of one stage; means over the seeds, which draw weights and images."""
    data = options.load()
    for depth in options.depths:
        if depth < 2 or depth % 2:
            raise InputError(f"depth must be even, two layers a block, got {depth}")
    hide = None if options.progress is None else not options.progress
    cases = [(depth, name) for depth in sorted(options.depths) for name in VERSIONS]
    stream: dict[str, dict[str, list[float]]] = {}
    weights: dict[str, dict[str, list[float]]] = {}
    rows: list[list[Any]] = []
    for depth, name in tqdm(cases, desc="nets", unit="net", leave=False, disable=hide):
        runs = []
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            net = ResidualNetwork(
                [depth // 2],
                [options.width],
                ordering=VERSIONS[name],
                num_classes=len(data.classes),
                in_channels=data.channels,
            ).to(options.place, memory_format=torch.channels_last)  # type: ignore[call-overload]
            batches = Batches(data, options.batch_size, seed, options.place)
            runs.append(layer_gradients(net, *next(batches.training())))
        at_outputs, of_weights = (
            [statistics.fmean(values) for values in zip(*(run[i] for run in runs))] for i in (0, 1)
        )
        title = f"{depth} layers"
        stream.setdefault(title, {})[name] = at_outputs
        weights.setdefault(title, {})[name] = of_weights
        first_to_last = [run[0][0] / run[0][-1] for run in runs]
        rows.append(
            [
                depth,
                name,
                at_outputs[0],
                at_outputs[-1],
                statistics.fmean(first_to_last),
                min(first_to_last),
                max(first_to_last),
                min(of_weights),
                max(of_weights),
            ]
        )
    columns = [
        "layers",
        "net",
        "gradient after the stem",
        "after the last block",
        "first / last",
        "least seed",
        "greatest seed",
        "least of a weight",
        "greatest of a weight",
    ]
    table = Table("Gradient norms", columns, rows)
    visualizer = ResNetV2Visualizer()
    return Result(
        tables=[table],
        conclusions=_conclusions(table),
        figures={
            "gradients-at-block-outputs": visualizer.plot_gradients(
                stream, "block (0: stem)", "gradient norm at its output"
            ),
            "gradients-of-weights": visualizer.plot_gradients(
                weights, "convolution", "gradient norm of its weight"
            ),
        },
        series={"at_outputs": stream, "of_weights": weights},
        notes=[
            f"Untrained nets of one stage of {options.width} channels, mean cross-entropy of one "
            f"batch of {options.batch_size} training images, mean over {options.seeds} "
            f"seed{'s' if options.seeds > 1 else ''}."
        ],
    )


def _conclusions(table: Table) -> list[str]:
    found = {(row[0], row[1]): dict(zip(table.columns, row)) for row in table.rows}
    depths = sorted({depth for depth, _ in found})
    sentences = []
    for depth in depths:
        both = " and ".join(
            f"{found[depth, name]['first / last']:.3g} times in the {name} net" for name in VERSIONS
        )
        sentences.append(
            f"{depth} layers: the gradient after the stem is, against that after the last block, "
            f"{both}."
        )
    if len(depths) > 1:
        for column in ("gradient after the stem", "greatest of a weight"):
            growth = {
                name: found[depths[-1], name][column] / found[depths[0], name][column]
                for name in VERSIONS
            }
            # 1 is no change; a fall by 2 is as much as a rise by 2.
            steadier = min(growth, key=lambda name: max(growth[name], 1 / growth[name]))
            factors = " and ".join(f"{growth[name]:.3g} ({name})" for name in VERSIONS)
            sentences.append(
                f'From {depths[0]} to {depths[-1]} layers the norm called "{column}" changes by '
                f"factors of {factors}: it depends less on depth in the {steadier} net."
            )
    return sentences
