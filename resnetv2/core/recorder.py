"""Writes down what a chain does to its inputs: the steps of a program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from . import aten
from .steps import Alloc, Call, Launch, Pointer, Register, Step, View, begin_of, is_large, is_view

_aten = torch.ops.aten

# Operators that make a tensor without computing anything: a place in the arena, or a result.
_ALLOCATIONS = frozenset(
    {
        _aten.empty.memory_format,
        _aten.empty_strided.default,
        _aten.empty_like.default,
        _aten.new_empty.default,
        _aten.new_empty_strided.default,
    }
)


# Counters that are zeroed at once while a program is recorded.
_COUNTERS = 4096


class Recorder(TorchDispatchMode):
    """Writes down what is done to ``inputs`` while it is entered."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.steps: list[Step] = []
        # For each register: the one whose memory it shares, and where that begins in its storage.
        self.roots: list[tuple[int, int]] = [(n, begin_of(t)) for n, t in enumerate(inputs)]
        # For each register with its root's memory and dtype: where it lies there.
        self.views: dict[int, View] = {}
        # For each register: the bytes of its storage.
        self.storages = [tensor.untyped_storage().nbytes() for tensor in inputs]
        # FLOPs of the next launch.
        self.flops = 0
        # What kernels count in: while recording, what is left of a tensor of zeros; the register of
        # the one that a program makes; how many there are in it.
        self._zeros: Tensor | None = None
        self._counters = -1
        self._counted = 0
        self._device = inputs[0].device
        self._on_meta = any(tensor.is_meta for tensor in inputs)
        self._inputs = {id(tensor): number for number, tensor in enumerate(inputs)}
        # A tensor's register is written on it: it must not be kept alive, and ids come again.
        self._name = f"_register_of_{id(self)}"

    def register_of(self, tensor: Tensor) -> int:
        """The register that holds ``tensor``; KeyError for one that came from elsewhere."""
        number = self._inputs.get(id(tensor), tensor.__dict__.get(self._name))
        if number is None:
            raise KeyError("a chain used a tensor that is none of its inputs")
        return int(number)

    def _new(self, tensor: Tensor, sources: Sequence[Tensor] = ()) -> int:
        """The register of a result of an operator on ``sources``."""
        if id(tensor) in self._inputs or self._name in tensor.__dict__:
            return self.register_of(tensor)  # an operator in place
        number = len(self.roots)
        root = (number, begin_of(tensor))
        for source in sources:
            if _storage(source) == _storage(tensor):
                root = self.roots[self.register_of(source)]
                break
        tensor.__dict__[self._name] = number
        self.roots.append(root)
        self.storages.append(tensor.untyped_storage().nbytes())
        return number

    def _note_view(self, tensor: Tensor, sources: Sequence[Tensor]) -> None:
        number = self.register_of(tensor)
        root, begin = self.roots[number]
        if root != number and all(source.dtype == tensor.dtype for source in sources):
            offset = (begin_of(tensor) - begin) // tensor.dtype.itemsize
            size, stride = tuple(tensor.shape), tuple(tensor.stride())
            self.views[number] = View(number, root, size, stride, offset)

    def _replace(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return Register(self.register_of(value))
        if isinstance(value, (list, tuple)):
            return [self._replace(part) for part in value]
        return value

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        known = aten.ON_META.get(func, func) if self._on_meta else func
        result = known(*args, **kwargs)
        if func in _ALLOCATIONS:
            number = self._new(result)
            size, stride = tuple(result.shape), tuple(result.stride())
            self.steps.append(Alloc(number, size, stride, result.dtype))
        else:
            self._write(func, args, kwargs, result)
        return result

    def _write(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        sources = [*_tensors(args), *_tensors(kwargs.values())]
        many = isinstance(result, (tuple, list))
        values = result if many else (result,)
        if not sources and not _tensors(values):
            return  # promote_types, say
        results = tuple(
            self._new(value, sources) if isinstance(value, Tensor) else None for value in values
        )
        if is_view(func):
            for value in _tensors(values):
                self._note_view(value, sources)
        sizes = sum(map(_nbytes, sources)), sum(map(_nbytes, _tensors(values)))
        shapes = {id(tensor) for tensor in aten.unread(func, args)}
        read = {self.register_of(t): t for t in sources if id(t) not in shapes}
        moved = sum(_nbytes(t) for t in (*read.values(), *_tensors(values)) if is_large(t.shape))
        about = aten.flops(func, args, values), aten.scratch(func, args, values)
        named = {name: self._replace(value) for name, value in kwargs.items()}
        self.steps.append(
            Call(func, tuple(self._replace(args)), named, results, many, sizes, moved, *about)
        )

    def counters(self, number: int) -> Tensor:
        """``number`` int32 zeros that no other launch has (``kernels.recording``)."""
        number += -number % 4  # each launch's begin at a multiple of 16 bytes, wherever they lie
        with _disable_current_modes():
            if self._zeros is None or self._zeros.numel() < number:
                size = max(number, _COUNTERS)
                self._zeros = torch.zeros(size, dtype=torch.int32, device=self._device)
            counters, self._zeros = self._zeros[:number], self._zeros[number:]
        if self._counters < 0:
            self._counters = len(self.roots)
            self.roots.append((self._counters, 0))
            self.storages.append(0)
        counters.__dict__[self._name] = len(self.roots)
        # Where the root would begin, seen from here.
        self.roots.append((self._counters, begin_of(counters) - self.storages[self._counters]))
        self.storages.append(0)
        self.storages[self._counters] += number * counters.dtype.itemsize
        self._counted += number
        return counters

    def finish(self) -> None:
        """Have all counters zeroed, at once, before they are first counted in."""
        if self._counted:
            register, size = self._counters, self.storages[self._counters]
            zero = Call(
                _aten.zero_.default, (Register(register),), {}, (register,), False, (0, size)
            )
            self.steps[:0] = [Alloc(register, (self._counted,), (1,), torch.int32), zero]

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """``function(*args)`` as one step, whatever it does inside."""
        with _disable_current_modes():
            result = function(*args)
        self._write(function, args, {}, result)
        return result

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        args: tuple[Any, ...],
        constants: dict[str, Any],
        run: Callable[..., Any],
    ) -> None:
        """A kernel launch; ``run`` does it and gives what starts it again."""
        flops, self.flops = self.flops, 0
        with _disable_current_modes():
            compiled = run(kernel, grid, args, constants)
        pointers = tuple(self._pointer(a) if isinstance(a, Tensor) else a for a in args)
        self.steps.append(Launch(kernel, grid, pointers, constants, compiled, flops))

    def _pointer(self, tensor: Tensor) -> Pointer:
        root, begin = self.roots[self.register_of(tensor)]
        size, stride = tuple(tensor.shape), tuple(tensor.stride())
        return Pointer(root, begin_of(tensor) - begin, size, stride, tensor.dtype)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.dtype.itemsize


def _tensors(values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found
