"""What is compiled where no GPU is at hand, and checked where one is: the steps of residual units.

A unit's steps go through ``triton_engine.TritonEngine``, as a chain's do, so the kernels, their
options and their tiles are those that a model launches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import choices, input_grad, norm_backward, ranks, reference, triton_engine
from ..aten_engine import AtenEngine, ConvGrads
from ..operands import Act, Activated, Geometry, Grad, Norm, running_stats

# name: dtype of the multiplication, dtype of the residual stream, TF32.
DTYPES = {
    "fp32": (torch.float32, torch.float32, False),
    "tf32": (torch.float32, torch.float32, True),
    "fp16": (torch.float16, torch.float16, False),
    "bf16": (torch.bfloat16, torch.bfloat16, False),
    "bf16+fp32": (torch.bfloat16, torch.float32, False),
}
_RELU = Act("relu")
# A residual stream has a mean; around 0 that of bfloat16 numbers is ATen's without any rounding.
_STREAM_MEAN = 0.5
# Targets with sm_80's matrix unit.
_LIKE_SM_80 = ("sm_86", "sm_89", "sm_120")


class Unit(NamedTuple):
    """A residual unit: channels in and out, inner width, input size, stride, images a batch.

    ``act`` and ``training`` are those of its norms, which are over ``groups`` if that is not 0;
    ``each``: with a weight and bias for each image, and convolutions with such a bias. ``reach``
    says for what it is compiled by default: 0 for sm_90 in bf16, 1 for every kind of matrix unit
    and of dtype, 2 for every target in bf16; -1 for none, since its kernels are like those of other
    units and only their loops over channels are longer.
    """

    name: str
    convs: tuple[tuple[int, int, int, int], ...]  # (C, K, kernel size, stride)
    size: int
    batch: int
    projection: int = 0  # its stride
    act: Act = _RELU
    training: bool = True
    groups: int = 0
    each: bool = False
    reach: int = 0

    @property
    def weights(self) -> torch.memory_format:
        """Layout of the weights: a model in channels_last, as one trains, or PyTorch's default."""
        cifar = self.name.startswith("resnet")
        return torch.channels_last if cifar else torch.contiguous_format


def _bottleneck(
    name: str, c: int, k: int, size: int, batch: int, stride: int = 1, **options
) -> Unit:
    w = k // 4
    convs = ((c, w, 1, 1), (w, w, 3, stride), (w, k, 1, 1))
    return Unit(name, convs, size, batch, 0 if c == k else stride, **options)


def _basic(name: str, c: int, k: int, size: int, batch: int, stride: int = 1, **options) -> Unit:
    convs = ((c, k, 3, stride), (k, k, 3, 1))
    return Unit(name, convs, size, batch, 0 if c == k else stride, **options)


UNITS = (
    _bottleneck("resnet1001/1", 64, 64, 32, 128),
    _bottleneck("resnet1001/2", 128, 128, 16, 128),
    _bottleneck("resnet1001/3", 256, 256, 8, 128),
    _bottleneck("resnet1001/1 entry", 16, 64, 32, 128),
    _bottleneck("resnet1001/2 entry", 64, 128, 32, 128, 2, reach=1),
    _bottleneck("resnet1001/3 entry", 128, 256, 16, 128, 2),
    _basic("resnet110/1", 16, 16, 32, 128, reach=1),
    _basic("resnet110/2", 32, 32, 16, 128),
    _basic("resnet110/3", 64, 64, 8, 128),
    _basic("resnet110/2 entry", 16, 32, 32, 128, 2),
    _basic("resnet110/3 entry", 32, 64, 16, 128, 2),
    _bottleneck("imagenet/1", 256, 256, 56, 32, reach=-1),
    _bottleneck("imagenet/2", 512, 512, 28, 32),
    _bottleneck("imagenet/3", 1024, 1024, 14, 32, reach=-1),
    _bottleneck("imagenet/4", 2048, 2048, 7, 32, reach=-1),
    _bottleneck("imagenet/1 entry", 64, 256, 56, 32, reach=-1),
    _bottleneck("imagenet/2 entry", 256, 512, 56, 32, 2, reach=2),
    _bottleneck("imagenet/3 entry", 512, 1024, 28, 32, 2, reach=-1),
    _bottleneck("imagenet/4 entry", 1024, 2048, 14, 32, 2, reach=-1),
    _basic("imagenet basic/1", 64, 64, 56, 32, reach=-1),
    _basic("imagenet basic/2", 128, 128, 28, 32, reach=-1),
    _basic("imagenet basic/3", 256, 256, 14, 32, reach=-1),
    _basic("imagenet basic/4", 512, 512, 7, 32, reach=-1),
    _basic("imagenet basic/2 entry", 64, 128, 56, 32, 2, reach=-1),
    _basic("imagenet basic/3 entry", 128, 256, 28, 32, 2, reach=-1),
    _basic("imagenet basic/4 entry", 256, 512, 14, 32, 2, reach=-1),
    _basic("odd channels", 17, 17, 13, 5, act=Act("silu"), training=False, reach=1),
    _bottleneck("gelu", 48, 48, 15, 3, act=Act("gelu")),
    _basic("leaky_relu", 80, 80, 9, 8, act=Act("leaky_relu", 0.1)),
    _basic("unet", 320, 320, 32, 2, act=Act("silu"), groups=32, each=True, reach=2),
    _bottleneck("layer norm", 64, 256, 16, 4, groups=1),
    _basic("odd groups", 18, 18, 13, 5, act=Act("silu"), groups=3, reach=1),
)


