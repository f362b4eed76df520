"""What the Python code of a forward could read while it was traced, and whether it still is so.

A trace is a function of its tensor and of what its code read besides. ``Observer`` sees each
instruction of each function that runs and is not PyTorch's, and each call that one makes. What such
code reads can only come from a global name, a closure, a default, an attribute of a module, or from
something that is reached through one of these (``frozen``) or returned by a call. ``Watch`` holds
the first kinds, which all blocks of a class share; attributes of modules are guards of the block's
plan. A call to what is neither traced, nor such code itself, nor known to depend on its arguments
alone, is a reason to leave the block as it is.
"""

from __future__ import annotations

import dis
import functools
import gc
import itertools
import os
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from operator import is_
from pathlib import Path as File
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.checks import CHILD_ATTRIBUTES
from ..core.reading import current_epoch
from .frozen import A_TENSOR, ABSENT, Absent, Freezer, Frozen, difference, is_same
from .reasons import NotAUnitError

_TORCH = str(File(torch.__file__).parent) + os.sep  # not torchvision's
_OURS = str(File(__file__).parents[1]) + os.sep
# What PyTorch calls itself: where a model calls it, it is looked at like the model's code.
_PACKAGES = str(File(_TORCH).parent) + os.sep
_STANDARD = str(File(dis.__file__).parent) + os.sep
_DEPENDENCIES = tuple(
    _PACKAGES + name for name in ("numpy/", "sympy/", "mpmath/", "typing_extensions.py")
)

# Of a module, besides its children: read by PyTorch and the chain, not by a forward.
INTERNAL = frozenset(vars(nn.Module())) - {"training"}

# What PyTorch looks up on the class of a module that is called; any of them may decide.
_PROTOCOL = frozenset(
    (
        "forward", "__call__", "_call_impl", "_wrapped_call_impl", "_conv_forward",
        "_check_input_dim", "__getattr__", "__getattribute__", "__iter__", "__len__", "__getitem__",
        "__contains__", "__bool__", "__eq__", "__get__", "__instancecheck__", *CHILD_ATTRIBUTES,
    )
)  # fmt: skip

_PURE_BUILTINS = frozenset(
    (
        "abs", "all", "any", "callable", "chr", "divmod", "format", "getattr", "hasattr",
        "isinstance", "issubclass", "iter", "len", "max", "min", "next", "ord", "pow", "repr",
        "round", "sorted", "sum",
    )
)  # fmt: skip
_PURE_MODULES = frozenset(("math", "_operator", "itertools", "_abc", "_bisect"))
_PURE_TYPES: tuple[type, ...] = (
    bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset, range, slice,
    types.MappingProxyType, type({}.keys()), type({}.values()), type({}.items()),
)  # fmt: skip
_PLAIN_CLASSES = (
    *_PURE_TYPES, super, object, zip, map, filter, enumerate, reversed, property, staticmethod,
    classmethod, types.SimpleNamespace, types.FunctionType, types.MethodType,
)  # fmt: skip

# Functions of PyTorch that code may call though no graph shows them: (file, name or None for all).
_FOLLOWED = {
    "fx/proxy.py": None,
    "fx/_symbolic_trace.py": None,
    "nn/modules/container.py": None,
    "nn/modules/module.py": frozenset(
        ("children", "named_children", "modules", "named_modules", "__getattr__", "__setattr__",
         "get_submodule", "_call_impl", "_wrapped_call_impl", "forward", "_forward_unimplemented",
         "__hash__", "_get_name")
    ),
    "_jit_internal.py": frozenset(("is_scripting",)),
    "jit/_trace.py": frozenset(("is_tracing",)),
    "__init__.py": frozenset(("is_tensor", "_assert")),
}  # fmt: skip
# From where PyTorch calls a model's code.
_ENTRIES = {
    "fx/proxy.py": None,
    "fx/_symbolic_trace.py": None,
    "nn/modules/container.py": None,
    "nn/modules/module.py": frozenset(("_call_impl", "_wrapped_call_impl", "_slow_forward",
                                       "named_children", "named_modules", "__getattr__")),
}  # fmt: skip


class _Ran(NamedTuple):
    """A function that ran: its code, globals, and what it closes over by name."""

    code: types.CodeType
    names: dict[str, Any]
    cells: tuple[tuple[str, Any], ...]


