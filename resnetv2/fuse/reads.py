"""Where the Python code of a traced forward found what it read: guards and entries of a watch."""

from __future__ import annotations

import dis
import gc
import types
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..core.checks import CHILD_ATTRIBUTES
from .frozen import A_TENSOR, ABSENT, Absent, Freezer, Frozen
from .observer import PURE_MODULES, PURE_TYPES, Observer, Ran, is_torchs
from .reasons import NotAUnitError
from .watch import Cells, Entry, attributes_of

# What PyTorch looks up on the class of a module that is called; any of them may decide.
_PROTOCOL = frozenset(
    (
        "forward", "__call__", "_call_impl", "_wrapped_call_impl", "_conv_forward",
        "_check_input_dim", "__getattr__", "__getattribute__", "__iter__", "__len__", "__getitem__",
        "__contains__", "__bool__", "__eq__", "__get__", "__instancecheck__", *CHILD_ATTRIBUTES,
    )
)  # fmt: skip

_PLAIN_CLASSES = (
    *PURE_TYPES, super, object, zip, map, filter, enumerate, reversed, property, staticmethod,
    classmethod, types.SimpleNamespace, types.FunctionType, types.MethodType,
)  # fmt: skip

_GEOMETRY = ("out_channels", "kernel_size", "stride", "padding", "dilation")

Guard = tuple[tuple[str, ...], str, Frozen]


