"""The names that options take, each list once."""

from __future__ import annotations

import torch

from .kernels.dispatch import BACKENDS as _ENGINES

AUTO = "auto"
EAGER = "eager"

# Implementations of a block: kernels, ATen, whichever fits the device, the children one by one.
BACKENDS = (*_ENGINES, EAGER)

# The memory modes, as a rule the fastest first.
MEMORY_MODES = ("recompute", "invert_h1", "invert", "segment")

# The dtypes in which convolutions multiply.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
