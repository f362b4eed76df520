"""What the tests share: the eager twin of a module, one recorded step, and the yardstick.

The yardstick (README, "Numbers"): error against float64 at most twice that of eager PyTorch in the
same dtype, plus a few units in the last place.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import os
import statistics
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ULPS = 4

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
            if not isinstance(child, nn.BatchNorm2d):
                continue
            if child.weight is not None:
                child.weight.copy_(draw(child.weight, 0.5, 1.5))
            if child.bias is not None:
                child.bias.copy_(draw(child.bias, -0.5, 0.5))
            if child.running_mean is not None and child.running_var is not None:
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


def assert_within_twice(
    fused: list[dict[str, Tensor]],
    eager: list[dict[str, Tensor]],
    exact: list[dict[str, Tensor]],
    terms: list[dict[str, float]] | None = None,
) -> None:
    """Hold every recorded tensor of ``fused`` to the yardstick; integers must be equal.

    Args:
        fused, eager, exact: recordings of the same draws by ``step``; ``exact`` in float64. Eager
            may have more draws. The error of a draw is the Euclidean norm over a tensor's
            elements; over draws see ``_usual_errors``.
        terms: per draw and name the sum of the absolute values of what is added up to the tensor
            (``record_terms``). A sum over rows that cancels, as the gradient of a bias in front
            of a norm does, is exact to the last place of its terms, not of itself; sums are
            accumulated in float32 at least.
    """
    for mine, theirs in zip(fused, eager):
        assert mine.keys() == theirs.keys()
    for name in fused[0]:
        for a, b in zip(fused, eager):
            assert a[name].dtype == b[name].dtype, name
            assert a[name].shape == b[name].shape, name
            if not a[name].is_floating_point():
                assert torch.equal(a[name], b[name]), name
        if not fused[0][name].is_floating_point():
            continue
        size = statistics.median(float(draw[name].norm()) for draw in exact)
        slack = ULPS * torch.finfo(fused[0][name].dtype).eps * size
        if terms is not None:
            added = statistics.median(draw.get(name, 0.0) for draw in terms)
            wide = torch.promote_types(fused[0][name].dtype, torch.float32)
            slack += ULPS * torch.finfo(wide).eps * added
        found = _usual_errors(
            [_distance(a[name], b[name]) for a, b in zip(fused, exact)],
            [_distance(a[name], b[name]) for a, b in zip(eager, exact)],
        )
        assert any(all(mine <= 2 * theirs + slack for mine, theirs in pairs) for pairs in found), (
            f"{name}: errors and eager's {found}, size {size:.3e}, slack {slack:.3e}"
        )


def _usual_errors(mine: list[float], theirs: list[float]) -> list[list[tuple[float, float]]]:
    """Estimates of how large either side's error is; one of them has to be within the yardstick.

    The root of the mean square is the sharper where errors are rounding. In half precision a
    ReLU's sign may flip at a value near 0, in eager as here, and one flip outweighs all rounding:
    then the quartiles tell more, both of them, since a median jumps where half of the draws have
    a flip. Of few draws, eager's on the same inputs or, where it was lucky, its usual one.
    """
    square = [statistics.fmean(e * e for e in errors) ** 0.5 for errors in (mine, theirs)]
    if len(mine) < 8:
        usual = max(statistics.median(theirs[: len(mine)]), statistics.median(theirs))
        return [[(square[0], square[1])], [(statistics.median(mine), usual)]]
    low, middle, _ = statistics.quantiles(mine)
    their_low, _, their_high = statistics.quantiles(theirs)
    return [[(square[0], square[1])], [(low, their_low), (middle, their_high)]]


def record_terms(module: nn.Module) -> dict[str, float]:
    """Hook ``module`` so that each backward fills the returned dictionary, names as ``step``'s.

    For the sums over rows (N*H*W): parameters' gradients, whose terms are the output's gradient
    (times the input, of about 1 after a norm), and running means.
    """
    terms: dict[str, float] = {}

    def record(name: str, child: nn.Module, x: Tensor, g: Tensor) -> None:
        g = g.detach().abs()
        terms[f"grad {name}.bias"] = float(g.sum((0, 2, 3)).norm())
        if isinstance(child, nn.Conv2d):
            added = torch.nn.grad.conv2d_weight(
                x, child.weight.shape, g,
                child.stride, child.padding, child.dilation, child.groups,
            )  # fmt: skip
            terms[f"grad {name}.weight"] = float(added.norm())
        else:
            terms[f"grad {name}.weight"] = terms[f"grad {name}.bias"]
            if isinstance(child.running_var, Tensor):
                terms[f"buffer {name}.running_mean"] = float(child.running_var.sqrt().norm())

    def hook_on(name: str, child: nn.Module) -> None:
        def hook(_: nn.Module, args: Any, out: Tensor) -> None:
            # On the tensor: a module's backward hook forbids the in-place ReLU that may follow.
            x = args[0].detach().abs()
            if out.requires_grad:
                out.register_hook(lambda g: record(name, child, x, g))

        child.register_forward_hook(hook)

    for name, child in module.named_modules():
        if isinstance(child, (nn.BatchNorm2d, nn.Conv2d)):
            hook_on(name, child)
    return terms


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm())


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
        draws: how many random inputs. eager_draws: how many for eager, where they are more.
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
    fused, eager, exact, terms = [], [], [], []
    for seed in range(max(draws, eager_draws)):
        x = images(shape, seed, dtype, **input_options)
        for each, buffers in zip(copies, first):
            if not successive:
                each.load_state_dict(buffers, strict=False)
        if seed < draws:
            fused.append(step(copies[0], x, autocast=autocast, seed=seed))
        eager.append(step(copies[1], x, autocast=autocast, seed=seed))
        g = images(eager[-1]["out"].shape, 500 + seed).to(eager[-1]["out"].dtype)
        exact.append(step(copies[2], x.double(), g.double()))
        terms.append(dict(recorded))
    assert_within_twice(fused, eager, exact, terms)


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
