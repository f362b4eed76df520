"""Scripts of this folder, run where kernels are compiled and not interpreted."""

from __future__ import annotations

import json
from typing import Any

from tests.support.processes import python


def compiled(*arguments: str) -> str:
    """What ``python ARGUMENTS`` prints."""
    return python(*arguments, without=["TRITON_INTERPRET"])


def checked(script: str) -> Any:
    """The JSON that a script of tests/support prints; a stub takes the place of a GPU's library."""
    found = python(
        "-m", f"tests.support.{script}",
        without=["TRITON_INTERPRET"], env={"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    return json.loads(found)
