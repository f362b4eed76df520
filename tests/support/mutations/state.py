"""Mutations that a later assignment makes wrong: state of the block and of what it holds."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import types
import weakref
from collections import deque
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.fuse_models import conv3
from tests.support.mutations.base import CHANNELS, B, Mutation, assign, item, on


class ChildAttribute(B):
    def setup(self) -> None:
        self.conv1.slope = 0.1

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.leaky_relu(self.bn1(x), self.conv1.slope))
        return x + self.conv2(F.leaky_relu(self.bn2(h), self.conv1.slope))


class Optional(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        scale = getattr(self, "scale", None)
        return x + (h if scale is None else scale * h)


class IfPresent(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        if hasattr(self, "scale"):
            h = self.scale * h
        return x + h


class IfItRaises(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        with contextlib.suppress(AttributeError):
            h = h * self.scale
        return x + h


class OptionalOnAChild(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h * self.bn2.scale if hasattr(self.bn2, "scale") else x + h


class InADictionary(B):
    def setup(self) -> None:
        self.options = {"scale": False}

    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + 2 * h if self.options["scale"] else x + h


class InAList(B):
    def setup(self) -> None:
        self.flags = [False, True]

    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + 2 * h if self.flags[0] else x + h


class InASet(B):
    def setup(self) -> None:
        self.options: set[str] = set()

    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + 2 * h if "double" in self.options else x + h


class InADeque(B):
    def setup(self) -> None:
        self.options: deque[int] = deque([1, 2])

    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + 2 * h if self.options[0] > 1 else x + h


@dataclasses.dataclass
class Depths:
    scale: int = 1


@dataclasses.dataclass
class Settings:
    depths: Depths = dataclasses.field(default_factory=Depths)


class Slotted:
    __slots__ = ("scale",)

    def __init__(self) -> None:
        self.scale = 1


class Computed:
    """Its attributes come from a dictionary, as many configurations' do."""

    def __init__(self) -> None:
        self.values = {"scale": 1}

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["values"][name]
        except KeyError:
            raise AttributeError(name) from None


class Configured(B):
    def __init__(self, config: Any) -> None:
        self_config = config
        super().__init__()
        self.config = self_config

    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if self.config.scale == 1 else x + self.config.scale * h


class Nested(Configured):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if self.config.depths.scale == 1 else x + self.config.depths.scale * h


class ByAPropertyOfADictionary(B):
    def setup(self) -> None:
        self._options = {"scale": 1}

    @property
    def scale(self) -> int:
        return self._options["scale"]

    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if self.scale == 1 else x + self.scale * h


class Activation(enum.Enum):
    RELU = "relu"
    SILU = "silu"


class ByAnEnum(B):
    def setup(self) -> None:
        self.kind = Activation.RELU

    def forward(self, x: Tensor) -> Tensor:
        act = F.relu if self.kind is Activation.RELU else F.silu
        return x + self.conv2(act(self.bn2(self.conv1(act(self.bn1(x))))))


class Pair(NamedTuple):
    scale: int
    shift: int


class ByATuple(B):
    def setup(self) -> None:
        self.pair = Pair(1, 0)

    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if self.pair.scale == 1 else x + self.pair.scale * h


class TrueOrOne(B):
    def setup(self) -> None:
        self.scale: Any = True

    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if self.scale is True else x + 2 * h


class Partial(B):
    def setup(self) -> None:
        self.act = functools.partial(F.leaky_relu, negative_slope=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.act(self.bn2(self.conv1(self.act(self.bn1(x))))))


class InAPlainList(B):
    """The list is what runs; its modules are registered as well."""

    def setup(self) -> None:
        self.order = [self.bn1, nn.Identity(), self.conv1]
        self.act = nn.ReLU()
        self.order[1] = self.act

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for layer in self.order:
            h = layer(h)
        return x + self.conv2(self.act(self.bn2(h)))


class Unregistered(B):
    def setup(self) -> None:
        self.hidden = (conv3(CHANNELS, CHANNELS),)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.hidden[0](F.relu(self.bn2(self.inner(x))))


class PlainTensor(B):
    def setup(self) -> None:
        self.scale = torch.tensor(1.0)

    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if float(self.scale) == 1 else x + 2 * h


class TensorInAList(PlainTensor):
    def setup(self) -> None:
        self.scales = [torch.tensor(1.0)]

    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if self.scales[0].item() == 1 else x + 2 * h


class OfNumpy(B):
    def setup(self) -> None:
        self.scale = np.array([1.0])

    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if self.scale[0] == 1 else x + 2 * h