def rated(unit: Unit, target: str, dtype: str) -> bool:
    """Whether instructions are counted without being asked for: 0.4 s a kernel."""
    return (target, dtype) == ("sm_90", "bf16") and unit.name.startswith("resnet")


def selected(target: str, dtype: str) -> list[Unit]:
    """The units compiled for a target and dtype, by their ``reach``.

    A whole matrix takes hours; the targets beside sm_90 show with a few units that every kernel
    compiles for them, sm_90 shows what each tile becomes.
    """
    if (target, dtype) == ("sm_90", "bf16"):
        return [unit for unit in UNITS if unit.reach >= 0]
    # fp16's code is bf16's, and fp32's the same wherever no matrix unit takes it.
    dtypes = {"sm_80": ("bf16", "tf32"), "sm_90": ("fp32", "tf32", "bf16+fp32")}
    reach = {2} if dtype == "bf16" and target != "sm_90" else set()
    if target not in _LIKE_SM_80 and dtype in dtypes.get(target, ("bf16",)):
        reach.add(1)
    return [unit for unit in UNITS if unit.reach in reach]


def sampled(target: str, dtype: str) -> list[Unit]:
    """Of ``selected``, what the tests compile: they read the rest in the committed table."""
    if dtype != "bf16" and (target, dtype) != ("sm_90", "tf32"):
        return []
    name = "imagenet/2 entry" if target in _LIKE_SM_80 else "resnet1001/2 entry"
    return [unit for unit in selected(target, dtype) if unit.name == name]


# For doctor: channels and sizes that no tile divides, a norm with running statistics, strides,
# projections, another activation, and a 3x3 that is left to ATen.
ODD = (
    _basic("odd basic", 17, 17, 13, 3, act=Act("silu"), training=False, reach=1),
    _bottleneck("odd bottleneck", 24, 68, 9, 3, 2),
    _basic("odd entry", 3, 19, 11, 2, 2, act=Act("gelu")),
    _basic("wide", 130, 130, 5, 2),
    _basic("odd groups", 6, 21, 5, 3, 2, act=Act("silu"), groups=3),
    _basic("instances", 19, 19, 5, 3, groups=19, each=True),
)