# What an observer puts on nn.Module is there for all threads. Its own exit runs under observation,
# this lock's does not: it is given back whatever happens.
OBSERVING = threading.Lock()


class Observer:
    """While it is entered, under ``OBSERVING``, notes what the code of a traced module does.

    paths: of the traced modules, by id. graph: gives the nodes so far.
    """

    def __init__(self, paths: dict[int, tuple[str, ...]], graph: Callable[[], Any]) -> None:
        self.paths = paths
        self.graph = graph
        self.log: dict[tuple[tuple[str, ...], str], None] = {}
        self.ran: dict[Any, _Ran] = {}
        self.offsets: dict[types.CodeType, set[int]] = {}
        self.reasons: list[str] = []
        self._kinds: dict[types.CodeType, str] = {}
        self._calls: list[tuple[Any, Any, int]] = []

    def __enter__(self) -> Observer:
        self._before = sys.gettrace(), sys.getprofile()
        # A collection would run finalizers and callbacks of others in between, which a forward
        # seems to call.
        self._collects = gc.isenabled()
        gc.disable()
        # Another tool may have put its own there.
        self._reads = vars(nn.Module).get("__getattribute__")
        read = self._reads or object.__getattribute__

        def recording(module: nn.Module, name: str) -> Any:
            self._read(module, name, sys._getframe(1))
            return read(module, name)

        nn.Module.__getattribute__ = recording  # type: ignore[method-assign,assignment]
        sys.setprofile(self._on_profile)
        sys.settrace(self._on_call)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.settrace(self._before[0])
        sys.setprofile(self._before[1])
        if self._reads is None:
            del nn.Module.__getattribute__
        else:
            nn.Module.__getattribute__ = self._reads  # type: ignore[method-assign]
        if self._collects:
            gc.enable()

    def is_user(self, frame: types.FrameType | None) -> bool:
        """Whether a frame runs the model's code: neither PyTorch's nor this library's, nor what
        these call of other libraries."""
        while frame is not None:
            kind = self._kinds.get(frame.f_code)
            if kind is None:
                kind = self._kinds[frame.f_code] = _kind_of(frame)
            if kind != "library":
                return kind == "user"
            frame = frame.f_back
        return True

    def _read(self, module: nn.Module, name: str, frame: types.FrameType) -> None:
        path = self.paths.get(id(module))
        if path is None or not self.is_user(frame):
            return
        if name in ("_modules", "__class__"):
            return
        if name in INTERNAL or name == "__dict__":
            self._note(f"its forward reads {name}")
            return
        if not name.startswith("__"):
            self.log[path, name] = None

    def _note(self, reason: str) -> None:
        if reason not in self.reasons:
            self.reasons.append(reason)

    def _on_call(self, frame: types.FrameType, event: str, arg: Any) -> Any:
        code, caller = frame.f_code, frame.f_back
        by_user = self.is_user(caller) if caller is not None else False
        if self.is_user(frame):
            entered = caller is not None and not by_user and code.co_name != "__getattr__"
            if entered and not _listed(caller.f_code, _ENTRIES):  # type: ignore[union-attr]
                self._note(_reason_of(caller))  # type: ignore[arg-type]
            # The first of code.co_freevars that are not yet bound stand for themselves.
            local = frame.f_locals
            cells = tuple([(name, local.get(name, Absent)) for name in code.co_freevars])
            key = (code, id(frame.f_globals), tuple([id(value) for _, value in cells]))
            self.ran.setdefault(key, _Ran(code, frame.f_globals, cells))
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
            return self._on_instruction
        if by_user and not _listed(code, _FOLLOWED):
            frame.f_trace_lines = False
            start = len(self.graph())

            def on_return(frame: types.FrameType, event: str, arg: Any) -> Any:
                if event == "return" and not self._is_traced(start, code):
                    self._note(_reason_of(frame))
                return on_return

            return on_return
        return None

    def _is_traced(self, start: int, function: Any) -> bool:
        """Whether the call of a function, or of what has its code, is a node since ``start``."""
        nodes = list(self.graph())[start:]
        return any(
            n.target is function
            or getattr(n.target, "__code__", None) is function
            or (n.op == "call_method" and n.target == getattr(function, "__name__", None))
            for n in nodes
        )

    def _on_instruction(self, frame: types.FrameType, event: str, arg: Any) -> Any:
        if event == "opcode":
            self.offsets.setdefault(frame.f_code, set()).add(frame.f_lasti)
        return self._on_instruction

    def _on_profile(self, frame: types.FrameType, event: str, arg: Any) -> None:
        if event == "c_call" and self.is_user(frame):
            self._calls.append((frame, arg, len(self.graph())))
        elif event in ("c_return", "c_exception") and self.is_user(frame):
            while self._calls:
                at, function, start = self._calls.pop()
                if at is frame:
                    if not _is_pure(function) and not self._is_traced(start, function):
                        self._note(
                            f"its forward calls {_called(function)}, whose answer may be another "
                            "at the next call"
                        )
                    break


