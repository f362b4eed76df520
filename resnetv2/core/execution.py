"""A part's forward and backward on its tensors, by the program for them (``program``)."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.aten_engine import AtenEngine
from ..kernels.dispatch import engine, resolve_backend
from ..kernels.operands import flat_moments, joined_moments
from ..kernels.reference import in_memory_format, is_channels_last
from ..kernels.switches import allow_tf32
from .chain import Chain, stream_dtypes
from .program import Programs
from .spec import Spec


class Forward(NamedTuple):
    """The results of a part's forward.

    out: in eager's dtype, where the part is the chain's last. end: the same in the stream's dtype;
    ``out`` itself where that is eager's. stats: flat; norm after norm, (5, C) each or a group
    norm's (2, N, G), then the number of rows of each norm that is synchronised over ranks. kept:
    ``Spec.kept()`` in order. moments, form: of ``end``, for the next part
    (``operands.flat_moments``).
    """

    out: Tensor
    end: Tensor
    stats: Tensor
    kept: list[Tensor]
    moments: list[Tensor]
    form: Any


def _engine(spec: Spec, x: Tensor, params: Sequence[Tensor]) -> AtenEngine:
    dtypes = {x.dtype, spec.dtype, *(p.dtype for p in params)}
    return engine(spec.backend, x.device, tuple(dtypes))


def _compile_ahead(function: Callable[..., Any], inputs: Sequence[Tensor], spec: Spec) -> None:
    """Have the kernels of a new program compiled side by side, where kernels are compiled."""
    x = inputs[0]
    # What is exchanged between ranks must not be exchanged for tensors without memory.
    if spec.synced or x.is_meta or _engine(spec, x, inputs).name != "triton":
        return
    from ..kernels.ahead import compile_ahead

    # A tensor that is given twice stays one.
    like = {
        id(t): torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
        for t in inputs
    }
    compile_ahead(lambda: function(*[like[id(t)] for t in inputs]), x.device)


# Each part of a chain has one for either direction, and for each shape and dtype.
PROGRAMS = Programs(limit=512, prepare=_compile_ahead)


def _key(spec: Spec, direction: str, form: Any, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """Everything that a program depends on besides its tensors' values."""
    device = tensors[0].device
    large: tuple[bool, ...] = ()
    if torch.version.hip is not None:
        # Buffer operations reach 2 GiB: Triton compiles kernels by their tensors' storages.
        large = tuple(t.untyped_storage().nbytes() >= 2**31 for t in tensors)
    return (
        id(spec),
        direction,
        form,
        device,
        resolve_backend(spec.backend, device),
        allow_tf32(),
        large,
        *[(t.dtype, t.shape, t.stride(), t.data_ptr() % 16) for t in tensors],
    )


@contextlib.contextmanager
def no_autocast(device: str) -> Iterator[None]:
    """The dtype of every step is decided by the spec; autocast must not decide again inside."""
    if device == "meta" or not torch.is_autocast_enabled(device):
        yield
        return
    torch.set_autocast_enabled(device, False)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, True)


def weights_of(spec: Spec, params: Sequence[Tensor]) -> Iterator[Tensor]:
    """The weights of a chain's convolutions."""
    for at in spec.positions:
        yield from (params[position] for position in at.conv_weight)
        if at.projection_weight >= 0:
            yield params[at.projection_weight]


def layout_of(x: Tensor) -> torch.memory_format | None:
    """The layout of eager's results for an input x, (N, C, H, W): that of the order of its strides,
    whether or not x is dense; None for another order."""
    if x.is_contiguous():
        return torch.channels_last if is_channels_last(x) else torch.contiguous_format
    if x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    for axes, layout in (
        ((0, 2, 3, 1), torch.channels_last),
        ((0, 1, 2, 3), torch.contiguous_format),
    ):
        strides = [x.stride(axis) for axis in axes if x.shape[axis] > 1]
        if all(a >= b > 0 for a, b in itertools.pairwise([*strides, 1])):
            return layout
    return None


def chain_format(x: Tensor, weights: Iterable[Tensor], backend: str) -> torch.memory_format:
    """The layout of a chain's activations for an input x, (N, C, H, W), and its convolutions.

    channels_last. But where x is NCHW, ATen convolves it in NCHW as long as all weights are, with
    other roundings: eager's, where nothing is converted.
    """
    if (
        layout_of(x) == torch.contiguous_format
        and resolve_backend(backend, x.device) == "aten"
        and all(w.is_contiguous() and not is_channels_last(w) for w in weights)
    ):
        return torch.contiguous_format
    return torch.channels_last


