"""A chain in parts, each an autograd function that runs programs.

Gradients leave a part as soon as it has them, its intermediates go with it, and parts of equal
units share their programs. Moments of a part's output are handed to the next; where the stream is
walked back, a part's backward hands the x that it walks back to to the part before.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import execution
from .differentiable import differentiable_backward, differentiable_forward
from .execution import no_autocast
from .operators import check_differentiable, saved_params
from .spec import Spec

# Units of a part: few enough for its gradients and intermediates to be a small share of a step's.
UNITS = 16


class Link:
    """Between two parts: what the first hands on in the forward, and gets back in the backward.

    moments, form: of the first part's output. stats: the first part's. end: its output, walked back
    to by the second part. compared: in front of a chain, whether what is walked back to was
    compared with the chain's input.
    """

    compared = True

    moments: Sequence[Tensor] = ()
    form: Any = None
    stats: Tensor
    end: Tensor | None = None


class PartFunction(torch.autograd.Function):
    """One part's output, for its input and parameters."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        spec: Spec,
        memory_format: torch.memory_format,
        before: Link,
        after: Link,
        x: Tensor,
        *params: Tensor,
    ) -> Tensor:
        result = execution.forward(spec, x, params, memory_format, before.moments, before.form)
        before.moments = ()
        after.moments, after.form, after.stats = result.moments, result.form, result.stats
        if spec.keep:
            ctx.set_materialize_grads(False)
            ctx.spec, ctx.before, ctx.after = spec, before, after
            ctx.memory_format = memory_format
            saved = [] if spec.walks_to_x else [x]
            walks = spec.memory != "recompute"
            if walks and spec.part.last:
                saved.append(result.end)
            ctx.count = len(saved) + 1 + len(result.kept)
            ctx.save_for_backward(*saved, result.stats, *result.kept, *saved_params(spec, params))
        return result.out

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        spec: Spec = ctx.spec
        saved = list(ctx.saved_tensors)
        params = saved[ctx.count :]
        if g is None:
            return (None,) * (5 + len(params))
        x = None if spec.walks_to_x else saved[0]
        if torch.is_grad_enabled() or _is_batched(g):
            check_differentiable(spec)
            flat: Sequence[Tensor] = differentiable_backward(spec, g, _input_of(ctx), params)
        else:
            place = 0 if x is None else 1
            end = None
            if spec.memory != "recompute":
                end = saved[place] if spec.part.last else ctx.after.end
                place += spec.part.last
                ctx.after.end = None
            stats, kept = saved[place], saved[place + 1 : ctx.count]
            if not ctx.before.compared and x is not None and end is not None:
                ctx.before.compared = True
                _compare(spec, x, end, stats, kept, params, ctx.memory_format)
            flat, x = execution.backward(spec, g, x, end, stats, kept, params, ctx.memory_format)
            if spec.memory != "recompute" and not spec.part.first:
                ctx.before.end = x
        values = iter(flat)
        dx = next(values) if spec.need_x else None
        return None, None, None, None, dx, *(next(values) if need else None for need in spec.needs)


def _compare(spec: Spec, x: Tensor, end: Tensor, *rest: Any) -> None:
    """Warn where the stream is walked back to something else than the chain's input: where what its
    units add is large beside it, their sum has lost it. In half precision the walk to it begins at
    the first anchor."""
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    error = execution.walking_error(spec, x, end, *rest)
    stream = torch.float32 if spec.wide else x.dtype
    if error > (_LARGE_HALF if spec.anchors else _LARGE) * torch.finfo(stream).eps:
        warnings.warn(
            f"memory={spec.memory!r}: the input of a chain is walked back to with a relative error "
            f"of {error:.0e}, since its units add far more than it holds; gradients are as far "
            'off. memory="recompute" keeps it',
            stacklevel=2,
        )


# Errors of walking back, in roundings: on 111 bottlenecks it is off by 7, and by 1 from the nearest
# anchor of a stream in half precision, where 8 are 6 % in bfloat16.
_LARGE, _LARGE_HALF = 128, 8


def _is_batched(g: Tensor) -> bool:
    """Whether a gradient stands for many (``is_grads_batched``, vectorised jacobians, vmap)."""
    functorch = torch._C._functorch
    return bool(functorch.is_batchedtensor(g) or functorch.is_legacy_batchedtensor(g))


def _input_of(ctx: Any) -> Tensor:
    """A part's input as a function of what came before: recomputed where nothing keeps it."""
    saved = ctx.saved_tensors
    if not ctx.spec.walks_to_x:
        return saved[0]  # type: ignore[no-any-return]
    before = ctx.next_functions[0][0]
    with torch.enable_grad(), no_autocast(saved[0].device.type):
        return differentiable_forward(
            before.spec, _input_of(before), before.saved_tensors[before.count :]
        )


def run_parts(
    specs: Sequence[Spec],
    x: Tensor,
    params: Sequence[Sequence[Tensor]],
    memory_format: torch.memory_format,
    compared: bool = True,
) -> tuple[Tensor, list[Tensor]]:
    """x through the parts of a chain: the output, and each part's flat statistics.

    compared: whether it is known already how well the chain is walked back.
    """
    stats = []
    before = Link()
    before.compared = compared
    for spec, its_params in zip(specs, params):
        if spec.keep:
            after = Link()
            x = PartFunction.apply(spec, memory_format, before, after, x, *its_params)
            before = after
            stats.append(after.stats)
            del after.stats  # the graph would keep them to the end of the backward
        else:
            result = execution.forward(
                spec, x, its_params, memory_format, before.moments, before.form
            )
            x, before.moments, before.form = result.out, result.moments, result.form
            stats.append(result.stats)
    return x, stats
