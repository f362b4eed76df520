"""PyTorch's switches that change what a kernel computes. Needs no Triton."""

from __future__ import annotations

import torch


def allow_tf32() -> bool:
    """PyTorch's own switch for TF32 in convolutions, old and new interface."""
    try:
        return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError):
        return torch.backends.cudnn.allow_tf32
