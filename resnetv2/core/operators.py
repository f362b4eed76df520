"""The chain as ``torch.library`` operators: ``resnetv2::chain_forward`` and ``chain_backward``.

One call is a whole chain (a Python operator costs ~10 us, a stage of ResNet-1001 has 111 units).
The forward returns the output, all statistics in one flat tensor, and what the memory mode keeps;
buffers are updated outside, since an operator with an autograd formula must not change its inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import reference
from ..kernels.dispatch import AtenEngine, engine, resolve_backend
from ..kernels.operands import Act, stats_dtype
from ..kernels.reference import in_memory_format, is_channels_last
from .chain import Chain, stream_dtypes
from .spec import Norm, Spec, decode


def _engine(spec: Spec, x: Tensor, params: Sequence[Tensor]) -> AtenEngine:
    dtypes = {x.dtype, spec.dtype, *(p.dtype for p in params)}
    return engine(spec.backend, x.device, tuple(dtypes))


def _no_autocast(x: Tensor) -> Any:
    # The dtype of every step is decided by the spec; autocast must not decide again inside.
    return torch.autocast(x.device.type, enabled=False)


@torch.library.custom_op("resnetv2::chain_forward", mutates_args=())
def chain_forward(
    x: Tensor, params: list[Tensor], layout: list[int], constants: list[float]
) -> list[Tensor]:
    """[out, stats, *end, *kept] of a chain (``spec.decode``) on x, (N, C, H, W).

    Results lie in memory as ``chain_format`` says, and x should, or it is copied.

    out: in eager's dtype. stats: flat; norm after norm, (5, C) each: mean, biased var, rstd,
    scale, shift; then the number of rows of each norm that is synchronised over ranks. end: out in
    float32, where the stream is (``Spec.wide``) and out is not.
    kept: ``Spec.kept()`` in order.
    """
    spec = decode(layout, constants)
    memory_format = chain_format(x, _weights(spec, params), spec.backend)
    with _no_autocast(x):
        chain = Chain(spec, params, _engine(spec, x, params))
        keys = spec.kept()
        end, kept = chain.forward(_stream(spec, x, memory_format), 0, len(spec.units), keys)
        assert end is not None
        end = in_memory_format(end, memory_format)
        stats = torch.cat([s.reshape(-1) for s in (*chain.stats, *chain.totals)])
        out = end.to(stream_dtypes(spec, x.dtype)[-1])
        ends = [end] if spec.keep and out is not end else []
        return [out, stats, *ends, *(in_memory_format(kept[key], memory_format) for key in keys)]


def _stream(spec: Spec, x: Tensor, memory_format: torch.memory_format) -> Tensor:
    return in_memory_format(x.float() if spec.wide else x, memory_format)


def _weights(spec: Spec, params: Sequence[Tensor]) -> Iterator[Tensor]:
    for at in spec.positions:
        yield from (params[position] for position in at.conv_weight)
        if at.projection_weight >= 0:
            yield params[at.projection_weight]


def chain_format(x: Tensor, weights: Iterable[Tensor], backend: str) -> torch.memory_format:
    """The layout of a chain's activations for an input x, (N, C, H, W), and its convolutions.

    channels_last. But where x is NCHW, ATen convolves it in NCHW as long as all weights are, with
    other roundings: eager's, where nothing is converted.
    """
    if (
        x.is_contiguous()
        and not is_channels_last(x)
        and resolve_backend(backend, x.device) == "aten"
        and all(w.is_contiguous() and not is_channels_last(w) for w in weights)
    ):
        return torch.contiguous_format
    return torch.channels_last


class Shape(NamedTuple):
    """Shape and dtype of a tensor that need not exist."""

    size: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.size)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def empty(self, device: torch.device, memory_format: torch.memory_format) -> Tensor:
        return torch.empty(self.size, dtype=self.dtype, device=device, memory_format=memory_format)


def chain_shapes(
    spec: Spec, size: Sequence[int], dtype: torch.dtype, params: Sequence[Tensor]
) -> list[list[Shape]]:
    """Each unit's h_0..h_k for an input of ``size`` (N, C, H, W) and ``dtype``."""
    result = []
    h = Shape(tuple(size), torch.float32 if spec.wide else dtype)
    for unit, at, natural in zip(spec.units, spec.positions, stream_dtypes(spec, dtype)[1:]):
        hs = [h]
        for i, conv in enumerate(unit.convs):
            out_channels, _, r, s = params[at.conv_weight[i]].shape
            n, _, *image = h.size
            last = torch.float32 if spec.wide else natural
            height, width = conv.geometry.output_size((image[0], image[1]), (r, s))
            h = Shape(
                (n, out_channels, height, width),
                last if i == len(unit.convs) - 1 else spec.dtype,
            )
            hs.append(h)
        result.append(hs)
    return result


