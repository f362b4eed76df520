"""What the compiler made of one kernel: a line of the matrix."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One distinct kernel and grid of a target and dtype, as the table and the JSON give it."""

    target: str
    dtype: str
    case: str
    kernel: str
    constants: dict[str, Any]
    key: str
    grid: Sequence[int]
    programs: int
    num_warps: int
    num_stages: int
    registers: int
    spilled: int
    shared: int
    seconds: float | None
    matrix: int
    rounded: int
    wgmma: int
    local: int
    multiply_adds: int
    instructions: int | None
    nbytes: int
    ratio: float | None
    tile_ratio: float | None
    unsure: str

    @property
    def convolution(self) -> str:
        """ "forward", "dgrad", "wgrad" or "backward" for a kernel that convolves, else ""."""
        found = re.fullmatch(r"_conv_(forward|dgrad|wgrad|backward)_kernel", self.kernel)
        return found[1] if found else ""

    @property
    def fault(self) -> str:
        """Why this kernel must not ship, or ""."""
        if self.spilled or self.local:
            return f"spills {self.spilled} bytes a thread"
        low = self.dtype in ("fp16", "bf16", "bf16+fp32")
        if self.target == "sm_90" and low and self.convolution and not self.wgmma:
            return "no wgmma"
        return ""
