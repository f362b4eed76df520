"""A kernel that cannot be had never ends a training step, and never changes what it computes."""

from __future__ import annotations

import itertools
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton", reason="the kernels need Triton")

from resnetv2 import BottleneckPreActBlock, PreActResNet
from resnetv2.kernels import dispatch, launch, reference, triton_engine
from resnetv2.kernels.fallback import FallbackWarning
from resnetv2.kernels.inspect import stub_driver
from resnetv2.kernels.launch import KernelError
from resnetv2.kernels.operands import Act, Geometry, Grad, Norm, running_stats
from tests.support.compiled import checked

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GEOMETRY = Geometry((1, 1), (1, 1))
RELU = Act("relu")
CONV_KERNELS = {
    "forward": "_conv_forward_kernel",
    "dgrad": "_conv_dgrad_kernel",
    "wgrad": "_conv_wgrad_kernel",
}
KERNELS = (
    *CONV_KERNELS.values(),
    "_moments_kernel",
    "_norm_act_kernel",
    "_operands_kernel",
)
# Of a unit whose norms are over groups.
GROUP_KERNELS = (
    "_moments_kernel",
    "_norm_act_kernel",
    "_group_affine_kernel",
    "_act_backward_kernel",
    "_input_grad_kernel",
)


@contextmanager
def failing(
    kernel: str, condition: Callable[[dict[str, Any]], bool] = lambda _: True
) -> Iterator[list[dict[str, Any]]]:
    """Have ``kernel`` fail where its constants meet the condition; all that it was tried with."""
    tried: list[dict[str, Any]] = []

    def refuse(name: str, grid: tuple[int, ...], constants: dict[str, Any]) -> None:
        if name == kernel:
            tried.append(constants)
            if condition(constants):
                raise KernelError(f"{name}: out of resource: shared memory")

    with launch.record(refuse):
        yield tried


def said(caught: Any) -> list[str]:
    """The fallbacks among warnings; NumPy has some of its own for Triton's interpreter."""
    return [str(w.message) for w in caught if w.category is FallbackWarning]


def tile(constants: dict[str, Any]) -> tuple[int, ...]:
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_J", "BLOCK_K")
    return tuple(constants[name] for name in names if name in constants)


