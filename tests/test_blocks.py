"""Blocks and chains against their own children, run one by one, in float64.

Promise: outputs, dx, every parameter's gradient and the running statistics are at most twice as
far from float64 as eager PyTorch's in the same dtype, on both backends.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Iterable
from typing import Any

import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from torch import nn

from resnetv2 import BottleneckPreActBlock, PreActBlock
from resnetv2.blocks import PreActUnit, Stage
from tests.support.yardstick import (
    BACKENDS,
    DEVICE,
    check_module,
    interpreted,
    needs_triton,
    randomise,
)

pytestmark = pytest.mark.usefixtures("one_thread")

ACTS = ("relu", "leaky_relu", "silu", "gelu", "identity")

# Channel counts in the order (in, out); stride; options.
BASIC: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "identity": (6, 6, 1, {}),
    "identity-reads-preact": (6, 6, 1, {"identity": "preact"}),
    "stride2-preact": (5, 9, 2, {}),
    "stride2-raw": (5, 9, 2, {"shortcut": "raw"}),
    "stride2-same-width": (8, 8, 2, {}),
    "stride3": (4, 8, 3, {}),
    "narrower": (9, 4, 1, {}),
    "wider-raw": (3, 17, 1, {"shortcut": "raw"}),
    "bias": (6, 6, 1, {"bias": True}),
    "bias-projection": (4, 8, 2, {"bias": True}),
    "bias-projection-raw": (4, 8, 2, {"bias": True, "shortcut": "raw"}),
    **{f"act-{act}": (6, 6, 1, {"act": act}) for act in ACTS[1:]},
    **{f"act-{act}-projection": (4, 8, 2, {"act": act}) for act in ACTS[1:]},
    "one-channel": (1, 1, 1, {}),
}
BOTTLENECK: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "identity": (12, 12, 1, {}),
    "identity-reads-preact": (12, 12, 1, {"identity": "preact"}),
    "stride2-preact": (6, 20, 2, {}),
    "stride2-raw": (6, 20, 2, {"shortcut": "raw"}),
    "narrower-expansion2": (10, 6, 1, {"expansion": 2}),
    "expansion1": (5, 5, 1, {"expansion": 1}),
    "bias": (8, 8, 1, {"bias": True}),
    "bias-projection": (4, 8, 2, {"bias": True}),
    **{f"act-{act}": (8, 8, 1, {"act": act}) for act in ACTS[1:]},
}
CASES = {
    **{f"basic-{name}": (PreActBlock, *case) for name, case in BASIC.items()},
    **{f"bottleneck-{name}": (BottleneckPreActBlock, *case) for name, case in BOTTLENECK.items()},
}
# Activations that the interpreter, a thousand times slower than a GPU, meets in another case.
MET_ELSEWHERE = {
    *(f"basic-act-{act}" for act in ("silu", "identity")),
    *(f"basic-act-{act}-projection" for act in ("leaky_relu", "gelu")),
    *(f"bottleneck-act-{act}" for act in ("leaky_relu", "silu", "identity")),
}


def on_backends(cases: Iterable[Any], skipped: Container[Any]) -> list[Any]:
    """(case, backend) for both backends, without those that the interpreter skips."""

    def param(case: Any, backend: str, *marks: Any) -> Any:
        words = [case] if isinstance(case, str) else map(str, case)
        return pytest.param(case, backend, marks=marks, id="-".join((*words, backend)))

    skips = interpreted("triton")
    return [
        *(param(case, "aten") for case in cases),
        *(param(c, "triton", needs_triton) for c in cases if not (skips and c in skipped)),
    ]


# Dtype of input and parameters, and autocast's.
PRECISIONS = {
    "float32": (torch.float32, torch.float32, None),
    "float32-stream-bf16-autocast": (torch.float32, torch.float32, torch.bfloat16),
    "bf16-stream-bf16-autocast": (torch.bfloat16, torch.float32, torch.bfloat16),
    "float32-stream-fp16-autocast": (torch.float32, torch.float32, torch.float16),
    "bf16-module": (torch.bfloat16, torch.bfloat16, None),
    "fp16-module": (torch.float16, torch.float16, None),
}


def build(
    kind: Callable[..., PreActUnit],
    in_channels: int,
    out_channels: int,
    stride: int,
    options: dict[str, Any],
    backend: str = "auto",
) -> PreActUnit:
    """A block with norms that matter, on the test device."""
    torch.manual_seed(0)
    block = kind(in_channels, out_channels, stride, backend=backend, **options)
    randomise(block)
    return block.to(DEVICE)


def shape_for(backend: str, channels: int) -> tuple[int, int, int, int]:
    """A batch of the size that a backend runs in a second."""
    return (2, channels, 5, 6) if interpreted(backend) else (4, channels, 9, 7)


def half_draws(backend: str) -> dict[str, int]:
    """How many inputs tell a tensor of few numbers' error in half precision from luck."""
    return {"draws": 3, "eager_draws": 15} if interpreted(backend) else {"draws": 15}