def _kind_of(frame: types.FrameType) -> str:
    name = frame.f_code.co_filename
    module = str(frame.f_globals.get("__name__"))
    if _is_torchs(module):
        return "trusted"
    if name.startswith("<frozen") or (name.startswith("<") and module.startswith("namedtuple_")):
        return "library"
    if name.startswith(_PACKAGES) and not name.startswith(_DEPENDENCIES):
        return "user"
    return "library" if name.startswith((_STANDARD, *_DEPENDENCIES)) else "user"


def _listed(code: types.CodeType, table: dict[str, frozenset[str] | None]) -> bool:
    name = code.co_filename
    if name.startswith(_OURS):
        return True
    if not name.startswith(_TORCH):
        return False
    relative = name[len(_TORCH) :].replace("\\", "/")
    if relative not in table:
        return False
    names = table[relative]
    return names is None or code.co_name in names


def _name_of(frame: types.FrameType) -> str:
    """A function of PyTorch as a user writes it."""
    if frame.f_code.co_name == "decorate_context":
        return "a decorator like torch.no_grad()"
    local = frame.f_locals
    wrapped = local.get("fn")
    if isinstance(wrapped, types.FunctionType):  # what torch.compile must not trace
        return f"{wrapped.__module__}.{wrapped.__name__}"
    owner = local.get("self", local.get("cls"))
    if owner is not None and frame.f_code.co_name.startswith("__"):
        kind = owner if isinstance(owner, type) else type(owner)
        return f"{kind.__module__.removesuffix('.autocast_mode')}.{kind.__name__}".replace(
            "torch.amp.autocast", "torch.autocast"
        )
    return f"{frame.f_globals.get('__name__', 'torch')}.{frame.f_code.co_name}"


def _reason_of(frame: types.FrameType) -> str:
    owner = frame.f_locals.get("cls")
    if isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
        return f"autograd.Function {owner.__name__} may have a gradient of its own"
    return f"its forward calls {_name_of(frame)}, which a trace does not show"


def _called(function: Any) -> str:
    owner = getattr(function, "__self__", None)
    name = getattr(function, "__name__", repr(function))
    if isinstance(owner, types.ModuleType):
        return name if owner.__name__ == "builtins" else f"{owner.__name__}.{name}"
    if owner is None:
        return str(name)
    kind = owner if isinstance(owner, type) else type(owner)
    return f"{kind.__name__}.{name}"


def _is_pure(function: Any) -> bool:
    """Whether a built-in function's answer follows from its arguments, which are watched."""
    owner = getattr(function, "__self__", None)
    module = getattr(function, "__module__", None)
    if isinstance(owner, types.ModuleType):
        if module == "builtins":
            return function.__name__ in _PURE_BUILTINS
        return module in _PURE_MODULES or (module, function.__name__) == ("_functools", "reduce")
    kind = owner if isinstance(owner, type) else type(owner)
    return issubclass(kind, _PURE_TYPES) or kind.__module__ in ("collections", "itertools")


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


class _Entry(NamedTuple):
    """One thing to watch. get(key, Absent) gives it now; words: what it is to a user."""

    get: Callable[[Any, Any], Any]
    key: Any
    frozen: Frozen
    words: str


class _Cells:
    """Closures' cells by their place."""

    def __init__(self, function: types.FunctionType) -> None:
        self.__self__ = function.__closure__ or ()

    def __call__(self, place: int, default: Any = Absent) -> Any:
        try:
            return self.__self__[place].cell_contents
        except ValueError:
            return default


