"""What a chain does for one set of shapes, recorded once and replayed.

``record`` runs a function of tensors once, as it is, and writes down what reaches the device:
kernel launches, ATen operators, calls of Python functions (collectives). The ``Program`` that comes
of it does the same to other tensors of the same shapes without the Python that decided on it: code
without branches, compiled once, in which a launch is a call of Triton's launcher with addresses
filled in.

Temporaries that only kernels touch lie in one arena, which a replay takes from PyTorch's allocator
as a whole; their offsets are planned from when they are first and last used. Results are tensors
of their own. What a Program depends on besides its inputs' values must be in the key under which it
is kept (``Programs``).
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ..kernels import recording
from . import aten

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

# Every offset in the arena is a multiple: vector loads want 16, cache lines 128.
_ALIGNMENT = 256


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
        return sum(math.prod(a.size) * a.dtype.itemsize for a in places if _is_large(a.size))


class StepCost(NamedTuple):
    """What one launch or operator moves and multiplies. nbytes: read plus written."""

    name: str
    nbytes: int
    flops: int


Step = Alloc | Call | View | Launch


class Recorder(TorchDispatchMode):
    """Writes down what is done to ``inputs`` while it is entered."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.steps: list[Step] = []
        # Of each register the one whose memory it shares, and where that begins in its storage.
        self.roots: list[tuple[int, int]] = [(n, _begin(t)) for n, t in enumerate(inputs)]
        # Of each register that shares its root's memory and dtype: where it lies there.
        self.views: dict[int, View] = {}
        # Of each register the bytes of its storage.
        self.storages = [tensor.untyped_storage().nbytes() for tensor in inputs]
        # FLOPs of the next launch.
        self.flops = 0
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
        root = (number, _begin(tensor))
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
            offset = (_begin(tensor) - begin) // tensor.dtype.itemsize
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
        if _is_view(func):
            for value in _tensors(values):
                self._note_view(value, sources)
        sizes = sum(map(_nbytes, sources)), sum(map(_nbytes, _tensors(values)))
        read = {self.register_of(tensor): tensor for tensor in sources}
        moved = sum(_nbytes(t) for t in (*read.values(), *_tensors(values)) if _is_large(t.shape))
        about = aten.flops(func, args, values), aten.scratch(func, args, values)
        named = {name: self._replace(value) for name, value in kwargs.items()}
        self.steps.append(
            Call(func, tuple(self._replace(args)), named, results, many, sizes, moved, *about)
        )

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
        return Pointer(root, _begin(tensor) - begin, size, stride, tensor.dtype)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _begin(tensor: Tensor) -> int:
    """Bytes between the beginning of a tensor's storage and its first element."""
    return int(tensor.storage_offset()) * tensor.dtype.itemsize


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.dtype.itemsize


def _is_large(shape: Sequence[int]) -> bool:
    """Whether a tensor is an activation or a weight, and not one value per channel."""
    return len(shape) == 4 and (shape[0], *shape[2:]) != (1, 1, 1)