def forward(
    spec: Spec,
    x: Tensor,
    params: Sequence[Tensor],
    memory_format: torch.memory_format,
    moments: Sequence[Tensor] = (),
    form: Any = None,
    programs: Any = None,
) -> Forward:
    """Run a part on x, (N, C, H, W), whose moments may be known from the part before.

    Results lie in memory as ``memory_format`` says. programs: where its program is
    kept, ``PROGRAMS`` if None.
    """
    given = len(moments)

    def run(x: Tensor, *rest: Tensor) -> tuple[list[Tensor], Any]:
        params = rest[given:]
        chain = Chain(spec, params, _engine(spec, x, params))
        stream = in_memory_format(x.float() if spec.wide else x, memory_format)
        keys = spec.kept()
        known = joined_moments(rest[:given], form)
        end, kept, partials = chain.forward(stream, 0, len(spec.units), keys, partials=known)
        assert end is not None
        end = in_memory_format(end, memory_format)
        natural = spec.part.natural or x.dtype
        out = end.to(stream_dtypes(spec, natural)[-1]) if spec.part.last else end
        stats = torch.cat([s.reshape(-1) for s in (*chain.stats, *chain.totals)])
        handed, its_form = flat_moments(partials if spec.part.hands_on else None)
        its_kept = [in_memory_format(kept[key], memory_format) for key in keys]
        return [out, end, stats, *handed, *its_kept], its_form

    inputs = [x, *moments, *params]
    with no_autocast(x.device.type):
        key = _key(spec, "forward", (memory_format, form), inputs)
        results, its_form = (PROGRAMS if programs is None else programs).run(
            key, run, inputs, x.device, spec
        )
    out, end, stats, *rest = results
    count = len(rest) - len(spec.kept())
    return Forward(out, end, stats, rest[count:], rest[:count], its_form)


def backward(
    spec: Spec,
    g: Tensor,
    x: Tensor | None,
    end: Tensor | None,
    stats: Tensor,
    kept: Sequence[Tensor],
    params: Sequence[Tensor],
    memory_format: torch.memory_format,
    programs: Any = None,
) -> tuple[list[Tensor], Tensor | None]:
    """Gradients for the gradient g of a part's output: x's, then the params', those wanted; and x.

    x: its input, None where it is walked back to. end: its output in the stream's dtype, which the
    modes that walk need. stats, kept: as ``forward`` gave them. programs: as there.
    """
    ends = [tensor for tensor in (x, end) if tensor is not None]
    keys = spec.kept()

    def run(g: Tensor, *rest: Tensor) -> tuple[list[Tensor], Any]:
        found = iter(rest)
        its_x = None if x is None else next(found)
        its_end = None if end is None else next(found)
        its_stats = next(found)
        its_kept = {key: next(found) for key in keys}
        its_params = list(found)
        like = g if its_x is None else its_x
        chain = Chain(
            spec,
            its_params,
            _engine(spec, like, its_params),
            *split_stats(spec, its_stats, its_params, g.shape[0]),
        )
        stream = its_x
        if its_x is not None:
            stream = in_memory_format(its_x.float() if spec.wide else its_x, memory_format)
        grads: list[Tensor | None] = [None] * len(its_params)
        g = in_memory_format(g, memory_format)
        dx, walked = chain.backward(g, stream, its_end, its_kept, grads)
        results: list[Tensor | None] = [grad for grad, need in zip(grads, spec.needs) if need]
        if spec.need_x:
            assert dx is not None
            dx = dx if its_x is None else dx.to(its_x.dtype)
            results.insert(0, in_memory_format(dx, memory_format))
        if its_x is None:
            results.append(walked)
        assert all(r is not None for r in results)
        return results, None  # type: ignore[return-value]

    inputs = [g, *ends, stats, *kept, *params]
    with no_autocast(g.device.type):
        key = _key(spec, "backward", (memory_format, x is None, end is None), inputs)
        results, _ = (PROGRAMS if programs is None else programs).run(
            key, run, inputs, g.device, spec
        )
    if x is None:
        *results, x = results
    return results, x


def walking_error(
    spec: Spec,
    x: Tensor,
    end: Tensor,
    stats: Tensor,
    kept: Sequence[Tensor],
    params: Sequence[Tensor],
    memory_format: torch.memory_format,
) -> float:
    """How far a part's input x is from what a backward walks back to, relative to x; 0 where none
    does. By norms. Arguments as of ``backward``."""
    with torch.no_grad(), no_autocast(x.device.type):
        known = split_stats(spec, stats, params, x.shape[0])
        chain = Chain(spec, params, _engine(spec, x, params), *known)
        stream = in_memory_format(x.float() if spec.wide else x, memory_format)
        walked = chain.walk_back(stream, end, dict(zip(spec.kept(), kept)))
        if walked is None:
            return 0.0
        return float(torch.dist(walked, stream) / stream.norm().clamp_min(1e-30))


def stats_sizes(spec: Spec, params: Sequence[Tensor], images: int) -> list[tuple[int, ...]]:
    """Shape of each norm's statistics for so many images, as ``Forward.stats`` has them."""
    return [
        (2, images, norm.groups)
        if norm.groups
        else (5, params[at.conv_weight[i]].shape[1] * conv.geometry.groups)
        for unit, at in zip(spec.units, spec.positions)
        for i, (norm, conv) in enumerate(zip(unit.norms, unit.convs))
    ]


def split_stats(
    spec: Spec, stats: Tensor, params: Sequence[Tensor], images: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Each norm's statistics (``stats_sizes``), and the rows (1,) of each that is synchronised."""
    shapes = stats_sizes(spec, params, images)
    parts = stats.split([*map(math.prod, shapes), *[1] * spec.synced])
    count = len(shapes)
    return [part.view(shape) for part, shape in zip(parts, shapes)], list(parts[count:])
