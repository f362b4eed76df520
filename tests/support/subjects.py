"""Units that both behaviour suites look at: this library's blocks, and foreign ones after ``fuse``.

Each subject comes as a pair of equal weights: the module that runs fused, and the module that runs
its children one by one, which is the expectation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from resnetv2 import BottleneckPreActBlock, PreActBlock
from resnetv2.blocks import PreActUnit, Stage
from tests.support.fuse_checks import fused_copy
from tests.support.fuse_models import Basic, NormAct, OfNormActs, OfTuples, PlainNet, Wide
from tests.support.yardstick import DEVICE, eager_twin, needs_triton, randomise, with_backend

SHAPE = (3, 4, 5, 6)
NET_SHAPE = (2, 3, 8, 8)
Pair = tuple[nn.Module, nn.Module]

# Foreign blocks, unfused.
FOREIGN: dict[str, Callable[[], nn.Module]] = {
    "basic": lambda: Basic(4, 8, 2),
    "identity": lambda: Basic(4, 4),
    "norm-act": lambda: OfNormActs(NormAct, 4, 3, 8),
    "tuples": lambda: OfTuples(4, 8, 2, True),
    "wide": lambda: Wide(4, 8, 2, activate_first=False),
    "stage": lambda: nn.Sequential(*[Basic(4, 4) for _ in range(3)]),
    "net": PlainNet,
}
OWN: dict[str, Callable[[], PreActUnit | Stage]] = {
    "basic": lambda: PreActBlock(4, 8, 2),
    "bottleneck": lambda: BottleneckPreActBlock(4, 8, 2),
    "identity": lambda: PreActBlock(4, 4),
    "stage": lambda: Stage(*[PreActBlock(4, 4) for _ in range(3)]),
    "mixed-stage": lambda: Stage(PreActBlock(4, 8, 2), PreActBlock(8, 8)),
    "biased": lambda: PreActBlock(4, 8, 2, bias=True),
    "biased-raw": lambda: PreActBlock(4, 8, 2, bias=True, shortcut="raw"),
    "biased-identity": lambda: PreActBlock(4, 4, bias=True),
    "biased-bottleneck": lambda: BottleneckPreActBlock(4, 8, 2, bias=True),
    "biased-bottleneck-raw": lambda: BottleneckPreActBlock(4, 8, 2, bias=True, shortcut="raw"),
    "biased-bottleneck-identity": lambda: BottleneckPreActBlock(4, 4, bias=True),
}


def foreign(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise(FOREIGN[kind]()).to(DEVICE)


def own(kind: str, backend: str = "aten") -> Any:
    torch.manual_seed(0)
    return with_backend(randomise(OWN[kind]()).to(DEVICE), backend)


def pair(subject: str) -> Pair:
    """(fused, child by child) of a subject's name.

    "own basic" runs on ATen, "triton basic" on the kernels; "fused stage" keeps memory by
    "recompute", "fused stage invert" by that mode.
    """
    whose, kind, *memory = subject.split()
    if whose == "fused":
        model = foreign(kind)
        return fused_copy(model, memory=memory[0] if memory else "recompute"), model
    module = own(kind, "aten" if whose == "own" else whose)
    return module, eager_twin(module)


def subjects(*names: str) -> pytest.MarkDecorator:
    """Parametrise ``subject`` over names."""
    return pytest.mark.parametrize(
        "subject",
        [pytest.param(n, marks=needs_triton if n.startswith("triton") else ()) for n in names],
    )


ON_ATEN = (
    *(f"own {kind}" for kind in ("basic", "identity", "stage")),
    *(f"fused {kind}" for kind in ("basic", "norm-act", "tuples", "wide", "stage")),
)
every = subjects(*ON_ATEN)
blocks = subjects("own basic", "fused basic")
stages = subjects("own stage", "fused stage")
