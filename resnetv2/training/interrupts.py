"""Ctrl-C and termination: the step in hand is finished and the run saved."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any


class StopRequests:
    """While active, SIGINT and SIGTERM set ``signal`` instead of raising; the second one raises.

    Outside the main thread, where Python allows no handlers, signals do what they did before.

    Args:
        active: whether to take the signals at all. quiet: print nothing.
    """

    def __init__(self, active: bool = True, quiet: bool = False) -> None:
        self.active = active and threading.current_thread() is threading.main_thread()
        self.quiet = quiet
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequests:
        if self.active:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        if not self.quiet:
            print("\nstopping after this step (once more: at once)", file=sys.stderr, flush=True)
