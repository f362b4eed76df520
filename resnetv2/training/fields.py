"""A field of options: its type, range and words, written once as an annotation.

A field of a dataclass is ``Annotated[TYPE, RULE, Option(...)]``, or ``Annotated[TYPE | None, ...]``
where it may be left out. From this come the conversion and the check of a value, the message that
refuses one, the arguments in the class' docstring (``documented``) and the command line
(``resnetv2.cli.options``).
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import os
import textwrap
import types
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import torch

from ..core.memory import parse_bytes
from ..errors import InputError

C = TypeVar("C", bound=type)


@dataclass(frozen=True)
class Between:
    """The numbers between two, of which one that is open is itself left out."""

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = True

    def __str__(self) -> str:
        low = f"{'above' if self.open_low else 'of at least'} {self.low:g}"
        high = f"{'below' if self.open_high else 'at most'} {self.high:g}"
        return low if self.high == math.inf else f"{low} and {high}"

    def allows(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)


class Choice(tuple[str, ...]):
    """The words that an option may be."""

    __slots__ = ()


class Bytes:
    """An amount of memory, as ``core.memory.parse_bytes`` reads it."""


Rule = Between | Choice | Bytes


@dataclass(frozen=True)
class Option:
    """The meaning of a field to the user of a command or of a class.

    Args:
        text: sentences; other options are named as fields are. Empty where the name says it all.
        default: the default in words, where the value alone does not tell.
        metavar: of the command line, for the value.
        off: of a bool, the command line's opposite word; None: its name alone is a flag.
        resume: whether a run that goes on must keep it: "decides" (the result: it must), "rounds"
            (the same function with other roundings), "free", or "machine" (compared by what it came
            to, see ``environment.machine``).
    """

    text: str = ""
    default: str = ""
    metavar: str | None = None
    off: str | None = None
    resume: str = "decides"


@dataclass(frozen=True)
class Field:
    """A field of a dataclass of options, read off its annotation."""

    name: str
    kind: type
    rule: Rule | None
    optional: bool
    default: Any
    option: Option

    @property
    def default_words(self) -> str:
        """The default as ``--help`` shows it; empty where there is none to show."""
        if self.option.default or self.default is None:
            return self.option.default
        if isinstance(self.default, bool):
            return "" if self.option.off is None else ("yes" if self.default else "no")
        return f"{self.default:g}" if isinstance(self.default, float) else str(self.default)

    def checked(self, value: Any, where: str = "") -> Any:
        """``value`` as the field's type.

        Raises:
            InputError: it is none that the field may have. ``where`` begins the message.
        """
        if self.optional and value is None:
            return None
        rule = self.rule
        if isinstance(value, bool) and isinstance(rule, Choice) and {"on", "off"} <= {*rule}:
            value = "on" if value else "off"  # as which YAML reads the bare words
        message = f"{where}{self.name} must be {self._expected()}, got {show(value)}"
        if isinstance(rule, Choice) and isinstance(value, str) and value not in rule:
            raise InputError(message + nearest(value, rule))
        try:
            if isinstance(rule, Bytes):
                # Numbers from a command line come as text: one spelling for both in the file.
                value = value if isinstance(value, str) else str(_to_int(value))
                parse_bytes(value)
            else:
                value = _CONVERT[self.kind](value)
        except OverflowError as error:
            raise InputError(f"{where}{self.name} is too large, got {show(value)}") from error
        except (TypeError, ValueError) as error:
            raise InputError(message) from error
        if isinstance(rule, Between) and not rule.allows(value):
            raise InputError(message)
        return value

    def _expected(self) -> str:
        if isinstance(self.rule, Bytes):
            return 'bytes, such as "8GiB" or a number above 0'
        if isinstance(self.rule, Choice):
            return f"one of {', '.join(self.rule)}"
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "some text"}
        return words[self.kind] if self.rule is None else f"{words[self.kind]} {self.rule}"


def fields_of(cls: type) -> dict[str, Field]:
    """The fields of a dataclass by name, in their order; those without an ``Option`` left out.

    Of several types that a field may have, the first is its kind.
    """
    hints = get_type_hints(cls, include_extras=True)
    found = {}
    for field in dataclasses.fields(cls):
        kinds, notes = _unpacked(hints[field.name])
        options = [note for note in notes if isinstance(note, Option)]
        rules = [note for note in notes if isinstance(note, (Between, Choice, Bytes))]
        if options:
            found[field.name] = Field(
                field.name,
                next(kind for kind in kinds if kind is not type(None)),
                rules[0] if rules else None,
                type(None) in kinds,
                field.default,
                options[0],
            )
    return found


def _unpacked(hint: Any) -> tuple[list[Any], list[Any]]:
    """The types of an annotation and all that is noted beside them."""
    if get_origin(hint) is Annotated:
        inner, *notes = get_args(hint)
        kinds, more = _unpacked(inner)
        return kinds, [*notes, *more]
    if get_origin(hint) in (Union, types.UnionType):
        parts = [_unpacked(part) for part in get_args(hint)]
        return [kind for kinds, _ in parts for kind in kinds], [n for _, ns in parts for n in ns]
    return [hint], []


def documented(cls: C) -> C:
    """A class decorator: put the fields' words where the docstring says ``{options}``."""
    lines = []
    for field in fields_of(cls).values():
        words = [field.option.text] if field.option.text else []
        if isinstance(field.rule, Choice):
            words.append(f"One of {', '.join(field.rule)}.")
        elif isinstance(field.rule, Between):
            words.append(f"{field._expected().capitalize()}.")
        if field.default_words:
            words.append(f"Default: {field.default_words}.")
        text = f"{field.name}: {' '.join(words)}"
        lines += textwrap.wrap(
            text, 100, initial_indent=" " * 8, subsequent_indent=" " * 12, break_on_hyphens=False
        )
    cls.__doc__ = (cls.__doc__ or "").replace("{options}", "\n".join(lines).lstrip())
    return cls


def show(value: Any) -> str:
    """``value`` for a message: on one line, not too long."""
    try:
        text = repr(value)
    except ValueError:  # an int of more digits than Python converts
        text = "a huge number"
    text = " ".join(text.split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def nearest(word: Any, words: Iterable[str]) -> str:
    """A question after the word that was meant, or nothing."""
    near = difflib.get_close_matches(str(word).lower().replace("-", "_"), list(words), n=1)
    return f": did you mean {near[0]}?" if near else ""


def _to_bool(value: Any) -> bool:
    words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    raise TypeError


def _to_int(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    if isinstance(value, str):
        try:
            value = int(value)
        except ValueError:
            value = float(value)
    if isinstance(value, float):
        if not value.is_integer():
            raise ValueError
        value = int(value)
    number = operator.index(value)
    if number >= 2**63:  # torch's integers end here
        raise OverflowError
    return number


def _to_float(value: Any) -> float:
    # A tensor of one element has a __float__ too; here it is likelier a mistake than a wish.
    if isinstance(value, bool) or not isinstance(value, (Real, str)):
        raise TypeError
    value = float(value)
    if not math.isfinite(value):
        raise ValueError
    return value


def _to_text(value: Any) -> str:
    if not isinstance(value, (str, os.PathLike, torch.device)):
        raise TypeError
    text = str(value)
    if not text.strip() or "\0" in text:  # no system's path holds a zero
        raise ValueError
    text.encode()  # ValueError where a path is not in UTF-8: it is printed, and written to files
    return text


_CONVERT = {bool: _to_bool, int: _to_int, float: _to_float, str: _to_text}