class Tensors:
    """Operands that hold whatever their memory held: nothing runs on them."""

    def wide(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which a step is asked to compute."""
        return dtype

    def activation(self, shape: tuple[int, ...], dtype: torch.dtype, mean: float = 0.0) -> Tensor:
        """(N, C, H, W), channels_last."""
        return torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)

    def stats(self, channels: int) -> tuple[Tensor, Tensor]:
        """(5, C), a norm's in float32, and its weight (C,)."""
        return torch.empty(5, channels), torch.empty(channels)

    def values(self, *shape: int) -> Tensor:
        """float32: of weights, affine parameters and coefficients."""
        return torch.empty(shape)


class Random(Tensors):
    """Random operands on a device, the same for the same seed; in float64 where ``exact``."""

    def __init__(self, seed: int, device: torch.device, exact: bool = False) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.device = device
        self.exact = exact

    def _draw(self, shape: tuple[int, ...], dtype: torch.dtype, mean: float = 0.0) -> Tensor:
        values = torch.randn(shape, generator=self.generator) + mean
        return values.to(self.device, dtype)

    def _given(self, values: Tensor) -> Tensor:
        return values.double() if self.exact else values

    def wide(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float64 if self.exact else dtype

    def activation(self, shape: tuple[int, ...], dtype: torch.dtype, mean: float = 0.0) -> Tensor:
        values = self._draw(shape, dtype, mean).contiguous(memory_format=torch.channels_last)
        return self._given(values)

    def stats(self, channels: int) -> tuple[Tensor, Tensor]:
        mean, deviation, weight, bias = self._draw((4, channels), torch.float32)
        stats = running_stats(mean, deviation.square() + 0.5, weight, bias, 1e-5)
        return self._given(stats), self._given(weight)

    def values(self, *shape: int) -> Tensor:
        # A weight's sums over C*R*S are of the size of what they are summed from.
        return self._given(self._draw(shape, torch.float32) * math.prod(shape[1:]) ** -0.5)


def steps(
    unit: Unit,
    dtype: torch.dtype,
    stream: torch.dtype,
    tensors: Tensors | None = None,
    engine: AtenEngine | None = None,
) -> Iterator[tuple[str, Callable[[], object]]]:
    """(label, what a chain does there) for each step of a unit's forward and backward.

    A step returns what the engine gave, of moments the statistics (5, C). It belongs to its place
    in the iteration, and draws from ``tensors`` when it runs.

    Args:
        dtype, stream: of the multiplication and of the residual stream.
        tensors: makes the operands; None for those that nothing runs on.
        engine: None for the kernels'.
    """
    tensors = tensors or Tensors()
    engine = engine or triton_engine.TritonEngine()
    kernels = engine.name == "triton"
    functions = norm_backward if kernels else reference
    gradients = input_grad if kernels else reference
    compute = tensors.wide(dtype)

    def activation(channels: int, size: int, dtype: torch.dtype, mean: float = 0.0) -> Tensor:
        return tensors.activation((unit.batch, channels, size, size), dtype, mean)

    def affine(channels: int) -> Tensor:
        return tensors.values(*([unit.batch] if unit.each else []), channels)

    def kept() -> Tensor:
        """Mean and rstd of the groups of a norm's input."""
        return tensors.values(2, unit.batch, unit.groups).square() + 0.5

    def known(channels: int) -> tuple[Tensor, Norm]:
        """A norm and its statistics."""
        if unit.groups:
            norm = norm_of(channels)
            return reference.group_affine(kept(), norm, channels), norm
        stats, weight = tensors.stats(channels)
        return stats, Norm(weight, None, 1e-5)

    def stats_of(channels: int) -> Tensor:
        return known(channels)[0]

    def norm_of(channels: int) -> Norm:
        return Norm(affine(channels), affine(channels), 1e-5, unit.groups)

    def finished(x: Tensor, norm: Norm, found: Any = None) -> object:
        """The norm's statistics of x, out of its moments where they are known."""
        if unit.groups:
            return engine.group_stats(x, norm) if found is None else found
        found = engine.moments(x, norm) if found is None else found
        return engine.norm_stats(found, *norm[:3])

    def moments(x: Tensor) -> object:
        return finished(x, norm_of(x.shape[1]))

    def expanded(x: Tensor) -> object:
        return engine.group_affine(kept(), norm_of(x.shape[1]), x.shape[1])

    def forward(
        h: Tensor, weight: Tensor, geometry: Geometry, out: Tensor, residual: Tensor | None
    ) -> object:
        norm, bias = norm_of(weight.shape[0]), affine(weight.shape[0]) if unit.each else None
        given = engine.gives_moments(True, False, unit.groups)
        result, found = engine.conv_forward(
            h, weight, bias, geometry, dtype=compute, stats=stats_of(h.shape[1]), act=unit.act,
            residual=residual, out_dtype=out.dtype, with_moments=given, norm=norm,
        )  # fmt: skip
        return result, finished(result, norm, found)

    def backward(
        h: Tensor, weight: Tensor, geometry: Geometry, out: Tensor, first: bool, last: bool,
        before_wide: bool,
    ) -> object:  # fmt: skip
        grad = Grad(out)
        if not last and not unit.groups:
            coef = tensors.values(4, out.shape[1])
            normed = tensors.activation(tuple(out.shape), dtype)
            z = Activated(normed, stats_of(out.shape[1]), unit.act) if before_wide else None
            grad = Grad(out, normed if unit.training else None, coef, z)
        other = tensors.activation(tuple(h.shape), stream) if first else None
        stats, norm = known(h.shape[1])
        return engine.norm_conv_backward(
            grad, h, stats, unit.act, weight, geometry, training=unit.training,
            norm=norm, dtype=compute, need_input=True, need_weight=True,
            need_bias=False, final=first,
            add=other if unit.projection else None, identity=None if unit.projection else other,
        )  # fmt: skip

    def act_backward(h: Tensor) -> object:
        dz = tensors.activation(tuple(h.shape), stream)
        stats, norm = known(h.shape[1])
        return functions.act_backward(dz, h, stats, unit.act, dtype=compute, norm=norm)

    def norm_gradient(h: Tensor) -> object:
        coef = tensors.values(4, h.shape[1])
        other = tensors.activation(tuple(h.shape), stream)
        return gradients.input_grad(Grad(other, h, coef), None, compute)

    def operands(h: Tensor) -> object:
        coef = tensors.values(4, h.shape[1])
        dz, normed = (tensors.activation(tuple(h.shape), dtype) for _ in range(2))
        stats = stats_of(h.shape[1])
        z = Activated(normed, stats, unit.act)
        grad = Grad(dz, normed if unit.training else None, coef, z)
        if kernels:
            g, written = input_grad.written_operands(grad, h, stats, unit.act, compute)
        else:
            g = reference.input_grad(grad, None, compute)
            written = reference.norm_act(h, stats, unit.act, compute)
        return ConvGrads(Grad(g), None, None, None, None), written

    def between_ranks(like: Tensor) -> object:
        h = tensors.activation(tuple(like.shape), stream, _STREAM_MEAN)
        affine = tensors.values(h.shape[1])

        def gather(values: Tensor) -> Tensor:
            return values.view(1, -1).repeat(8, 1)

        rows = h.numel() // h.shape[1]
        stats, total = engine.synced_stats(
            engine.rank_moments(h), rows, gather, affine, affine, 1e-5
        )
        sums = ranks.gather_sums(affine, affine, gather)
        return stats, functions.norm_grad(sums, stats, True, total)

    def shortcut(x: Tensor, weight: Tensor, geometry: Geometry) -> object:
        return engine.conv_forward(
            x, weight, None, geometry, dtype=compute, stats=stats_of(x.shape[1]), act=unit.act
        )

    def shortcut_backward(h: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> object:
        return engine.conv_backward(
            h, x, weight, geometry, dtype=compute, stats=stats_of(x.shape[1]), act=unit.act,
            need_input=True, need_weight=True, need_bias=False,
        )  # fmt: skip

    def is_wide(i: int) -> bool:
        c, k, kernel, _ = unit.convs[i]
        how = choices.implementation((k, c, kernel, kernel), Geometry())
        return how == choices.ATEN

    size, last = unit.size, len(unit.convs) - 1
    x = h = activation(unit.convs[0][0], size, stream, _STREAM_MEAN)
    yield "moments", lambda: moments(x)
    for i, (c, k, kernel, stride) in enumerate(unit.convs):
        geometry = Geometry((stride, stride), (kernel // 2, kernel // 2))
        size = geometry.output_size((size, size), (kernel, kernel))[0]
        out = activation(k, size, stream if i == last else dtype)
        weight = tensors.values(k, c, kernel, kernel).to(memory_format=unit.weights)
        label = f"{kernel}x{kernel} {c}>{k}" + (f" /{stride}" if stride > 1 else "")
        residual = activation(k, size, stream) if i == last else None
        yield f"{label} forward", partial(forward, h, weight, geometry, out, residual)
        place = i == 0, i == last, i < last and is_wide(i + 1)
        yield f"{label} backward", partial(backward, h, weight, geometry, out, *place)
        h = out
    # The engine's dgrads do this themselves; it is there for a convolution that is left to ATen.
    yield "act backward", partial(act_backward, h)
    if unit.groups:
        yield "statistics of groups", partial(expanded, h)
    elif unit.reach >= 1:
        # Where a 3x3's weight is frozen, its gradient is written alone.
        yield "norm gradient", partial(norm_gradient, h)
        # Of a narrow 3x3 in front of a wide one.
        yield "operands", partial(operands, h)
        yield "merged over ranks", partial(between_ranks, h)
    if unit.projection:
        geometry = Geometry((unit.projection, unit.projection))
        weight = tensors.values(h.shape[1], x.shape[1], 1, 1).to(memory_format=unit.weights)
        label = f"shortcut {x.shape[1]}>{h.shape[1]} /{unit.projection}"
        yield f"{label} forward", partial(shortcut, x, weight, geometry)
        yield f"{label} backward", partial(shortcut_backward, h, x, weight, geometry)
