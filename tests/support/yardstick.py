"""What the tests share: the eager twin of a module, one recorded step, and steps held to the
yardstick of ``resnetv2.kernels.inspect.yardstick``.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import os
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnetv2.core.norms import NORMS, groups_of
from resnetv2.kernels.inspect.yardstick import MOST_DRAWS, Draw, judged

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)
BACKENDS = ("aten", pytest.param("triton", marks=needs_triton))


def eager_twin(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of ``module`` whose blocks run their children one by one, in ``dtype`` if given."""
    twin = copy.deepcopy(module)
    for child in twin.modules():
        if hasattr(child, "backend"):
            child.backend = "eager"
    return twin if dtype is None else twin.to(dtype)


def with_backend(module: nn.Module, backend: str) -> nn.Module:
    """A copy of ``module`` whose blocks and stages run on ``backend``."""
    twin = copy.deepcopy(module)
    for child in twin.modules():
        if hasattr(child, "backend"):
            child.backend = backend
    return twin


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give norms weights, biases and running statistics that matter, in place.

    A fresh BatchNorm2d has weight 1 and bias 0, which hides whatever is done with them.
    Convolutions get the paper's initialisation: PyTorch's shrinks activations to 0.01, and the
    next norm's backward magnifies all rounding a hundredfold, in eager as here.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(like: Tensor, low: float, high: float) -> Tensor:
        values = torch.rand(like.shape, generator=generator) * (high - low) + low
        return values.to(like.device, like.dtype)

    with torch.no_grad():
        for child in module.modules():
            if isinstance(child, nn.Conv2d):
                fan_out = math.prod(child.kernel_size) * child.out_channels
                values = torch.randn(child.weight.shape, generator=generator)
                child.weight.copy_(values * math.sqrt(2.0 / fan_out))
            if not isinstance(child, NORMS):
                continue
            if child.weight is not None:
                child.weight.copy_(draw(child.weight, 0.5, 1.5))
            if child.bias is not None:
                child.bias.copy_(draw(child.bias, -0.5, 0.5))
            if getattr(child, "running_mean", None) is not None:
                child.running_mean.copy_(draw(child.running_mean, -0.3, 0.3))
                child.running_var.copy_(draw(child.running_var, 0.5, 2.0))
    return module


def images(
    shape: Iterable[int],
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
    mean: float = 0.0,
    std: float = 1.0,
) -> Tensor:
    """Normal random activations (N, C, H, W) on the test device."""
    generator = torch.Generator().manual_seed(1000 + seed)
    x = torch.randn(tuple(shape), generator=generator, dtype=torch.float64) * std + mean
    last = channels_last and x.dim() == 4
    memory_format = torch.channels_last if last else torch.contiguous_format
    return x.to(DEVICE, dtype).contiguous(memory_format=memory_format)


