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
        with self.several(1):
            yield

    @contextmanager
    def several(self, number: int) -> Iterator[Callable[[int], None]]:
        """The same for ``number`` of them; to be told how many are done."""
        began, shown = self.clock(), False

        def tell(done: int) -> None:
            nonlocal shown
            seconds = self.seconds + self.clock() - began
            stream = sys.stderr
            if seconds > _QUIET and stream is not None and stream.isatty():
                shown = True
                text = f"{self.kernels + done} in {seconds:.0f} s, kept for later runs"
                stream.write(f"\r\033[Kcompiling kernels: {text}")
                stream.flush()

        tell(0)
        try:
            yield tell
        finally:
            took = self.clock() - began
            if took > _LOADED:
                self.kernels += number
                self.seconds += took
            if shown:
                sys.stderr.write("\r\033[K")
                sys.stderr.flush()


COMPILING = Compiling()
