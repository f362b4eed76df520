"""The chain as ``torch.library`` operators: ``resnetv2::chain_forward`` and ``chain_backward``.

What torch.compile sees of a chain: one call each. Un-compiled, ``parts`` runs the same programs
without a custom operator's cost. Buffers are updated outside, since an operator with an autograd
formula must not change its inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.operands import stats_dtype
from . import execution
from .chain import stream_dtypes
from .differentiable import differentiable_backward
from .execution import chain_format, stats_sizes, weights_of
from .shapes import Shape, chain_shapes
from .spec import Spec, decode


@torch.library.custom_op("resnetv2::chain_forward", mutates_args=())
def chain_forward(
    x: Tensor, params: list[Tensor], layout: list[int], constants: list[float]
) -> list[Tensor]:
    """[out, stats, *end, *kept] of a chain (``spec.decode``) on x, (N, C, H, W).

    Results lie in memory as ``chain_format`` says, and x should, or it is copied. They are those
    of ``execution.Forward``; end only where it is not out.
    """
    spec = decode(layout, constants)
    memory_format = chain_format(x, weights_of(spec, params), spec.backend)
    result = execution.forward(spec, x, params, memory_format)
    ends = [result.end] if spec.keep and result.out is not result.end else []
    return [result.out, result.stats, *ends, *result.kept]


@chain_forward.register_fake
def _chain_forward_fake(
    x: Tensor, params: list[Tensor], layout: list[int], constants: list[float]
) -> list[Tensor]:
    spec = decode(layout, constants)
    hs = chain_shapes(spec, x.shape, x.dtype, params)
    numbers = sum(map(math.prod, stats_sizes(spec, params, x.shape[0]))) + spec.synced
    stats = torch.empty((numbers,), dtype=stats_dtype(x.dtype), device=x.device)
    memory_format = chain_format(x, weights_of(spec, params), spec.backend)
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
    memory_format = chain_format(x, weights_of(spec, params), spec.backend)
    return execution.backward(spec, g, x, out, stats, kept, params, memory_format)[0]


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
    memory_format = chain_format(x, weights_of(spec, params), spec.backend)
    result = [Shape(tuple(x.shape), x.dtype).empty(x.device, memory_format)] if spec.need_x else []
    return result + [torch.empty_like(p) for p, need in zip(params, spec.needs) if need]


def saved_params(spec: Spec, params: Sequence[Tensor]) -> Sequence[Tensor]:
    """The part of ``params`` that a backward saves.

    What it does not read may be changed meanwhile, as in eager: running statistics, which ``stats``
    holds.
    """
    if not spec.running:
        return params
    params = list(params)
    for position in spec.running:
        params[position] = params[position].data
    return params


def check_differentiable(spec: Spec) -> None:
    """Raise where a backward cannot be differentiated again."""
    if spec.synced:
        raise RuntimeError(
            "the backward of a synchronised norm cannot be differentiated again, in eager "
            "PyTorch neither: create_graph=True needs BatchNorm2d"
        )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, params, layout, constants = inputs
    out, stats, *kept = output
    spec = decode(layout, constants)
    if len(kept) > len(spec.kept()):
        out, *kept = kept
    # Only out is a function that one differentiates; gradients of the rest would be dense zeros.
    ctx.set_materialize_grads(False)
    if spec.memory == "recompute":
        out = x  # not read
    ctx.save_for_backward(x, out, stats, *kept, *saved_params(spec, params))
    ctx.layout, ctx.constants, ctx.kept = layout, constants, len(kept)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    spec = decode(ctx.layout, ctx.constants)
    x, out, stats, *rest = ctx.saved_tensors
    kept, params = rest[: ctx.kept], rest[ctx.kept :]
    g = grads[0]
    if g is None:
        return None, [None] * len(params), None, None
    if torch.is_grad_enabled():
        check_differentiable(spec)
        flat: Any = differentiable_backward(spec, g, x, params)
    else:
        flat = chain_backward(g, x, out, stats, kept, params, ctx.layout, ctx.constants)
    values = iter(flat)
    dx = next(values) if spec.need_x else None
    return dx, [next(values) if need else None for need in spec.needs], None, None


chain_forward.register_autograd(_backward, setup_context=_setup_context)
