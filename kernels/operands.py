"""The small records that kernels and their reference exchange (kernels/README.md, "Notation").

Everything here is plain data: no computation, no dependency on Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

ACTS = ("identity", "relu", "leaky_relu", "silu", "gelu")

# Rows of a ``stats`` tensor, float32 (float64 for float64 activations): (5, C), or "per image"
# (5, N, C) for a norm over groups of channels of an image, whose row VAR nobody reads.
MEAN, VAR, RSTD, SCALE, SHIFT = range(5)


class Act(NamedTuple):
    """An elementwise activation: ``kind`` is one of ``ACTS``; ``slope`` belongs to leaky_relu.

    ``gelu`` is the exact one (erf), PyTorch's default.
    """

    kind: str = "relu"
    slope: float = 0.0


IDENTITY = Act("identity")


class Geometry(NamedTuple):
    """How a convolution walks over its input, as in ``torch.nn.functional.conv2d``.

    extra: rows and columns of zeros at the bottom and on the right beyond ``padding``, negative
    for fewer, as where a model pads asymmetrically itself.
    """

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    extra: tuple[int, int] = (0, 0)

    def output_size(self, size: tuple[int, int], kernel: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the output for an input of ``size`` and a kernel of ``kernel``."""
        return (
            self._output_size(size[0], kernel[0], 0),
            self._output_size(size[1], kernel[1], 1),
        )

    def _output_size(self, size: int, kernel: int, axis: int) -> int:
        padded = size + 2 * self.padding[axis] + self.extra[axis]
        return (padded - self.dilation[axis] * (kernel - 1) - 1) // self.stride[axis] + 1


class Convolution(NamedTuple):
    """A convolution as a kernel is compiled for it: the one constexpr argument ``CONV``.

    C, H, W: channels and size of the input. K, P, Q: of the output. R, S: size of the kernel.
    STRIDE_WK, STRIDE_WC, STRIDE_WR, STRIDE_WS: the weight's, 0 for a kernel that does not read it.
    """

    C: int
    K: int
    H: int
    W: int
    P: int
    Q: int
    R: int
    S: int
    STRIDE_H: int
    STRIDE_W: int
    PADDING_H: int
    PADDING_W: int
    STRIDE_WK: int = 0
    STRIDE_WC: int = 0
    STRIDE_WR: int = 0
    STRIDE_WS: int = 0


class Activated(NamedTuple):
    """z = act(a*h + b) by what it was made of, and a further gradient of it.

    h, add: (N, C, H, W), channels_last, or None for ``add``. stats: (5, C), with rows a and b.
    """

    h: Tensor
    stats: Tensor
    act: Act
    add: Tensor | None = None


class Grad(NamedTuple):
    """A gradient that may still wait for a norm's backward: g = A*(q - C - B*(h - mean)).

    q:    (N, C, H, W), channels_last.
    h:    (N, C, H, W), the norm's input, or None where B = C = 0 (running statistics).
    coef: (4, C) rows A, B, C, mean, or None where g = q. (4, N, C) behind a group norm, where
          g = A*q - C - B*(h - mean): its sums are weighted by gamma, which may be 0.
    z:    where it waits for act' too: ``q`` holds dz, and (dz + add) * act'(a*h + b) stands for it.
    """

    q: Tensor
    h: Tensor | None = None
    coef: Tensor | None = None
    z: Activated | None = None


class Dgrad(NamedTuple):
    """A convolution's input gradient that is still to be computed.

    g: (N, K, P, Q), channels_last. weight: (K, C, R, S).
    """

    g: Tensor
    weight: Tensor
    geometry: Geometry


class Norm(NamedTuple):
    """A norm that takes its input's statistics: its weight and bias, (C,) or None, and its eps.

    groups: 0 where they are over the batch; else over each of so many groups of an image's channels
    (Wu and He 2018), and weight and bias may be (N, C).
    """

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    groups: int = 0


class NormGrads(NamedTuple):
    """What the sums of a norm's backward give: coef (4, C), dweight = S2 and dbias = S1, (C,).

    Of a group norm coef is (4, N, C), and dweight and dbias are summed over images where the weight
    and bias are (C,), and (N, C) where these are.
    """

    coef: Tensor
    dweight: Tensor
    dbias: Tensor


class Partials(NamedTuple):
    """Per-tile reductions over rows (N*H*W), to be merged in the order of the tiles.

    data:      (P, 3, C): mean, M2 (sum of squared deviations) and what the mean's rounding has
               left, of a tile; (P, 2, C) without the last. Or S1 = sum q and S2 = sum q*xhat of a
               tile for a norm's backward, (P, 2, C).
    rows:      number of rows in all.
    tile_rows: rows in each tile; the last one has what remains.
    """

    data: Tensor
    rows: int
    tile_rows: int


# What a kernel gives of the moments of what it wrote: a tile's, or the statistics of the norm that
# it was told of; of a group norm (2, N, G), mean and rstd, and ``stats`` per image.
Moments = Partials | Tensor | tuple[Tensor, Tensor]


def flat_moments(moments: Any) -> tuple[list[Tensor], Any]:
    """The tensors of an engine's moments, and the rest: what ``joined_moments`` joins again."""
    if isinstance(moments, Partials):
        return [moments.data], (moments.rows, moments.tile_rows)
    return ([], None) if moments is None else (list(moments), ())


def joined_moments(tensors: Sequence[Tensor], form: Any) -> Any:
    """Moments out of what ``flat_moments`` gave."""
    if form is None:
        return None
    return Partials(tensors[0], *form) if form else tuple(tensors)


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics and coefficients of ``dtype`` activations are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def running_stats(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Stack a norm's statistics into (5, C): mean, var, rstd, scale = a, shift = b.

    Args:
        mean, var: (C,), any float dtype; var is the biased one in training.
        weight, bias: (C,) or None (``affine=False``).
        eps: added to the variance.
    """
    dtype = stats_dtype(mean.dtype)
    mean, var = mean.to(dtype), var.to(dtype)
    # In float64, as ATen does it: on a CPU a chain computes the bits that eager PyTorch computes.
    rstd = (var.double() + eps).rsqrt_().to(dtype)
    scale = rstd if weight is None else rstd * weight
    shift = mean * -scale if bias is None else torch.addcmul(bias.to(dtype), mean, scale, value=-1)
    return torch.stack((mean, var, rstd, scale, shift))