def _attributes(owner: types.FunctionType | type) -> Callable[[Any, Any], Any]:
    """A getter of a function's defaults and code, or of a class's bases."""
    return functools.partial(getattr, owner)


_watches: weakref.WeakValueDictionary[int, Watch] = weakref.WeakValueDictionary()
_numbers = itertools.count()


class Watch:
    """State outside of a block that its forward read: globals, classes, closures, defaults.

    Blocks of one kind share it; copies too. A pickle leaves it out: ``known`` is false then, and
    the block is to be recognised anew, and ``lost`` says why where that fails.
    """

    known = False
    lost = ""

    def __init__(self, entries: list[_Entry] | None = None) -> None:
        self.number = next(_numbers)
        _watches[self.number] = self
        self.entries: list[_Entry] = []
        self._epoch = 0
        if entries is not None:
            self.fill(entries)

    def fill(self, entries: list[_Entry]) -> None:
        """Make this the watch of ``entries``."""
        unique = {(id(_owner(entry.get)), entry.key): entry for entry in entries}
        self.entries = list(unique.values())
        self.known = True
        self._sort()

    def _sort(self) -> None:
        owners: dict[int, tuple[Any, list[Any], list[Any], list[Any]]] = {}
        for get, key, frozen, _ in self.entries:
            owner = _owner(get)
            _, keys, values, absent = owners.setdefault(id(owner), (get, [], [], []))
            if frozen.value is Absent and isinstance(owner, dict):
                absent.append(key)
            else:
                keys.append(key)
                values.append(frozen.value)
        self._there = [(get, keys, values) for get, keys, values, _ in owners.values() if keys]
        self._absent = [
            (_owner(get).keys().isdisjoint, frozenset(absent))
            for get, _, _, absent in owners.values()
            if absent
        ]
        self._deep = [entry.frozen for entry in self.entries if entry.frozen.parts is not None]
        self._epoch = 0

    def holds(self) -> bool:
        """Whether all is as it was; looked at once for all blocks that a call comes by."""
        epoch = current_epoch()
        if self._epoch == epoch:
            return True
        for get, keys, values in self._there:
            if not all(map(is_, map(get, keys, _ABSENTS), values)):
                return not self.changed()
        for is_disjoint, absent in self._absent:
            if not is_disjoint(absent):
                return not self.changed()
        for frozen in self._deep:
            if not is_same(frozen, frozen.value):
                return False
        self._epoch = epoch
        return True

    def changed(self) -> str:
        """What has changed, in words; empty where nothing has."""
        if self.lost or not self.known:
            return self.lost or "it was loaded from a file and has not run yet"
        moved = False
        for i, (get, key, frozen, words) in enumerate(self.entries):
            now = get(key, Absent)
            if not is_same(frozen, now):
                return difference(frozen, now, words)
            if now is not frozen.value and frozen.parts is None:
                self.entries[i] = _Entry(get, key, frozen._replace(value=now), words)
                moved = True
        if moved:
            self._sort()
        return ""

    @property
    def states(self) -> str:
        """What of it is no code (a value that a program may well change); empty for nothing."""
        code = (type, types.FunctionType, types.ModuleType, types.BuiltinFunctionType, property,
                staticmethod, classmethod)  # fmt: skip
        for _, _, frozen, words in self.entries:
            value = frozen.value
            if not isinstance(value, (*code, types.CodeType, type(None), tuple)):
                return words
        return ""

    def __deepcopy__(self, memo: Any) -> Watch:
        return self

    def __copy__(self) -> Watch:
        return self

    def __reduce__(self) -> Any:
        return Watch, ()


_ABSENTS = itertools.repeat(Absent)


def _owner(get: Any) -> Any:
    """What a ``get`` looks into."""
    return get.args[0] if isinstance(get, functools.partial) else get.__self__


def changed_when_compiled(number: int) -> str:
    """``Watch.changed`` of the watch of that number, as it is when a graph is compiled.

    A graph would not be compiled anew for what changes later, which is therefore a reason.
    """
    watch = _watches[number]
    states = watch.states
    reason = f"torch.compile would not see {states} change" if states else ""
    return watch.changed() or reason


