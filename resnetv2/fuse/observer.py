"""What the Python code of a forward did while it was traced.

A trace is a function of its tensor and of what its code read besides. ``Observer`` sees each
instruction of each function that runs and is not PyTorch's, and each call that one makes. What such
code reads can only come from a global name, a closure, a default, an attribute of a module, or from
something that is reached through one of these (``frozen``) or returned by a call. ``reads`` finds
it, for a ``watch`` where all blocks of a class share it, and as guards of a block's plan where it
is an attribute of a module. A call to what is neither traced, nor such code itself, nor known to
depend on its arguments alone, is a reason to leave the block as it is.
"""

from __future__ import annotations

import dis
import gc
import os
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path as File
from typing import Any, NamedTuple

import torch
from torch import nn

from .frozen import Absent

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

_PURE_BUILTINS = frozenset(
    (
        "abs", "all", "any", "callable", "chr", "divmod", "format", "getattr", "hasattr",
        "isinstance", "issubclass", "iter", "len", "max", "min", "next", "ord", "pow", "repr",
        "round", "sorted", "sum",
    )
)  # fmt: skip
PURE_MODULES = frozenset(("math", "_operator", "itertools", "_abc", "_bisect"))
PURE_TYPES: tuple[type, ...] = (
    bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset, range, slice,
    types.MappingProxyType, type({}.keys()), type({}.values()), type({}.items()),
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
    "nn/modules/conv.py": frozenset(("forward", "_conv_forward")),
    "nn/modules/normalization.py": frozenset(("forward",)),
    "_jit_internal.py": frozenset(("is_scripting",)),
    "jit/_trace.py": frozenset(("is_tracing",)),
    "__init__.py": frozenset(("is_tensor", "_assert")),
}  # fmt: skip
# From where PyTorch calls a model's code.
_ENTRIES = {
    "fx/proxy.py": None,
    "fx/_symbolic_trace.py": None,
    "nn/modules/container.py": None,
    "nn/modules/conv.py": frozenset(("forward",)),
    "nn/modules/module.py": frozenset(("_call_impl", "_wrapped_call_impl", "_slow_forward",
                                       "named_children", "named_modules", "__getattr__")),
}  # fmt: skip


class Ran(NamedTuple):
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
        self.ran: dict[Any, Ran] = {}
        self.offsets: dict[types.CodeType, set[int]] = {}
        self.reasons: list[str] = []
        # By a code object's id, which it keeps: its hash is one of all its bytes, at every look.
        self._kinds: dict[int, tuple[str, types.CodeType]] = {}
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
            code = frame.f_code
            known = self._kinds.get(id(code))
            if known is None:
                known = self._kinds[id(code)] = _kind_of(frame), code
            if known[0] != "library":
                return known[0] == "user"
            frame = frame.f_back
        return True

    def _read(self, module: nn.Module, name: str, frame: types.FrameType) -> None:
        path = self.paths.get(id(module))
        if path is None or not self.is_user(frame):
            return
        if name in ("_modules", "__class__"):
            return
        if name in INTERNAL or name == "__dict__":
            self.note(f"its forward reads {name}")
            return
        if not name.startswith("__"):
            self.log[path, name] = None

    def note(self, reason: str) -> None:
        """Why the block is left alone."""
        if reason not in self.reasons:
            self.reasons.append(reason)

    def _on_call(self, frame: types.FrameType, event: str, arg: Any) -> Any:
        code, caller = frame.f_code, frame.f_back
        by_user = self.is_user(caller) if caller is not None else False
        if self.is_user(frame):
            entered = caller is not None and not by_user and code.co_name != "__getattr__"
            if entered and not _listed(caller.f_code, _ENTRIES):  # type: ignore[union-attr]
                self.note(_reason_of(caller))  # type: ignore[arg-type]
            # The first of code.co_freevars that are not yet bound stand for themselves.
            local = frame.f_locals
            cells = tuple([(name, local.get(name, Absent)) for name in code.co_freevars])
            key = (code, id(frame.f_globals), tuple([id(value) for _, value in cells]))
            self.ran.setdefault(key, Ran(code, frame.f_globals, cells))
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
            return self._on_instruction
        if by_user and not _listed(code, _FOLLOWED):
            frame.f_trace_lines = False
            start = len(self.graph())

            def on_return(frame: types.FrameType, event: str, arg: Any) -> Any:
                if event == "return" and not self._is_traced(start, code):
                    self.note(_reason_of(frame))
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
                        self.note(
                            f"its forward calls {_called(function)}, whose answer may be another "
                            "at the next call"
                        )
                    break


def _kind_of(frame: types.FrameType) -> str:
    name = frame.f_code.co_filename
    module = str(frame.f_globals.get("__name__"))
    if is_torchs(module):
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
        return module in PURE_MODULES or (module, function.__name__) == ("_functools", "reduce")
    kind = owner if isinstance(owner, type) else type(owner)
    return issubclass(kind, PURE_TYPES) or kind.__module__ in ("collections", "itertools")


def is_torchs(name: str | None) -> bool:
    return name is not None and name.partition(".")[0] in ("torch", "resnetv2")
