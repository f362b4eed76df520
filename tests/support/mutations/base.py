"""``B``, the plain unit; what a mutation of it is, and the assignments that follow ``fuse``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.fuse_models import conv3

CHANNELS = 6


class B(nn.Module):
    """x + conv2(relu(bn2(conv1(relu(bn1(x))))))."""

    def __init__(self, channels: int = CHANNELS) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), conv3(channels, channels)
        self.bn2, self.conv2 = nn.BatchNorm2d(channels), conv3(channels, channels)
        self.setup()

    def setup(self) -> None:
        """What a subclass adds."""

    def inner(self, x: Tensor) -> Tensor:
        return self.conv1(F.relu(self.bn1(x)))

    def outer(self, h: Tensor) -> Tensor:
        return self.conv2(F.relu(self.bn2(h)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(self.inner(x))


Later = Callable[[nn.Module, pytest.MonkeyPatch], None]


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One block.

    build: makes it. later: what is assigned to it after ``fuse`` (to the unfused twin alike), or to
    what is global. fused: whether it must run fused before that; None where either is right.
    reason: a pattern of the words that ``explain`` must say where it does not run fused.
    """

    build: Callable[[], nn.Module]
    later: Later | None = None
    fused: bool | None = None
    reason: str = r"\w"


def assign(name: str, value: Any) -> Later:
    """Of an attribute, by its dotted path from the block."""
    owners, _, last = name.rpartition(".")

    def later(block: nn.Module, _: pytest.MonkeyPatch) -> None:
        owner: Any = block
        for part in owners.split(".") if owners else ():
            owner = getattr(owner, part)
        setattr(owner, last, value)

    return later


def on(owner: Any, name: str, value: Any) -> Later:
    """Of an attribute of something global."""
    return lambda _, patch: patch.setattr(owner, name, value, raising=False)


def here(namespace: dict[str, Any], name: str, value: Any) -> Later:
    """Of a global of the module whose globals are ``namespace``."""
    return lambda _, patch: patch.setitem(namespace, name, value)


def item(name: str, key: Any, value: Any) -> Later:
    """Of an item of a container that the block has."""

    def later(block: nn.Module, _: pytest.MonkeyPatch) -> None:
        getattr(block, name)[key] = value

    return later
