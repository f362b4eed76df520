"""The one place that launches kernels, and what a launch needs to know of the device.

Device properties come from Triton's active driver (design 4), so that the dry run's stand-in
device is asked like a real one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .operands import Geometry

INTERPRET: bool = triton.knobs.runtime.interpret

# The dtypes in which a kernel's tl.dot multiplies; float64 is the reference's alone.
TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}

_recorders: list[Callable[[str, tuple[int, ...], dict[str, Any]], None]] = []


class Config(NamedTuple):
    """A kernel's tile and how it is run. BLOCK_M: rows, BLOCK_N: columns, BLOCK_K: reduction."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 2


@contextmanager
def record(callback: Callable[[str, tuple[int, ...], dict[str, Any]], None]) -> Iterator[None]:
    """Call ``callback(kernel name, grid, constants)`` for each launch inside the block."""
    _recorders.append(callback)
    try:
        yield
    finally:
        _recorders.remove(callback)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> Any:
    """Run ``kernel[grid](*args, **constants)`` on the device of its first tensor argument."""
    for callback in _recorders:
        callback(kernel.fn.__name__, grid, constants)
    tensor = next(a for a in args if isinstance(a, Tensor))
    guard = torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
    with guard:
        return kernel[grid](*args, **constants)


@functools.cache
def _multiprocessors(device: int, target: str) -> int:
    properties = triton.runtime.driver.active.utils.get_device_properties(device)
    return int(properties["multiprocessor_count"])


def multiprocessors() -> int:
    """Number of multiprocessors of the current device; 1 in the interpreter, which has none."""
    if INTERPRET:
        return 1
    active = triton.runtime.driver.active
    return _multiprocessors(active.get_current_device(), str(active.get_current_target()))


def allow_tf32() -> bool:
    """PyTorch's own switch for TF32 in convolutions (design 6), old and new interface."""
    try:
        return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError):
        return torch.backends.cudnn.allow_tf32


def input_precision(dtype: torch.dtype) -> str:
    """``tl.dot``'s input_precision for operands of ``dtype``."""
    return "tf32" if dtype == torch.float32 and allow_tf32() else "ieee"


def check_activation(name: str, x: Tensor, shape: tuple[int, ...] | None = None) -> None:
    """Kernels read (N, C, H, W) tensors in channels_last memory; say so where one is not."""
    if x.dim() != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(
            f"{name} must be a 4-D tensor in channels_last memory, got shape {tuple(x.shape)} "
            f"with strides {x.stride()}"
        )
    if shape is not None and tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(x.shape)}")


def check_convolution(geometry: Geometry, dtype: torch.dtype) -> None:
    """Raise NotImplementedError for what the convolution kernels leave to ATen."""
    if geometry.dilation != (1, 1) or geometry.groups != 1:
        raise NotImplementedError(f"no kernel for dilated or grouped convolutions: {geometry}")
    if dtype not in TRITON_DTYPES:
        raise NotImplementedError(f"no kernel multiplies in {dtype}")


def is_wide(*tensors: Tensor) -> bool:
    """Whether an element's offset in one of ``tensors`` needs 64 bits (design 6)."""
    return any(tensor.numel() >= 2**31 for tensor in tensors)
