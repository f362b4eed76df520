"""ATen as its CUDA kernels answer, on a CPU: where their contract differs from the CPU's.

The values stay the CPU kernels'; what is there, where it lies and what is refused become CUDA's:

    native_batch_norm_backward  Without a weight there are no sums: tensors of shape (0,) in
        channels_last, an error in NCHW. Gradient and input have one dtype; a weight has that, or
        the statistics', which is float32 or float64. The input's gradient is NCHW where gradient
        and input lie in different layouts, and from 2**31 elements on.
    convolution, convolution_backward  Results are channels_last if input or weight is and cuDNN
        computes; NCHW in float64, and without cuDNN.

``with as_on_cuda():`` for a test; ``python -m pytest -p tests.support.cuda_aten`` for a run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from resnetv2.kernels.reference import is_channels_last, memory_format_of

LARGE = 2**31

_aten = torch.ops.aten
_norm_backward = _aten.native_batch_norm_backward
_convolution_backward = _aten.convolution_backward
_conv2d = F.conv2d
_new = torch.empty


def _laid_out(x: Tensor | None, memory_format: torch.memory_format) -> Tensor | None:
    if x is None:
        return None
    return _new(x.shape, dtype=x.dtype, memory_format=memory_format).copy_(x)


def norm_backward(
    g: Tensor, x: Tensor, weight: Tensor | None, mean: Any, var: Any, save_mean: Tensor,
    save_invstd: Tensor, train: bool, eps: float, mask: list[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """native_batch_norm_backward(...) as CUDA computes it."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if g.dtype != x.dtype or {save_mean.dtype, save_invstd.dtype} != {wide}:
        raise RuntimeError(f"expected {x.dtype} and statistics in {wide}")
    if weight is not None and weight.dtype not in (x.dtype, wide):
        raise RuntimeError(f"expected a weight in {x.dtype} or {wide}, got {weight.dtype}")
    last = is_channels_last(g) and is_channels_last(x)
    if weight is None and any(mask[1:]) and not last:
        raise RuntimeError("tensor does not have a device")
    dx, dweight, dbias = _norm_backward(
        g, x, weight, mean, var, save_mean, save_invstd, train, eps, mask
    )
    if weight is None:
        dweight = dbias = save_mean.new_empty(0)
    mixed = is_channels_last(g) != is_channels_last(x) or x.numel() >= LARGE
    return (
        _laid_out(dx, torch.contiguous_format if mixed else memory_format_of(x)),
        dweight,
        dbias,
    )


def _convolution_format(x: Tensor, weight: Tensor) -> torch.memory_format:
    cudnn = torch.backends.cudnn.enabled and x.dtype != torch.float64
    last = is_channels_last(x) or is_channels_last(weight)
    return torch.channels_last if cudnn and last else torch.contiguous_format


def conv2d(input: Tensor, weight: Tensor, *args: Any, **options: Any) -> Tensor:
    """torch.nn.functional.conv2d(...) as CUDA lays it out."""
    out = _conv2d(input, weight, *args, **options)
    if out.dim() != 4 or type(out) is not Tensor:
        return out
    return out.contiguous(memory_format=_convolution_format(input, weight))


def convolution_backward(
    g: Tensor, x: Tensor, weight: Tensor, *args: Any
) -> tuple[Tensor | None, ...]:
    """convolution_backward(...) as CUDA lays it out."""
    dx, dweight, dbias = _convolution_backward(g, x, weight, *args)
    memory_format = _convolution_format(x, weight)
    return _laid_out(dx, memory_format), _laid_out(dweight, memory_format), dbias


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """ATen answers as on CUDA inside the block."""
    with (
        mock.patch.object(_aten, "native_batch_norm_backward", norm_backward),
        mock.patch.object(_aten, "convolution_backward", convolution_backward),
        mock.patch.object(F, "conv2d", conv2d),
    ):
        yield


def pytest_configure(config: Any) -> None:
    """``-p tests.support.cuda_aten``: a whole run."""
    context = as_on_cuda()
    context.__enter__()
    config.add_cleanup(lambda: context.__exit__(None, None, None))
