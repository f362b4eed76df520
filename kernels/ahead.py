"""Kernels compiled before they are launched, as many at a time as there are processors.

A first step launches some seventy kernels, each of which takes about a second to compile: one after
the other they would take a minute on any machine.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import torch
import triton
from triton.runtime._async_compile import AsyncCompileMode, FutureKernel

from . import launch, recording
from .progress import COMPILING

_off = False
# Without it, as in Triton 3.6, a kernel that does not compile would be launched all the same.
_RAISES = hasattr(FutureKernel, "__getattr__")


def processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Inside the block each kernel is compiled at its first launch, in all threads."""
    global _off
    before, _off = _off, True
    try:
        yield
    finally:
        _off = before


def compile_ahead(run: Callable[[], object], device: torch.device) -> None:
    """Compile for ``device`` what ``run`` launches, which is a function of tensors without memory.

    A kernel that does not compile says so when it is launched (``fallback``).
    """
    if not _RAISES or _off or launch.INTERPRET or processors() < 2:
        return
    on_cuda = device.type == "cuda"
    with torch.cuda.device(device) if on_cuda else contextlib.nullcontext():
        try:
            known = launch.device_of(torch.empty(0, device=device))
            with recording.for_gpu(known), recording.listing() as listed, torch.no_grad():
                run()
        except Exception as error:  # a step does not depend on it
            text = f"kernels are compiled one at a time: what is launched was not told: {error!r}"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
        else:
            _compile(listed)


def _compile(listed: list[tuple[Any, tuple[Any, ...], dict[str, Any]]]) -> None:
    number = triton.runtime.driver.active.get_current_device()
    wanted = {}
    for kernel, args, constants in listed:
        key = launch.key_of(kernel, number, args, constants)
        if not launch.unusual(kernel) and not launch.is_compiled(key):
            wanted[key] = kernel, args, constants
    if len(wanted) < 2:
        return
    with (
        COMPILING.several(len(wanted)) as tell,
        ThreadPoolExecutor(processors()) as pool,
        AsyncCompileMode(pool, ignore_errors=True) as mode,
    ):
        for kernel, args, constants in wanted.values():
            kernel.warmup(*args, grid=(1,), **constants, **launch.OPTIONS)
        for done, _ in enumerate(as_completed(mode.raw_futures), start=1):
            tell(done)
