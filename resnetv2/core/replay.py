"""Steps as a Python function: straight code, compiled once, that does them to other tensors."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .steps import Alloc, Call, Launch, Pointer, Register, Step, View, begin_of, registers, uses

_aten = torch.ops.aten

# The same operators as Python's bindings know them, in half the time of ``torch.ops``.
_BINDINGS: dict[Any, Callable[..., Any]] = {
    _aten.add.Tensor: torch.add,
    _aten.add_.Tensor: Tensor.add_,
    _aten.addcmul.default: torch.addcmul,
    _aten.addcmul_.default: Tensor.addcmul_,
    _aten.batch_norm_update_stats.default: torch.batch_norm_update_stats,
    _aten.cat.default: torch.cat,
    _aten.convolution.default: torch.convolution,
    _aten.mul.Tensor: torch.mul,
    _aten.mul_.Tensor: Tensor.mul_,
    _aten.native_batch_norm.default: torch.native_batch_norm,
    _aten.new_zeros.default: Tensor.new_zeros,
    _aten.relu_.default: torch.relu_,
    _aten.rsqrt_.default: torch.rsqrt_,
    _aten.stack.default: torch.stack,
    _aten.sub.Tensor: torch.sub,
}


class Code:
    """Writes steps as the source of a function of (inputs, stream).

    ``r3`` in the source is the tensor of register 3, ``a3`` its address.

    Args:
        inputs: how many tensors the function takes. offsets: where registers lie in the arena, in
            bytes. arena: its size. device: where it is taken.
        start_of: what starts a compiled kernel with addresses (``kernels.launch.start_of``); None:
            kernels are launched with tensors.
    """

    def __init__(
        self,
        inputs: int,
        offsets: Mapping[int, int],
        arena: int,
        device: torch.device,
        start_of: Callable[[Any], Any] | None,
    ) -> None:
        self._inputs = inputs
        self._offsets = offsets
        self._arena = arena
        self._start_of = start_of
        self._lines: list[str] = []
        # The values that the source names besides its own variables.
        self._names: dict[str, Any] = {
            "device": device,
            "empty": torch.empty_strided,
            "as_strided": torch.as_strided,
            "view": _view,
        }
        # Registers that kernels take by address.
        self._addressed: Container[int] = ()

    def compile(
        self, steps: Sequence[Step], outputs: Sequence[int]
    ) -> Callable[[Sequence[Tensor], Any], list[Tensor]]:
        """The function that does ``steps`` and returns ``outputs``."""
        as_tensor, self._addressed = uses(steps, outputs)
        # When a name is needed last; an owner also by those that share its memory by address.
        last = {number: max(places) for number, places in as_tensor.items()}
        for root, places in self._addressed.items():
            last[root] = max(last.get(root, -1), *places)
        ending: dict[int, list[int]] = {}
        for number, place in last.items():
            if number >= self._inputs and number not in self._offsets:
                ending.setdefault(place, []).append(number)
        if self._inputs:
            self._lines.append("".join(f"r{n}, " for n in range(self._inputs)) + "= inputs")
        for number in range(self._inputs):
            self._take_address(number)
        if self._arena:
            self._lines.append(f"held = {self._empty((self._arena,), (1,), torch.uint8)}")
            self._lines.append("arena = held" + ".data_ptr()" * self._by_address)
        for place, step in enumerate(steps):
            if isinstance(step, Alloc):
                self._alloc(step)
            elif isinstance(step, View):
                self._view(step)
            elif isinstance(step, Call):
                self._call(step)
            else:
                self._launch(step)
            if place in ending:
                self._lines.append(f"del {', '.join(f'r{number}' for number in ending[place])}")
        self._lines.append(f"return [{', '.join(f'r{number}' for number in outputs)}]")
        body = "".join(f"    {line}\n" for line in self._lines)
        source = f"def replay(inputs, stream):\n{body}"
        exec(compile(source, "<program of a chain>", "exec"), self._names)
        return self._names["replay"]  # type: ignore[no-any-return]

    def _alloc(self, step: Alloc) -> None:
        if step.register not in self._offsets:
            self._lines.append(
                f"r{step.register} = {self._empty(step.size, step.stride, step.dtype)}"
            )
            self._take_address(step.register)

    def _view(self, step: View) -> None:
        begin = str(step.offset)
        if step.root < self._inputs:
            begin += f" + r{step.root}.storage_offset()"
        size, stride = self._constant(step.size), self._constant(step.stride)
        self._lines.append(
            f"r{step.register} = as_strided(r{step.root}, {size}, {stride}, {begin})"
        )

    def _call(self, step: Call) -> None:
        args = [self._spell(value) for value in step.args]
        args += [f"{name}={self._spell(value)}" for name, value in step.kwargs.items()]
        # An operator in place returns a tensor that has its name already.
        left = ", ".join("_" if n is None else f"r{n}" for n in step.results) + "," * step.many
        self._lines.append(f"{left} = {self._constant(_binding(step))}({', '.join(args)})")
        for result in dict.fromkeys(step.results):
            if result is not None and result >= self._inputs:
                self._take_address(result)

    def _launch(self, step: Launch) -> None:
        args = [self._argument(value) for value in step.args]
        if self._start_of is None:
            from ..kernels.launch import launch

            function, kernel, grid = map(self._constant, (launch, step.kernel, step.grid))
            more = f"**{self._constant(step.constants)}"
            self._lines.append(f"{function}({', '.join([kernel, grid, *args, more])})")
            return
        start = self._start_of(step.compiled)
        head = [*map(str, (*step.grid, 1, 1)[:3]), "stream", *map(self._constant, start.before)]
        tail = ", ".join([*args, f"*{self._constant(start.constants)}"])
        tail = f"({tail})" if start.packed else tail
        self._lines.append(f"{self._constant(start.function)}({', '.join([*head, tail])})")

    @property
    def _by_address(self) -> bool:
        return self._start_of is not None

    def _take_address(self, number: int) -> None:
        if number in self._addressed and self._by_address:
            self._lines.append(f"a{number} = r{number}.data_ptr()")

    def _empty(self, size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> str:
        size_, stride_, dtype_ = map(self._constant, (size, stride, dtype))
        return f"empty({size_}, {stride_}, dtype={dtype_}, device=device)"

    def _constant(self, value: Any) -> str:
        """The name of a value, or its text where that is as short."""
        if value is None or type(value) in (bool, int):
            return repr(value)
        name = f"k{len(self._names)}"
        self._names[name] = value
        return name

    def _spell(self, value: Any) -> str:
        """An operator's argument."""
        if isinstance(value, Register):
            return f"r{value.number}"
        if isinstance(value, (list, tuple)) and registers(value):
            return f"[{', '.join(map(self._spell, value))}]"
        return self._constant(value)

    def _argument(self, value: Any) -> str:
        """A kernel's argument."""
        if not isinstance(value, Pointer):
            return self._constant(value)
        begin = self._offsets.get(value.register)
        if not self._by_address:
            base = f"r{value.register}" if begin is None else "arena"
            rest = (value.offset + (begin or 0), value.size, value.stride, value.dtype)
            return f"view({base}, {', '.join(map(self._constant, rest))})"
        if begin is None:
            return f"a{value.register}" + (f" + {value.offset}" if value.offset else "")
        return f"arena + {begin + value.offset}"


def _binding(step: Call) -> Callable[..., Any]:
    """The function that code calls for an operator."""
    if step.function is _aten._to_copy.default and step.kwargs.keys() == {"dtype"}:
        # Only recorded where the dtype was another one, which the program's key fixes.
        return Tensor.to
    found = _BINDINGS.get(step.function)
    return getattr(step.function, "_op", step.function) if found is None else found


def _view(
    base: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """A tensor in another one's memory; offset: bytes from its first element."""
    begin = (begin_of(base) + offset) // dtype.itemsize
    result = torch.empty(0, dtype=dtype, device=base.device)
    return result.set_(base.untyped_storage(), begin, size, stride)  # type: ignore[call-overload]
