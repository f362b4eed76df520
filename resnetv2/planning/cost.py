"""Bytes and FLOPs of every kernel of a training step, and the time that they cannot go below.

The walk is the chain's own: ``Chain`` runs on tensors without memory, with an engine that writes
down what each kernel (Triton) or operator (ATen) would read, write and multiply, and computes
nothing. So a memory mode's recomputation, and the choice between a fused and a written operand
(``dispatch.implementation``), are counted where they are decided.

Every tensor of a launch counts once, as with a cache of unlimited size; values per channel are
left out. A kernel's floor is the larger of its bytes over the device's copy rate and its FLOPs
over the device's rate of matrix multiplication; launches take their own time on top.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.chain import Chain
from ..core.memory import format_bytes
from ..core.modules import UnitModules
from ..core.reading import Reading
from ..core.run import describe, segment_length
from ..core.spec import decode
from ..core.table import text_table
from ..kernels.dispatch import ATEN, WRITTEN, AtenEngine, ConvGrads, implementation, runs_twice
from ..kernels.operands import Act, Geometry, Grad, stats_dtype
from ..names import MEMORY_MODES


class Rates(NamedTuple):
    """What a device can do. copy: bytes/s, read plus written. multiply: FLOP/s of a matrix product
    in ``dtype``. source: where the figures come from, for people to read."""

    copy: float
    multiply: float
    dtype: torch.dtype
    source: str


# NVIDIA's data sheet, dense; fp32 without TF32, as convolutions run by PyTorch's default in "ieee".
_H100_FLOPS = {torch.float32: 67e12, torch.float16: 989e12, torch.bfloat16: 989e12}


def h100_rates(dtype: torch.dtype = torch.bfloat16) -> Rates:
    """The data sheet's rates of an H100 SXM: 3.35 TB/s, 989 TFLOP/s in bf16 and fp16.

    Raises:
        ValueError: ``dtype`` is not one of float32, float16, bfloat16.
    """
    if dtype not in _H100_FLOPS:
        raise ValueError(f"expected float32, float16 or bfloat16, got {dtype}")
    return Rates(3.35e12, _H100_FLOPS[dtype], dtype, "data sheet of an H100 SXM")


def copy_rate(device: torch.device | str, nbytes: int) -> float:
    """Bytes/s, read plus written, of the best of several copies of ``nbytes`` on ``device``."""
    device = torch.device(device)
    source = torch.empty(nbytes, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source).copy_(source)
    copies = max(1, 2**26 // nbytes)  # small buffers several times, above the clock's resolution

    def copy() -> None:
        for _ in range(copies):
            target.copy_(source)

    return 2 * nbytes * copies / _best_seconds(copy, device)


def multiply_rate(device: torch.device | str, dtype: torch.dtype) -> float:
    """FLOP/s of the best of several matrix products in ``dtype`` on ``device``."""
    device = torch.device(device)
    size = 8192 if device.type == "cuda" else 1024
    a = torch.ones(size, size, dtype=dtype, device=device)
    b = torch.ones(size, size, dtype=dtype, device=device)
    return 2 * size**3 / _best_seconds(lambda: a @ b, device)


MEMORY_BYTES = 2**27  # a buffer that no cache near the cores holds
CACHE_BYTES = 2**20  # one that a core's cache holds


def measure_rates(device: torch.device | str, dtype: torch.dtype = torch.float32) -> Rates:
    """The rates of ``device`` as measured now: the best of several runs.

    On a CPU, whose caches hold a layer's activations, copies of a buffer in the cache count if
    they are faster: what is added up from these rates is a floor.
    """
    device = torch.device(device)
    sizes = (MEMORY_BYTES,) if device.type == "cuda" else (MEMORY_BYTES, CACHE_BYTES)
    copy = max(copy_rate(device, nbytes) for nbytes in sizes)
    return Rates(copy, multiply_rate(device, dtype), dtype, f"measured on this {device.type}")


def _best_seconds(run: Callable[[], object], device: torch.device) -> float:
    best = float("inf")
    end = time.perf_counter() + 0.3  # at least: clocks and threads take a while to wake up
    while time.perf_counter() < end:
        for _ in range(3):
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            best = min(best, time.perf_counter() - start)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Cost(NamedTuple):
    """One kernel, or operator of ATen. step: which call of the engine it belongs to ("3x3 64>64
    forward"). nbytes: read plus written. flops: of a convolution, else 0."""

    step: str
    kernel: str
    nbytes: int
    flops: int

    def floor(self, rates: Rates) -> float:
        """Seconds below which the kernel cannot go on a device of these rates."""
        return max(self.nbytes / rates.copy, self.flops / rates.multiply)


class StepCost(NamedTuple):
    """The kernels of a training step, without the optimizer: forward and backward apart."""

    forward: list[Cost]
    backward: list[Cost]

    @property
    def all(self) -> list[Cost]:
        """Both, in order."""
        return self.forward + self.backward


def modes_table(
    model: nn.Module,
    batch_size: int,
    image_size: int,
    dtype: torch.dtype,
    rates: Rates,
    *,
    triton: bool,
) -> str:
    """Launches, bytes, FLOPs and the floor in milliseconds of a step, one line per memory mode."""
    names = ("mode", "launches", "bytes", "FLOPs", "forward", "backward", "floor")
    rows = []
    for mode in MEMORY_MODES:
        cost = step_costs(model, batch_size, image_size, dtype, mode, triton=triton)
        forward, backward = (floor_seconds(part, rates) for part in cost)
        rows.append(
            (
                mode,
                str(len(cost.all)),
                format_bytes(sum(c.nbytes for c in cost.all)),
                f"{sum(c.flops for c in cost.all) / 1e9:.1f} G",
                *(f"{1e3 * s:.2f} ms" for s in (forward, backward, forward + backward)),
            )
        )
    text = [text_table(names, rows, [False] + [True] * (len(names) - 1))]
    text.append(
        f"{rates.copy / 1e9:.1f} GB/s copied, {rates.multiply / 1e9:.0f} GFLOP/s "
        f"({str(rates.dtype).removeprefix('torch.')}): {rates.source}"
    )
    text.append(
        "floor: the larger of a kernel's bytes and FLOPs over these rates, added up; without "
        "launches' own time and the optimizer"
    )
    return "\n".join(text)


def floor_seconds(costs: Sequence[Cost], rates: Rates) -> float:
    """Sum of the kernels' floors: each runs after the other."""
    return sum(cost.floor(rates) for cost in costs)


def _size(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


class CostEngine(AtenEngine):
    """An engine that computes nothing and lists what would have been launched, in ``costs``.

    Arguments may be tensors without memory (device "meta"); results always are.

    Args:
        triton: the fused kernels' launches, or ATen's operators.
    """

    name = "cost"

    def __init__(self, triton: bool) -> None:
        self.triton = triton
        self.costs: list[Cost] = []
        self._step = ""

    def _add(self, kernel: str, nbytes: int, flops: int = 0) -> None:
        self.costs.append(Cost(self._step or "statistics", kernel, nbytes, flops))

    def _how(self, op: str, weight: Tensor, geometry: Geometry) -> str:
        if not self.triton:
            return ATEN
        return implementation(op, (weight.shape[2], weight.shape[3]), geometry)

    @staticmethod
    def _label(weight: Tensor, geometry: Geometry, what: str) -> str:
        k, c, r, s = weight.shape
        stride = f" /{geometry.stride[0]}" if geometry.stride != (1, 1) else ""
        return f"{r}x{s} {c * geometry.groups}>{k}{stride} {what}"

    def _cast(self, tensor: Tensor, dtype: torch.dtype) -> None:
        if tensor.dtype != dtype:
            self._add("cast", _size(tensor) + tensor.numel() * dtype.itemsize)

    def _affine(self, h: Tensor) -> int:
        """ATen's a*h + b in the statistics' dtype; the bytes of one such tensor."""
        wide = stats_dtype(h.dtype)
        self._cast(h, wide)
        u = h.numel() * wide.itemsize
        self._add("affine", 2 * u)
        return u

    def _norm_act(self, h: Tensor, stats: Tensor | None, dtype: torch.dtype) -> Tensor:
        """z = act(a*h + b), written, or h in ``dtype`` where there is no prologue."""
        z = torch.empty_like(h, dtype=dtype, device="meta")
        if stats is None:
            self._cast(h, dtype)
        elif self.triton:
            self._add("norm_act", _size(h, z))
        else:
            u = self._affine(h)
            self._add("activation", 2 * u)
            self._cast(torch.empty_like(h, dtype=stats_dtype(h.dtype), device="meta"), dtype)
        return z

    def moments(self, x: Tensor) -> int:
        """Lists the reading of x; the result stands for its moments: their number of channels."""
        if not self.triton:
            self._cast(x, stats_dtype(x.dtype))
        self._add("moments", x.numel() * (x.element_size() if self.triton else 4))
        return x.shape[1]

    def rank_moments(self, x: Tensor) -> int:
        """``moments``."""
        return self.moments(x)

    def norm_stats(
        self, moments: int, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        """A (5, C) tensor without memory; the merging of tiles is one launch on channels only."""
        self._add("norm_stats", 0)
        return torch.empty(5, moments, device="meta")

    def synced_stats(
        self,
        moments: int,
        rows: int,
        gather: Any,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        """``norm_stats``; what is exchanged between ranks is not counted."""
        return self.norm_stats(moments, weight, bias, eps), torch.empty(1, device="meta")

    def conv_forward(  # type: ignore[override]
        self,
        h: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        *,
        dtype: torch.dtype,
        stats: Tensor | None = None,
        residual: Tensor | None = None,
        residual_stats: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        with_moments: bool = False,
        **_: Any,
    ) -> tuple[Tensor, Any]:
        """``AtenEngine.conv_forward`` without doing it."""
        self._step = self._label(weight, geometry, "forward")
        how = self._how("forward", weight, geometry)
        height, width = geometry.output_size(
            (h.shape[2], h.shape[3]), (weight.shape[2], weight.shape[3])
        )
        shape = (h.shape[0], weight.shape[0], height, width)
        out = torch.empty(shape, dtype=out_dtype or dtype, device="meta")
        flops = 2 * out.numel() * weight[0].numel()
        if how == ATEN:
            z = self._norm_act(h, stats, dtype)
            product = torch.empty(shape, dtype=dtype, device="meta")
            self._add("convolution", _size(z, weight, product), flops)
            if residual is not None:
                if residual_stats is not None:
                    residual = self._norm_act(residual, residual_stats, dtype)
                self._cast(product, out.dtype)
                self._add("add", 2 * _size(out) + _size(residual))
            if with_moments:
                self.moments(out)
        else:
            z = self._norm_act(h, stats, dtype) if how == WRITTEN and stats is not None else h
            self._add("conv_forward", _size(z, weight, residual, out), flops)
        self._step = ""
        return out, shape[1] if with_moments else None

    def _backward_products(
        self, g: int, z: Tensor, weight: Tensor, flops: int, need_input: bool, need_weight: bool
    ) -> None:
        """ATen's two products, in the convolution's dtype; g: bytes of the gradient."""
        if need_input:
            self._add("dgrad", g + _size(z, weight), flops)
        if need_weight:
            self._add("wgrad", g + _size(z, weight), flops)

    def conv_backward(
        self,
        g: Tensor,
        h: Tensor,
        weight: Tensor,
        geometry: Geometry,
        *,
        dtype: torch.dtype,
        stats: Tensor | None,
        act: Act,
        need_input: bool,
        need_weight: bool,
        need_bias: bool,
    ) -> ConvGrads:
        """``AtenEngine.conv_backward`` without doing it."""
        self._step = self._label(weight, geometry, "shortcut backward")
        how = self._how("wgrad", weight, geometry)
        flops = 2 * g.numel() * weight[0].numel()
        dz = torch.empty_like(h, dtype=dtype, device="meta")
        if how == ATEN:
            z = self._norm_act(h, stats if need_weight else None, dtype)
            self._cast(g, dtype)
            size = g.numel() * dtype.itemsize
            self._backward_products(size, z, weight, flops, need_input, need_weight)
        else:
            if need_weight:
                written = how == WRITTEN and stats is not None
                z = self._norm_act(h, stats, dtype) if written else h
                self._add("conv_wgrad", _size(g, z, weight), flops)
            if need_input:
                self._add("conv_dgrad", _size(g, weight, dz), flops)
        dweight = torch.empty_like(weight, device="meta") if need_weight else None
        dbias = torch.empty(weight.shape[0], device="meta") if need_bias else None
        return ConvGrads(Grad(dz) if need_input else None, dweight, dbias, None, None)

    def norm_conv_backward(
        self,
        grad: Grad,
        h: Tensor,
        stats: Tensor,
        act: Act,
        weight: Tensor,
        geometry: Geometry,
        *,
        training: bool,
        gamma: Tensor | None,
        dtype: torch.dtype,
        need_input: bool,
        need_weight: bool,
        need_bias: bool,
        add: Tensor | None = None,
        identity: Tensor | None = None,
        final: bool = False,
        sync: Any = None,
    ) -> ConvGrads:
        """``AtenEngine.norm_conv_backward`` without doing it."""
        self._step = self._label(weight, geometry, "backward")
        how = self._how("dgrad", weight, geometry)
        flops = 2 * grad.q.numel() * weight[0].numel()
        channels = h.shape[1]
        dweight = torch.empty_like(weight, device="meta") if need_weight else None
        dbias = torch.empty(weight.shape[0], device="meta") if need_bias else None
        dgamma, dbeta = torch.empty(2, channels, device="meta").clone().unbind(0)
        out = torch.empty_like(h, dtype=h.dtype if final else dtype, device="meta")
        waiting = grad
        if how == ATEN:
            waiting = Grad(out)
            self._cast(grad.q, dtype)
            u = self._affine(h)
            if need_input and act.kind not in ("relu", "identity"):
                self._add("clone", 2 * u)
            self._add("activation", 2 * u)
            z = torch.empty_like(h, dtype=dtype, device="meta")
            self._cast(torch.empty_like(h, dtype=stats_dtype(h.dtype), device="meta"), dtype)
            size = grad.q.numel() * dtype.itemsize
            self._backward_products(size, z, weight, flops, need_input, need_weight)
            if need_input:
                if add is not None:
                    self._add("add", 2 * _size(z) + _size(add))
                self._cast(z, stats_dtype(h.dtype))
                self._add("activation_backward", 3 * u)
                # The sums read both, then the gradient reads both again; or q is scaled in place.
                self._add("norm_backward", 5 * u if training else 4 * u)
                if final and identity is not None:
                    self._add("add", 2 * u + _size(identity))
        else:
            if how == WRITTEN and (grad.coef is not None or grad.q.dtype != dtype):
                g = torch.empty_like(grad.q, dtype=dtype, device="meta")
                self._add("input_grad", _size(grad.q, grad.h, g))
                grad = Grad(g)
            if need_weight or need_bias:
                z = self._norm_act(h, stats, dtype) if how == WRITTEN else h
                self._add("conv_wgrad", _size(grad.q, grad.h, z, weight), flops)
            if need_input:
                q = torch.empty_like(h, dtype=dtype, device="meta")
                read = _size(grad.q, grad.h, weight, h, add)
                if final and runs_twice(weight):
                    self._add("conv_dgrad (sums)", read, flops)
                    self._add("norm_grad", 0)
                    self._add("conv_dgrad", read + _size(identity, out), flops)
                    waiting = Grad(out)
                else:
                    self._add("conv_dgrad", read + _size(q), flops)
                    self._add("norm_grad", 0)
                    waiting = Grad(q, h if training else None, torch.empty(3, channels))
                    if final:
                        self._add("input_grad", _size(q, waiting.h, identity, out))
                        waiting = Grad(out)
        self._step = ""
        if not need_input:
            return ConvGrads(None, dweight, dbias, None, None)
        return ConvGrads(waiting, dweight, dbias, dgamma, dbeta)


def chain_costs(
    units: Sequence[UnitModules],
    x: Tensor,
    dtype: torch.dtype,
    memory: str = "recompute",
    *,
    triton: bool,
    need_x: bool = True,
) -> tuple[StepCost, Tensor]:
    """The kernels of one chain's forward and backward, and its output, a tensor without memory.

    Args:
        units: the chain's units. x: (N, C, H, W), its input; only shape and dtype are used.
        dtype: in which convolutions multiply. memory: a mode (resnetv2/README.md, "Memory modes").
        triton: the fused kernels' launches, or ATen's operators.
    """
    segment = segment_length(units) if memory == "segment" else 0
    with torch.enable_grad():
        params, layout, constants = describe(
            [Reading(unit) for unit in units],
            dtype,
            need_x=need_x,
            backend="aten",
            memory=memory,
            segment=segment,
        )
    spec = decode(layout, constants)
    engine = CostEngine(triton)
    params = [p.detach().to("meta") for p in params]
    x = torch.empty_like(x, dtype=torch.float32 if spec.wide else x.dtype, device="meta")
    with torch.no_grad():
        first = Chain(spec, params, engine)
        out, kept, _ = first.forward(x, 0, len(spec.units), spec.kept())
        assert out is not None
        forward, engine.costs = engine.costs, []
        grads: list[Tensor | None] = [None] * len(params)
        second = Chain(spec, params, engine, first.stats)
        second.backward(torch.empty_like(out), x, out, kept, grads)
    return StepCost(forward, engine.costs), out


def step_costs(
    model: nn.Module,
    batch_size: int,
    image_size: int | tuple[int, int] = 32,
    dtype: torch.dtype = torch.float32,
    memory: str = "recompute",
    *,
    triton: bool,
) -> StepCost:
    """The kernels of a ``PreActResNet``'s forward and backward for a batch; nothing is run.

    The stages' chains are listed kernel by kernel; of the layers around them (stem, last norm and
    activation) what ATen reads and writes. Pooling, classifier and loss are left out.

    Args:
        model: may lie on the device "meta". batch_size: images. image_size: height and width.
        dtype: in which convolutions multiply. memory, triton: as for ``chain_costs``.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    conv: Any = model.conv1
    images = torch.empty(batch_size, conv.in_channels, *size, dtype=dtype, device="meta")
    geometry = Geometry(conv.stride, conv.padding)
    stem = CostEngine(triton=False)
    weight = conv.weight.detach().to("meta")
    x, _ = stem.conv_forward(images, weight, None, geometry, dtype=dtype)
    forward = [cost._replace(step=f"stem {cost.step}") for cost in stem.costs]
    stem_backward = Cost(
        "stem backward", "wgrad", _size(images, weight, x), 2 * x.numel() * weight[0].numel()
    )
    if model.stem == "imagenet":
        pooled = [n // 2 + n % 2 for n in x.shape[2:]]
        y = torch.empty(*x.shape[:2], *pooled, dtype=dtype, device="meta")
        forward.append(Cost("stem pooling", "max_pool2d", _size(x, y) + 8 * y.numel(), 0))
        x = y
    chains: list[StepCost] = []
    for stage in model.stages:  # type: ignore[union-attr]
        units = [block.unit_modules() for block in stage]
        chain, x = chain_costs(units, x, dtype, memory, triton=triton)
        forward += chain.forward
        chains.append(chain)
    # Moments, then a*h + b, then act; backward: act', the norm's sums, its gradient.
    tail = _size(x)
    forward.append(Cost("last norm and activation", "batch_norm, relu", 5 * tail, 0))
    backward = [Cost("last norm and activation backward", "threshold, batch_norm", 8 * tail, 0)]
    for chain in reversed(chains):
        backward += chain.backward
    return StepCost(forward, [*backward, stem_backward])