def step(
    module: nn.Module,
    x: Tensor,
    g: Tensor | None = None,
    autocast: torch.dtype | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """One forward and backward: "out", "dx", "grad NAME" and "buffer NAME", detached.

    g is the gradient of the output; random by ``seed`` if None. A gradient that stays None is left
    out. The input must come out of it untouched.
    """
    module.zero_grad(set_to_none=True)
    given = x
    x = x.detach().clone().requires_grad_()
    version = x._version
    with torch.autocast(x.device.type, dtype=autocast, enabled=autocast is not None):
        out = module(x)
    if g is None:
        g = images(out.shape, 500 + seed)
    out.backward(g.to(out.device, out.dtype))
    assert x._version == version, "the input was written to"
    assert torch.equal(x.nan_to_num(), given.nan_to_num()), "the input has changed"
    result = {"out": out.detach()}
    if x.grad is not None:
        result["dx"] = x.grad
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            result[f"grad {name}"] = parameter.grad.clone()
    for name, buffer in module.named_buffers():
        result[f"buffer {name}"] = buffer.clone()
    return result


def assert_yardstick(take: Callable[[int, bool], Draw], draws: int, eager_draws: int) -> None:
    """Hold the recordings of several draws to the yardstick (``inspect.yardstick.judged``)."""
    failures = judged(take, draws, eager_draws, MOST_DRAWS).failures()
    assert not failures, "\n".join(failures)


def record_terms(module: nn.Module) -> dict[str, float]:
    """Hook ``module`` so that each step fills the returned dictionary, names as ``step``'s.

    For the sums over rows (N*H*W), the norm of what is added up: of a bias's gradient the output's
    gradient, of a weight's the products with the input, of running statistics the moments' terms.
    """
    terms: dict[str, float] = {}

    def record(name: str, child: nn.Module, x: Tensor, g: Tensor) -> None:
        g = g.detach()
        terms[f"grad {name}.bias"] = float(g.norm())
        if isinstance(child, nn.Conv2d):
            squares = torch.nn.grad.conv2d_weight(
                x.square(), child.weight.shape, g.square(),
                child.stride, child.padding, child.dilation, child.groups,
            )  # fmt: skip
            terms[f"grad {name}.weight"] = float(squares.sum().sqrt())
        elif groups_of(child):
            xhat = F.group_norm(x, groups_of(child), eps=child.eps)
            terms[f"grad {name}.weight"] = float((g * xhat).norm())
        else:
            batch = child.training or child.running_mean is None
            running = (None, None) if batch else (child.running_mean, child.running_var)
            xhat = F.batch_norm(x, *running, training=batch, eps=child.eps)
            terms[f"grad {name}.weight"] = float((g * xhat).norm())

    def record_statistics(name: str, norm: nn.Module, x: Tensor) -> None:
        share = (1.0 if norm.momentum is None else norm.momentum) * x.shape[1] / x.numel()
        deviation = x - x.mean((0, 2, 3), keepdim=True)
        terms[f"buffer {name}.running_mean"] = share * float(x.norm())
        terms[f"buffer {name}.running_var"] = share * float(deviation.square().norm())

    def hook_on(name: str, child: nn.Module) -> None:
        def hook(_: nn.Module, args: Any, out: Tensor) -> None:
            # On the tensor: a module's backward hook forbids the in-place ReLU that may follow.
            x = args[0].detach().clone()
            if isinstance(child, nn.BatchNorm2d) and child.training:
                record_statistics(name, child, x)
            if out.requires_grad:
                out.register_hook(lambda g: record(name, child, x, g))

        child.register_forward_hook(hook)

    for name, child in module.named_modules():
        if isinstance(child, (*NORMS, nn.Conv2d)):
            hook_on(name, child)
    return terms


def check_module(
    module: nn.Module,
    shape: Iterable[int],
    *,
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    draws: int = 1,
    eager_draws: int = 9,
    prepare: Callable[[nn.Module], Any] | None = None,
    successive: bool = False,
    **input_options: Any,
) -> None:
    """Training steps of ``module`` as it is, eagerly, and in float64, held to the yardstick.

    Args:
        module: with its backend set. shape: of the input. dtype: of the input.
        draws, eager_draws: how many random inputs (``assert_yardstick``).
        prepare: what is done to each copy before its first step (eval mode, ...).
        successive: each draw is the step after the last one's, with its buffers; otherwise every
            draw begins with the same, so that their errors are independent.
    """
    copies = [copy.deepcopy(module), eager_twin(module), eager_twin(module, torch.float64)]
    if prepare is not None:
        for each in copies:
            prepare(each)
    recorded = record_terms(copies[2])
    first = [{name: b.clone() for name, b in each.named_buffers()} for each in copies]

    def take(seed: int, both: bool) -> Draw:
        x = images(shape, seed, dtype, **input_options)
        for each, buffers in zip(copies, first):
            if not successive:
                each.load_state_dict(buffers, strict=False)
        fused = step(copies[0], x, autocast=autocast, seed=seed) if both else None
        eager = step(copies[1], x, autocast=autocast, seed=seed)
        g = images(eager["out"].shape, 500 + seed).to(eager["out"].dtype)
        exact = step(copies[2], x.double(), g.double())
        return Draw(fused, eager, exact, dict(recorded))

    assert_yardstick(take, draws, eager_draws)


def assert_equal_steps(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Two recordings, bit for bit (NaN equal to NaN)."""
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0, equal_nan=True, msg=name)


def assert_close_steps(
    a: dict[str, Tensor], b: dict[str, Tensor], rtol: float = 1e-4, atol: float = 1e-5
) -> None:
    """Two float32 recordings up to rounding, atol relative to the largest element.

    For what eager does rather than how exactly; ``check_module`` is the test of the numbers. A
    bias's gradient, which is 0 in front of a norm, is compared on the scale of the weight's.
    """
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        weight = b.get(name.replace("bias", "weight"), b[name])
        largest = max(float(tensor.abs().max()) for tensor in (b[name], weight))
        torch.testing.assert_close(
            a[name], b[name], rtol=rtol, atol=atol * max(largest, 1e-2), msg=lambda m, n=name: n + m
        )


def interpreted(backend: str) -> bool:
    """Whether kernels run in Triton's interpreter, a thousand times slower than on a GPU."""
    return backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
