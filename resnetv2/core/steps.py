"""The steps of a program (launches, operators, views, new tensors), and what uses which tensor."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Register(NamedTuple):
    """A tensor of the program, by number."""

    number: int


class Alloc(NamedTuple):
    """A tensor that is made without a value."""

    register: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes from its first to its last element."""
        if 0 in self.size:
            return 0
        last = sum((n - 1) * step for n, step in zip(self.size, self.stride))
        return (last + 1) * self.dtype.itemsize


class Call(NamedTuple):
    """An operator or Python function: registers stand for tensors among its arguments.

    results: the registers of its tensors, in order; None for what is no tensor. many: whether it
    returns a tuple or list. sizes: bytes of its tensors, those read and those written. moved:
    bytes of activations and weights among them, each counted once. flops: of a convolution.
    scratch: bytes that it allocates and frees itself.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: tuple[int | None, ...]
    many: bool
    sizes: tuple[int, int]
    moved: int = 0
    flops: int = 0
    scratch: int = 0


class View(NamedTuple):
    """A register's tensor as part of another one's memory. offset: elements from its first."""

    register: int
    root: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class Pointer(NamedTuple):
    """A kernel's tensor argument: a place in what a register holds."""

    register: int
    offset: int  # bytes
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Launch(NamedTuple):
    """A kernel launch: ``Pointer``s stand for tensors among its arguments."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    compiled: Any  # kernels.launch.Compiled, or None where Triton itself must launch
    flops: int = 0  # of a convolution

    @property
    def moved(self) -> int:
        """Bytes of its activations and weights, each counted once."""
        places = {a for a in self.args if isinstance(a, Pointer)}
        return sum(math.prod(a.size) * a.dtype.itemsize for a in places if is_large(a.size))


class Cost(NamedTuple):
    """Bytes that a launch or operator reads and writes, and its FLOPs."""

    name: str
    nbytes: int
    flops: int


Step = Alloc | Call | View | Launch


def registers(value: Any) -> list[int]:
    """The registers among a step's arguments, those in lists and dictionaries included."""
    if isinstance(value, Register):
        return [value.number]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [number for part in value for number in registers(part)]


@functools.cache
def is_view(function: Any) -> bool:
    """Whether an operator gives nothing but views of its arguments."""
    schema = getattr(function, "_schema", None)
    if schema is None:
        return False
    aliases = [r.alias_info for r in schema.returns]
    return bool(aliases) and all(a is not None and not a.is_write for a in aliases)


def is_large(shape: Sequence[int]) -> bool:
    """Whether a tensor is an activation or a weight, and not one value per channel."""
    return len(shape) == 4 and (shape[0], *shape[2:]) != (1, 1, 1)


def begin_of(tensor: Tensor) -> int:
    """Bytes between the beginning of a tensor's storage and its first element."""
    return int(tensor.storage_offset()) * tensor.dtype.itemsize


def uses(
    steps: Sequence[Step], outputs: Sequence[int]
) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """Per register the steps that read or write it as a tensor; per root those by address."""
    as_tensor: dict[int, list[int]] = {}
    by_address: dict[int, list[int]] = {}
    for place, step in enumerate(steps):
        if isinstance(step, Call):
            for number in (*registers((step.args, step.kwargs)), *step.results):
                if number is not None:
                    as_tensor.setdefault(number, []).append(place)
        elif isinstance(step, View):
            as_tensor.setdefault(step.root, []).append(place)
            as_tensor.setdefault(step.register, []).append(place)
        elif isinstance(step, Launch):
            for a in step.args:
                if isinstance(a, Pointer):
                    by_address.setdefault(a.register, []).append(place)
    for number in outputs:
        as_tensor.setdefault(number, []).append(len(steps))
    return as_tensor, by_address
