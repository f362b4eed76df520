"""What the tests of ``fuse`` share: fused copies, calls of the operator, the yardstick's steps."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from resnetv2 import explain, fuse
from tests.support.yardstick import Draw, assert_yardstick, images, record_terms, step

LEARNING_RATE = 0.1


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        importlib.util.find_spec(package) is None,
        reason=f"the package {package} is not installed (it is in the extra 'test')",
    )


class ChainCalls(TorchDispatchMode):
    """Counts the calls of the chain's operator while it is active."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.resnetv2.chain_forward.default
        return func(*args, **(kwargs or {}))


def chain_calls(model: nn.Module, x: Tensor) -> int:
    """How many chains a forward of ``model`` runs, without gradients; buffers stay as they are."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.no_grad(), ChainCalls() as calls:
        model(x)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    return calls.count


def fuse_if_any(model: nn.Module, backend: str = "aten", **options: Any) -> nn.Module:
    """``fuse``, whether or not there is anything to fuse."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pre-activation")
        return fuse(model, backend=backend, **options)


def fused_copy(model: nn.Module, backend: str = "aten", **options: Any) -> nn.Module:
    """A fused deep copy of ``model``, if there is anything to fuse."""
    return fuse_if_any(copy.deepcopy(model), backend, **options)


def fused_units(model: nn.Module) -> int:
    return len(explain(model).fused)


def training_step(
    model: nn.Module, x: Tensor, g: Tensor | None = None, *, seed: int = 0, **options: Any
) -> dict[str, Tensor]:
    """``yardstick.step`` and one step of SGD: also "stepped NAME" of each parameter.

    Random numbers, of dropout for one, are those of ``seed``.
    """
    torch.manual_seed(seed)
    result = step(model, x, g, seed=seed, **options)
    torch.optim.SGD(model.parameters(), lr=LEARNING_RATE).step()
    for name, parameter in model.named_parameters():
        result[f"stepped {name}"] = parameter.detach().clone()
    return result


def check_fused(
    model: nn.Module,
    shape: Iterable[int],
    *,
    backend: str = "aten",
    memory: str = "recompute",
    training: bool = True,
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    draws: int = 1,
    eager_draws: int = 9,
    **input_options: Any,
) -> nn.Module:
    """Steps of the fused model, of the model and of it in float64, held to the yardstick.

    Every draw begins with the same weights and buffers. Returns the fused model.
    """
    model = model.train(training)
    fused = fused_copy(model, backend, memory=memory)
    eager, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    recorded = record_terms(exact)
    copies = (fused, eager, exact)
    first = [copy.deepcopy(each.state_dict()) for each in copies]

    def take(seed: int, both: bool) -> Draw:
        x = images(shape, seed, dtype, **input_options)
        for each, state in zip(copies, first):
            each.load_state_dict(state)
        mine = training_step(fused, x, autocast=autocast, seed=seed) if both else None
        theirs = training_step(eager, x, autocast=autocast, seed=seed)
        g = images(theirs["out"].shape, 500 + seed).to(theirs["out"].dtype)
        truth = training_step(exact, x.double(), g.double(), seed=seed)
        terms = dict(recorded)
        for name, added in recorded.items():
            if name.startswith("grad "):
                terms[name.replace("grad", "stepped")] = LEARNING_RATE * added
        return Draw(mine, theirs, truth, terms)

    assert_yardstick(take, draws, eager_draws)
    return fused
