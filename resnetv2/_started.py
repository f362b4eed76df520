"""What the command does before torch is imported, which takes seconds.

``resnetv2/__init__.py`` imports this first: of the package, nothing else can come before it.
"""

from __future__ import annotations

import os
import signal
import sys
from multiprocessing.process import parent_process
from pathlib import Path
from types import FrameType


def is_command() -> bool:
    """Whether this process is the command ``resnetv2`` or ``python -m resnetv2``."""
    if parent_process() is not None:
        return False
    if sys.argv[:1] == ["-m"]:  # of a module whose package is being imported
        words = sys.orig_argv
        return "-m" in words and words[words.index("-m") + 1 :][:1] == ["resnetv2"]
    return bool(sys.argv) and Path(sys.argv[0]).stem == "resnetv2"


def _end(number: int, frame: FrameType | None) -> None:
    """Nothing has begun that could be lost."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"stopped at once\n")
    os._exit(128 + number)


if is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _end)


def begin() -> None:
    """Everything is imported: Ctrl-C is the command's own affair again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
