"""What runs where a kernel cannot: the next smaller tile, and then ATen.

A kernel that does not compile for a device, or takes more shared memory, registers or threads than
it has, must not end a training run. ``Fallbacks.run`` tries an operation's tile halved, and halved
again, and then leaves it to ATen, and says so in one ``FallbackWarning``. What was found holds for
this operation, shape and device from then on, so that nothing is compiled in vain twice.

One decision covers all that a convolution's forward does for a shape (with moments or without, with
a residual added or subtracted): x_l = x_{l+1} - F(x_l) is walked back with the tile that computed
F, and so with its bits. The one exception is the step in which a decision falls: if the subtracting
kernel fails although the adding one ran, F is computed once more by another tile, whose sums differ
by roundings, or by ATen, which also rounds F to the multiplication's dtype before it is subtracted.
Later steps use the new one in both directions.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from . import launch
from .launch import KernelError
from .operands import Geometry

T = TypeVar("T")

# How often a tile is halved: from 128 to the 16 that matrix units need.
_HALVINGS = 3
_ATEN = _HALVINGS + 1


class FallbackWarning(RuntimeWarning):
    """An operation runs with a smaller tile than it should, or on ATen."""


class Fallbacks:
    """How each operation, shape and device that a kernel failed for is computed."""

    def __init__(self) -> None:
        self._levels: dict[tuple[Any, ...], int] = {}

    def run(
        self,
        op: str,
        x: Tensor,
        shape: tuple[Any, ...],
        kernel: Callable[[int], T],
        aten: Callable[[], T],
        tiled: bool = True,
        instead: str = "by ATen",
    ) -> T:
        """``kernel(0)``, or what is left of it.

        Args:
            op, shape: what is computed, for the warning and as what the decision is kept under.
            x: a tensor on the device.
            kernel: the operation with its tile halved so many times.
            aten: the same by ATen.
            tiled: whether there are smaller tiles.
            instead: what ``aten`` computes with, for the warning.
        """
        level = 0
        if self._levels:
            level = self._levels.get((op, shape, x.device, launch.device_of(x)), 0)
        reason = None
        for number in range(level, _ATEN if tiled else min(level + 1, _ATEN)):
            try:
                result = kernel(number)
                break
            except KernelError as error:
                reason = reason or error
        else:
            # Not in the handler: what fails here is no consequence of the kernel's error.
            number, result = _ATEN, aten()
        if reason is not None:
            how = f"computed {instead}" if number == _ATEN else "computed with a smaller tile"
            described = ", ".join(_describe(part) for part in shape)
            warnings.warn(
                f"{op} of {described} on {launch.describe(x)} is {how} from now on: {reason}",
                FallbackWarning,
                stacklevel=2,
            )
            self._levels[op, shape, x.device, launch.device_of(x)] = number
        return result


def _describe(part: Any) -> str:
    if isinstance(part, Geometry):
        return f"stride {part.stride}, padding {part.padding}"
    return str(tuple(part)) if isinstance(part, tuple) else str(part)
