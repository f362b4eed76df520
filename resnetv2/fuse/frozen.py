"""What a value was, so that it can be seen later whether it still is: the state that Python reads.

``freeze`` follows containers and plain objects to the simple values, functions, classes and modules
that they are made of. Of what cannot be compared (tensors, arrays, iterators, objects of extension
modules, modules that are not in the block) nothing is known later, so it is refused.
"""

from __future__ import annotations

import enum
import functools
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .reasons import NotAUnitError

# Compared by type and value: an equal one in its place is no change.
SIMPLE = (
    bool, int, float, complex, str, bytes, type(None), type(Ellipsis), range,
    torch.dtype, torch.device, torch.memory_format, torch.layout,
)  # fmt: skip

_SEQUENCES = (tuple, list, deque, set, frozenset)
_CONTAINERS = (*_SEQUENCES, dict, OrderedDict, defaultdict)
_OBJECTS = (object, types.SimpleNamespace, *_CONTAINERS)

MOST_PARTS = 512

_HEAP_TYPE = 1 << 9


class Absent:
    """In the place of an attribute that is not there."""


class Frozen(NamedTuple):
    """One value at one moment.

    value: itself. same: "is" where it must be the same object, "equal" where an equal one of its
    type does, "tensor" where any tensor does. parts: of what it is made, None for nothing.
    """

    value: Any
    same: str
    parts: tuple[Frozen, ...] | None = None


ABSENT = Frozen(Absent, "is")
A_TENSOR = Frozen(Tensor, "tensor")


# Compared by identity: they do not change, or what of them matters is watched apart.
_FIXED = (
    type, types.FunctionType, types.ModuleType, property, staticmethod, classmethod, enum.Enum,
    types.MethodDescriptorType, types.WrapperDescriptorType, types.GetSetDescriptorType,
    types.MemberDescriptorType, types.ClassMethodDescriptorType, type(Frozen.value),
)  # fmt: skip


class Freezer:
    """Freezes values and notes what of them is to be watched apart.

    inside: ids of the block's modules, whose attributes are noted as they are read. on_class,
    on_module: called with the classes and Python modules that are reached, and words for them.
    """

    def __init__(
        self,
        inside: set[int],
        on_class: Callable[[type], None],
        on_module: Callable[[types.ModuleType], None],
    ) -> None:
        self.inside = inside
        self.on_class = on_class
        self.on_module = on_module
        self._known: dict[int, Frozen] = {}
        self._count = 0

    def freeze(self, value: Any, words: str) -> Frozen:
        """``value``; words: what it is to a user.

        Raises:
            NotAUnitError: it, or a part of it, can change without being seen to.
        """
        kind = type(value)
        if kind in SIMPLE:
            return Frozen(value, "equal")
        if value is Absent:
            return ABSENT
        if isinstance(value, nn.Module):
            if id(value) not in self.inside:
                raise NotAUnitError(f"{words} is a module outside of the block")
            return Frozen(value, "is")
        if isinstance(value, Tensor):
            raise NotAUnitError(f"{words} is a tensor that is no parameter or buffer")
        if isinstance(value, type):
            self.on_class(value)
            return Frozen(value, "is")
        if isinstance(value, types.ModuleType):
            self.on_module(value)
            return Frozen(value, "is")
        if isinstance(value, _FIXED):
            if isinstance(value, enum.Enum):
                self.on_class(kind)
            return Frozen(value, "is")
        if id(value) in self._known:
            return self._known[id(value)]
        # In a cycle its parts are compared where it was first met. Held here, its id stays taken.
        self._known[id(value)] = Frozen(value, "is")
        parts = parts_of(value)
        if parts is None:
            raise NotAUnitError(f"{words} is a {kind.__name__}, whose changes cannot be seen")
        self._count += len(parts)
        if self._count > MOST_PARTS:
            raise NotAUnitError(f"{words} holds too much to be compared at every call")
        if kind.__module__ != "builtins":
            self.on_class(kind)
        same = "equal" if kind in _FLEETING or isinstance(value, tuple) else "is"
        frozen = tuple(
            [self.freeze(p, f"{words}{label_of(value, i)}") for i, p in enumerate(parts)]
        )
        self._known[id(value)] = Frozen(value, same, frozen)
        return self._known[id(value)]


# Made anew at every look, or without an identity that matters.
_FLEETING = (types.MethodType, types.BuiltinFunctionType, types.MethodWrapperType)