def smaller(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> triton_engine.TritonEngine:
    """An engine to which nothing has happened yet, and which chains use."""
    engine = triton_engine.TritonEngine()
    monkeypatch.setattr(dispatch, "_engine", lambda name: engine)
    return engine


def activation(channels: int, size: int = 8) -> Tensor:
    x = torch.randn(2, channels, size, size, device=DEVICE)
    return x.to(memory_format=torch.channels_last)


def weight(k: int, c: int) -> Tensor:
    return torch.randn(k, c, 3, 3, device=DEVICE) / (9 * c) ** 0.5


@pytest.fixture
def call(engine: triton_engine.TritonEngine) -> Callable[[str], tuple[Tensor, Tensor]]:
    """One convolution by the engine, and the reference's, for an operation's name."""
    torch.manual_seed(0)
    h, g, w = activation(20), activation(24), weight(24, 20)

    def run(op: str) -> tuple[Tensor, Tensor]:
        if op == "forward":
            out, _ = engine.conv_forward(h, w, None, GEOMETRY, dtype=torch.float32)
            return out, reference.conv_forward(h, w, None, GEOMETRY, dtype=torch.float32)[0]
        options = {"dtype": torch.float32, "stats": None, "act": RELU, "need_bias": False}
        grads = engine.conv_backward(
            g, h, w, GEOMETRY, need_input=op == "dgrad", need_weight=op == "wgrad", **options
        )  # type: ignore[no-untyped-call]
        dz, dweight, _ = reference.convolution_backward(g, h, w, GEOMETRY, (True, True, False))
        pair = (grads.grad.q, dz) if op == "dgrad" else (grads.dweight, dweight)
        return pair  # type: ignore[return-value]

    return run


OPS = pytest.mark.parametrize("op", CONV_KERNELS)


@OPS
def test_the_next_smaller_tile(op: str, call: Callable[[str], tuple[Tensor, Tensor]]) -> None:
    first: list[dict[str, Any]] = []
    with failing(CONV_KERNELS[op], lambda c: tile(c) == tile(first[0])) as tried:
        first = tried
        with pytest.warns(FallbackWarning) as caught:
            out, expected = call(op)
        (message,) = said(caught)
        assert "a smaller tile" in message
        assert len(tried) == 2
        assert smaller(tile(tried[1]), tile(tried[0]))
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        # Decided: it is neither tried nor said again.
        with warnings.catch_warnings():
            warnings.simplefilter("error", FallbackWarning)
            again, _ = call(op)
        assert torch.equal(again, out)
        assert len(tried) == 3


@OPS
def test_aten_where_no_tile_can_be_had(
    op: str, call: Callable[[str], tuple[Tensor, Tensor]]
) -> None:
    with failing(CONV_KERNELS[op]) as tried:
        with pytest.warns(FallbackWarning) as caught:
            out, expected = call(op)
        count = len(tried)
        assert count > 1
        assert all(smaller(tile(b), tile(a)) for a, b in itertools.pairwise(tried))
        assert torch.equal(out, expected)
        with warnings.catch_warnings():
            warnings.simplefilter("error", FallbackWarning)
            again, _ = call(op)
        assert torch.equal(again, out)
        assert len(tried) == count
    (text,) = said(caught)
    assert text == (
        f"conv {op} of (2, 20, 8, 8), (24, 20, 3, 3), stride (1, 1), padding (1, 1), torch.float32 "
        f"on {launch.describe(out)} is computed by ATen from now on: "
        f"{CONV_KERNELS[op]}: out of resource: shared memory"
    )


def test_a_kernel_for_each_gradient_where_the_one_for_both_cannot_be_had(
    engine: triton_engine.TritonEngine,
) -> None:
    torch.manual_seed(0)
    h, g, w = activation(64), activation(16), torch.randn(16, 64, 1, 1, device=DEVICE) / 8
    stats = running_stats(*torch.rand(2, 64, device=DEVICE), None, None, 1e-5)
    names: list[str] = []

    def run() -> Any:
        names.clear()
        with launch.record(lambda name, grid, constants: names.append(name)):
            return engine.norm_conv_backward(
                Grad(g), h, stats, RELU, w, Geometry(), training=True, norm=Norm(None, None, 1e-5),
                dtype=torch.float32, need_input=True, need_weight=True, need_bias=True,
            )  # type: ignore[no-untyped-call]  # fmt: skip

    expected = run()
    assert names == ["_conv_backward_kernel"]
    with failing("_conv_backward_kernel"):
        with pytest.warns(FallbackWarning, match="is computed by a kernel for each gradient from"):
            found = run()
        run()
        assert names == ["_conv_wgrad_kernel", "_conv_dgrad_kernel"]
    for value, wanted in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5)


def block(norm: str = "batch") -> nn.Module:
    torch.manual_seed(0)
    block = BottleneckPreActBlock(8, 16, stride=2, norm=norm, backend="triton").to(DEVICE)
    return block.to(memory_format=torch.channels_last)


