"""What the compiler made of one kernel: a line of the matrix."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One distinct kernel and grid of a target and dtype, as the table and the JSON give it.

    ``key`` is the kernel's in Triton's cache here; a committed table's rows have none.
    """

    target: str
    dtype: str
    case: str
    kernel: str
    constants: dict[str, Any]
    key: str
    digest: str
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
    def identity(self) -> tuple[str, str, str, str, tuple[int, ...]]:
        """Target, dtype, kernel, digest and grid: what one row stands for."""
        return self.target, self.dtype, self.kernel, self.digest, tuple(self.grid)

    @property
    def tile(self) -> str:
        """The sizes of a program's blocks: "128x32x32x8"."""
        return "x".join(str(v) for k, v in self.constants.items() if k.startswith("BLOCK"))

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
