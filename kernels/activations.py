"""Elementwise pieces that the Triton kernels share: the activations and their derivatives.

``KIND`` is a constexpr string out of ``operands.ACTS``; u is float32. NaN passes through all of
them, as in eager PyTorch (design 6): comparisons are written so that NaN takes the branch which
keeps it.
"""

import triton
import triton.language as tl


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
