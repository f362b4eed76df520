"""How far from float64 a result may be: the one yardstick of the tests and the benchmarks.

    error <= 2 * (eager PyTorch's error) + 0.3 eps * (size of the result)

Errors and sizes are Euclidean norms over a tensor, eps is that of the result's dtype. To round
every element once costs 0.29 eps of the norm in the root mean square: the last term is that one
rounding, for results that eager happens to have exactly. A sum over rows may cancel, as the
gradient of a bias in front of a norm does, and is then no more exact than a rounding of its terms:
it has 0.3 eps of the norm of the terms on top, in the dtype in which it is accumulated.
"""

from __future__ import annotations

import torch
from torch import Tensor

TIMES_EAGER = 2.0
ROUNDING = 0.3  # eps: 1/sqrt(12) is the root mean square of a rounding to the nearest


def distance(a: Tensor, b: Tensor) -> float:
    """The error of ``a`` against ``b``: the Euclidean norm of their difference, in float64."""
    return float((a.double() - b.double()).norm())


def slack(size: float, dtype: torch.dtype, terms: float = 0.0) -> float:
    """One rounding of a result of norm ``size``, and of a sum's terms, of norm ``terms``.

    dtype: of the result. Sums are accumulated in float32 at least.
    """
    wide = torch.promote_types(dtype, torch.float32)
    return ROUNDING * (torch.finfo(dtype).eps * size + torch.finfo(wide).eps * terms)


def allowed(eager: float, size: float, dtype: torch.dtype, terms: float = 0.0) -> float:
    """The largest error that passes where eager PyTorch's is ``eager``; see ``slack``."""
    return TIMES_EAGER * eager + slack(size, dtype, terms)
