"""Scripts of this folder, run where kernels are compiled and not interpreted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def compiled(script: str, *arguments: str) -> Any:
    """The JSON that a script of tests/support prints."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # A stub takes the place of a GPU's library.
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "support" / script), *arguments],
        env=environment, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
