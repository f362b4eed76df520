"""A line on the terminal while kernels are compiled, once that has taken some seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Seconds that go by without a word.
_QUIET = 3.0
# A kernel of Triton's cache is loaded in less.
_LOADED = 0.05


class Compiling:
    """What this process has compiled so far.

    kernels, seconds: how many, and in what time. clock: seconds from any moment on.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.kernels = 0
        self.seconds = 0.0
        self.clock = clock

    @contextmanager
    def kernel(self) -> Iterator[None]:
        """Around what compiles a kernel, or finds it in the cache. The line goes with the block."""
        stream = sys.stderr
        shown = self.seconds > _QUIET and stream is not None and stream.isatty()
        if shown:
            text = f"compiling kernels: {self.kernels} in {self.seconds:.0f} s, kept for later runs"
            stream.write(f"\r\033[K{text}")
            stream.flush()
        began = self.clock()
        try:
            yield
        finally:
            took = self.clock() - began
            if took > _LOADED:
                self.kernels += 1
                self.seconds += took
            if shown:
                stream.write("\r\033[K")
                stream.flush()


COMPILING = Compiling()
