"""Launches and distinct bytes of what runs in Triton's interpreter.

    with count() as counted:
        block(x)
    print(len(counted.launches), sum(launch.nbytes for launch in counted.launches))

Every address that a load reads or a store writes under its mask is collected, and counts once a
launch however many programs touch it: what a cache of unlimited size would fetch and write back.
ATen's operators that would launch a kernel on a GPU are listed as well, with their sizes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from torch.autograd.profiler import profile, record_function
from torch.autograd.profiler_util import FunctionEvent
from triton._C.libtriton.ir import ATOMIC_OP
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

_LAUNCH = "resnetv2::launch"

# Operators that allocate or look at memory in another way, and so launch nothing.
_VIEWS = frozenset(
    f"aten::{name}"
    for name in (
        "_reshape_alias", "_unsafe_view", "alias", "as_strided", "chunk", "contiguous", "detach",
        "detach_", "empty", "empty_like", "empty_strided", "expand", "expand_as", "flatten",
        "is_nonzero", "lift_fresh", "narrow", "new_empty", "new_empty_strided", "numpy_T",
        "permute", "promote_types", "reshape", "resize_", "resolve_conj", "resolve_neg",
        "result_type", "select", "set_", "slice", "split", "split_with_sizes", "squeeze", "t",
        "to", "transpose", "unbind", "unflatten", "unsqueeze", "view", "view_as",
        "_local_scalar_dense", "item",
    )
)  # fmt: skip


class Access(NamedTuple):
    """Distinct bytes of one tensor argument that a launch read and wrote, and its elements."""

    read: int
    written: int
    numel: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class LaunchCount:
    """One launch: the kernel's name, its grid and the accesses to each tensor, by argument."""

    name: str
    grid: tuple[int, ...]
    tensors: dict[str, Access]

    def bytes_where(self, condition: Callable[[Access], bool]) -> int:
        """Distinct bytes read plus written of the tensors that meet ``condition``."""
        return sum(t.read + t.written for t in self.tensors.values() if condition(t))

    @property
    def nbytes(self) -> int:
        """Distinct bytes read plus distinct bytes written, of all tensors."""
        return self.bytes_where(lambda tensor: True)


class AtenCount(NamedTuple):
    """An ATen operator that launches a kernel on a GPU, and the elements of its largest input."""

    name: str
    numel: int


@dataclass
class Counted:
    """Launches in order; ``aten`` is filled when the block ends."""

    launches: list[LaunchCount] = field(default_factory=list)
    aten: list[AtenCount] = field(default_factory=list)


class _Addresses:
    """Element addresses by element size, made distinct in the end."""

    def __init__(self) -> None:
        self._parts: dict[int, list[np.ndarray]] = {}

    def add(self, pointers: Any, mask: Any) -> None:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        addresses = np.broadcast_to(pointers.data, mask.data.shape)[mask.data]
        self._parts.setdefault(size, []).append(np.unique(addresses))

    def within(self, start: int, nbytes: int) -> int:
        """Distinct bytes accessed in [start, start + nbytes)."""
        total = 0
        for size, parts in self._parts.items():
            addresses = np.unique(np.concatenate(parts))
            first, last = np.searchsorted(addresses, [start, start + nbytes])
            total += size * int(last - first)
        return total


@contextlib.contextmanager
def count() -> Iterator[Counted]:
    """Count launches, bytes and ATen's kernels inside the block.

    Raises:
        RuntimeError: kernels are not interpreted in this process (TRITON_INTERPRET=1), or one of
            them uses an atomic operation other than a ticket (one integer that is counted up): its
            order, and so its result, is not fixed.
    """
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("bytes are counted in Triton's interpreter: set TRITON_INTERPRET=1")
    counted = Counted()
    reads, writes = _Addresses(), _Addresses()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    draw = InterpreterBuilder.create_atomic_rmw
    call = GridExecutor.__call__

    def counting_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        reads.add(ptrs, mask)
        return load(self, ptrs, mask, *rest)

    def counting_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        writes.add(ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    def counting_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal reads, writes
        reads, writes = _Addresses(), _Addresses()
        with record_function(_LAUNCH):
            result = call(self, *args, **kwargs)
        arguments = dict(zip(self.arg_names, args)) | kwargs
        tensors: dict[str, Access] = {}
        seen: set[int] = set()
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor) and value.data_ptr() not in seen:
                seen.add(value.data_ptr())
                span = value.data_ptr(), _extent(value)
                tensors[name] = Access(
                    reads.within(*span), writes.within(*span), value.numel(), tuple(value.shape)
                )
        counted.launches.append(LaunchCount(self.fn.__name__, tuple(self.grid), tensors))
        return result

    def ticket(self: Any, op: Any, ptr: Any, *rest: Any) -> Any:
        integer = ptr.get_element_ty().is_int()
        if op != ATOMIC_OP.ADD or ptr.data.size > 1 or not integer:
            raise RuntimeError("a kernel uses an atomic operation that is no ticket")
        return draw(self, op, ptr, *rest)

    def refuse(*args: Any) -> Any:
        raise RuntimeError("a kernel uses an atomic operation")

    patches = {
        "create_masked_load": counting_load,
        "create_masked_store": counting_store,
        "create_atomic_rmw": ticket,
        "create_atomic_cas": refuse,
    }
    previous = {name: getattr(InterpreterBuilder, name) for name in patches}
    for name, function in patches.items():
        setattr(InterpreterBuilder, name, function)
    GridExecutor.__call__ = counting_call
    try:
        with profile(use_cpu=True, record_shapes=True) as profiler:
            yield counted
    finally:
        GridExecutor.__call__ = call
        for name, function in previous.items():
            setattr(InterpreterBuilder, name, function)
    counted.aten = aten_kernels(profiler.function_events or [])


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to its last: its storage may hold, and what lies behind
    that may be, another tensor's."""
    if tensor.numel() == 0:
        return 0
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride()))
    return (last + 1) * tensor.element_size()


def aten_kernels(events: Sequence[FunctionEvent]) -> list[AtenCount]:
    """The outermost ATen operators that compute something, outside of interpreted kernels.

    A ``_foreach`` operator is one kernel on a GPU, though a loop of many on a CPU.
    """
    found = []
    for event in events:
        if not _computes(event):
            continue
        parent = event.cpu_parent
        while parent is not None and parent.name != _LAUNCH and not _computes(parent):
            parent = parent.cpu_parent
        if parent is None:
            sizes = [int(np.prod(shape)) for shape in event.input_shapes or [] if shape]
            found.append(AtenCount(event.name, max(sizes, default=0)))
    return found


def _computes(event: FunctionEvent) -> bool:
    return event.name.startswith("aten::") and event.name not in _VIEWS
