"""The kernels' functions in plain PyTorch: specification, CPU path and oracle.

Same names and signatures as the Triton files beside it, any float dtype up to float64. Activations
are (N, C, H, W) tensors in channels_last memory, M = N*H*W rows; ``stats`` is a (5, C) tensor
(``operands.running_stats``); ``dtype`` is the one in which a convolution multiplies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .operands import (
    IDENTITY,
    MEAN,
    RSTD,
    SCALE,
    SHIFT,
    Act,
    Activated,
    Geometry,
    Grad,
    Moments,
    Norm,
    NormGrads,
    Partials,
    running_stats,
    stats_dtype,
)

_aten = torch.ops.aten


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), without the call where there is nothing to do: it costs what a kernel does."""
    return x if x.dtype == dtype else x.to(dtype)


def _per_channel(values: Tensor) -> Tensor:
    """(C,), or (N, C) for values of each image, to go with (N, C, H, W)."""
    return values.view(-1, values.shape[-1], 1, 1)


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[1]


def is_channels_last(x: Tensor) -> bool:
    """Whether ATen takes x, (N, C, H, W), for a tensor in channels_last memory.

    With one channel or images of one pixel a tensor lies in both layouts; ATen then goes by the
    strides of the dimensions of size 1, and so does this.
    """
    if not x.is_contiguous(memory_format=torch.channels_last):
        return False
    if not x.is_contiguous():
        return True
    least = 0
    for axis in (1, 3, 2, 0):
        stride = x.stride(axis)
        if stride < least or stride == 0 or (axis == 0 and least == x.stride(1)):
            return False
        least = stride * max(x.shape[axis], 1)
    return True


def memory_format_of(x: Tensor) -> torch.memory_format:
    """channels_last or contiguous_format, as ATen sees x (``is_channels_last``)."""
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def in_memory_format(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    """x, (N, C, H, W), with the strides of a new tensor of that format.

    x itself where it has them, a view where only the strides of dimensions of size 1 differ.
    """
    if not x.is_contiguous(memory_format=memory_format):
        return x.contiguous(memory_format=memory_format)
    n, c, h, w = x.shape
    if c > 1 and h > 1 and w > 1 and n > 1:
        return x
    last = memory_format == torch.channels_last
    strides = (h * w * c, 1, w * c, c) if last else (c * h * w, h * w, w, 1)
    return x if x.stride() == strides else x.as_strided(x.shape, strides)


# --- statistics ---------------------------------------------------------------------------------


def moments(x: Tensor, norm: Norm | None = None) -> Moments:
    """Per-channel mean and sum of squared deviations of x (N, C, H, W), as one tile.

    Half-precision inputs are accumulated in float32. norm: whose ``stats``, (5, C), are returned;
    for a group norm ``group_moments`` and its ``stats``, (5, N, C).
    """
    rows = _rows(x)
    if norm is not None and norm.groups:
        kept = group_moments(x, norm.groups, norm.eps)
        return kept, group_affine(kept, norm, x.shape[1])
    mean, var = batch_moments(x)
    if norm is not None:
        return running_stats(mean, var, norm.weight, norm.bias, norm.eps)
    return Partials(torch.stack((mean, var.mul_(rows))).unsqueeze(0), rows, rows)


def batch_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Per-channel mean and biased variance of x, (C,) each, in the statistics' dtype."""
    return torch.batch_norm_update_stats(cast(x, stats_dtype(x.dtype)), None, None, 0.0)


def normalise(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """A batch's (5, C) statistics and u = a*x + b, as eager PyTorch's norm computes them.

    x: (N, C, H, W), in the statistics' dtype. One call of ATen for what ``batch_moments``,
    ``operands.running_stats`` and ``affine`` do, with the same bits but for the variance's last.
    """
    rows = _rows(x)
    weight = None if weight is None else cast(weight, x.dtype)
    bias = None if bias is None else cast(bias, x.dtype)
    # A running variance of 0 moves to (1 - 1/rows) of the unbiased one: the biased one.
    mean, var = x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1])
    u, mean, rstd = torch.native_batch_norm(x, weight, bias, mean, var, True, 1.0 - 1.0 / rows, eps)
    scale = rstd if weight is None else rstd * weight
    shift = mean * -scale if bias is None else torch.addcmul(bias, mean, scale, value=-1)
    return torch.stack((mean, var, rstd, scale, shift)), u


