"""The second input of a block's forward, as an embedding is."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

from torch import nn


class Second(NamedTuple):
    """A forward's second parameter. required: whether it has no default; given: whether a tensor
    is passed, else None."""

    name: str
    required: bool
    given: bool


def seconds_of(module: nn.Module) -> tuple[Second | None, ...]:
    """The ways to call a module that are tried: (None,) where its forward takes no second input."""
    try:
        parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return (None,)
    if len(parameters) < 2 or parameters[1].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
        return (None,)
    second = parameters[1]
    if second.default is inspect.Parameter.empty:
        return Second(second.name, True, True), Second(second.name, True, False)
    if second.default is None:
        return Second(second.name, False, False), Second(second.name, False, True)
    return (None,)


def inputs_of(second: Second | None, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
    """x and the second input of a call, or None where the forward is called in another way."""
    if len(args) == 1 and not kwargs:
        return None if second is not None and second.required else (args[0], None)
    if second is not None and len(args) == 2 and not kwargs:
        return args[0], args[1]
    if second is not None and len(args) == 1 and set(kwargs) == {second.name}:
        return args[0], kwargs[second.name]
    return None
