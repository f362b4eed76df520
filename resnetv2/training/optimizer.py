"""An optimizer's state for checkpoints, and what fused SGD needs before its first step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# How an optimizer computes, not what: the running program's choice, not a checkpoint's.
_IMPLEMENTATION = ("foreach", "fused", "capturable", "differentiable")


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """``optimizer.state_dict()`` for a checkpoint: learning rates as numbers, no switches of the
    implementation, so that graphed and ungraphed runs read each other's."""
    state = optimizer.state_dict()
    groups = []
    for group in state["param_groups"]:
        kept = {name: value for name, value in group.items() if name not in _IMPLEMENTATION}
        groups.append({**kept, "lr": float(kept["lr"])})
    return {**state, "param_groups": groups}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load what ``optimizer_state`` gave; the optimizer stays fused, or not, as it was built.

    A graphed ``Step`` of this optimizer notices, and captures anew.

    Raises:
        ValueError: the state of other parameter groups.
    """
    saved, own = state["param_groups"], optimizer.param_groups
    if len(saved) != len(own):
        raise ValueError(
            f"expected the state of {len(own)} parameter groups, got that of {len(saved)}"
        )
    groups = [
        {**theirs, **{name: mine[name] for name in _IMPLEMENTATION if name in mine}}
        for theirs, mine in zip(saved, own, strict=True)
    ]
    optimizer.load_state_dict({**state, "param_groups": groups})
    # Fused kernels want momentum to lie as the weights do, which may have another memory format.
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter).copy_(value)


def fill_momentum(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
    """Give fused SGD under a scaler its momentum, zero, before its first step.

    It would take uninitialised memory and leave it so where that step overflows and is left out, as
    float16's first steps are. Zero is the same first step where nothing is damped.
    """
    if not (isinstance(optimizer, torch.optim.SGD) and scaler.is_enabled()):
        return
    for group in optimizer.param_groups:
        if not group["fused"] or not group["momentum"] or group["dampening"]:
            continue
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if parameter.requires_grad and state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)