# As torch.compiler.assume_constant_result does, which imports the compiler, and that Triton.
changed_when_compiled._dynamo_marked_constant = True  # type: ignore[attr-defined]


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

    def entries(self, module: nn.Module) -> list[_Entry]:
        """Everything else that was read, and what it is now.

        All copies of the block share it, so that no module may be in it.
        """
        self.check()
        freezer, queue = self._freezer(None)
        found: list[_Entry] = []
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
        ran: _Ran,
        instructions: list[dis.Instruction],
        freezer: Freezer,
        found: list[_Entry],
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
                found.append(_Entry(ran.names.get, name, ABSENT, words))
                value = builtins.get(name, Absent)
                _refuse_class(value, f"its forward calls {name}()")
                continue
            _refuse_class(value, f"its forward uses {name}")
            module = value.__name__ if isinstance(value, types.ModuleType) else "torch"
            if self.dynamic and not _is_torchs(module) and module not in _PURE_MODULES:
                raise NotAUnitError(f"its forward may read any attribute of {name}", True)
            found.append(_Entry(ran.names.get, name, _with_words(freezer, value, words), words))

    def _enter_function(
        self,
        function: types.FunctionType,
        instructions: list[dis.Instruction],
        freezer: Freezer,
        found: list[_Entry],
    ) -> None:
        name = function.__qualname__.replace(".<locals>", "")
        get = _attributes(function)
        found.append(
            _Entry(get, "__code__", Frozen(function.__code__, "is"), f"the code of {name}")
        )
        for key in ("__defaults__", "__kwdefaults__"):
            words = f"the defaults of {name}"
            found.append(_Entry(get, key, _with_words(freezer, get(key, Absent), words), words))
        cells = _Cells(function)
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
                found.append(_Entry(cells, place, frozen, words))

    def _enter_module(
        self, module: types.ModuleType, freezer: Freezer, found: list[_Entry]
    ) -> None:
        attributes = vars(module)
        torchs = _is_torchs(module.__name__)
        for name in self.names:
            value = attributes.get(name, Absent)
            if torchs and not isinstance(value, (types.FunctionType, types.BuiltinFunctionType)):
                continue  # PyTorch's own state is not read by name
            words = f"{module.__name__}.{name}"
            _refuse_class(value, f"its forward uses {words}")
            found.append(_Entry(attributes.get, name, _with_words(freezer, value, words), words))

    def _enter_class(self, base: type, freezer: Freezer, found: list[_Entry]) -> None:
        if _is_torchs(base.__module__) or base.__module__ == "builtins":
            return
        # The dictionary itself: its proxy takes ten times as long.
        attributes = next((d for d in gc.get_referents(vars(base)) if isinstance(d, dict)), None)
        assert attributes is not None
        bases = Frozen(base.__mro__, "is")
        found.append(_Entry(_attributes(base), "__mro__", bases, f"the bases of {base.__name__}"))
        names = self.names | _PROTOCOL
        if self.dynamic and not issubclass(base, nn.Module):
            names = names | {name for name in attributes if not name.startswith("_")}
        for name in names - {"__dict__", "__weakref__", "__class__", "__doc__", "__module__"}:
            value = attributes.get(name, Absent)
            words = f"{base.__name__}.{name}"
            found.append(_Entry(attributes.get, name, _with_words(freezer, value, words), words))


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
    known = value.__module__ in ("collections", "itertools") or _is_torchs(value.__module__)
    if not python and not known and not issubclass(value, BaseException):
        raise NotAUnitError(f"{words}, which is not written in Python", True)


def _is_torchs(name: str | None) -> bool:
    return name is not None and name.partition(".")[0] in ("torch", "resnetv2")


def lookup(module: nn.Module, name: str) -> Any:
    """What an attribute's name is on a module itself, without its class; ``Absent`` if nothing."""
    for place in (vars(module), module._parameters, module._buffers, module._modules):
        if name in place:
            return place[name]
    return Absent


def _is_plain_attribute(module: nn.Module, name: str) -> bool:
    return name in vars(module)


def _functions_of(ran: _Ran, module: nn.Module) -> list[types.FunctionType]:
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
        raise NotAUnitError(f"where {ran.code.co_name} comes from cannot be told", True)
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


def _closes_over(function: types.FunctionType, ran: _Ran) -> bool:
    cells = _Cells(function)
    return all(cells(place) is value for place, (_, value) in enumerate(ran.cells))
