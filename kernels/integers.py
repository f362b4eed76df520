"""The host's integer arithmetic: outside of kernels, Triton's own functions cost 4 us a call."""

from __future__ import annotations


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below n, for n >= 1."""
    return 1 << max(n - 1, 0).bit_length()
