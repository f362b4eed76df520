"""Triton's interpreter, with the sums of a GPU, and a sixth faster."""

from __future__ import annotations

import importlib.util
from typing import Any


def sum_as_a_gpu_does() -> None:
    """Have ``tl.sum`` add halves to halves, as threads and warps do.

    NumPy adds the rows of a block one after the other: of 64 rows that is off by 2 eps where a GPU
    is off by half an eps, and the yardstick would measure NumPy.
    """
    if importlib.util.find_spec("triton") is None:
        return
    import numpy as np
    from triton.runtime.interpreter import ReduceOps

    def halves(self: Any, input: Any) -> Any:
        data = input.handle.data
        axis = self.axis
        if axis is None:
            data, axis = data.reshape(-1), 0
        data = np.moveaxis(data, axis, 0)
        while len(data) > 1:  # a power of two: blocks have no other size
            data = data[: len(data) // 2] + data[len(data) // 2 :]
        data = data[0]
        if self.keep_dims:
            every = input.handle.data.ndim * (1,)
            data = data.reshape(every) if self.axis is None else np.expand_dims(data, axis)
        elif self.axis is None:
            data = data.item()
        return self.to_tensor(data, input.dtype)

    ReduceOps.sum = halves


def find_builtins_once() -> None:
    """Have each call of a device function look at Triton's built-in functions alone.

    The interpreter puts its own in their place anew at every such call, and looks for them among
    all that Triton's modules hold: a sixth of the time of a small kernel.
    """
    if importlib.util.find_spec("triton") is None:
        return
    import inspect

    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    names: dict[Any, list[str]] = {}

    def patch(package: Any, builder: Any, *scope: Any) -> None:
        if package not in names:
            names[package] = [n for n, value in inspect.getmembers(package) if is_builtin(value)]
        for name in names[package]:
            member = getattr(package, name)
            if is_builtin(member):
                interpreter._patch_attr(package, name, member, builder, *scope)

    interpreter._patch_builtin = patch
