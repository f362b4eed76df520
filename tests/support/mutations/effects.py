"""Mutations whose state moves by itself, or whose forward has effects."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.support.mutations.base import B, Mutation
from tests.support.mutations.state import Configured, Depths

COUNTS = {"calls": 0}


LOG: list[Any] = []


class Draws(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if random.random() < 0.5 else x


class DrawsWithNumpy(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if np.random.rand() < 0.5 else x  # noqa: NPY002


class OwnGenerator(B):
    def setup(self) -> None:
        self.generator = torch.Generator()

    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if torch.rand((), generator=self.generator) < 0.5 else x


class OwnRandom(B):
    def setup(self) -> None:
        self.random = random.Random(3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if self.random.random() < 0.5 else x


class Cycles(B):
    def setup(self) -> None:
        self.cycle = itertools.cycle([1, 2, 3])

    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if next(self.cycle) < 2 else x


class CountsItsCalls(B):
    def setup(self) -> None:
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = self.outer(self.inner(x))
        return x + h if self.calls < 3 else x


class CountsInADictionary(B):
    def setup(self) -> None:
        self.counts = {"calls": 0}

    def forward(self, x: Tensor) -> Tensor:
        self.counts["calls"] += 1
        h = self.outer(self.inner(x))
        return x + h if self.counts["calls"] % 2 else x


class CountsGlobally(B):
    def forward(self, x: Tensor) -> Tensor:
        COUNTS["calls"] += 1
        return x + self.outer(self.inner(x))


class CountsInAnObject(Configured):
    def forward(self, x: Tensor) -> Tensor:
        self.config.scale += 1
        return x + self.outer(self.inner(x))


class Logs(B):
    def forward(self, x: Tensor) -> Tensor:
        LOG.append(len(LOG))
        return x + self.outer(self.inner(x))


class AssignsAGlobal(B):
    def forward(self, x: Tensor) -> Tensor:
        global LAST
        LAST = 1
        return x + self.outer(self.inner(x))


LAST = 0


class Clock(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if time.time() > 0 else x


class Steps(B):
    """A generator kept between calls."""

    def setup(self) -> None:
        def numbers() -> Iterator[int]:
            yield from itertools.count()

        self.numbers = numbers

    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        if not hasattr(self, "running"):
            self.running = self.numbers()
        return x + h if next(self.running) % 2 == 0 else x


MUTATIONS: dict[str, Mutation] = {
    "random": Mutation(Draws, None, False, "random"),
    "numpy-random": Mutation(DrawsWithNumpy, None, False, "rand"),
    "generator": Mutation(OwnGenerator, None, False, "rand|generator"),
    "random-of-its-own": Mutation(OwnRandom, None, False, "random"),
    "cycle": Mutation(Cycles, None, False, "cycle|next"),
    "counts-its-calls": Mutation(CountsItsCalls, None, False, "calls|attributes"),
    "counts-in-a-dictionary": Mutation(CountsInADictionary, None, False, "counts"),
    "counts-globally": Mutation(CountsGlobally, None, False, "COUNTS"),
    "counts-in-an-object": Mutation(lambda: CountsInAnObject(Depths()), None, False, "config"),
    "logs": Mutation(Logs, None, False, "LOG"),
    "assigns-a-global": Mutation(AssignsAGlobal, None, False, "LAST"),
    "clock": Mutation(Clock, None, False, "time"),
    "generator-function": Mutation(Steps, None, False, "running|attributes|next|numbers"),
}  # fmt: skip