class Parent(nn.Module):
    """The block asks the model that it is in, which it holds in a list."""

    def __init__(self, block: type[B]) -> None:
        super().__init__()
        self.scale = 1
        self.block = block()
        self.block.parents = [self]

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class AsksItsParent(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if self.parents[0].scale == 1 else x + self.parents[0].scale * h


class WeakParent(Parent):
    def __init__(self, block: type[B]) -> None:
        super().__init__(block)
        self.block.parents = [weakref.ref(self)]

    def __deepcopy__(self, memo: Any) -> Any:
        raise NotImplementedError


class AsksItsParentWeakly(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if self.parents[0]().scale == 1 else x + 2 * h


class OwnGetattr(B):
    def setup(self) -> None:
        self.options = {"scale": 1}

    def __getattr__(self, name: str) -> Any:
        if name == "scale":
            return self.__dict__["options"][name]
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if self.scale == 1 else x + self.scale * h


class ReadsItsDictionary(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if "scale" not in self.__dict__ else x + 2 * h


class ReadsVars(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h * vars(self).get("scale", 1) if vars(self).get("scale") else x + h


class OptionsClass:
    scale = 1


class OnTheClassLater(Optional):
    pass


def _register_scale(block: Any, _: Any) -> None:
    block.register_buffer("scale", torch.tensor(2.0))


def _other_layer(block: Any, _: Any) -> None:
    block.order[1] = nn.Identity()


MUTATIONS: dict[str, Mutation] = {
    "child-attribute": Mutation(ChildAttribute, assign("conv1.slope", 0.5), True, "conv1.slope"),
    "optional": Mutation(Optional, assign("scale", 2.0), True, "scale"),
    "optional-parameter": Mutation(
        Optional,
        lambda b, _: setattr(b, "scale", nn.Parameter(torch.tensor(2.0))),
        True,
        "scale|children",
    ),
    "optional-buffer": Mutation(Optional, _register_scale, True, "scale"),
    "optional-on-the-class": Mutation(OnTheClassLater, on(OnTheClassLater, "scale", 2.0), True,
                                      "scale"),
    "if-present": Mutation(IfPresent, assign("scale", 2.0), True, "scale"),
    "if-it-raises": Mutation(IfItRaises, assign("scale", 2.0), None, "scale|suppress|with|context"),
    "optional-on-a-child": Mutation(OptionalOnAChild, assign("bn2.scale", 2.0), True, "scale"),
    "dictionary": Mutation(InADictionary, item("options", "scale", True), True, "options"),
    "dictionary-replaced": Mutation(InADictionary, assign("options", {"scale": True}), True,
                                    "options"),
    "list": Mutation(InAList, item("flags", 0, True), True, "flags"),
    "set": Mutation(InASet, lambda b, _: b.options.add("double"), True, "options"),
    "deque": Mutation(InADeque, lambda b, _: b.options.popleft(), True, "options"),
    "namespace": Mutation(
        lambda: Configured(types.SimpleNamespace(scale=1)), assign("config.scale", 2), True,
        "config"
    ),
    "dataclass": Mutation(lambda: Configured(Depths()), assign("config.scale", 2), True, "config"),
    "slots": Mutation(lambda: Configured(Slotted()), assign("config.scale", 2), True, "config"),
    "getattr-of-a-configuration": Mutation(
        lambda: Configured(Computed()), lambda b, _: b.config.values.update(scale=2), None, "config"
    ),
    "class-of-a-configuration": Mutation(
        lambda: Configured(OptionsClass()), on(OptionsClass, "scale", 2), True, "scale"
    ),
    "configuration-is-a-class": Mutation(
        lambda: Configured(OptionsClass), on(OptionsClass, "scale", 2), True, "scale"
    ),
    "nested-dataclass": Mutation(
        lambda: Nested(Settings()), assign("config.depths.scale", 2), True, "config"
    ),
    "property-of-a-dictionary": Mutation(
        ByAPropertyOfADictionary, item("_options", "scale", 2), True, "_options"
    ),
    "enum": Mutation(ByAnEnum, assign("kind", Activation.SILU), True, "kind"),
    "named-tuple": Mutation(ByATuple, assign("pair", Pair(2, 0)), True, "pair"),
    "true-or-one": Mutation(TrueOrOne, assign("scale", 1), True, "scale"),
    "partial": Mutation(
        Partial, lambda b, _: b.act.keywords.update(negative_slope=0.5), None, "act"
    ),
    "modules-in-a-list": Mutation(InAPlainList, _other_layer, None, "order"),
    "unregistered": Mutation(Unregistered, None, None, "hidden|installed|registered"),
    "plain-tensor": Mutation(PlainTensor, lambda b, _: b.scale.fill_(2), False, "scale"),
    "tensor-in-a-list": Mutation(
        TensorInAList, lambda b, _: b.scales[0].fill_(2), False, "scales|item"
    ),
    "numpy-array": Mutation(OfNumpy, lambda b, _: b.scale.fill(2), False, "scale"),
    "parent": Mutation(lambda: Parent(AsksItsParent), assign("scale", 2), None, "parents|scale"),
    "weak-parent": Mutation(
        lambda: WeakParent(AsksItsParentWeakly), assign("scale", 2), False, "parents|weak"
    ),
    "getattr-of-its-own": Mutation(OwnGetattr, item("options", "scale", 2), None, "options|dict"),
    "reads-its-dictionary": Mutation(ReadsItsDictionary, assign("scale", 2), None, "__dict__"),
    "reads-vars": Mutation(ReadsVars, assign("scale", 2), None, "vars|__dict__"),
}  # fmt: skip
