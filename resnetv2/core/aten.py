"""FLOPs and allocations of ATen's operators, and their results for tensors without memory.

Programs are read for their cost without being run (``meta``): FLOPs and scratch memory of an
operator that the library calls are said here, once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels.reference import is_channels_last, memory_format_of

_aten = torch.ops.aten
_CONVOLUTION = _aten.convolution.default
_CONVOLUTION_BACKWARD = _aten.convolution_backward.default
_NORM_BACKWARD = _aten.native_batch_norm_backward.default
_NORM = _aten.native_batch_norm.default
_UPDATE_STATS = _aten.batch_norm_update_stats.default

# oneDNN's buffers for one thread that do not grow with a convolution, and a bfloat16 weight
# gradient's: blocks of transposed operands.
_BUFFERS, _TRANSPOSED = 2**13 + 2**10, 2**16


def flops(function: Any, args: tuple[Any, ...], results: tuple[Any, ...]) -> int:
    """Multiplications and additions of a convolution; 0 of everything else."""
    if function is _CONVOLUTION:
        return 2 * results[0].numel() * args[1][0].numel()
    if function is _CONVOLUTION_BACKWARD:
        need_input, need_weight, _ = args[10]
        return 2 * args[0].numel() * args[2][0].numel() * (need_input + need_weight)
    return 0


def unread(function: Any, args: tuple[Any, ...]) -> list[Tensor]:
    """Arguments of which only shape, dtype and layout are looked at."""
    if function is not _CONVOLUTION_BACKWARD:
        return []
    need_input, need_weight, _ = args[10]
    return [x for x, read in ((args[1], need_weight), (args[2], need_input)) if not read]


def scratch(function: Any, args: tuple[Any, ...], results: tuple[Any, ...]) -> int:
    """Bytes that an operator allocates on a CPU beside its results, at most."""
    if function is _CONVOLUTION:
        return _convolution_scratch(args[0], args[1], results[0], args[3], backward=False)
    if function is _CONVOLUTION_BACKWARD:
        return _convolution_scratch(args[1], args[2], args[0], args[4], backward=True)
    if function is _NORM_BACKWARD and results[0] is not None:
        return _nbytes(results[0])
    return 0


def _convolution_scratch(
    x: Tensor, weight: Tensor, out: Tensor, stride: Any, backward: bool
) -> int:
    taps = weight[0, 0].numel()
    plain = taps == 1 and all(step == 1 for step in stride)
    if x.dtype not in (torch.float32, torch.bfloat16):
        # A matrix of all patches; and weights in another layout.
        patches = out.numel() // out.shape[1] * x.shape[1] * taps * x.dtype.itemsize
        return 0 if plain else patches + _nbytes(weight)
    if plain and x.dtype == torch.float32:
        return 0
    reordered = 0 if is_channels_last(weight) else _nbytes(weight)
    size = _BUFFERS + reordered
    if not is_channels_last(x):
        # oneDNN's own layout; a strided one's gradient is reordered once more.
        strided = backward and any(step > 1 for step in stride)
        size += _nbytes(x) + _nbytes(x if strided else out)
    if not backward:
        return size + _nbytes(weight)
    if x.dtype == torch.bfloat16:
        size += _TRANSPOSED
    return size + 2 * weight.numel() * 4


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.dtype.itemsize


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    *_: Any,
) -> Tensor:
    sizes = [
        (x.shape[axis] + 2 * padding[i] - dilation[i] * (weight.shape[axis] - 1) - 1) // stride[i]
        + 1
        for i, axis in enumerate((2, 3))
    ]
    either = x if is_channels_last(x) else weight
    return torch.empty(
        (x.shape[0], weight.shape[0], *sizes),
        dtype=x.dtype,
        device="meta",
        memory_format=memory_format_of(either),
    )


def _convolution_backward(g: Tensor, x: Tensor, weight: Tensor, *args: Any) -> Any:
    need_input, need_weight, need_bias = args[-1]
    return (
        torch.empty_like(x) if need_input else None,
        torch.empty_like(weight) if need_weight else None,
        weight.new_empty(weight.shape[0]) if need_bias else None,
    )


def _norm_backward(g: Tensor, x: Tensor, weight: Tensor, *args: Any) -> Any:
    sums = [torch.empty_like(args[2]) if need else None for need in args[-1][1:]]
    return (torch.empty_like(x) if args[-1][0] else None, *sums)


def _update_stats(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[1]), x.new_empty(x.shape[1])


def _elementwise(*args: Any) -> Tensor:
    """The result of tensors of one dtype, or of several that are promoted as in a chain."""
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    largest = max(tensors, key=Tensor.numel)
    dtype = functools.reduce(torch.promote_types, {tensor.dtype for tensor in tensors})
    return torch.empty_like(largest, dtype=dtype)


def _in_place(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
    return tensor


def _into(*_: Any, **out: Tensor) -> Tensor:
    (tensor,) = out.values()
    return tensor


def _norm(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), *_update_stats(x)


# Results of operators on the device "meta", in the layout in which other devices give it. PyTorch
# has no such function for some; its own for elementwise ones take a hundred microseconds.
ON_META: dict[Any, Callable[..., Any]] = {
    _CONVOLUTION: _convolution,
    _CONVOLUTION_BACKWARD: _convolution_backward,
    _NORM: _norm,
    _NORM_BACKWARD: _norm_backward,
    _UPDATE_STATS: _update_stats,
    _aten.addcmul.default: lambda *args, **_: _elementwise(*args),
    _aten.add.Tensor: lambda *args, **_: _elementwise(*args),
    _aten.mul.Tensor: _elementwise,
    _aten.add_.Tensor: _in_place,
    _aten.relu_.default: _in_place,
    _aten.rsqrt_.default: _in_place,
    _aten.sub.out: _into,
    _aten.threshold_backward.grad_input: _into,
}