class Reads:
    """What a trace's code read, to be looked up in the module that was traced a copy of."""

    def __init__(self, observer: Observer, asked: bool) -> None:
        self.observer = observer
        self.asked = asked  # for the shape of a tensor
        self.names: set[str] = set()  # of attributes
        self.dynamic = False
        self._instructions = {
            code: list(_executed(code, observer.offsets.get(code)))
            for code in dict.fromkeys(ran.code for ran in observer.ran.values())
        }
        for code, instructions in self._instructions.items():
            for instruction in instructions:
                name = instruction.opname
                if name in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "STORE_ATTR"):
                    self.names.add(str(instruction.argval))
                elif name == "LOAD_GLOBAL" and instruction.argval in ("getattr", "hasattr"):
                    self.dynamic = True
                    self.names.update(c for c in code.co_consts if isinstance(c, str))
        self.names.update(name for _, name in observer.log)

    def check(self) -> None:
        """Raise NotAUnitError for what no watch can hold."""
        if self.observer.reasons:
            raise NotAUnitError(self.observer.reasons[0], True)
        for code, instructions in self._instructions.items():
            for instruction in instructions:
                name, argument = instruction.opname, instruction.argval
                if name in ("STORE_GLOBAL", "DELETE_GLOBAL"):
                    raise NotAUnitError(f"its forward assigns the global {argument}", True)
                if name == "IMPORT_NAME" and str(argument).partition(".")[0] not in (
                    "torch", "math"
                ):  # fmt: skip
                    raise NotAUnitError(f"{code.co_name} imports {argument or 'a module'}", True)

    def guards(self, module: nn.Module, inside: nn.Module | None = None) -> list[Guard]:
        """The attributes of a block's modules that were read, and what they are now.

        inside: the block, if ``module`` is only a part of it.
        """
        freezer, _ = self._freezer(inside or module)
        found = []
        for path, name in self.observer.log:
            owner: Any = module
            for part in path:
                owner = owner._modules[part]
            value = lookup(owner, name)
            if isinstance(value, nn.Module) and name in owner._modules:
                continue  # children are read afresh, and checked themselves
            words = ".".join((*path, name))
            if isinstance(value, Tensor) and not _is_plain_attribute(owner, name):
                frozen = A_TENSOR
            else:
                frozen = _with_words(freezer, value, words)
            found.append((path, name, frozen))
        if self.asked:
            # Channels and sizes were answered from these.
            for full, child in module.named_modules():
                for name in _GEOMETRY if isinstance(child, nn.Conv2d) else ():
                    words = f"{full}.{name}"
                    value = freezer.freeze(getattr(child, name), words)
                    found.append((tuple(full.split(".")), name, value))
        return found

    def entries(self, module: nn.Module) -> list[Entry]:
        """Everything else that was read, and what it is now.

        All copies of the block share it, so that no module may be in it.
        """
        self.check()
        freezer, queue = self._freezer(None)
        found: list[Entry] = []
        for child in module.modules():
            queue.append(type(child))
        nested = {inner for code in self._instructions for inner in _nested(code)}
        for ran in self.observer.ran.values():
            instructions = self._instructions[ran.code]
            self._enter_globals(ran, instructions, freezer, found)
            if ran.code not in nested:
                for function in _functions_of(ran, module):
                    self._enter_function(function, instructions, freezer, found)
        for _, _, frozen in self.guards(module):
            _reach(frozen, queue)
        done: set[int] = set()
        while queue:
            owner = queue.pop()
            for each in owner.__mro__ if isinstance(owner, type) else (owner,):
                if id(each) in done:
                    continue
                done.add(id(each))
                if isinstance(each, type):
                    self._enter_class(each, freezer, found)
                else:
                    self._enter_module(each, freezer, found)
        return found

    def _freezer(self, module: nn.Module | None) -> tuple[Freezer, list[Any]]:
        queue: list[Any] = []
        inside = set() if module is None else {id(m) for m in module.modules()}
        freezer = Freezer(inside, queue.append, queue.append)
        return freezer, queue

    def _enter_globals(
        self,
        ran: Ran,
        instructions: list[dis.Instruction],
        freezer: Freezer,
        found: list[Entry],
    ) -> None:
        builtins = ran.names.get("__builtins__", {})
        builtins = builtins if isinstance(builtins, dict) else vars(builtins)
        for instruction in instructions:
            if instruction.opname not in ("LOAD_GLOBAL", "LOAD_NAME"):
                continue
            name = str(instruction.argval)
            words = f"the global {name}"
            value = ran.names.get(name, Absent)
            if value is Absent:
                found.append(Entry(ran.names.get, name, ABSENT, words))
                value = builtins.get(name, Absent)
                _refuse_class(value, f"its forward calls {name}()")
                continue
            _refuse_class(value, f"its forward uses {name}")
            module = value.__name__ if isinstance(value, types.ModuleType) else "torch"
            if self.dynamic and not is_torchs(module) and module not in PURE_MODULES:
                raise NotAUnitError(f"its forward may read any attribute of {name}", True)
            found.append(Entry(ran.names.get, name, _with_words(freezer, value, words), words))

    def _enter_function(
        self,
        function: types.FunctionType,
        instructions: list[dis.Instruction],
        freezer: Freezer,
        found: list[Entry],
    ) -> None:
        name = function.__qualname__.replace(".<locals>", "")
        get = attributes_of(function)
        found.append(Entry(get, "__code__", Frozen(function.__code__, "is"), f"the code of {name}"))
        for key in ("__defaults__", "__kwdefaults__"):
            words = f"the defaults of {name}"
            found.append(Entry(get, key, _with_words(freezer, get(key, Absent), words), words))
        cells = Cells(function)
        read = {
            str(i.argval)
            for i in instructions
            if i.opname in ("LOAD_DEREF", "LOAD_CLOSURE", "LOAD_CLASSDEREF", "STORE_DEREF",
                            "LOAD_FROM_DICT_OR_DEREF", "LOAD_FAST")
        }  # fmt: skip
        for place, free in enumerate(function.__code__.co_freevars):
            if free in read:
                words = f"{free}, a variable of {name}"
                frozen = _with_words(freezer, cells(place), words)
                found.append(Entry(cells, place, frozen, words))

    def _enter_module(self, module: types.ModuleType, freezer: Freezer, found: list[Entry]) -> None:
        attributes = vars(module)
        torchs = is_torchs(module.__name__)
        for name in self.names:
            value = attributes.get(name, Absent)
            if torchs and not isinstance(value, (types.FunctionType, types.BuiltinFunctionType)):
                continue  # PyTorch's own state is not read by name
            words = f"{module.__name__}.{name}"
            _refuse_class(value, f"its forward uses {words}")
            found.append(Entry(attributes.get, name, _with_words(freezer, value, words), words))

    def _enter_class(self, base: type, freezer: Freezer, found: list[Entry]) -> None:
        if is_torchs(base.__module__) or base.__module__ == "builtins":
            return
        # The dictionary itself: its proxy takes ten times as long.
        attributes = next((d for d in gc.get_referents(vars(base)) if isinstance(d, dict)), None)
        assert attributes is not None
        bases = Frozen(base.__mro__, "is")
        found.append(Entry(attributes_of(base), "__mro__", bases, f"the bases of {base.__name__}"))
        names = self.names | _PROTOCOL
        if self.dynamic and not issubclass(base, nn.Module):
            names = names | {name for name in attributes if not name.startswith("_")}
        for name in names - {"__dict__", "__weakref__", "__class__", "__doc__", "__module__"}:
            value = attributes.get(name, Absent)
            words = f"{base.__name__}.{name}"
            found.append(Entry(attributes.get, name, _with_words(freezer, value, words), words))