@pytest.mark.parametrize(("case", "backend"), on_backends(CASES, MET_ELSEWHERE))
def test_training_step_float32(case, backend):
    check_float32(*CASES[case], backend)


def check_float32(kind, in_channels, out_channels, stride, options, backend):
    block = build(kind, in_channels, out_channels, stride, options, backend)
    check_module(block, shape_for(backend, in_channels))


# A ReLU's sign that flips near 0 outweighs all rounding; it takes many draws to tell how often
# that happens to either side, and only ATen has the time. The interpreter runs smooth functions.
SMOOTH = {
    "basic-projection-silu": (PreActBlock, *BASIC["act-silu-projection"]),
    "basic-identity-reads-preact-gelu": (
        PreActBlock, 6, 6, 1, {"identity": "preact", "act": "gelu"}
    ),
    "bottleneck-silu": (BottleneckPreActBlock, *BOTTLENECK["act-silu"]),
}  # fmt: skip
HALF_CASES = {
    **SMOOTH,
    "basic": (PreActBlock, *BASIC["identity"]),
    "basic-projection": (PreActBlock, *BASIC["stride2-preact"]),
    "basic-identity-reads-preact": (PreActBlock, *BASIC["identity-reads-preact"]),
    "bottleneck": (BottleneckPreActBlock, *BOTTLENECK["identity"]),
    "bottleneck-projection-raw": (BottleneckPreActBlock, *BOTTLENECK["stride2-raw"]),
    "bottleneck-projection": (BottleneckPreActBlock, *BOTTLENECK["stride2-preact"]),
}
LOW_PRECISIONS = [name for name in PRECISIONS if name != "float32"]
HALF = [(case, precision) for case in HALF_CASES for precision in LOW_PRECISIONS]
IN_TURN = list(zip(itertools.cycle(SMOOTH), LOW_PRECISIONS))


