"""Which implementation runs, per backend, operation and shape
(kernels/README.md, "Which implementation runs").

An engine offers the four steps out of which a chain's forward and backward are made: moments and
their merging, a convolution's forward, and the backward of one norm -> act -> conv. ``AtenEngine``
puts them together from ``reference``; ``TritonEngine`` from the fused kernels, and decides by
``choices`` whether a convolution applies its prologue on load, has its operands written
once by an elementwise kernel, or is left to ATen.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from . import recording
from .aten_engine import AtenEngine

BACKENDS = ("auto", "triton", "aten")
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def has_triton() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def _below_sm80(device: torch.device) -> bool:
    """Whether ATen is the better choice on a GPU: Triton's code for it spills and compiles long."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return False
    return _said_below_sm80(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _said_below_sm80(number: int) -> bool:
    major, minor = torch.cuda.get_device_capability(number)
    if major >= 8:
        return False
    warnings.warn(
        f"{torch.cuda.get_device_name(number)} (sm_{major}{minor}) runs on ATen: below sm_80 "
        "Triton's kernels spill registers and take minutes to compile. RESNETV2_BACKEND=triton "
        "runs them nevertheless",
        RuntimeWarning,
        stacklevel=4,
    )
    return True


def resolve_backend(backend: str, device: torch.device) -> str:
    """ "triton" or "aten" for a requested backend and a device.

    ``RESNETV2_BACKEND`` overrides "auto"; without it, Triton runs on a GPU, from sm_80 on, and in
    its interpreter (``TRITON_INTERPRET=1``).

    Raises:
        ValueError: an unknown name. ImportError: "triton" asked for where it is not installed.
    """
    source = "backend"
    if backend == "auto" and os.environ.get("RESNETV2_BACKEND"):
        source, backend = "RESNETV2_BACKEND", os.environ["RESNETV2_BACKEND"]
    if backend not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "auto":
        if device.type == "cuda":
            on = not _below_sm80(device)
        elif device.type == "meta" and recording.gpu() is not None:
            on = True  # tensors without memory, for a GPU whose kernels are wanted
        else:
            on = os.environ.get("TRITON_INTERPRET") == "1"
        return "triton" if on and has_triton() else "aten"
    if backend == "triton" and not has_triton():
        raise ImportError("the triton backend needs the package triton: pip install triton")
    return backend


@functools.cache
def _engine(name: str) -> AtenEngine:
    if name != "triton":
        return AtenEngine()
    from .triton_engine import TritonEngine

    return TritonEngine()


def engine(backend: str, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> AtenEngine:
    """The engine for tensors of ``dtypes`` on ``device``; ATen's where Triton has no such dtype."""
    name = resolve_backend(backend, device)
    if name == "triton" and any(dtype not in TRITON_DTYPES for dtype in dtypes):
        name = "aten"
    return (_stand_in.get() if name == "triton" else None) or _engine(name)


_stand_in: ContextVar[AtenEngine | None] = ContextVar("stand-in", default=None)


@contextmanager
def stand_in(engine: AtenEngine) -> Iterator[None]:
    """Inside the block chains run on ``engine`` where they would on Triton's: it is looked at."""
    token = _stand_in.set(engine)
    try:
        yield
    finally:
        _stand_in.reset(token)