def _reach(frozen: Frozen, queue: list[Any]) -> None:
    """Classes and Python modules in a frozen value."""
    value = frozen.value
    if isinstance(value, (type, types.ModuleType)) and value is not Absent:
        queue.append(value)
    elif not isinstance(value, nn.Module) and type(value).__module__ != "builtins":
        queue.append(type(value))
    for part in frozen.parts or ():
        _reach(part, queue)


def _with_words(freezer: Freezer, value: Any, words: str) -> Frozen:
    try:
        return freezer.freeze(value, words)
    except NotAUnitError as error:
        error.resembles = True
        raise


def _refuse_class(value: Any, words: str) -> None:
    """A class of an extension module may make anything, and is called without an event."""
    if not isinstance(value, type) or value is Absent or value in _PLAIN_CLASSES:
        return
    if value is type:
        raise NotAUnitError("its forward asks for the type of a value", True)
    python = bool(value.__flags__ & (1 << 9))
    known = value.__module__ in ("collections", "itertools") or is_torchs(value.__module__)
    if not python and not known and not issubclass(value, BaseException):
        raise NotAUnitError(f"{words}, which is not written in Python", True)


def lookup(module: nn.Module, name: str) -> Any:
    """What an attribute's name is on a module itself, without its class; ``Absent`` if nothing."""
    for place in (vars(module), module._parameters, module._buffers, module._modules):
        if name in place:
            return place[name]
    return Absent


def _is_plain_attribute(module: nn.Module, name: str) -> bool:
    return name in vars(module)


def _functions_of(ran: Ran, module: nn.Module) -> list[types.FunctionType]:
    """The functions that ran: those of the code, and of the variables that it closed over."""
    qualified = getattr(ran.code, "co_qualname", "<locals>")
    if "<locals>" not in qualified and "<lambda>" not in qualified:
        owner: Any = ran.names
        for part in qualified.split("."):
            attributes = owner if isinstance(owner, dict) else getattr(owner, "__dict__", {})
            owner = attributes.get(part)
        for function in _unwrapped(owner):
            if function.__code__ is ran.code:
                return [function]
    found = [
        function
        for function in gc.get_referrers(ran.code)
        if isinstance(function, types.FunctionType)
        and function.__code__ is ran.code
        and function.__globals__ is ran.names
        and _closes_over(function, ran)
    ]
    if not found:
        hidden = ", since gc.freeze() hides it: fuse before" if gc.get_freeze_count() else ""
        raise NotAUnitError(f"where {ran.code.co_name} comes from cannot be told{hidden}", True)
    return found


def _unwrapped(value: Any) -> Iterator[types.FunctionType]:
    """The functions in a class's attribute."""
    if isinstance(value, types.FunctionType):
        yield value
        yield from _unwrapped(getattr(value, "__wrapped__", None))
    elif isinstance(value, (staticmethod, classmethod)):
        yield from _unwrapped(value.__func__)
    elif isinstance(value, property):
        for function in (value.fget, value.fset, value.fdel):
            yield from _unwrapped(function)


def _closes_over(function: types.FunctionType, ran: Ran) -> bool:
    cells = Cells(function)
    return all(cells(place) is value for place, (_, value) in enumerate(ran.cells))


def _executed(code: types.CodeType, offsets: set[int] | None) -> Iterator[dis.Instruction]:
    """The instructions that ran; all of them where no event said so."""
    extended = False
    for instruction in dis.get_instructions(code):
        if extended or not offsets or instruction.offset in offsets:
            yield instruction
            extended = instruction.opname == "EXTENDED_ARG"


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield constant
            yield from _nested(constant)
