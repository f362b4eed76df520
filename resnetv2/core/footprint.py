"""The bytes of a training step of any module whose chains are fused, before it is run.

The module's forward and backward run on tensors without memory (``FakeTensorMode``), whose bytes
are counted as they come and go. Each part of a chain is an autograd function that keeps and hands
on what the part's programs say (``core.meta``), so that no formula repeats what a chain does.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from .checks import following
from .meta import MetaPart, MetaPrograms, chain_parts
from .reading import Reading
from .shapes import chain_shapes

if TYPE_CHECKING:
    from ..kernels.launch import Device


class Footprint(NamedTuple):
    """What a step holds, in bytes.

    kept: activations from forward to backward. walk: what a part's backward needs on top, where it
    needs most. peak: of all at the worst moment, gradients too, without parameters, buffers and the
    images. eager: what eager PyTorch keeps, read off mode "recompute". flops: of the chains.
    segments: units of a segment in each chain.
    """

    kept: int
    walk: int
    peak: int
    eager: int
    flops: int
    segments: tuple[int, ...]


class _Count(TorchDispatchMode):
    """Bytes of the storages that operators have made and that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        results = out if isinstance(out, (tuple, list)) else (out,)
        for result, told in zip(results, func._schema.returns):
            if told.alias_info is None:
                for tensor in tree_leaves(result):
                    if isinstance(tensor, Tensor):
                        self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        nbytes = storage.nbytes()
        self.now += nbytes
        self.need(0)
        weakref.finalize(storage, self._remove, nbytes).atexit = False

    def _remove(self, nbytes: int) -> None:
        self.now -= nbytes

    def hold(self, nbytes: int) -> None:
        """So many more bytes are held, or fewer; what is needed at once is in ``need``."""
        self.now += nbytes

    def need(self, nbytes: int) -> None:
        """So many bytes are needed for a moment on top of what is alive."""
        self.most = max(self.most, self.now + nbytes)


class _Notes:
    """What the chains of one step were: see ``Footprint``."""

    def __init__(self, count: _Count, gpu: Device | None, programs: MetaPrograms) -> None:
        self.count, self.gpu, self.programs = count, gpu, programs
        self.walk = self.flops = self.saved = self.eager = 0
        self.segments: list[int] = []

    def chain(
        self,
        readings: Sequence[Reading],
        tensors: Sequence[Sequence[Tensor]],
        x: Tensor,
        dtype: torch.dtype,
        memory: str,
    ) -> Tensor:
        """The chain's output, for an input x without memory; its parts are noted."""
        with _disable_current_modes():
            like = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
            parts, _ = chain_parts(
                readings,
                tensors,
                like,
                dtype,
                memory,
                gpu=self.gpu,
                programs=self.programs,
                need_x=x.requires_grad,
            )
        self.segments.append(parts[0].spec.segment)
        # In their names: without it, a chain of frozen inputs would not be walked back.
        some = next((t for its in tensors for t in its if t.requires_grad), None)
        before = _Link()
        for part in parts:
            for program in (part.forward, part.backward):
                self.flops += sum(cost.flops for cost in program.costs)
            shapes = chain_shapes(part.spec, part.x.shape, part.x.dtype, part.params)
            for unit, hs in zip(part.spec.units, shapes):
                # The norm keeps its input, and the convolution its own; of most activations' inputs
                # something is kept as well.
                copies = 2 if unit.act.kind in ("relu", "identity") else 3
                self.eager += copies * sum(shape.nbytes for shape in hs[:-1])
            after = _Link()
            x = _Part.apply(self, part, before, after, x, some)
            before = after
        return x


class _Link:
    """Between two parts, as in ``parts.Link``. walked: bytes of the x that the second's backward
    arrives at."""

    walked = 0


class _Part(torch.autograd.Function):
    """One part: holds what ``parts.PartFunction`` does, and computes nothing.

    Its output and x's gradient are tensors, all else is counted alone.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        notes: _Notes,
        part: MetaPart,
        before: _Link,
        after: _Link,
        x: Tensor,
        some: Tensor | None,
    ) -> Tensor:
        result, spec = part.result, part.spec
        notes.count.need(part.forward.peak)
        out = _like(result.out, x)
        held = {id(t): nbytes_of(t) for t in (result.stats, *result.kept)}
        saved = [] if spec.walks_to_x else [x]
        if spec.memory != "recompute" and spec.part.last:
            held[id(result.end)] = nbytes_of(result.end)
            if held.pop(id(result.out), 0):
                saved.append(out)
        ctx.held = sum(held.values())
        notes.count.hold(ctx.held)
        notes.saved += ctx.held + sum(map(nbytes_of, saved))
        ctx.save_for_backward(*saved)
        ctx.notes, ctx.part, ctx.before, ctx.after = notes, part, before, after
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        part: MetaPart = ctx.part
        count: _Count = ctx.notes.count
        needs = part.backward.peak
        count.need(needs)
        ctx.notes.walk = max(ctx.notes.walk, needs + nbytes_of(g) + ctx.after.walked)
        count.hold(-ctx.held - ctx.after.walked)
        if part.walked is not None:
            ctx.before.walked = nbytes_of(part.walked)
            count.hold(ctx.before.walked)
        need_x = part.spec.need_x
        count.hold(sum(map(nbytes_of, part.grads[need_x:])))  # stay to the end of the step
        return None, None, None, None, _like(part.grads[0], g) if need_x else None, None


def _like(tensor: Tensor, beside: Tensor) -> Tensor:
    return torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=beside.device
    )


def nbytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.dtype.itemsize


def footprint(
    model: nn.Module,
    inputs: Callable[[], tuple[Sequence[Any], Mapping[str, Any]]],
    *,
    gpu: Device | None,
    programs: MetaPrograms,
) -> Footprint:
    """What a training step of ``model`` holds, in the modes that its chains have.

    Parameters and buffers give shape, dtype and place alone, and are left as they are; so is the
    generator of random numbers. What the forward does besides (attributes it sets, hooks) it does.

    Args:
        inputs: makes the forward's arguments and keywords; called where tensors have no memory.
        gpu: whose kernels run; None for ATen's operators. programs: those that are known already.

    Raises:
        what the forward raises, where it cannot do without values.
    """
    count = _Count()
    notes = _Notes(count, gpu, programs)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # it would keep tensors without memory for later
    try:
        with following(notes.chain), FakeTensorMode(), torch.enable_grad():
            fakes = {name: without_memory(tensor) for name, tensor in state.items()}
            args, kwargs = inputs()
            leaves = [t for t in (*fakes.values(), *_tensors((args, kwargs))) if t.requires_grad]
            with count:
                out = torch.func.functional_call(model, fakes, tuple(args), dict(kwargs))
                kept = count.now
                ends = [tensor for tensor in _tensors(out) if tensor.requires_grad]
                gradients = [torch.empty_like(end) for end in ends]
                del out
                if ends and leaves:
                    torch.autograd.backward(ends, gradients, inputs=leaves)
    finally:
        torch.set_autocast_cache_enabled(cached)
    eager = kept - notes.saved + notes.eager
    return Footprint(kept, notes.walk, count.most, eager, notes.flops, tuple(notes.segments))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def without_memory(tensor: Tensor) -> Tensor:
    """A leaf of the same shape, strides, dtype and place; on "cpu" for one on "meta"."""
    device = "cpu" if tensor.is_meta else tensor.device
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return made.requires_grad_(tensor.requires_grad)