def step(block: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, input's gradient and parameters' gradients."""
    block.zero_grad()
    x = x.detach().requires_grad_()
    out = block(x)
    out.square().mean().backward()
    return [out, x.grad, *(p.grad for p in block.parameters())]  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("norm", "kernel"),
    [
        *(pytest.param("batch", name, id=name) for name in KERNELS),
        *(pytest.param("group:2", name, id=f"groups-{name}") for name in GROUP_KERNELS),
    ],
)
def test_a_training_step_without_one_of_the_kernels(
    norm: str, kernel: str, engine: triton_engine.TritonEngine
) -> None:
    x = activation(8)
    expected = step(block(norm), x)
    with failing(kernel) as tried:
        with pytest.warns(FallbackWarning) as caught:
            found = step(block(norm), x)
        messages = said(caught)
        assert len(set(messages)) == len(messages)
        assert all("computed by ATen" in message for message in messages)
        count = len(tried)
        with warnings.catch_warnings():
            warnings.simplefilter("error", FallbackWarning)
            step(block(norm), x)
        assert len(tried) == count
    for value, wanted in zip(found, expected):
        torch.testing.assert_close(value, wanted, rtol=2e-4, atol=1e-5)


def test_walking_back_uses_the_tile_of_the_forward(engine: triton_engine.TritonEngine) -> None:
    """Only the adding kernel fails, but the subtracting one changes with it: the same bits."""
    torch.manual_seed(0)
    x, residual, w = activation(20), activation(24), weight(24, 20)
    options: dict[str, Any] = {"dtype": torch.float32}

    def forward(**more: Any) -> Tensor:
        return engine.conv_forward(x, w, None, GEOMETRY, **options, **more)[0]

    largest = 0

    def adding(constants: dict[str, Any]) -> bool:
        nonlocal largest
        largest = max(largest, constants["BLOCK_M"])
        return not constants["SUBTRACT"] and constants["BLOCK_M"] == largest

    with failing("_conv_forward_kernel", adding) as tried:
        with pytest.warns(FallbackWarning, match="a smaller tile"):
            out = forward(residual=torch.zeros_like(residual), with_moments=True)
        back = forward(residual=torch.zeros_like(residual), subtract=True)
    assert torch.equal(back, -out)
    tiles = [tile(c) for c in tried]
    assert [c["SUBTRACT"] for c in tried] == [False, False, True]
    assert tiles[0] != tiles[1] == tiles[2]


def test_a_step_in_which_only_the_walk_fails(engine: triton_engine.TritonEngine) -> None:
    """The decision falls between forward and backward: gradients differ by roundings."""
    torch.manual_seed(0)
    model = PreActResNet(
        "basic", [2, 1, 1], widths=(4, 4, 4), backend="triton", memory="invert"
    ).to(DEVICE)
    model.to(memory_format=torch.channels_last)
    x = activation(3, 4)
    expected = step(model, x)
    with failing("_conv_forward_kernel", lambda c: c["SUBTRACT"]):
        with pytest.warns(FallbackWarning, match="computed by ATen"):
            found = step(model, x)
        with warnings.catch_warnings():
            warnings.simplefilter("error", FallbackWarning)
            later = step(model, x)
    for values in (found, later):
        for value, wanted in zip(values, expected):
            torch.testing.assert_close(value, wanted, rtol=1e-3, atol=1e-5)


def test_an_error_as_a_filter_decides_nothing(
    call: Callable[[str], tuple[Tensor, Tensor]],
) -> None:
    """Whoever has warnings raised sees this one each time, not a silent fallback the next."""
    with failing("_conv_forward_kernel"), warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        for _ in range(2):
            with pytest.raises(FallbackWarning):
                call("forward")


# --- with Triton's compiler and launcher (tests/support/fallback_checks.py) ---------------------


@pytest.fixture(scope="module")
def found() -> Any:
    if stub_driver.missing():
        pytest.skip(stub_driver.missing())
    return checked("fallback_checks")


@pytest.mark.parametrize(
    "fault", ["CompilationError", "PTXASError", "pass", "registers", "no kernel image"]
)
def test_a_kernel_that_does_not_compile_or_load(found: Any, fault: str) -> None:
    first, second = found[fault]
    assert len(first) == 1
    assert re.match(r"moments of \(2, \d+, 8, 8\), torch.float32 on sm_90 is computed", first[0])
    assert second == []


@pytest.mark.parametrize("fault", ["illegal access", "out of memory", "KeyboardInterrupt"])
def test_what_is_no_fault_of_a_kernel_is_raised(found: Any, fault: str) -> None:
    assert found[fault] == "raised"


def test_shared_memory(found: Any) -> None:
    """A device with less than the tiles want: all that is launched fits."""
    assert found["limit"] >= max(found["shared"]) > 0
    assert len(found["said"]) > 0
    assert all("shared memory" in text and "sm_90" in text for text in found["said"])
    assert max(Counter(found["said"]).values()) == 1
    assert found["said again"] == []
    convolutions = {"_conv_forward_kernel", "_conv_dgrad_kernel", "_conv_wgrad_kernel"}
    assert convolutions <= set(found["kernels"])
