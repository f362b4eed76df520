"""What a training step costs the host: processor time, and Python functions called.

    clear()
    taken = seconds(step)       # of all threads: backward runs in one of autograd's on a GPU

Kernels' own time is not in it where they run on a GPU, or nowhere (stub_driver.py).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch


def seconds(step: Callable[[], object]) -> float:
    """Processor time of the process in ``step()``; a GPU has nothing left to do before it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.process_time()
    step()
    return time.process_time() - start


def calls(step: Callable[[], object]) -> int:
    """Python functions that this thread enters in ``step()``: the same on any machine."""
    entered = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal entered
        entered += event == "call"

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        step()
    finally:
        sys.setprofile(before)
    return entered