@chain_forward.register_fake
def _chain_forward_fake(
    x: Tensor, params: list[Tensor], layout: list[int], constants: list[float]
) -> list[Tensor]:
    spec = decode(layout, constants)
    hs = chain_shapes(spec, x.shape, x.dtype, params)
    numbers = 5 * sum(norm_channels(spec, params)) + spec.synced
    stats = torch.empty((numbers,), dtype=stats_dtype(x.dtype), device=x.device)
    memory_format = chain_format(x, _weights(spec, params), spec.backend)
    end = hs[-1][-1].empty(x.device, memory_format)
    out = end.to(stream_dtypes(spec, x.dtype)[-1])
    ends = [end] if spec.keep and out is not end else []
    kept = (hs[u][i].empty(x.device, memory_format) for u, i in spec.kept())
    return [out, stats, *ends, *kept]


@torch.library.custom_op("resnetv2::chain_backward", mutates_args=())
def chain_backward(
    g: Tensor,
    x: Tensor,
    out: Tensor,
    stats: Tensor,
    kept: list[Tensor],
    params: list[Tensor],
    layout: list[int],
    constants: list[float],
) -> list[Tensor]:
    """Gradients for the gradient g of a chain's output: x's, then the params', those wanted.

    x: the chain's input; out: its output in the stream's dtype; stats, kept: as ``chain_forward``
    returned them.
    """
    spec = decode(layout, constants)
    memory_format = chain_format(x, _weights(spec, params), spec.backend)
    with _no_autocast(x):
        chain = Chain(spec, params, _engine(spec, x, params), *_split_stats(spec, stats, params))
        grads: list[Tensor | None] = [None] * len(params)
        dx = chain.backward(
            in_memory_format(g, memory_format),
            _stream(spec, x, memory_format),
            out,
            dict(zip(spec.kept(), kept)),
            grads,
        )
    result = []
    if spec.need_x:
        result = [None if dx is None else in_memory_format(dx.to(x.dtype), memory_format)]
    result += [grad for grad, need in zip(grads, spec.needs) if need]
    assert all(r is not None for r in result)
    return result  # type: ignore[return-value]


@chain_backward.register_fake
def _chain_backward_fake(
    g: Tensor,
    x: Tensor,
    out: Tensor,
    stats: Tensor,
    kept: list[Tensor],
    params: list[Tensor],
    layout: list[int],
    constants: list[float],
) -> list[Tensor]:
    spec = decode(layout, constants)
    memory_format = chain_format(x, _weights(spec, params), spec.backend)
    result = [Shape(tuple(x.shape), x.dtype).empty(x.device, memory_format)] if spec.need_x else []
    return result + [torch.empty_like(p) for p, need in zip(params, spec.needs) if need]


def norm_channels(spec: Spec, params: Sequence[Tensor]) -> list[int]:
    """Channels of each norm of a chain, in the order of its flat statistics."""
    return [
        params[at.conv_weight[i]].shape[1] * unit.convs[i].geometry.groups
        for unit, at in zip(spec.units, spec.positions)
        for i in range(len(unit.convs))
    ]


