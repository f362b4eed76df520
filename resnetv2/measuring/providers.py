"""Who computes a case: eager PyTorch, torch.compile, and this project in each memory mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from .cases import Case, device

EAGER = "eager"
COMPILE = "compile"


class Provider(NamedTuple):
    """prepare: a case to the module that computes it. ours: this project's. compiles: by
    torch.compile, which takes its time. graph: the whole step in a CUDA graph. missing: why it
    cannot run here, or "".
    """

    name: str
    prepare: Callable[[Case], Any]
    ours: bool = False
    compiles: bool = False
    graph: bool = False
    missing: str = ""


def eager(case: Case) -> nn.Module:
    return case.build(backend="eager")


def compiled(case: Case, mode: str | None = None) -> Any:
    torch._dynamo.reset()
    return torch.compile(eager(case), mode=mode, dynamic=False)


def memory_mode(case: Case, memory: str, backend: str = "") -> nn.Module:
    """This project's module. backend: the device's if empty."""
    return case.build(
        memory=memory, backend=backend or ("triton" if device().type == "cuda" else "aten")
    )