def parts_of(value: Any) -> list[Any] | None:
    """What a value is made of, in an order that stays; None where that cannot be told."""
    kind = type(value)
    if kind in (list, tuple, deque, set, frozenset):
        return list(value)
    if kind in (dict, OrderedDict):
        return [*value, *value.values()]
    if kind is types.MethodType:
        return [value.__func__, value.__self__]
    if kind is types.BuiltinFunctionType or kind is types.MethodWrapperType:
        owner = value.__self__
        return [] if owner is None or isinstance(owner, (type, types.ModuleType)) else [owner]
    if kind is functools.partial:
        return [value.func, value.args, value.keywords, vars(value)]
    if kind is types.MappingProxyType:
        return [*value, *value.values()]
    return _parts_of_object(value)


def _parts_of_object(value: Any) -> list[Any] | None:
    """Of an object of a class that is written in Python: its attributes, and its items if any."""
    names: list[str] = []
    base: type = object
    for cls in type(value).__mro__:
        if cls in _OBJECTS:
            base = base if base is not object else cls
            continue
        if not _is_written_in_python(cls):
            return None
        slots = vars(cls).get("__slots__", ())
        names += [slots] if isinstance(slots, str) else list(slots)
    parts: list[Any] = []
    if hasattr(value, "__dict__"):
        attributes = object.__getattribute__(value, "__dict__")
        parts += [*attributes, *attributes.values()]
    elif not names and base is object and type(value) is not object:
        return [] if type(value).__dictoffset__ == 0 else None
    for name in names:
        if name not in ("__dict__", "__weakref__"):
            parts.append(getattr(value, name, Absent))
    if issubclass(base, dict):
        parts += [*dict.keys(value), *dict.values(value)]
        if isinstance(value, defaultdict):
            parts.append(value.default_factory)
    elif base in _SEQUENCES:
        parts += list(base.__iter__(value))  # type: ignore[attr-defined]
    return parts


def _is_written_in_python(cls: type) -> bool:
    """Whether all the state of a class's objects is in attributes, slots and its bases."""
    slots = vars(cls).get("__slots__", ())
    number = 1 if isinstance(slots, str) else len(slots)
    room = 8 * number + 16  # a dictionary and weak references
    return bool(cls.__flags__ & _HEAP_TYPE) and cls.__basicsize__ <= (
        cls.__base__.__basicsize__ + room  # type: ignore[union-attr]
    )


def label_of(value: Any, i: int) -> str:
    """Of part i, as a user writes it."""
    if isinstance(value, dict) and type(value) in (dict, OrderedDict):
        keys = list(value)
        return f"[{keys[i % len(keys)]!r}]"
    if type(value) is functools.partial:
        return (".func", ".args", ".keywords", "")[i]
    if type(value) is types.MethodType:
        return ("", ".__self__")[i]
    fields = getattr(type(value), "_fields", None)
    if isinstance(value, tuple) and isinstance(fields, tuple):
        return f".{fields[i]}"
    if isinstance(value, _SEQUENCES):
        return f"[{i}]"
    attributes = getattr(value, "__dict__", None)
    if isinstance(attributes, dict) and i < 2 * len(attributes):
        return f".{list(attributes)[i % len(attributes)]}"
    return ""


def is_same(frozen: Frozen, now: Any) -> bool:
    """Whether ``now`` is what was frozen."""
    value, same, parts = frozen
    if now is not value:
        if same == "is":
            return False
        if same == "tensor":
            return isinstance(now, Tensor)
        if type(now) is not type(value):
            return False
        if parts is None:
            # 0.0 and -0.0 are equal, and NaN is not.
            return bool(now == value or now != now) and repr(now) == repr(value)
    elif parts is None:
        return True
    return _same_parts(parts or (), parts_of(now))


def _same_parts(parts: tuple[Frozen, ...], now: list[Any] | None) -> bool:
    if now is None or len(now) != len(parts):
        return False
    for part, value in zip(parts, now):
        # Most parts are the very same simple objects.
        if part.parts is None and value is part.value:
            continue
        if not is_same(part, value):
            return False
    return True


def difference(frozen: Frozen, now: Any, words: str) -> str:
    """In words how ``now`` differs from what was frozen."""
    value, _, parts = frozen
    then = "when the block was fused"
    if value is Absent:
        return f"{words} was not there {then}"
    if now is Absent:
        return f"{words} is gone"
    if type(value) in SIMPLE or type(now) in SIMPLE:
        return f"{words} is {_shown(now)}, was {_shown(value)} {then}"
    if now is value or (frozen.same == "equal" and type(now) is type(value)):
        current = parts_of(now) or []
        if len(current) == len(parts or ()):
            for i, (part, part_now) in enumerate(zip(parts or (), current)):
                if not is_same(part, part_now):
                    return difference(part, part_now, f"{words}{label_of(now, i)}")
        return f"{words} has changed since the block was fused"
    return f"{words} was replaced since the block was fused"


def _shown(value: Any) -> str:
    text = repr(value) if type(value) in SIMPLE else f"a {type(value).__name__}"
    return text if len(text) < 40 else f"a {type(value).__name__}"
