"""What the Python code of a forward read while it was traced, and whether it still is so."""

from __future__ import annotations

import functools
import itertools
import types
import weakref
from collections.abc import Callable
from operator import is_
from typing import Any, NamedTuple

from ..core.reading import current_epoch
from .frozen import Absent, Frozen, difference, is_same


class Entry(NamedTuple):
    """One thing to watch. get(key, Absent) gives it now; words: what it is to a user."""

    get: Callable[[Any, Any], Any]
    key: Any
    frozen: Frozen
    words: str


class Cells:
    """Closures' cells by their place."""

    def __init__(self, function: types.FunctionType) -> None:
        self.__self__ = function.__closure__ or ()

    def __call__(self, place: int, default: Any = Absent) -> Any:
        try:
            return self.__self__[place].cell_contents
        except ValueError:
            return default


def attributes_of(owner: types.FunctionType | type) -> Callable[[Any, Any], Any]:
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

    def __init__(self, entries: list[Entry] | None = None) -> None:
        self.number = next(_numbers)
        _watches[self.number] = self
        self.entries: list[Entry] = []
        self._epoch = 0
        if entries is not None:
            self.fill(entries)

    def fill(self, entries: list[Entry]) -> None:
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
                self.entries[i] = Entry(get, key, frozen._replace(value=now), words)
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