def _tensors(values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found


class Program:
    """Recorded steps as one function of tensors like those that they were recorded with.

    Args:
        recorder: what was recorded. inputs: how many tensors the function takes. outputs: the
            registers of its results. device: where it runs.

    Attributes:
        steps: in order, without views that nothing reads. arena: bytes of the temporaries that only
        kernels touch. faults: what a replay raises where its choices hold no longer.
    """

    def __init__(
        self, recorder: Recorder, inputs: int, outputs: Sequence[int], device: torch.device
    ) -> None:
        self.device = device
        self.inputs = inputs
        self.outputs = tuple(outputs)
        self.roots = [root for root, _ in recorder.roots]
        self._storages = recorder.storages
        self.steps = _without_unread(recorder.steps, self.outputs)
        self.steps = _without_copies(self.steps, self.outputs, self.roots)
        self.steps = _with_short_views(self.steps, recorder.views, self.outputs)
        self.offsets, self.arena = self._plan_arena()
        launches = [step for step in self.steps if isinstance(step, Launch)]
        # kernels.launch, where all launches can be started again without Triton's own launcher.
        self._launcher: Any = None
        # What a kernel raises that can no longer be had: the choices in this program are void.
        self.faults: tuple[type[Exception], ...] = ()
        if launches:
            from ..kernels import launch

            self.faults = (launch.KernelError,)
            if all(step.compiled is not None for step in launches):
                self._launcher = launch
        self._fast: Callable[..., list[Tensor]] | None = None
        self._slow: Callable[..., list[Tensor]] | None = None

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The results for ``inputs``."""
        if self.device.type == "cuda" and self.device.index != torch.cuda.current_device():
            with torch.cuda.device(self.device):
                return self(inputs)
        stream = self._launcher.replay_stream() if self._launcher is not None else None
        if stream is None:
            if self._slow is None:
                self._slow = self._code(by_address=False)
            return self._slow(inputs, stream)
        if self._fast is None:
            self._fast = self._code(by_address=True)
        return self._fast(inputs, stream)

    def allocs(self) -> dict[int, Alloc]:
        """Tensors that are made without a value, by register."""
        return {step.register: step for step in self.steps if isinstance(step, Alloc)}

    @functools.cached_property
    def costs(self) -> list[StepCost]:
        """What is launched and called, in order, views left out."""
        found = []
        for step in self.steps:
            if isinstance(step, Launch):
                found.append(StepCost(step.kernel.fn.__name__, step.moved, step.flops))
            elif isinstance(step, Call) and not _is_view(step.function):
                name = getattr(step.function, "overloadpacket", step.function).__name__
                found.append(StepCost(name, step.moved, step.flops))
        return found

    @functools.cached_property
    def peak(self) -> int:
        """Most bytes that a replay holds besides its inputs: the arena, results, and all between.

        A tensor is held from the step that makes it to the last one that uses it.
        """
        as_tensor, addressed = self._uses()
        last: dict[int, int] = {}
        for number, places in (*as_tensor.items(), *addressed.items()):
            root = self.roots[number]
            last[root] = max(last.get(root, -1), *places)
        ending: dict[int, list[int]] = {}
        for root, place in last.items():
            ending.setdefault(place, []).append(root)
        held: dict[int, int] = {}
        alive = most = self.arena
        for place, step in enumerate(self.steps):
            made: dict[int, int] = {}
            scratch = 0
            if isinstance(step, Alloc) and step.register not in self.offsets:
                made[step.register] = step.nbytes
            elif isinstance(step, Call):
                scratch = step.scratch
                numbers = [number for number in step.results if number is not None]
                made = {self.roots[number]: self._storages[number] for number in numbers}
            for root, nbytes in made.items():
                if root >= self.inputs and root not in held:
                    held[root] = nbytes
                    alive += nbytes
            most = max(most, alive + scratch)
            for root in ending.get(place, ()):
                alive -= held.get(root, 0)
        return most

    def _uses(self) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
        """Per register the steps that read or write it as a tensor; per root those by address."""
        as_tensor: dict[int, list[int]] = {}
        by_address: dict[int, list[int]] = {}
        for place, step in enumerate(self.steps):
            if isinstance(step, Call):
                for number in (*_registers((step.args, step.kwargs)), *step.results):
                    if number is not None:
                        as_tensor.setdefault(number, []).append(place)
            elif isinstance(step, View):
                as_tensor.setdefault(step.root, []).append(place)
                as_tensor.setdefault(step.register, []).append(place)
            elif isinstance(step, Launch):
                for a in step.args:
                    if isinstance(a, Pointer):
                        by_address.setdefault(a.register, []).append(place)
        for number in self.outputs:
            as_tensor.setdefault(number, []).append(len(self.steps))
        return as_tensor, by_address

    def _plan_arena(self) -> tuple[dict[int, int], int]:
        """The offset of each tensor that lies in the arena, and the arena's size.

        The largest first, each as low as it can lie beside those that live at the same time.
        """
        as_tensor, addressed = self._uses()
        touched = {self.roots[number] for number in as_tensor}
        lives = [
            (alloc.nbytes, min(addressed[number]), max(addressed[number]), number)
            for number, alloc in self.allocs().items()
            if number in addressed and number not in touched
        ]
        offsets: dict[int, int] = {}
        placed: list[tuple[int, int, int, int]] = []  # begin, end, first and last use
        for nbytes, first, last, number in sorted(lives, key=lambda life: (-life[0], life[3])):
            size = max(nbytes, 1) + -max(nbytes, 1) % _ALIGNMENT
            begin = 0
            for low, high, start, stop in sorted(placed):
                if start <= last and first <= stop:
                    if begin + size <= low:
                        break
                    begin = max(begin, high)
            placed.append((begin, begin + size, first, last))
            offsets[number] = begin
        return offsets, max((high for _, high, _, _ in placed), default=0)

    def _code(self, by_address: bool) -> Callable[..., list[Tensor]]:
        """The steps as a Python function of (inputs, stream).

        by_address: whether compiled kernels are started with addresses, or launched with tensors.
        """
        names: dict[str, Any] = {
            "device": self.device,
            "empty": torch.empty_strided,
            "as_strided": torch.as_strided,
        }
        lines: list[str] = []
        as_tensor, addressed = self._uses()
        # When a name is needed last; an owner also by those that share its memory by address.
        last = {number: max(places) for number, places in as_tensor.items()}
        for root, places in addressed.items():
            last[root] = max(last.get(root, -1), *places)
        ending: dict[int, list[int]] = {}
        for number, place in last.items():
            if number >= self.inputs and number not in self.offsets:
                ending.setdefault(place, []).append(number)

        def constant(value: Any) -> str:
            if value is None or type(value) in (bool, int):
                return repr(value)
            name = f"k{len(names)}"
            names[name] = value
            return name

        def spell(value: Any) -> str:
            if isinstance(value, Register):
                return f"r{value.number}"
            if isinstance(value, (list, tuple)):
                if _registers(value):
                    return f"[{', '.join(map(spell, value))}]"
                return constant(value)
            return constant(value)

        def address(number: int) -> None:
            if number in addressed and by_address:
                lines.append(f"a{number} = r{number}.data_ptr()")

        def argument(value: Any) -> str:
            if not isinstance(value, Pointer):
                return constant(value)
            begin = self.offsets.get(value.register)
            if not by_address:
                base = f"r{value.register}" if begin is None else "arena"
                offset = value.offset + (begin or 0)
                rest = (offset, value.size, value.stride, value.dtype)
                return f"view({base}, {', '.join(map(constant, rest))})"
            if begin is None:
                return f"a{value.register}" + (f" + {value.offset}" if value.offset else "")
            return f"arena + {begin + value.offset}"

        if self.inputs:
            lines.append("".join(f"r{number}, " for number in range(self.inputs)) + "= inputs")
        for number in range(self.inputs):
            address(number)
        if self.arena:
            names["bytes_"] = (torch.uint8, (self.arena,))
            lines.append("held = empty(bytes_[1], (1,), dtype=bytes_[0], device=device)")
            lines.append("arena = held.data_ptr()" if by_address else "arena = held")
        names["view"] = _view
        if any(isinstance(step, Launch) for step in self.steps):
            from ..kernels.launch import launch

            names["launch"] = launch
        for place, step in enumerate(self.steps):
            if isinstance(step, Alloc):
                if step.register not in self.offsets:
                    size, stride, dtype = map(constant, (step.size, step.stride, step.dtype))
                    lines.append(
                        f"r{step.register} = empty({size}, {stride}, dtype={dtype}, device=device)"
                    )
                    address(step.register)
            elif isinstance(step, View):
                begin = str(step.offset)
                if step.root < self.inputs:
                    begin += f" + r{step.root}.storage_offset()"
                size, stride = constant(step.size), constant(step.stride)
                lines.append(
                    f"r{step.register} = as_strided(r{step.root}, {size}, {stride}, {begin})"
                )
            elif isinstance(step, Call):
                args = [spell(value) for value in step.args]
                args += [f"{name}={spell(value)}" for name, value in step.kwargs.items()]
                call = f"{constant(_binding(step))}({', '.join(args)})"
                # An operator in place returns what has its name already.
                left = ", ".join("_" if n is None else f"r{n}" for n in step.results)
                left += "," * step.many
                lines.append(f"{left} = {call}")
                for result in dict.fromkeys(step.results):
                    if result is not None and result >= self.inputs:
                        address(result)
            else:
                args = [argument(value) for value in step.args]
                if by_address:
                    start = self._launcher.start_of(step.compiled)
                    head = [
                        *map(str, (*step.grid, 1, 1)[:3]),
                        "stream",
                        *map(constant, start.before),
                    ]
                    tail = ", ".join([*args, f"*{constant(start.constants)}"])
                    tail = f"({tail})" if start.packed else tail
                    lines.append(f"{constant(start.function)}({', '.join([*head, tail])})")
                else:
                    how = map(constant, (step.kernel, step.grid))
                    more = f"**{constant(step.constants)}"
                    lines.append(f"launch({', '.join([*how, *args, more])})")
            gone = [f"r{number}" for number in ending.get(place, ())]
            if gone:
                lines.append(f"del {', '.join(gone)}")
        lines.append(f"return [{', '.join(f'r{number}' for number in self.outputs)}]")
        source = "def replay(inputs, stream):\n" + "".join(f"    {line}\n" for line in lines)
        exec(compile(source, "<program of a chain>", "exec"), names)
        return names["replay"]  # type: ignore[no-any-return]


def _binding(step: Call) -> Callable[..., Any]:
    """What code calls in place of an operator."""
    if step.function is _aten._to_copy.default and step.kwargs.keys() == {"dtype"}:
        # Only recorded where the dtype was another one, which the program's key fixes.
        return Tensor.to
    found = _BINDINGS.get(step.function)
    return getattr(step.function, "_op", step.function) if found is None else found


def _view(
    base: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """A tensor in another one's memory; offset: bytes from its first element."""
    begin = (_begin(base) + offset) // dtype.itemsize
    result = torch.empty(0, dtype=dtype, device=base.device)
    return result.set_(base.untyped_storage(), begin, size, stride)  # type: ignore[call-overload]


def _registers(value: Any) -> list[int]:
    if isinstance(value, Register):
        return [value.number]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [number for part in value for number in _registers(part)]


def _without_unread(steps: Sequence[Step], outputs: Sequence[int]) -> list[Step]:
    """Leave out what nothing reads: views that kernels took by address, tensors never written."""
    read = set(outputs)
    kept: list[Step] = []
    for step in reversed(steps):
        if isinstance(step, Call):
            if _is_view(step.function) and not read.intersection(step.results):
                continue
            read.update(_registers((step.args, step.kwargs)))
        elif isinstance(step, View):
            if step.register not in read:
                continue
            read.add(step.root)
        elif isinstance(step, Launch):
            read.update(a.register for a in step.args if isinstance(a, Pointer))
        elif isinstance(step, Alloc) and step.register not in read:
            continue
        kept.append(step)
    return kept[::-1]


def _without_copies(
    steps: Sequence[Step], outputs: Sequence[int], roots: Sequence[int]
) -> list[Step]:
    """Where tensors that kernels write are concatenated, let kernels write them in their places."""
    for place, cat in enumerate(steps):
        if not (isinstance(cat, Call) and cat.function is _aten.cat.default):
            continue
        (result,) = cat.results
        owners = [roots[number] for number in _registers(cat.args)]
        allocs = {s.register: s for s in steps if isinstance(s, Alloc) and s.register in owners}
        # Views that lead to the concatenation, whatever else reads one of them.
        views = {
            at
            for at, step in enumerate(steps)
            if isinstance(step, Call)
            and step is not cat
            and not set(owners).isdisjoint(roots[number] for number in _registers(step.args))
        }
        begins, total = {}, 0
        for owner in owners:
            begins[owner] = total
            total += allocs[owner].nbytes if owner in allocs else 0
        if (
            len(allocs) < len(owners)
            or total != cat.sizes[1]
            or len({alloc.dtype for alloc in allocs.values()}) > 1
            or any(begin % 16 for begin in begins.values())
            or not set(owners).isdisjoint(roots[number] for number in outputs)
            or any(not _is_view(steps[at].function) for at in views)  # type: ignore[union-attr]
        ):
            continue
        dtype = allocs[owners[0]].dtype
        assert result is not None
        joined: list[Step] = [Alloc(result, (total // dtype.itemsize,), (1,), dtype)]
        for at, step in enumerate(steps):
            if at == place or at in views or (isinstance(step, Alloc) and step.register in allocs):
                continue
            if isinstance(step, Launch):
                args = tuple(
                    a._replace(register=result, offset=a.offset + begins[a.register])
                    if isinstance(a, Pointer) and a.register in begins
                    else a
                    for a in step.args
                )
                step = step._replace(args=args)
            joined.append(step)
        return _without_copies(joined, outputs, roots)
    return list(steps)


def _with_short_views(
    steps: Sequence[Step], views: dict[int, View], outputs: Sequence[int]
) -> list[Step]:
    """Make each view of its root at once, and once, instead of through others."""
    known: dict[tuple[Any, ...], int] = {}
    same: dict[int, int] = {}
    short: list[Step] = []
    for step in steps:
        if not isinstance(step, Call):
            short.append(step)
            continue
        made = [views.get(n) for n in step.results if n is not None]
        if _is_view(step.function) and all(view is not None for view in made):
            for view in made:
                assert view is not None
                first = known.setdefault(view[1:], view.register)
                if view.register in outputs or first == view.register:
                    short.append(view)
                else:
                    same[view.register] = first
            continue
        if same:
            args = _renamed(step.args, same)
            step = step._replace(args=args, kwargs=_renamed(step.kwargs, same))
            # An operator in place gives its argument back.
            step = step._replace(results=tuple(same.get(n, n) for n in step.results))  # type: ignore[arg-type]
        short.append(step)
    return _without_unread(short, outputs)


def _renamed(value: Any, names: dict[int, int]) -> Any:
    """``value`` with other registers in the place of some."""
    if isinstance(value, Register):
        return Register(names.get(value.number, value.number))
    if isinstance(value, dict):
        return {key: _renamed(part, names) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_renamed(part, names) for part in value)
    return value


@functools.cache
def _is_view(function: Any) -> bool:
    schema = getattr(function, "_schema", None)
    if schema is None:
        return False
    aliases = [r.alias_info for r in schema.returns]
    return bool(aliases) and all(a is not None and not a.is_write for a in aliases)


def record(
    function: Callable[..., tuple[Sequence[Tensor], Any]],
    inputs: Sequence[Tensor],
    device: torch.device,
) -> tuple[Program, list[Tensor], Any]:
    """Run ``function(*inputs)``, which gives tensors and something static, and record it.

    Returns the program, and what this run gave.
    """
    recorder = Recorder(inputs)
    with recording.to(recorder), recorder:
        results, static = function(*inputs)
    outputs = [recorder.register_of(tensor) for tensor in results]
    return Program(recorder, len(inputs), outputs, device), list(results), static


class Programs:
    """The programs in use, by key; the one used least recently goes where there are too many.

    Args:
        limit: how many are kept.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        # With each what its function gave that is static, and what its key names by identity.
        self._kept: OrderedDict[Hashable, tuple[Program, Any, Any]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def run(
        self,
        key: Hashable,
        function: Callable[..., tuple[Sequence[Tensor], Any]],
        inputs: Sequence[Tensor],
        device: torch.device,
        named: Any = None,
    ) -> tuple[list[Tensor], Any]:
        """``function(*inputs)``: replayed, or run and recorded where ``key`` is new.

        named: what must live as long as the key, which has its id.
        """
        found = self._kept.get(key)
        if found is not None:
            with contextlib.suppress(KeyError):
                self._kept.move_to_end(key)
            # A kernel that fails now has what replaces it chosen as at first (kernels.fallback).
            with contextlib.suppress(*found[0].faults):
                return found[0](inputs), found[1]
        program, results, static = record(function, inputs, device)
        with self._lock:
            self._kept[key] = program, static, named
            while len(self._kept) > self.limit:
                self._kept.popitem(last=False)
        return results, static

    def clear(self) -> None:
        """Forget all of them."""
        with self._lock:
            self._kept.clear()
