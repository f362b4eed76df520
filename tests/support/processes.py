"""Python in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def python(
    *arguments: str, path: Iterable[Path] = (ROOT,), without: Iterable[str] = (), **options: Any
) -> str:
    """What ``python ARGUMENTS`` prints; the test fails where it does, with its errors.

    Args:
        path: folders in front of the installed packages. without: names that are taken out of the
            environment. options: of ``subprocess.run``; ``env`` adds to this environment.
    """
    environment = {name: value for name, value in os.environ.items() if name not in {*without}}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, path))
    environment.update(options.pop("env", {}))
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment, capture_output=True, text=True, timeout=600, **{"cwd": ROOT, **options},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout
