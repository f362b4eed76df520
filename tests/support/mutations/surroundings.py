"""Mutations that a later assignment makes wrong: classes, globals, closures and functions."""

from __future__ import annotations

import functools
import os
import types
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support import fuse_options
from tests.support.mutations.base import B, Mutation, assign, here, on
from tests.support.mutations.state import OptionsClass


class OfTheClass(B):
    scale = 1

    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if self.scale == 1 else x + self.scale * h


class OfABase(OfTheClass):
    pass


class OfTheType(B):
    scale = 1

    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if type(self).scale == 1 else x + 2 * h


class OfDunderClass(OfTheType):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if self.__class__.scale == 1 else x + 2 * h


class OfAnotherClass(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if OptionsClass.scale == 1 else x + OptionsClass.scale * h


class MethodReplaced(B):
    def scaled(self, h: Tensor) -> Tensor:
        return h

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scaled(self.outer(self.inner(x)))


class ForwardReplaced(B):
    pass


class StaticMethod(B):
    @staticmethod
    def act(h: Tensor) -> Tensor:
        return F.relu(h)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.act(self.bn2(self.conv1(self.act(self.bn1(x))))))


class BaseOfSuper(B):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class SuperForward(BaseOfSuper):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


SCALE = 1


OPTIONS = {"scale": 1}


STATE = types.SimpleNamespace(scale=1)


ACTS = {"relu": F.relu, "silu": F.silu}


CONTEXT: ContextVar[int] = ContextVar("CONTEXT", default=1)


def helper(h: Tensor) -> Tensor:
    return h


def replaced_helper(h: Tensor) -> Tensor:
    return 2 * h