@pytest.mark.parametrize(
    ("half", "backend"), on_backends(HALF, [half for half in HALF if half not in IN_TURN])
)
def test_training_step_half_precision(half, backend):
    case, precision = half
    kind, in_channels, out_channels, stride, options = HALF_CASES[case]
    x_dtype, dtype, autocast = PRECISIONS[precision]
    block = build(kind, in_channels, out_channels, stride, options, backend).to(dtype)
    check_module(
        block,
        shape_for(backend, in_channels),
        dtype=x_dtype,
        autocast=autocast,
        **half_draws(backend),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_convolutions_with_float32_norms(dtype, backend):
    block = build(PreActBlock, 4, 8, 2, {"act": "silu"}, backend).to(dtype)
    block.bn1.float()
    block.bn2.float()
    check_module(block, shape_for(backend, 4), dtype=dtype, **half_draws(backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [PreActBlock, BottleneckPreActBlock])
def test_eval_mode_step(kind, backend):
    """Gradients through running statistics, as adversarial training takes them."""
    block = build(kind, 8, 12, 2, {}, backend)
    check_module(block, shape_for(backend, 8), prepare=nn.Module.eval)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", ["bn1", "bn2", "bn3"])
def test_one_norm_frozen(frozen, backend):
    block = build(BottleneckPreActBlock, 8, 8, 1, {}, backend)
    check_module(block, shape_for(backend, 8), prepare=lambda m: getattr(m, frozen).eval())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("affine", "track"), [(False, True), (True, False), (False, False)], ids=str
)
def test_norms_without_parameters_or_buffers(affine, track, backend):
    block = build(
        PreActBlock,
        *(6, 9, 2),
        {"norm": lambda c: nn.BatchNorm2d(c, affine=affine, track_running_stats=track)},
        backend,
    )
    for prepare in (nn.Module.train, nn.Module.eval):
        check_module(block, shape_for(backend, 6), prepare=prepare)


@pytest.mark.parametrize(
    ("norm", "backend"),
    on_backends([(0.0, 1e-5), (0.3, 0.1), (1.0, 1e-5), (None, 0.1)], [(0.0, 1e-5), (1.0, 1e-5)]),
)
def test_momentum_and_eps(norm, backend):
    """Three steps: a cumulative average (momentum None) only differs from the second on."""
    momentum, eps = norm
    block = build(
        PreActBlock,
        *(4, 4, 1),
        {"norm": lambda c: nn.BatchNorm2d(c, eps=eps, momentum=momentum)},
        backend,
    )
    draws = 3 if momentum is None else 1
    check_module(block, shape_for(backend, 4), draws=draws, eager_draws=draws, successive=draws > 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("two_rows", [False, True], ids=["many-rows", "two-rows"])
@pytest.mark.parametrize("kind", [PreActBlock, BottleneckPreActBlock])
def test_mean_far_above_standard_deviation(kind, two_rows, backend):
    """Statistics that cancel (E[x^2] - E[x]^2) would be wrong in every digit here, and so would
    gradients, whose B is large where a channel has two rows."""
    block = build(kind, 8, 8, 1, {}, backend)
    check_module(block, (2, 8, 1, 1) if two_rows else shape_for(backend, 8), mean=1e3)


@pytest.mark.parametrize(
    ("image", "backend"),
    on_backends(
        [(h, w, stride) for h, w in ((1, 1), (1, 7), (9, 1), (2, 2)) for stride in (1, 2)],
        [(1, 1, 1), (1, 7, 2), (9, 1, 1), (2, 2, 1)],
    ),
)
def test_small_images(image, backend):
    *size, stride = image
    block = build(PreActBlock, 3, 5, stride, {}, backend)
    check_module(block, (4, 3, *size))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nchw_input(backend):
    block = build(BottleneckPreActBlock, 8, 12, 2, {}, backend)
    check_module(block, shape_for(backend, 8), channels_last=False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", ["float32", "float32-stream-bf16-autocast"])
def test_stage_of_mixed_blocks(precision, backend):
    """One chain in which moments come from the epilogue that wrote each tensor."""
    x_dtype, dtype, autocast = PRECISIONS[precision]
    torch.manual_seed(0)
    act = "silu" if autocast else "relu"
    blocks = [
        BottleneckPreActBlock(4, 8, act=act),
        PreActBlock(8, 6, 2, shortcut="raw", act=act),
        PreActBlock(6, 6, identity="preact", act="gelu"),
    ]
    if not interpreted(backend):
        blocks += [PreActBlock(6, 6, act=act), BottleneckPreActBlock(6, 12, act=act)]
    stage = Stage(*blocks, backend=backend)
    randomise(stage)
    check_module(
        stage.to(DEVICE, dtype),
        shape_for(backend, 4),
        dtype=x_dtype,
        autocast=autocast,
        **half_draws(backend),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_stage_with_frozen_norms_between(backend):
    """A norm that takes no moments follows and precedes norms that do."""
    stage = Stage(*[PreActBlock(4, 4) for _ in range(3)], backend=backend)
    randomise(stage)
    stage[0].bn2.eval()
    stage[1].bn1.eval()
    check_module(stage.to(DEVICE), shape_for(backend, 4))


def test_error_does_not_grow_with_depth():
    """Twenty units: the stream's variance grows, and so would a cancelling variance's error."""
    torch.manual_seed(0)
    stage = Stage(*[PreActBlock(8, 8) for _ in range(20)], backend="aten")
    randomise(stage)
    check_module(stage.to(DEVICE), (8, 8, 6, 6))


BLOCKS = st.builds(
    dict,
    kind=st.sampled_from([PreActBlock, BottleneckPreActBlock]),
    in_channels=st.integers(1, 20),
    width=st.integers(1, 6),
    stride=st.integers(1, 3),
    shortcut=st.sampled_from(["preact", "raw"]),
    identity=st.sampled_from(["preact", "raw"]),
    act=st.sampled_from(ACTS),
    same=st.booleans(),
    eval_norms=st.sets(st.integers(1, 3)),
    channels_last=st.booleans(),
    seed=st.integers(0, 1000),
)


def check_drawn(case: dict[str, Any], shape: tuple[int, int, int], backend: str) -> None:
    kind = case["kind"]
    out_channels = case["width"] * kind.expansion
    in_channels = out_channels if case["same"] else case["in_channels"]
    torch.manual_seed(case["seed"])
    block = kind(
        in_channels,
        out_channels,
        1 if case["same"] else case["stride"],
        shortcut=case["shortcut"],
        identity=case["identity"],
        act=case["act"],
        backend=backend,
    )
    randomise(block, case["seed"])
    for i in case["eval_norms"]:
        getattr(block, f"bn{min(i, block.depth)}").eval()
    n, h, w = shape
    # Of two or three values a norm's gradient is 0 but for eps: nothing but rounding to compare.
    assume(n * -(-h // block.stride) * -(-w // block.stride) >= 8)
    check_module(block.to(DEVICE), (n, in_channels, h, w), channels_last=case["channels_last"])


@settings(max_examples=60, derandomize=True, deadline=None)
@given(case=BLOCKS, shape=st.tuples(st.integers(2, 5), st.integers(3, 12), st.integers(3, 12)))
def test_drawn_blocks_aten(case, shape):
    check_drawn(case, shape, "aten")


@needs_triton
@settings(max_examples=5, derandomize=True, deadline=None, phases=[Phase.generate])
@given(case=BLOCKS, shape=st.tuples(st.integers(2, 3), st.integers(3, 6), st.integers(3, 6)))
def test_drawn_blocks_triton(case, shape):
    check_drawn(case, shape, "triton")