def _split_stats(
    spec: Spec, stats: Tensor, params: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    sizes = [5 * c for c in norm_channels(spec, params)]
    parts = stats.split([*sizes, *[1] * spec.synced])
    return [part.view(5, -1) for part in parts[: len(sizes)]], list(parts[len(sizes) :])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, params, layout, constants = inputs
    out, stats, *kept = output
    if len(kept) > len(decode(layout, constants).kept()):
        out, *kept = kept
    # Only out is a function that one differentiates; gradients of the rest would be dense zeros.
    ctx.set_materialize_grads(False)
    spec = decode(layout, constants)
    # What the backward does not read is not saved, so that it may be changed meanwhile, as in
    # eager: out, where nothing is walked back, and running statistics, which ``stats`` holds.
    if spec.memory == "recompute":
        out = x
    params = list(params)
    for unit, at in zip(spec.units, spec.positions):
        for norm, mean, var in zip(unit.norms, at.running_mean, at.running_var):
            if not norm.training:
                params[mean], params[var] = params[mean].data, params[var].data
    ctx.save_for_backward(x, out, stats, *kept, *params)
    ctx.layout, ctx.constants, ctx.kept = layout, constants, len(kept)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    spec = decode(ctx.layout, ctx.constants)
    x, out, stats, *rest = ctx.saved_tensors
    kept, params = rest[: ctx.kept], rest[ctx.kept :]
    g = grads[0]
    if g is None:
        return None, [None] * len(params), None, None
    if torch.is_grad_enabled():
        if spec.synced:
            raise RuntimeError(
                "the backward of a synchronised norm cannot be differentiated again, in eager "
                "PyTorch neither: create_graph=True needs BatchNorm2d"
            )
        flat = _differentiable_backward(spec, g, x, params)
    else:
        flat = chain_backward(g, x, out, stats, kept, params, ctx.layout, ctx.constants)
    values = iter(flat)
    dx = next(values) if spec.need_x else None
    return dx, [next(values) if need else None for need in spec.needs], None, None


chain_forward.register_autograd(_backward, setup_context=_setup_context)


def _activate(u: Tensor, act: Act) -> Tensor:
    if act.kind == "leaky_relu":
        return F.leaky_relu(u, act.slope)
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "relu": F.relu,
        "silu": F.silu,
        "gelu": F.gelu,
    }
    return functions[act.kind](u) if act.kind in functions else u


def differentiable_forward(spec: Spec, x: Tensor, params: Sequence[Tensor]) -> Tensor:
    """The chain's output by differentiable PyTorch functions; running statistics stay as they are.

    What double backward differentiates: slower, and it keeps what eager keeps.
    """

    def param(position: int) -> Tensor | None:
        return None if position < 0 else params[position]

    def cast(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(spec.dtype)

    for unit, at in zip(spec.units, spec.positions):
        h = x
        z: Tensor | None = None
        for i, (norm, conv) in enumerate(zip(unit.norms, unit.convs)):
            u = _batch_norm(h, norm, [param(p[i]) for p in at[:4]])
            z_i = _activate(u, unit.act)
            z = z_i if z is None else z
            weight = params[at.conv_weight[i]].to(spec.dtype)
            bias = cast(param(at.conv_bias[i]))
            h = reference.conv2d(z_i.to(spec.dtype), weight, bias, conv.geometry)
        assert z is not None
        shortcut = z if unit.shortcut.reads_preact else x
        if unit.projection is not None:
            weight = params[at.projection_weight].to(spec.dtype)
            bias = cast(param(at.projection_bias))
            shortcut = reference.conv2d(
                shortcut.to(spec.dtype), weight, bias, unit.projection.geometry
            )
        out = h + shortcut
        x = out.to(h.dtype) if unit.add_in_place else out
    return x


def _batch_norm(h: Tensor, norm: Norm, tensors: list[Tensor | None]) -> Tensor:
    weight, bias, mean, var = tensors
    return F.batch_norm(h, mean, var, weight, bias, norm.training, 0.0, norm.eps)


def _differentiable_backward(
    spec: Spec, g: Tensor, x: Tensor, params: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The gradients as differentiable functions of g, x and params (create_graph=True)."""
    wanted = [x] if spec.need_x else []
    wanted += [p for p, need in zip(params, spec.needs) if need]
    with torch.enable_grad(), _no_autocast(x):
        out = differentiable_forward(spec, x, params)
        return torch.autograd.grad(out, wanted, g, create_graph=True)
