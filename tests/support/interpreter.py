"""Triton's interpreter with its programs in another order."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any


@contextlib.contextmanager
def programs_in_order(order: Callable[[int], Sequence[int]]) -> Iterator[None]:
    """Run a launch's programs as ``order(their number)`` says: on a GPU they arrive in any."""
    from triton.runtime.interpreter import InterpreterBuilder

    place = InterpreterBuilder.set_grid_idx
    orders: dict[int, Sequence[int]] = {}

    def placed(self: Any, x: int, y: int, z: int) -> None:
        programs = self.grid_dim[0]
        if programs not in orders:
            orders[programs] = order(programs)
        place(self, orders[programs][x], y, z)

    InterpreterBuilder.set_grid_idx = placed
    try:
        yield
    finally:
        InterpreterBuilder.set_grid_idx = place
