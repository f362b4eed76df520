"""Who computes a case: PyTorch in its ways, this project in each memory mode, and peers."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from resnetv2.kernels.inspect import stub_driver
from resnetv2.measuring.cases import Case, device
from resnetv2.measuring.providers import COMPILE, EAGER, Provider, compiled, eager, memory_mode
from resnetv2.names import MEMORY_MODES


class _Checkpointed(nn.Sequential):
    """A stage in about as many segments as a segment has blocks, by torch.utils.checkpoint."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        segments = max(1, round(len(self) ** 0.5))
        if len(self) == 1:
            return checkpoint(self[0], x, use_reentrant=False, preserve_rng_state=False)
        return checkpoint_sequential(
            self, segments, x, use_reentrant=False, preserve_rng_state=False
        )


def _checkpointed(case: Case) -> nn.Module:
    module = eager(case)
    if not case.depth:
        return _Checkpointed(*module)
    for number in range(1, module.num_stages + 1):
        name = f"stage{number}"
        setattr(module, name, _Checkpointed(*getattr(module, name)))
    return module


def _inplace_abn(case: Case) -> nn.Module:
    """Eager with each norm and activation replaced by In-Place ABN's, which is not batch norm.

    Its activation must be invertible, so it is leaky ReLU and not ReLU: the gate decides.
    """
    from inplace_abn import InPlaceABN

    module = eager(case)
    for unit in [m for m in module.modules() if hasattr(m, "bn1")]:
        for name, norm in list(unit.named_children()):
            if isinstance(norm, nn.BatchNorm2d):
                fused = InPlaceABN(norm.num_features, activation="leaky_relu").to(device())
                setattr(unit, name, fused)
        unit.act = nn.Identity()
    return module


def _attorch(case: Case) -> nn.Module:
    """Eager with attorch's batch norm and activation in one kernel."""
    import attorch

    module = eager(case)
    for unit in [m for m in module.modules() if hasattr(m, "bn1")]:
        for name, child in list(unit.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                norm = attorch.BatchNorm2d(child.num_features, act_func="relu").to(device())
                setattr(unit, name, norm)
        unit.act = nn.Identity()
    return module


def _on_path(case: Case, memory: str, backend: str) -> nn.Module:
    """A memory mode on Triton or ATen, whatever the device: without a GPU no kernel runs."""
    if backend == "triton" and device().type == "cpu":
        stub_driver.install()
    return case.build(memory=memory, backend=backend)


def host_providers() -> list[Provider]:
    """Whose host time is measured: eager, torch.compile, and the modes on Triton and on ATen."""
    result = [Provider(EAGER, eager), Provider(COMPILE, compiled, compiles=True)]
    for backend, name in (("triton", "Triton"), ("aten", "ATen")):
        missing = stub_driver.missing() if (backend, device().type) == ("triton", "cpu") else ""
        for memory in MEMORY_MODES:
            prepare = functools.partial(_on_path, memory=memory, backend=backend)
            result.append(Provider(f"{memory}, {name}", prepare, ours=True, missing=missing))
    return result


def _peer(name: str, package: str, prepare: Callable[[Case], Any]) -> Provider:
    missing = "" if importlib.util.find_spec(package) else "not installed"
    if not missing and device().type != "cuda":
        missing = "needs a GPU"
    return Provider(name, prepare, missing=missing)


def all_providers(graphs: bool = False) -> list[Provider]:
    """Every provider, eager first, then torch.compile; ratios are to these two.

    graphs: also each in a whole-step CUDA graph.
    """
    result = [
        Provider(EAGER, eager),
        Provider(COMPILE, compiled, compiles=True),
        Provider(
            "compile max-autotune",
            # The same kernels as "max-autotune"; CUDA graphs are a column of their own.
            functools.partial(
                compiled,
                mode="max-autotune-no-cudagraphs" if device().type == "cuda" else "max-autotune",
            ),
            compiles=True,
        ),
        Provider("checkpoint", _checkpointed),
    ]
    for memory in MEMORY_MODES:
        result.append(Provider(memory, functools.partial(memory_mode, memory=memory), ours=True))
    if graphs:
        missing = "" if device().type == "cuda" else "CUDA graphs need a GPU"
        result += [
            p._replace(name=f"{p.name} + graph", graph=True, missing=missing) for p in result
        ]
    result.append(_peer("inplace_abn", "inplace_abn", _inplace_abn))
    result.append(_peer("attorch", "attorch", _attorch))
    return result
