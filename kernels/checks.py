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


def _check_shape(name: str, values: Tensor, *shapes: tuple[int, ...]) -> None:
    """A contiguous tensor of one of ``shapes``."""
    if tuple(values.shape) not in shapes or not values.is_contiguous():
        raise ValueError(
            f"{name} must be a contiguous {' or '.join(map(str, shapes))} tensor, got "
            f"{tuple(values.shape)} with strides {values.stride()}"
        )


def check_per_channel(name: str, values: Tensor, *shape: int) -> None:
    """``stats`` and ``coef`` are contiguous float32 tensors of (rows, channels)."""
    _check_shape(name, values, shape)
    if values.dtype != torch.float32:
        raise TypeError(f"{name} must be float32, got {values.dtype}")


def check_rows(name: str, values: Tensor, rows: int, x: Tensor) -> int | None:
    """Those of x (N, C, H, W): (rows, C), or (rows, N, C) of a norm over groups; then gives N."""
    images, channels = x.shape[:2]
    if values.dim() != 3:
        check_per_channel(name, values, rows, channels)
        return None
    check_per_channel(name, values, rows, images, channels)
    return images


def check_vector(
    name: str, values: Tensor | None, size: int, dtype: torch.dtype | None = None, images: int = 0
) -> None:
    """A contiguous (size,) tensor of any floating dtype, or of ``dtype``; None is fine too.

    images: where it may be (images, size) as well, a row for each.
    """
    if values is None:
        return
    _check_shape(name, values, (size,), *([(images, size)] if images else []))
    if dtype is None:
        check_floating(**{name: values.dtype})
    elif values.dtype != dtype:
        raise TypeError(f"{name} must be {str(dtype).removeprefix('torch.')}, got {values.dtype}")


def check_norm(norm: Norm | None, channels: int, images: int = 0) -> None:
    """Its weight and bias are vectors of ``channels``; with groups, perhaps one for each image."""
    if norm is None:
        return
    if norm.groups < 0 or (norm.groups and channels % norm.groups):
        raise ValueError(f"norm.groups must divide {channels} channels, got {norm.groups}")
    images = images if norm.groups else 0
    check_vector("norm.weight", norm.weight, channels, images=images)
    check_vector("norm.bias", norm.bias, channels, images=images)


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


def check_grad(grad: Grad, shape: tuple[int, ...] | None = None) -> int | None:
    """q, h and those of z are activations of one shape; coef is (4, C).

    shape: of a convolution's output, whose kernel applies coef on load, but no act'. Without it
    coef and z's stats may be per image, behind a norm over groups; then gives N.
    """
    q, h, coef, z = grad
    check_activation("grad.q", q, shape)
    channels, found = q.shape[1], []
    if z is not None:
        if shape is not None:
            raise ValueError("grad.z must be None: a convolution's kernel does not apply act'")
        check_activation("grad.z.h", z.h, tuple(q.shape))
        found.append(check_rows("grad.z.stats", z.stats, 5, q))
        if z.add is not None:
            check_activation("grad.z.add", z.add, tuple(q.shape))
    if coef is not None:
        if shape is not None:
            check_per_channel("grad.coef", coef, 4, channels)
        found.append(None if shape is not None else check_rows("grad.coef", coef, 4, q))
        if h is not None:
            check_activation("grad.h", h, tuple(q.shape))
    if len(set(found)) > 1 or (coef is not None and coef.dim() == 3 and h is None):
        raise ValueError(
            "grad.coef and grad.z.stats must both be per channel or, with h, per image"
        )
    return found[0] if found else None


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
