"""Triton's interpreter, with the sums of a GPU, and faster."""

from __future__ import annotations

import importlib.util
from typing import Any


def prepare() -> None:
    """All of this module, once in a process that interprets kernels; without Triton, nothing."""
    if importlib.util.find_spec("triton") is not None:
        _sum_as_a_gpu_does()
        _patch_language_once()
        _leave_out_overflow_checks()


def _sum_as_a_gpu_does() -> None:
    """Have ``tl.sum`` add halves to halves, as threads and warps do.

    NumPy adds the rows of a block one after the other: of 64 rows that is off by 2 eps where a GPU
    is off by half an eps, and the yardstick would measure NumPy.
    """
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


def _patch_language_once() -> None:
    """Have a device function find Triton's language as the kernel that calls it has patched it.

    The interpreter puts its own functions in the place of Triton's built-in ones at every such
    call, and looks for them among all that Triton's modules hold.
    """
    import inspect

    import triton.language as tl
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    names: dict[Any, list[str]] = {}
    modules: dict[int, tuple[Any, list[Any]]] = {}
    whole = interpreter._patch_lang

    def patch_builtin(package: Any, builder: Any, *scope: Any) -> None:
        if package not in names:
            names[package] = [n for n, value in inspect.getmembers(package) if is_builtin(value)]
        for name in names[package]:
            member = getattr(package, name)
            if is_builtin(member):
                interpreter._patch_attr(package, name, member, builder, *scope)

    def patch_lang(function: Any) -> Any:
        namespace = function.__globals__
        if id(namespace) not in modules:
            seen = [v for v in namespace.values() if inspect.ismodule(v) and v in (tl, tl.core)]
            modules[id(namespace)] = namespace, seen
        seen = modules[id(namespace)][1]
        if seen and not any(is_builtin(module.arange) for module in seen):
            return interpreter._LangPatchScope()
        return whole(function)

    interpreter._patch_builtin = patch_builtin
    interpreter._patch_lang = patch_lang


def _leave_out_overflow_checks() -> None:
    """Have no addition or product of integers computed a second time in 64 bits.

    The interpreter does so, in ten steps that are half of a kernel's time, and then looks at the
    result in debug mode alone. Here masked lanes may wrap around: ``conv_tile.OUTSIDE``.
    """
    import functools

    from triton.runtime import interpreter

    options = functools.partial(interpreter.InterpreterOptions, sanitize_overflow=False)
    interpreter.InterpreterOptions = options
    interpreter.interpreter_builder.options = options()
