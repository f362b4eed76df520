"""How near a block is to the identity: |out - in| of both blocks, and block by block in a net.

He et al. 2016, section 2: with an identity shortcut and nothing after the addition,
x_L = x_l + sum of F, so that out - in is F(x) itself. After the original block's last ReLU it is
not: what is negative in x + F(x) is cut off.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import PreActBlock
from ..data.batches import Batches, ImageData
from .architecture import POST, PRE
from .harness import InputError, Result, StudyOptions, Table, study, train_variant
from .variants import (
    FULL_PREACTIVATION,
    ORIGINAL,
    ResidualNetwork,
    initialise,
    post_activation_block,
)
from .visualizer import ResNetV2Visualizer

SIZE = 32


def residual_norms(block: nn.Module, x: Tensor) -> tuple[list[float], list[float], int]:
    """|out - in| and |in| (Euclidean) for each image of x, and how many values of `out` are 0."""
    with torch.no_grad():
        out = block(x)
    difference = (out - x).flatten(1).norm(dim=1)
    return difference.tolist(), x.flatten(1).norm(dim=1).tolist(), int((out == 0).sum())


def block_norms(net: ResidualNetwork, images: Tensor) -> list[tuple[float, float]]:
    """Per unit of a net, by hooks: means over the images of |in| and |out - in|."""
    norms: list[tuple[float, float]] = []

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        (x,) = inputs
        norms.append((_mean_norm(x), _mean_norm(output - x)))

    handles = [unit.register_forward_hook(hook) for unit in net.units]
    try:
        with torch.no_grad():
            net(images)
    finally:
        for handle in handles:
            handle.remove()
    return norms


def _mean_norm(x: Tensor) -> float:
    return float(x.flatten(1).norm(dim=1).mean())


@study(
    "identity",
    title="Identity: how much a block changes its input",
    question="How far from the identity is a block, |F(x)| = |out - in|, alone and within a net?",
    defaults={
        "data": "digits",
        "root": "data",
        "image_size": None,
        "depth": 20,
        "width": 32,
        "epochs": 8,
        "batch_size": 64,
        "lr": 0.05,
        "samples": 100,
        "train_images": None,
        "test_images": None,
    },
    presets={"paper": {"data": "cifar10", "depth": 110, "width": 64, "epochs": 20}},
)
def identity(options: StudyOptions) -> Result:
    """Both blocks on `samples` random inputs; nets of depth / 2 blocks, untrained and trained."""
    makers: dict[str, Callable[[int, int], nn.Module]] = {
        POST: post_activation_block,
        PRE: PreActBlock,
    }
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(options.samples, options.width, SIZE, SIZE, generator=generator)
    x = x.to(options.place)
    changes, ratios, rows = {}, {}, []
    for name, make in makers.items():
        torch.manual_seed(0)
        block = make(options.width, options.width)
        initialise(block)
        difference, size, zeros = residual_norms(block.to(x.device).train(), x)
        changes[name] = difference
        ratios[name] = [d / s for d, s in zip(difference, size)]
        rows.append(
            [
                name,
                len(difference),
                statistics.fmean(difference),
                statistics.pstdev(difference),
                min(difference),
                max(difference),
                statistics.fmean(ratios[name]),
                100 * zeros / x.numel(),
            ]
        )
    columns = ["block", "inputs", "mean |out - in|", "std", "min", "max", "|out - in| / |in|"]
    alone = Table("One untrained block on random inputs", [*columns, "zeros in out %"], rows)
    series = _in_nets(options)
    return Result(
        tables=[alone, *_tables(series, options.one_depth)],
        conclusions=[
            *_alone(alone),
            *(_trend(name, each["ratio"]) for name, each in series.items()),
        ],
        figures={
            "change-of-random-inputs": ResNetV2Visualizer().plot_distributions(
                changes, "|F(x)| = |out - in|", "One untrained block on random inputs"
            ),
            "blocks-of-a-net": ResNetV2Visualizer().plot_block_norms(
                series, f"Nets of {options.one_depth} layers, before and after training"
            ),
        },
        series={"change": changes, "ratio": ratios, "blocks": series},
        notes=[
            f"Random inputs are normal with std 1, {options.width}x{SIZE}x{SIZE}, all in one batch "
            "in training mode. Norms are Euclidean, an image each. Nets have one stage of "
            f"{options.width} channels and are measured on one batch of training images, with its "
            "own statistics."
        ],
    )


def _in_nets(options: StudyOptions) -> dict[str, dict[str, list[float]]]:
    """|x_l|, |F(x_l)| and their ratio per block of both nets, before and after training."""
    data = options.load()
    if options.one_depth < 2 or options.one_depth % 2:
        raise InputError(f"depth must be even, two layers a block, got {options.one_depth}")
    batches = Batches(data, options.batch_size, 0, options.place)
    images, _ = next(batches.training())
    series: dict[str, dict[str, list[float]]] = {}
    for name, ordering in ((POST, ORIGINAL), (PRE, FULL_PREACTIVATION)):
        torch.manual_seed(0)
        net = _net(options, data, ordering).to(options.place)
        for when in ("untrained", "trained"):
            if when == "trained":
                train_variant(partial(_itself, net), data, replace(options, seeds=1), 0, name)
            net.train()
            norms = block_norms(net, images)
            sizes, changes = ([pair[i] for pair in norms] for i in (0, 1))
            ratios = [change / size if size else 0.0 for size, change in norms]
            series[f"{name}, {when}"] = {"identity": sizes, "residual": changes, "ratio": ratios}
    return series


def _tables(series: Mapping[str, Mapping[str, Sequence[float]]], depth: int) -> list[Table]:
    """A table a moment, a row a block, the nets side by side."""
    tables = []
    for when in dict.fromkeys(name.partition(", ")[2] for name in series):
        nets = {n.partition(" ")[0]: each for n, each in series.items() if n.endswith(f", {when}")}
        columns = ["block"]
        columns += [
            f"{net}: {part}" for net in nets for part in ("|x|", "|out - x|", "|out - x| / |x|")
        ]
        parts = [net[part] for net in nets.values() for part in ("identity", "residual", "ratio")]
        rows = [[i, *values] for i, values in enumerate(zip(*parts))]
        tables.append(Table(f"Blocks of nets of {depth} layers, {when}", columns, rows))
    return tables


def _itself(net: ResidualNetwork) -> ResidualNetwork:
    return net


def _net(options: StudyOptions, data: ImageData, ordering: Any) -> ResidualNetwork:
    return ResidualNetwork(
        [options.one_depth // 2],
        [options.width],
        ordering=ordering,
        num_classes=len(data.classes),
        in_channels=data.channels,
    )


def _alone(table: Table) -> list[str]:
    means = dict(zip(table.column("block"), table.column("mean |out - in|")))
    zeros = dict(zip(table.column("block"), table.column("zeros in out %")))
    ratio = means[PRE] / means[POST]
    nearer = PRE if means[PRE] < means[POST] else POST
    return [
        f"One untrained block changes a random input by {means[PRE]:.1f} ({PRE}) and by "
        f"{means[POST]:.1f} ({POST}), a ratio of {ratio:.2f}: the {nearer} block is nearer to the "
        "identity.",
        f"{zeros[POST]:.1f} % of the {POST} block's output are cut to 0 and {zeros[PRE]:.1f} % of "
        f"the {PRE} block's.",
    ]


def _trend(name: str, ratios: Sequence[float]) -> str:
    first, last = ratios[0], ratios[-1]
    trend = "falls" if last < first else "rises"
    return (
        f"{name}: |out - x| / |x| {trend} from {first:.2f} in the first block to {last:.2f} in the "
        f"last, {statistics.fmean(ratios):.2f} on average."
    )