class OfAGlobal(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if SCALE == 1 else x + SCALE * h


class OfAGlobalDictionary(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if OPTIONS["scale"] == 1 else x + OPTIONS["scale"] * h


class OfAGlobalObject(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if STATE.scale == 1 else x + STATE.scale * h


class OfAnotherModule(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if fuse_options.SCALE == 1 else x + fuse_options.SCALE * h


class OfAnotherModulesFunction(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if fuse_options.scale() == 1 else x + 2 * h


class InAComprehension(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if sum(OPTIONS["scale"] for _ in range(2)) == 2 else x + 2 * h


class OfATable(B):
    def setup(self) -> None:
        self.name = "relu"

    def forward(self, x: Tensor) -> Tensor:
        act = ACTS[self.name]
        return x + self.conv2(act(self.bn2(self.conv1(act(self.bn1(x))))))


class GlobalFunction(B):
    def forward(self, x: Tensor) -> Tensor:
        return x + helper(self.outer(self.inner(x)))


def recoded(h: Tensor) -> Tensor:
    return h


class CodeOfAFunction(B):
    def forward(self, x: Tensor) -> Tensor:
        return x + recoded(self.outer(self.inner(x)))


def closing_over(scale: int) -> type[B]:
    class Closing(B):
        def forward(self, x: Tensor) -> Tensor:
            h = self.outer(self.inner(x))
            return x + h if scale == 1 else x + scale * h

    return Closing


Closing = closing_over(1)


def decorated(options: dict[str, int]) -> Callable[[Any], Any]:
    def decorate(function: Any) -> Any:
        @functools.wraps(function)
        def wrapper(self: Any, x: Tensor) -> Tensor:
            out = function(self, x)
            return out if options["scale"] == 1 else options["scale"] * out

        return wrapper

    return decorate


DECORATION = {"scale": 1}


class Decorated(B):
    @decorated(DECORATION)
    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(self.inner(x))


class DefaultArgument(B):
    def forward(self, x: Tensor, scale: int = 1) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if scale == 1 else x + scale * h


class KeywordDefault(B):
    def forward(self, x: Tensor, *, scale: int = 1) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if scale == 1 else x + scale * h


class MutableDefault(B):
    def forward(self, x: Tensor, options: dict[str, int] = {"scale": 1}) -> Tensor:  # noqa: B006
        h = self.outer(self.inner(x))
        return x + h if options["scale"] == 1 else x + options["scale"] * h


@functools.cache
def cached_scale() -> int:
    return OPTIONS["scale"]


class Cached(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if cached_scale() == 1 else x + 2 * h


class Context(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if CONTEXT.get() == 1 else x + 2 * h


class Environment(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + 2 * h if os.environ.get("DOUBLE_THE_BRANCH") else x + h


class ImportsInside(B):
    def forward(self, x: Tensor) -> Tensor:
        from tests.support.fuse_options import SCALE

        h = self.outer(self.inner(x))
        return x + h if SCALE == 1 else x + 2 * h


class Evaluates(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if eval("OPTIONS['scale']") == 1 else x + 2 * h


def doubled(self: Any, x: Tensor) -> Tensor:
    return x + 2 * self.outer(self.inner(x))


def _change_code(block: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(recoded, "__code__", replaced_helper.__code__)


def _change_closure(block: Any, patch: pytest.MonkeyPatch) -> None:
    (cell,) = Closing.forward.__closure__  # type: ignore[attr-defined]
    patch.setattr(cell, "cell_contents", 2)


def _environment(block: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("DOUBLE_THE_BRANCH", "1")


MUTATIONS: dict[str, Mutation] = {
    "class-attribute": Mutation(OfTheClass, on(OfTheClass, "scale", 2), True, "scale"),
    "class-attribute-shadowed": Mutation(OfTheClass, assign("scale", 2), True, "scale"),
    "attribute-of-a-base": Mutation(OfABase, on(OfTheClass, "scale", 2), True, "scale"),
    "attribute-in-front-of-a-base": Mutation(OfABase, on(OfABase, "scale", 2), True, "scale"),
    "type-of-self": Mutation(OfTheType, on(OfTheType, "scale", 2), None, "scale|type"),
    "class-of-self": Mutation(OfDunderClass, on(OfDunderClass, "scale", 2), True, "scale"),
    "another-class": Mutation(OfAnotherClass, on(OptionsClass, "scale", 2), True, "scale"),
    "method-replaced": Mutation(
        MethodReplaced, on(MethodReplaced, "scaled", lambda self, h: 2 * h), True, "scaled"
    ),
    "method-on-the-block": Mutation(
        MethodReplaced, assign("scaled", replaced_helper), True, "scaled"
    ),
    "forward-replaced": Mutation(
        ForwardReplaced, on(ForwardReplaced, "forward", doubled), True, "forward"
    ),
    "forward-of-a-base-replaced": Mutation(SuperForward, on(BaseOfSuper, "forward", doubled), True,
                                           "forward"),
    "method-of-a-base-replaced": Mutation(
        B, on(B, "outer", lambda self, h: 2 * self.conv2(F.relu(self.bn2(h)))), True, "outer"
    ),
    "static-method": Mutation(
        StaticMethod, on(StaticMethod, "act", staticmethod(torch.tanh)), True, "act"
    ),
    "global": Mutation(OfAGlobal, here(globals(), "SCALE", 2), True, "SCALE"),
    "global-dictionary": Mutation(
        OfAGlobalDictionary, lambda _, p: p.setitem(OPTIONS, "scale", 2), True, "OPTIONS"
    ),
    "global-object": Mutation(OfAGlobalObject, on(STATE, "scale", 2), True, "STATE"),
    "global-of-another-module": Mutation(
        OfAnotherModule, on(fuse_options, "SCALE", 2), True, "SCALE"
    ),
    "global-of-another-modules-function": Mutation(
        OfAnotherModulesFunction, on(fuse_options, "SCALE", 2), True, "SCALE"
    ),
    "global-in-a-comprehension": Mutation(
        InAComprehension, lambda _, p: p.setitem(OPTIONS, "scale", 2), True, "OPTIONS"
    ),
    "table-of-functions": Mutation(
        OfATable, lambda _, p: p.setitem(ACTS, "relu", F.silu), True, "ACTS"
    ),
    "global-function": Mutation(
        GlobalFunction, here(globals(), "helper", replaced_helper), True, "helper"
    ),
    "code-of-a-function": Mutation(CodeOfAFunction, _change_code, True, "recoded"),
    "closure": Mutation(Closing, _change_closure, True, "scale"),
    "closure-of-a-decorator": Mutation(
        Decorated, lambda _, p: p.setitem(DECORATION, "scale", 2), True, "options"
    ),
    "default-argument": Mutation(
        DefaultArgument, on(DefaultArgument.forward, "__defaults__", (2,)), True, "forward"
    ),
    "keyword-default": Mutation(
        KeywordDefault, on(KeywordDefault.forward, "__kwdefaults__", {"scale": 2}), True, "forward"
    ),
    "mutable-default": Mutation(
        MutableDefault,
        lambda _, p: p.setitem(MutableDefault.forward.__defaults__[0], "scale", 2),
        True,
        "forward",
    ),
    "cached-function": Mutation(
        Cached, lambda *_: cached_scale.cache_clear(), False, "cached_scale"
    ),
    "context-variable": Mutation(Context, None, False, "ContextVar"),
    "environment": Mutation(Environment, _environment, None, "environ|imports|get"),
    "import-inside": Mutation(ImportsInside, on(fuse_options, "SCALE", 2), None, "import|SCALE"),
    "eval": Mutation(Evaluates, lambda _, p: p.setitem(OPTIONS, "scale", 2), False, "eval"),
}  # fmt: skip