def group_moments(x: Tensor, groups: int, eps: float) -> Tensor:
    """(2, N, G): mean and 1/sqrt(var + eps) of each image's groups of channels (Wu and He 2018).

    In two passes. ATen's kernel for channels_last takes E[x^2] - E[x]^2, which is nothing but
    rounding where |mean| >> std.
    """
    x = cast(x, stats_dtype(x.dtype))
    channels = x.shape[1]

    def means(values: Tensor) -> Tensor:  # (N, C, H, W) to (N, G)
        return _over_groups(values.mean((2, 3)), groups) * (groups / channels)

    mean = means(x)
    deviation = x - _per_channel(_of_groups(mean, channels))
    rest = means(deviation)
    var = means(deviation.square_()).sub_(rest.square())
    # In float64, as running_stats.
    rstd = (var.double() + eps).rsqrt_().to(x.dtype)
    return torch.stack((mean + rest, rstd))


def _over_groups(values: Tensor, groups: int) -> Tensor:
    """(N, C) to the sums (N, G) over each group's channels."""
    return values.unflatten(1, (groups, -1)).sum(2)


def _of_groups(values: Tensor, channels: int) -> Tensor:
    """(..., G) to (..., C): each channel has its group's."""
    groups = values.shape[-1]
    each = values.unsqueeze(-1).expand(*values.shape, channels // groups)
    return each.reshape(*values.shape[:-1], channels)


def group_affine(kept: Tensor, norm: Norm, channels: int) -> Tensor:
    """A group norm's ``stats``, (5, N, C), from its ``group_moments``."""
    mean, rstd = _of_groups(kept, channels).unbind(0)
    scale = rstd if norm.weight is None else rstd * norm.weight
    shift = mean * -scale
    if norm.bias is not None:
        shift = torch.addcmul(norm.bias.to(kept.dtype), mean, scale, value=-1)
    return torch.stack((mean, torch.zeros_like(mean), rstd, scale.to(kept.dtype), shift))


# Of a reduction between ranks: rows are summed in so many places side by side.
_RANK_TILES = 64


def _tile_channels(x: Tensor) -> Tensor:
    """x, (N, C, H, W), as (1, T*C, rows/T, 1): the channels of T tiles of rows, tile after tile."""
    rows, channels = _rows(x), x.shape[1]
    tiles = math.gcd(rows, _RANK_TILES)
    x = x.permute(0, 2, 3, 1).reshape(1, rows // tiles, 1, tiles * channels)
    return x.permute(0, 3, 1, 2)


def rank_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """``batch_moments`` for ranks to merge, without its bits, which no other process shares.

    Of channels_last, ATen's kernel adds up all rows of a channel in one float32 number, which costs
    5e-6 of a mean at 65536 rows; tiles that are merged cost what one rounding does, in its time.
    """
    if x.is_contiguous():
        return batch_moments(x)
    mean, var = batch_moments(_tile_channels(x))
    mean, var = mean.view(-1, x.shape[1]), var.view(-1, x.shape[1])
    whole = mean.mean(0)
    return whole, var.mean(0).add_((mean - whole).square_().mean(0))


def norm_stats(
    partials: Partials,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    counts: Tensor | None = None,
) -> Tensor:
    """Merge the tiles' moments (Chan et al. 1979) into a (5, C) ``stats`` tensor.

    counts: (P,), each tile's number of rows instead of what ``partials`` says.
    """
    data, rows, tile_rows = partials
    total: int | Tensor = rows
    if counts is None:
        counts = data.new_full((data.shape[0],), tile_rows)
        # An operator alone: assigning a number makes a tensor, which no program can record.
        counts[-1:].fill_(rows - (data.shape[0] - 1) * tile_rows)
    else:
        total = counts.sum()
    means, m2, *rests = data.unbind(1)
    counts = counts.unsqueeze(1)
    # Seen from the first tile's mean, nothing cancels where |mean| >> std.
    offsets = means - means[0]
    for rest in rests:
        offsets = offsets + rest
    offset = (offsets * (counts / total)).sum(0)
    m2 = (m2 + (offsets - offset).square_() * counts).sum(0)
    return running_stats(means[0] + offset, m2 / total, weight, bias, eps)


# --- elementwise --------------------------------------------------------------------------------


def affine(h: Tensor, stats: Tensor) -> Tensor:
    """u = a*h + b per channel, in the statistics' dtype; always a new tensor."""
    return torch.addcmul(
        _per_channel(stats[SHIFT]), cast(h, stats.dtype), _per_channel(stats[SCALE])
    )


def activate_(u: Tensor, act: Act) -> Tensor:
    """act(u), in u's memory."""
    if act.kind == "relu":
        return u.relu_()
    if act.kind == "leaky_relu":
        return F.leaky_relu_(u, act.slope)
    if act.kind == "silu":
        return F.silu(u, inplace=True)
    if act.kind == "gelu":
        return _aten.gelu_(u)
    return u


def activation_grad(dz: Tensor, u: Tensor, act: Act, in_place: bool = False) -> Tensor:
    """dz * act'(u). For relu, u may be act(u) as well: both have the same sign.

    in_place: dz is not needed any more and may be overwritten.
    """
    if act.kind == "relu":
        if in_place:
            return _aten.threshold_backward.grad_input(dz, u, 0, grad_input=dz)
        return _aten.threshold_backward(dz, u, 0)
    if act.kind == "leaky_relu":
        return _aten.leaky_relu_backward(dz, u, act.slope, False)
    if act.kind == "silu":
        return _aten.silu_backward(dz, u)
    if act.kind == "gelu":
        return _aten.gelu_backward(dz, u)
    return dz


def norm_act(h: Tensor, stats: Tensor | None, act: Act, dtype: torch.dtype) -> Tensor:
    """z = act(a*h + b) in ``dtype``: a convolution's prologue, written once. Shapes (N, C, H, W).

    ``stats=None`` means no prologue: h itself, cast.
    """
    if stats is None:
        return cast(h, dtype)
    return cast(activate_(affine(h, stats), act), dtype)


def act_backward(
    dz: Tensor,
    h: Tensor,
    stats: Tensor,
    act: Act,
    add: Tensor | None = None,
    training: bool = True,
    dtype: torch.dtype | None = None,
    norm: Norm | None = None,
) -> tuple[Tensor | None, NormGrads]:
    """What the sums of q = (dz + add) * act'(a*h + b) give, and z = act(a*h + b).

    dz, add, h: (N, C, H, W). dtype: of z, None for no z. norm: the group norm whose ``stats`` are
    per image.
    """
    q = _through_act(dz, Activated(h, stats, act, add))
    if norm is not None and norm.groups:
        grads = group_norm_grad(q, h, stats, norm)
    else:
        grads = norm_grad(gradient_sums(q, h, stats), stats, training)
    return (None if dtype is None else norm_act(h, stats, act, dtype)), grads


def _through_act(dz: Tensor, z: Activated) -> Tensor:
    """q = (dz + add) * act'(a*h + b), in the statistics' dtype."""
    u = affine(z.h, z.stats)
    dz = cast(dz, u.dtype)
    return activation_grad(dz if z.add is None else dz + z.add, u, z.act)


def _sums(q: Tensor, h: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # Only the sums are asked of native_batch_norm_backward: one pass over q and h. CUDA's gives
    # none where there is no weight; a weight's values do not enter them, so rstd stands for it.
    return _aten.native_batch_norm_backward(
        q, h, rstd, None, None, mean, rstd, True, 0.0, [False, True, True]
    )


def gradient_sums(q: Tensor, h: Tensor, stats: Tensor) -> Partials:
    """S1 = sum q and S2 = sum q*xhat per channel, with xhat = (h - mean)*rstd, as one tile."""
    wide = stats.dtype
    _, s2, s1 = _sums(cast(q, wide), cast(h, wide), stats[MEAN], stats[RSTD])
    return Partials(torch.stack((s1, s2)).unsqueeze(0), _rows(q), _rows(q))


def rank_gradient_sums(q: Tensor, h: Tensor, stats: Tensor) -> tuple[Tensor, Tensor]:
    """S1 and S2, (C,) each, as ``gradient_sums``, and as accurate as ``rank_moments``."""
    if h.is_contiguous():
        s1, s2 = gradient_sums(q, h, stats).data[0].unbind(0)
        return s1, s2
    channels = h.shape[1]
    q, h = _tile_channels(cast(q, stats.dtype)), _tile_channels(cast(h, stats.dtype))
    mean, rstd = (stats[row].repeat(h.shape[1] // channels) for row in (MEAN, RSTD))
    _, s2, s1 = _sums(q, h, mean, rstd)
    return s1.view(-1, channels).sum(0), s2.view(-1, channels).sum(0)


def norm_grad(
    partials: Partials, stats: Tensor, training: bool, total: Tensor | None = None
) -> NormGrads:
    """Coefficients (4, C) of g = A*(q - C - B*(h - mean)), and dweight = S2 and dbias = S1.

    With running statistics (``training=False``) B = C = 0. total: (1,), the number of rows where
    only the device knows it.
    """
    data = partials.data
    s1, s2 = (data[0] if data.shape[0] == 1 else data.sum(0)).unbind(0)
    mean, _, rstd, scale, _ = stats.unbind(0)
    coef = torch.empty((4, s1.numel()), dtype=stats.dtype, device=stats.device)
    a, b, c, center = coef.unbind(0)
    a.copy_(scale)
    center.copy_(mean)
    if training:
        inverse = 1.0 / (partials.rows if total is None else total)
        torch.mul(rstd, s2, out=b).mul_(inverse)
        torch.mul(s1, inverse, out=c)
    else:
        coef[1:3].zero_()
    return NormGrads(coef, s2, s1)


def group_norm_grad(q: Tensor, h: Tensor, stats: Tensor, norm: Norm) -> NormGrads:
    """Coefficients (4, N, C) of g = A*q - C - B*(h - mean) of a group norm, and its own gradients.

    With S1 = sum q and S2 = sum q*xhat over an image's pixels, and m values in a group:
    A = a,  C = sum a*S1/m,  B = rstd*sum a*S2/m, sums over the group's channels.
    """
    mean, _, rstd, scale, _ = stats.unbind(0)
    channels = h.shape[1]
    q = cast(q, stats.dtype)
    s1 = q.sum((2, 3))
    s2 = cast(h, stats.dtype).sub(_per_channel(mean)).mul_(q).sum((2, 3)).mul_(rstd)
    values = h[0, 0].numel() * channels // norm.groups

    def over_group(sums: Tensor) -> Tensor:
        return _of_groups(_over_groups(sums * scale, norm.groups), channels) / values

    coef = torch.stack((scale, over_group(s2) * rstd, over_group(s1), mean))
    dweight = s2 if _is_per_image(norm.weight) else s2.sum(0)
    return NormGrads(coef, dweight, s1 if _is_per_image(norm.bias) else s1.sum(0))


def _is_per_image(values: Tensor | None) -> bool:
    return values is not None and values.dim() == 2


def norm_backward(
    q: Tensor,
    h: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    training: bool,
    identity: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``gradient_sums``, ``norm_grad`` and ``input_grad`` in one call of ATen: (g, dweight, dbias).

    The CPU path's form of a norm's backward: eager PyTorch's own kernel, hence its bits.
    weight: (C,) or None, the norm's. identity: added to g.
    """
    mean, _, rstd, scale, _ = stats.unbind(0)
    q = cast(q, stats.dtype)
    h = cast(h, stats.dtype)
    if training:
        # Without a weight CUDA's gives no sums.
        weight = torch.ones_like(rstd) if weight is None else cast(weight, stats.dtype)
        g, s2, s1 = _aten.native_batch_norm_backward(
            q, h, weight, None, None, mean, rstd, True, 0.0, [True, True, True]
        )
        # CUDA's gives NCHW from 2**31 elements on.
        g = in_memory_format(g, memory_format_of(h))
    else:
        _, s2, s1 = _sums(q, h, mean, rstd)
        g = q.mul_(_per_channel(scale))
    return g if identity is None else g.add_(identity), s2, s1


def norm_backward_of(
    q: Tensor,
    h: Tensor,
    stats: Tensor,
    sums: Tensor,
    total: Tensor,
    identity: Tensor | None = None,
) -> Tensor:
    """g = a*(q - S1/M - xhat*S2/M) (+ identity) for sums (2, C) over M = ``total`` (1,) rows.

    The sums may be those of more rows than q has: of several processes.
    """
    mean, _, rstd, scale, _ = stats.unbind(0)
    s1, s2 = (sums / total).unbind(0)
    g = cast(h, stats.dtype).sub(_per_channel(mean)).mul_(_per_channel(rstd * -s2))
    g.add_(cast(q, stats.dtype)).sub_(_per_channel(s1)).mul_(_per_channel(scale))
    return g if identity is None else g.add_(identity)


def input_grad(
    grad: Grad,
    identity: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """g (``Grad``) (+ identity), written: a norm's dx, or an operand.

    identity: the identity path's gradient, (N, C, H, W), added untouched. dtype: of the result,
    q's if None.
    """
    q, h, coef, z = grad
    dtype = q.dtype if dtype is None else dtype
    if z is not None:
        q = _through_act(q, z)
    if coef is None:
        g = q if identity is None else q + identity
        return cast(g, dtype)
    a, b, c, center = (_per_channel(row) for row in coef.unbind(0))
    g = cast(q, coef.dtype)
    per_image = coef.dim() == 3
    if per_image:
        g = g * a
    if h is not None:
        g = (g - c).addcmul_(cast(h, coef.dtype) - center, b, value=-1.0)
    if not per_image:
        g = g * a
    if identity is not None:
        g = g.add_(identity)
    return cast(g, dtype)


# --- convolutions -------------------------------------------------------------------------------


def conv_forward(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    *,
    dtype: torch.dtype,
    stats: Tensor | None = None,
    act: Act = IDENTITY,
    residual: Tensor | None = None,
    residual_stats: Tensor | None = None,
    subtract: bool = False,
    out_dtype: torch.dtype | None = None,
    with_moments: bool = False,
    norm: Norm | None = None,
) -> tuple[Tensor, Moments | None]:
    """out = conv(act(a*h + b)) + bias + residual, and the moments of out.

    Args:
        h: (N, C, H, W). weight: (K, C, R, S). bias: (K,), (N, K) for one of each image, or None;
            all three are read as they are.
        dtype: of both operands of the multiplication; accumulation is in float32 or wider.
        stats, act: the prologue; ``stats=None`` convolves h itself.
        residual: (N, K, P, Q) or None. With ``residual_stats``, act(a*residual + b) is added
            instead (an identity that reads the pre-activation).
        subtract: out = residual - (conv + bias): walks the identity path back.
        out_dtype: of out, ``dtype`` if None.
        with_moments: also return the moments of out as stored, one tile or several. norm: the norm
            that reads out, whose ``stats`` (5, K) are returned instead (``moments``).
    """
    z = norm_act(h, stats, act, dtype)
    bias = None if bias is None else cast(bias, dtype)
    late = bias if bias is not None and bias.dim() == 2 else None
    out = conv2d(z, cast(weight, dtype), None if bias is late else bias, geometry)
    # Not every convolution of ATen keeps the layout: on CUDA cuDNN's do, but in float64 none does.
    out = in_memory_format(out, memory_format_of(h))
    return conv_end(
        out,
        late,
        residual=residual,
        residual_stats=residual_stats,
        act=act,
        subtract=subtract,
        out_dtype=out_dtype,
        with_moments=with_moments,
        norm=norm,
    )


def conv_end(
    out: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    residual_stats: Tensor | None = None,
    act: Act = IDENTITY,
    subtract: bool = False,
    out_dtype: torch.dtype | None = None,
    with_moments: bool = False,
    norm: Norm | None = None,
) -> tuple[Tensor, Moments | None]:
    """What ``conv_forward`` does with its product ``out``, whose memory it may take."""
    out_dtype = out.dtype if out_dtype is None else out_dtype
    if bias is not None:
        out = out.add_(_per_channel(bias))
    if residual is not None:
        if residual_stats is not None:
            # Added as it is: only what a convolution reads is rounded to ``dtype``.
            residual = norm_act(residual, residual_stats, act, residual.dtype)
        if out.dtype != out_dtype:
            out = cast(out, out_dtype)
        out = torch.sub(residual, out, out=out) if subtract else out.add_(residual)
    out = cast(out, out_dtype)
    return out, moments(out, norm) if with_moments else None


def conv2d(z: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """``torch.nn.functional.conv2d`` with a record's geometry."""
    z, padding = _padded(z, geometry)
    return F.conv2d(z, weight, bias, geometry.stride, padding, geometry.dilation, geometry.groups)


def _padded(z: Tensor, geometry: Geometry) -> tuple[Tensor, tuple[int, int]]:
    """z with the zeros that ATen's convolution cannot add, and the padding left to it."""
    if geometry.extra == (0, 0):
        return z, geometry.padding
    (top, left), (bottom, right) = geometry.padding, geometry.extra
    return F.pad(z, (left, left + right, top, top + bottom)), (0, 0)


def _shape_of(x: Tensor, dtype: torch.dtype, size: Sequence[int]) -> Tensor:
    """For an operand of which only shape (images of ``size``), dtype and layout are looked at."""
    if x.dtype == dtype and x.shape[2:] == size:
        return x
    shape = (*x.shape[:2], *size)
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=memory_format_of(x))


def _padded_shape(
    z: Tensor, dtype: torch.dtype, geometry: Geometry
) -> tuple[Tensor, tuple[int, int]]:
    """``_padded`` for an operand that is not read."""
    if geometry.extra == (0, 0):
        return _shape_of(z, dtype, z.shape[2:]), geometry.padding
    extents = zip(z.shape[2:], geometry.padding, geometry.extra)
    return _shape_of(z, dtype, [n + 2 * p + e for n, p, e in extents]), (0, 0)


def convolution_backward(
    g: Tensor,
    z: Tensor,
    weight: Tensor,
    geometry: Geometry,
    mask: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dz, dweight and dbias of conv(z) for the gradient g, where ``mask`` asks for them.

    z, weight: of any dtype where no gradient reads them: z without dweight, weight without dz.
    dz comes in z's layout and g's dtype, dweight and dbias in weight's dtype and layout.
    """
    size, layout = z.shape[2:], memory_format_of(z)
    if mask[1]:
        z, padding = _padded(z, geometry)
    else:
        z, padding = _padded_shape(z, g.dtype, geometry)
    dz, dweight, dbias = _aten.convolution_backward(
        g,
        z,
        cast(weight, g.dtype) if mask[0] else _shape_of(weight, g.dtype, weight.shape[2:]),
        [weight.shape[0]],
        geometry.stride,
        padding,
        geometry.dilation,
        False,
        [0, 0],
        geometry.groups,
        mask,
    )
    if mask[0] and dz.shape[2:] != size:
        (top, left), (height, width) = geometry.padding, size
        dz = dz[:, :, top : top + height, left : left + width]
    if mask[0]:
        dz = in_memory_format(dz, layout)
    if mask[1] and (dweight.dtype != weight.dtype or dweight.stride() != weight.stride()):
        dweight = torch.empty_like(weight).copy_(dweight)
    return (
        dz if mask[0] else None,
        dweight if mask[1] else None,
        cast(dbias, weight.dtype) if mask[2] else None,
    )


def image_sums(g: Tensor, like: Tensor) -> Tensor:
    """Of g, (N, K, P, Q), over each image's pixels: (N, K), in ``like``'s dtype."""
    return g.sum((2, 3), dtype=stats_dtype(g.dtype)).to(like.dtype)


def conv_dgrad(
    grad: Grad,
    weight: Tensor,
    h: Tensor,
    geometry: Geometry,
    *,
    dtype: torch.dtype,
    stats: Tensor | None = None,
    act: Act = IDENTITY,
    add: Tensor | None = None,
    write: bool = True,
    coef: Tensor | None = None,
    identity: Tensor | None = None,
    training: bool = True,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, NormGrads | None]:
    """q = (dgrad(g, weight) + add) * act'(a*h + b), and what its sums S1 and S2 give.

    Args:
        grad: the gradient of the convolution's output, (N, K, P, Q), applied on load.
        weight: (K, C, R, S). h: (N, C, H, W), the convolution's input before its prologue; where
            ``stats`` is None only its shape is used and the result is the plain dgrad + add.
        add: (N, C, H, W), a further gradient of z (a shortcut that reads z), or None.
        write: False computes the sums alone and returns (None, what they give).
        coef: (4, C): finish instead with dx = A*(q - C - B*(h - mean)) + identity, and return
            (dx, None).
        training: whether ``stats`` depend on h. If not, B = C = 0, and h is no part of dx.
        out_dtype: of the result, ``dtype`` if None.
    """
    out_dtype = dtype if out_dtype is None else out_dtype
    g = input_grad(grad, None, dtype)
    # The mask asks for no weight gradient, so z's values are not read: h stands for its shape.
    dz, _, _ = convolution_backward(g, h, weight, geometry, (True, False, False))
    assert dz is not None
    if stats is None:
        return (dz if add is None else dz + add).to(out_dtype), None
    q = _through_act(dz, Activated(h, stats, act, add)).to(dz.dtype)
    grads = norm_grad(gradient_sums(q, h, stats), stats, training)
    if coef is not None:
        return input_grad(Grad(q, h if training else None, coef), identity, out_dtype), None
    return (cast(q, out_dtype) if write else None), grads


def conv_wgrad(
    grad: Grad,
    h: Tensor,
    weight: Tensor,
    geometry: Geometry,
    *,
    dtype: torch.dtype,
    stats: Tensor | None = None,
    act: Act = IDENTITY,
    with_bias: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """dweight = wgrad(act(a*h + b), g) in weight's shape, dtype and layout; dbias = sum of g.

    grad: of the convolution's output, (N, K, P, Q), applied on load. h: (N, C, H, W).
    """
    g = input_grad(grad, None, dtype)
    z = norm_act(h, stats, act, dtype)
    _, dweight, dbias = convolution_backward(g, z, weight, geometry, (False, True, with_bias))
    assert dweight is not None
    return dweight, dbias
