"""What launchers ask of their arguments: a kernel reads memory by shapes and strides alone.

Every check raises with the argument's name, what was expected and what came: ValueError for a shape
or a layout, TypeError for a dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .integers import cdiv
from .launch import TRITON_DTYPES
from .operands import Convolution, Geometry, Grad, Norm, Partials


def check_floating(**dtypes: torch.dtype) -> None:
    """Raise TypeError for a dtype that the kernels cannot read or write."""
    for name, dtype in dtypes.items():
        if dtype not in TRITON_DTYPES:
            raise TypeError(f"{name} must be float32, float16 or bfloat16, got {dtype}")


def check_activation(name: str, x: Tensor, shape: tuple[int, ...] | None = None) -> None:
    """Activations are (N, C, H, W) tensors in channels_last memory, of ``shape`` if given."""
    if x.dim() != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(
            f"{name} must be a 4-D tensor in channels_last memory, got shape {tuple(x.shape)} "
            f"with strides {x.stride()}"
        )
    if shape is not None and x.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(x.shape)}")
    check_floating(**{name: x.dtype})


def check_per_channel(name: str, values: Tensor, rows: int, channels: int) -> None:
    """``stats`` and ``coef`` are contiguous float32 tensors of (rows, channels)."""
    if tuple(values.shape) != (rows, channels) or not values.is_contiguous():
        raise ValueError(
            f"{name} must be a contiguous ({rows}, {channels}) tensor, got {tuple(values.shape)} "
            f"with strides {values.stride()}"
        )
    if values.dtype != torch.float32:
        raise TypeError(f"{name} must be float32, got {values.dtype}")


def check_vector(
    name: str, values: Tensor | None, size: int, dtype: torch.dtype | None = None
) -> None:
    """A contiguous (size,) tensor of any floating dtype, or of ``dtype``; None is fine too."""
    if values is None:
        return
    if tuple(values.shape) != (size,) or not values.is_contiguous():
        raise ValueError(
            f"{name} must be a contiguous ({size},) tensor, got {tuple(values.shape)} "
            f"with strides {values.stride()}"
        )
    if dtype is None:
        check_floating(**{name: values.dtype})
    elif values.dtype != dtype:
        raise TypeError(f"{name} must be {str(dtype).removeprefix('torch.')}, got {values.dtype}")


def check_norm(norm: Norm | None, channels: int) -> None:
    """Its weight and bias are vectors of ``channels``."""
    if norm is not None:
        check_vector("norm.weight", norm.weight, channels)
        check_vector("norm.bias", norm.bias, channels)


def check_partials(partials: Partials, most: int = 2) -> None:
    """``data`` is a contiguous floating (P, 2 or ``most``, C), one entry for each tile of rows."""
    data, rows, tile_rows = partials
    tiles = cdiv(rows, tile_rows)
    known = data.dim() == 3 and data.shape[0] == tiles and data.shape[1] in (2, most)
    if not known or not data.is_contiguous():
        raise ValueError(
            f"partials.data must be a contiguous ({tiles}, {most}, C) tensor for {rows} rows in "
            f"tiles of {tile_rows}, got {tuple(data.shape)}"
        )
    check_floating(partials=data.dtype)


def check_grad(grad: Grad, shape: tuple[int, ...] | None = None) -> None:
    """q, h and those of z are activations of one shape; coef is (4, C).

    shape: of a convolution's output, whose kernel applies coef on load, but no act'.
    """
    q, h, coef, z = grad
    check_activation("grad.q", q, shape)
    if z is not None:
        if shape is not None:
            raise ValueError("grad.z must be None: a convolution's kernel does not apply act'")
        check_activation("grad.z.h", z.h, tuple(q.shape))
        check_per_channel("grad.z.stats", z.stats, 5, q.shape[1])
        if z.add is not None:
            check_activation("grad.z.add", z.add, tuple(q.shape))
    if coef is None:
        return
    check_per_channel("grad.coef", coef, 4, q.shape[1])
    if h is not None:
        check_activation("grad.h", h, tuple(q.shape))


def check_convolution(
    h: Tensor,
    weight: Tensor,
    geometry: Geometry,
    dtype: torch.dtype,
    *,
    reads_weight: bool = True,
) -> Convolution:
    """The convolution of h (N, C, H, W) by weight (K, C, R, S), for a kernel's ``CONV``.

    h's layout is the caller's to check: where only its shape is used, any will do.

    Raises:
        NotImplementedError: for what the kernels leave to ATen: groups, dilation, asymmetric
            padding (``Geometry.extra``), dtypes that no kernel multiplies in.
    """
    if geometry.dilation != (1, 1) or geometry.groups != 1 or geometry.extra != (0, 0):
        raise NotImplementedError(
            f"no kernel for dilated, grouped or asymmetrically padded convolutions: {geometry}"
        )
    if dtype not in TRITON_DTYPES:
        raise NotImplementedError(f"no kernel multiplies in {dtype}")
    if h.dim() != 4:
        raise ValueError(f"h must have shape (N, C, H, W), got {tuple(h.shape)}")
    _, c, height, width = h.shape
    if weight.dim() != 4 or weight.shape[1] != c:
        raise ValueError(f"weight must have shape (K, {c}, R, S), got {tuple(weight.shape)}")
    check_floating(weight=weight.dtype)
    k, _, r, s = weight.shape
    p, q = geometry.output_size((height, width), (r, s))
    if p < 1 or q < 1:
        raise ValueError(
            f"a {r}x{s} kernel with {geometry} fits nowhere in h of {height}x{width}, "
            f"got an output of {p}x{q}"
        )
    return Convolution(
        c, k, height, width, p, q, r, s, *geometry.stride, *geometry.padding,
        *(weight.stride() if reads_weight else ()),
    )  # fmt: skip
