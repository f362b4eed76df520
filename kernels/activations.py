"""Pieces that the Triton kernels share: the activations and their derivatives, casts, products.

``KIND`` is a constexpr string out of ``operands.ACTS``; u is float32. NaN passes through all of
them, as in eager PyTorch: comparisons are written so that NaN takes the branch which
keeps it.
"""

import triton
import triton.language as tl

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def activate(u, slope, KIND: tl.constexpr):
    """act(u), elementwise, float32 in and out."""
    if KIND == "relu":
        return tl.maximum(u, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif KIND == "leaky_relu":
        return tl.where(u > 0.0, u, u * slope)
    elif KIND == "silu":
        return u / (1.0 + tl.exp(-u))
    elif KIND == "gelu":
        return 0.5 * u * (1.0 + tl.erf(u * 0.7071067811865476))
    else:
        return u


@triton.jit
def activation_grad(dz, u, slope, KIND: tl.constexpr):
    """dz * act'(u), elementwise. As in eager, relu's gradient at NaN is dz."""
    if KIND == "relu":
        return tl.where(u <= 0.0, 0.0, dz)
    elif KIND == "leaky_relu":
        return tl.where(u > 0.0, dz, dz * slope)
    elif KIND == "silu":
        s = 1.0 / (1.0 + tl.exp(-u))
        return dz * s * (1.0 + u * (1.0 - s))
    elif KIND == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(u * 0.7071067811865476))
        pdf = tl.exp(-0.5 * u * u) * 0.3989422804014327
        return dz * (cdf + u * pdf)
    else:
        return dz


@triton.jit
def norm_gradient(q, h, a, b, c, center):
    """g = A*(q - C - B*(h - mean)) of a norm's backward, float32 (kernels/README.md, "Backward").

    q, h: (rows, channels). a, b, c, center: (channels,), rows A, B, C and mean of its coefficients.
    h is None where B = C = 0 (running statistics): it is then no part of the gradient, even where
    it is infinite. a is None where A is multiplied later.
    """
    g = q.to(tl.float32)
    if h is not None:
        g = (g - c[None, :]) - (h.to(tl.float32) - center[None, :]) * b[None, :]
    if a is not None:
        g *= a[None, :]
    return g


@triton.jit
def _add_both(a, b, c, d):
    return a + c, b + d


@triton.jit
def sums(a, b, AXIS: tl.constexpr = 0):
    """The sums of a's and of b's rows: one exchange between threads and warps for both."""
    if INTERPRET:
        return tl.sum(a, AXIS), tl.sum(b, AXIS)
    else:
        return tl.reduce((a, b), AXIS, _add_both)


@triton.jit
def cast(x, DTYPE: tl.constexpr):
    """x.to(DTYPE), rounded to nearest even everywhere.

    Triton's interpreter truncates float32 to bfloat16, up to twice the error of a GPU, so there
    the rounding is done on the bits first (NaN has none to spare and is left alone).
    """
    if INTERPRET:
        if DTYPE == tl.bfloat16 and x.dtype == tl.float32:
            bits = x.to(tl.uint32, bitcast=True)
            rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16
            x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(DTYPE)


@triton.jit
def operand(x, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """x as ``dot`` takes it: in DTYPE, with ``PRECISION`` "tf32" rounded to nearest, ties away.

    Matrix units leave out the lower 13 bits of float32, which by itself rounds towards zero: a
    bias. Adding half of what they leave out is two instructions with the test for NaN, whose bits
    would overflow (Inf's stay Inf in what is multiplied); ``cvt.rna.tf32`` becomes three.
    """
    x = cast(x, DTYPE)
    if PRECISION == "tf32":
        bits = x.to(tl.int32, bitcast=True)
        x = tl.where(x == x, (bits + 0x1000).to(tl.float32, bitcast=True), x)
    return x


@triton.jit
def _multiplied(x, PRECISION: tl.constexpr):
    """What matrix units multiply of an operand, as float32.

    The interpreter would multiply the bit patterns of bfloat16, and all bits of float32.
    """
    x = x.to(tl.float32)
    if PRECISION == "tf32":
        x = (x.to(tl.int32, bitcast=True) & -0x2000).to(tl.float32, bitcast=True)
    return x


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b, accumulated in float32, for operands that ``operand`` made."""
    if INTERPRET:
        acc = tl.dot(_multiplied(a, PRECISION), _multiplied(b, PRECISION), acc)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc
