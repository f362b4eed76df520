"""conv_forward and conv_dgrad against the float64 reference, held to the yardstick.

Beside the kernel's error stands that of the reference in the kernel's own dtype, which is eager
PyTorch. Every tensor lies between guards of NaN: what is read out of bounds poisons a result, what
is written there is noticed, and what is not written stays NaN.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton", reason="the kernels need Triton")

from resnetv2.kernels import configs, launch, reference
from resnetv2.kernels.conv_dgrad import conv_dgrad
from resnetv2.kernels.conv_forward import conv_forward
from resnetv2.kernels.launch import Config
from resnetv2.kernels.operands import (
    Act,
    Geometry,
    Grad,
    Norm,
    Partials,
    running_stats,
)
from tests.support.kernel_checks import DEVICE, DTYPES_IN_TURN, in_turn
from tests.support.yardstick import Draw, assert_yardstick

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ACTS = {
    "identity": Act("identity"),
    "relu": Act("relu"),
    "leaky_relu": Act("leaky_relu", 0.1),
    "silu": Act("silu"),
    "gelu": Act("gelu"),
}
GUARD = 1024
NORM = Norm(None, None, 1e-5)  # what reads a convolution's result

# N, C, H, W, K, kernel, stride, padding
SHAPES = {
    "1x1": (2, 16, 7, 5, 48, 1, 1, 0),
    "1x1-stride2": (3, 17, 9, 8, 16, 1, 2, 0),
    "1x1-padded": (1, 3, 4, 5, 17, 1, 1, 1),
    "3x3": (2, 17, 8, 6, 48, 3, 1, 1),
    "3x3-one-position": (5, 48, 1, 1, 3, 3, 1, 1),
    "3x3-stride2": (2, 3, 17, 9, 17, 3, 2, 1),
    "3x3-stride2-even": (2, 17, 6, 8, 20, 3, 2, 1),
    "3x3-no-padding": (2, 16, 5, 7, 16, 3, 1, 0),
    "3x3-stride3": (1, 80, 10, 7, 16, 3, 3, 1),
    "5x5-stride3-even": (1, 3, 6, 9, 16, 5, 3, 2),
    "5x5": (1, 16, 6, 9, 80, 5, 1, 2),
    "2x2": (2, 16, 6, 6, 16, 2, 2, 0),
}
Shape = tuple[int, int, int, int, int, int, int, int]

shapes_in_turn = in_turn("shape, dtype", SHAPES, DTYPES_IN_TURN, each=2)
plain_shapes_in_turn = in_turn("shape, dtype", SHAPES, DTYPES.items())
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())

_empty = torch.empty
_guarded: list[Tensor] = []


def guarded(shape: tuple[int, ...], dtype: torch.dtype, memory_format: Any) -> Tensor:
    """An uninitialised tensor, filled with NaN, between guards of NaN."""
    numel = torch.Size(shape).numel()
    base = torch.full((numel + 2 * GUARD,), float("nan"), dtype=dtype, device=DEVICE)
    _guarded.append(base)
    strides = _empty(shape, device="meta", memory_format=memory_format).stride()
    return base.as_strided(shape, strides, GUARD)


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Uninitialised memory is NaN, and nobody writes around it."""

    def empty(*size: Any, dtype: Any = None, **options: Any) -> Tensor:
        shape = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
        memory_format = options.get("memory_format", torch.contiguous_format)
        return guarded(shape, dtype or torch.float32, memory_format)

    _guarded.clear()
    monkeypatch.setattr(torch, "empty", empty)
    yield
    for base in _guarded:
        assert base[:GUARD].isnan().all(), "written before a tensor"
        assert base[-GUARD:].isnan().all(), "written after a tensor"


class Case:
    """Random operands of a convolution, the same for each call of one test."""

    def __init__(self, shape: Shape, dtype: torch.dtype, seed: int = 0) -> None:
        self.n, self.c, self.h, self.w, self.k, kernel, stride, padding = shape
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)
        self.geometry = Geometry((stride, stride), (padding, padding))
        self.p, self.q = self.geometry.output_size((self.h, self.w), (kernel, kernel))
        scale = (self.c * kernel * kernel) ** -0.5
        self.weight = self.normal(self.k, self.c, kernel, kernel) * scale
        self.bias = self.normal(self.k)
        self.stats = self.norm(self.c)
        self.x = self.input()

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(DEVICE)

    def activation(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        out = guarded(shape, dtype or self.dtype, torch.channels_last)
        return out.copy_(self.normal(*shape))

    def input(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.activation(self.n, self.c, self.h, self.w, dtype=dtype)

    def output(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.activation(self.n, self.k, self.p, self.q, dtype=dtype)

    def norm(self, channels: int) -> Tensor:
        var = self.normal(channels).square() + 0.5
        affine = self.normal(channels), self.normal(channels)
        return running_stats(self.normal(channels), var, *affine, 1e-5)

    def coef(self, channels: int) -> Tensor:
        return self.normal(4, channels)

    @property
    def normed(self) -> dict[str, Any]:
        """The norm in front of the convolution, and a ReLU."""
        return {"stats": self.stats, "act": ACTS["relu"]}

    def waiting(self, dtype: torch.dtype | None = None) -> Grad:
        """A gradient that waits for a norm's backward."""
        return Grad(self.output(dtype), self.output(dtype), self.coef(self.k))

    def check_forward(self, x: Tensor | None = None, bias: bool = True, **options: Any) -> Any:
        operands = self.x if x is None else x, self.weight, self.bias if bias else None
        return check(conv_forward, *operands, self.geometry, dtype=self.dtype, **options)

    def check_dgrad(self, grad: Grad, h: Tensor | None = None, **options: Any) -> Any:
        operands = grad, self.weight, self.x if h is None else h
        return check(conv_dgrad, *operands, self.geometry, dtype=self.dtype, **options)


def double(value: Any) -> Any:
    """The same argument in float64."""
    if isinstance(value, Tensor):
        return value.double()
    if isinstance(value, Grad):
        return Grad(*(double(part) for part in value))
    return value


def reordered(value: Any, generator: torch.Generator) -> Any:
    """A further draw: the same numbers in another order, per-channel ones by channels."""
    if isinstance(value, Grad):
        return Grad(*(reordered(part, generator) for part in value))
    if not isinstance(value, Tensor):
        return value
    if value.dim() < 3:
        return value[..., torch.randperm(value.shape[-1], generator=generator).to(DEVICE)]
    order = torch.randperm(value.numel(), generator=generator).to(DEVICE)
    return value.clone().copy_(value.reshape(-1)[order].view(value.shape))


def check(kernel: Any, *args: Any, config: Config | None = None, **options: Any) -> Any:
    """Call ``kernel`` and its reference, in its dtype and in float64, and hold it to the yardstick.

    Returns what the kernel gave.
    """
    results = []
    generator = torch.Generator().manual_seed(0)

    def take(seed: int, _: bool) -> Draw:
        inputs, named = args, options
        if seed:
            inputs = tuple(reordered(value, generator) for value in args)
            named = {key: reordered(value, generator) for key, value in options.items()}
        got, draw = compared(kernel, inputs, config, named)
        results.append(got)
        return draw

    assert_yardstick(take, 1, 1)
    return results[0]


def compared(kernel: Any, args: Any, config: Config | None, options: Any) -> tuple[Any, Draw]:
    """The kernel's results, and all that is compared of them."""
    got = kernel(*args, config=config, **options)
    oracle = getattr(reference, kernel.__name__)
    eager = oracle(*args, **options)
    wide = {key: double(value) for key, value in options.items()} | {"dtype": torch.float64}
    if wide.get("out_dtype") is not None:
        wide["out_dtype"] = torch.float64
    exact = oracle(*(double(arg) for arg in args), **wide)
    assert (got[0] is None) == (eager[0] is None)
    assert (got[1] is None) == (eager[1] is None)
    draw = Draw({}, {}, {}, {})
    if got[0] is not None:
        assert got[0].is_contiguous(memory_format=torch.channels_last)
        draw = Draw({"result": got[0]}, {"result": eager[0]}, {"result": exact[0]}, {})
    if got[1] is not None:
        if kernel is conv_forward:
            add_moments(draw, (got[1], eager[1], exact[1]), exact[0])
        else:
            add_sums(draw, (got[1], eager[1], exact[1]), exact[0], args[2], options["stats"])
    return got, draw


def merged(moments: Any) -> tuple[Tensor, Tensor]:
    stats = moments
    if isinstance(moments, Partials):
        assert moments.data.shape[0] == -(-moments.rows // moments.tile_rows)
        stats = reference.norm_stats(moments, None, None, 0.0)
    return stats[0], stats[1]


def add_moments(draw: Draw, moments: Any, out: Tensor) -> None:
    """Mean and variance of the output as stored."""
    found = [merged(each) for each in moments]
    rows = out.numel() / out.shape[1]
    deviations = out - out.mean((0, 2, 3), keepdim=True)
    for i, (name, added) in enumerate((("mean", out), ("var", deviations.square()))):
        for record, values in zip(draw[:3], found):
            record[name] = values[i]
        draw.terms[name] = float(added.norm()) / rows


def add_sums(draw: Draw, grads: Any, q: Tensor, h: Tensor, stats: Tensor) -> None:
    """S1, S2 and the coefficients that they give: A and the mean are copies."""
    shape = (1, -1, 1, 1)
    rows = h.numel() / h.shape[1]
    xhat = (h.double() - stats[0].view(shape)) * stats[2].view(shape)
    rstd = float(stats[2].abs().max())
    sizes = float(q.norm()), float((q * xhat).norm())
    names = {"S1": sizes[0], "S2": sizes[1], "B": sizes[1] * rstd / rows, "C": sizes[0] / rows}
    for record, (coef, s2, s1) in zip(draw[:3], grads):
        assert torch.equal(coef[0], stats[3].to(coef.dtype))
        assert torch.equal(coef[3], stats[0].to(coef.dtype))
        record |= {"S1": s1, "S2": s2, "B": coef[1], "C": coef[2]}
    draw.terms.update(names)


# --- forward ------------------------------------------------------------------------------------


@shapes_in_turn
def test_forward(shape: Shape, dtype: torch.dtype) -> None:
    """Prologue, bias and moments; the border stays 0 although act(b) is not."""
    case = Case(shape, dtype)
    case.check_forward(with_moments=True, norm=NORM, **case.normed)


@plain_shapes_in_turn
def test_forward_plain(shape: Shape, dtype: torch.dtype) -> None:
    """No prologue, no epilogue."""
    Case(shape, dtype).check_forward(bias=False)


RESIDUALS = {
    f"{how}-{sign}": (how, sign == "subtract")
    for how in ("residual", "residual-act", "stream")
    for sign in ("add", "subtract")
}


@in_turn("residual, dtype", RESIDUALS, DTYPES_IN_TURN, each=2)
def test_forward_residual(residual: tuple[str, bool], dtype: torch.dtype) -> None:
    """A residual as it is, activated, or in a float32 stream beside a low dtype."""
    check_residual(ACTS["relu"], dtype, *residual)


OF_ACTS = ("residual-act-add", "stream-subtract", "residual-act-subtract", "residual-add")


@in_turn("act, residual", ACTS, [(name, RESIDUALS[name]) for name in OF_ACTS], each=2)
def test_forward_residual_of_any_act(act: Act, residual: tuple[str, bool]) -> None:
    check_residual(act, torch.bfloat16, *residual)


def check_residual(act: Act, dtype: torch.dtype, how: str, subtract: bool) -> None:
    case = Case(SHAPES["3x3"], dtype)
    stream = torch.float32 if how == "stream" else dtype
    case.check_forward(
        case.input(stream),
        stats=case.stats,
        act=act,
        residual=case.output(stream),
        residual_stats=case.norm(case.k) if how == "residual-act" else None,
        subtract=subtract,
        out_dtype=stream if how == "stream" else None,
        with_moments=True,
    )


TILES = {"64x16x16": Config(64, 16, 16), "64x32x64": Config(64, 32, 64)}
tiles_in_turn = in_turn("config, dtype", TILES, DTYPES.items(), each=2)


@tiles_in_turn
def test_forward_tiles(config: Config, dtype: torch.dtype) -> None:
    """Several tiles along rows, columns and channels, the last of each cut short."""
    case = Case((2, 40, 7, 9, 35, 3, 1, 1), dtype)
    for norm in (None, NORM):
        case.check_forward(
            residual=case.output(), with_moments=True, norm=norm, config=config, **case.normed
        )


@pytest.mark.parametrize("config", [None, Config(16, 16, 16)], ids=["one-tile", "tiles"])
def test_moments_of_a_grown_stream(config: Config | None) -> None:
    """The variance holds where the mean is a thousand times the deviation, in 26 tiles and two
    groups of them too."""
    case = Case((5, 16, 9, 9, 16, 1, 1, 0), torch.float32)
    case.weight *= 1e-3
    residual = case.output().add_(1e3)
    operands = case.x, case.weight, None, case.geometry
    out, stats = conv_forward(
        *operands, dtype=torch.float32, residual=residual, with_moments=True, norm=NORM,
        config=config,
    )  # fmt: skip
    assert isinstance(stats, Tensor)
    var = out.double().var((0, 2, 3), correction=0)
    error = (stats[1].double() - var).norm() / var.norm()
    assert float(error) <= 2 * torch.finfo(torch.float32).eps


@dtypes
def test_walk_back(dtype: torch.dtype) -> None:
    """x + F and then - F, the same bits of F: x comes back to one rounding."""
    case = Case(SHAPES["3x3"], dtype)
    x = case.output(torch.float32)
    options: dict[str, Any] = {"dtype": dtype, "out_dtype": torch.float32, **case.normed}
    operands = case.x, case.weight, case.bias, case.geometry
    out, _ = conv_forward(*operands, residual=x, with_moments=True, **options)
    back, _ = conv_forward(*operands, residual=out, subtract=True, **options)
    f, _ = conv_forward(*operands, **options)
    assert torch.equal(out, x + f)
    assert torch.equal(back, out - f)


@dtypes
def test_weight_layouts_and_dtypes(dtype: torch.dtype) -> None:
    """Weights are read through their strides and in their dtype: the same bits."""
    case = Case(SHAPES["3x3"], dtype)
    weight = case.weight.to(dtype)
    outs = [
        conv_forward(case.x, w, case.bias, case.geometry, dtype=dtype)[0]
        for w in (weight, weight.float(), weight.to(memory_format=torch.channels_last))
    ]
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


# --- dgrad --------------------------------------------------------------------------------------


@shapes_in_turn
def test_dgrad(shape: Shape, dtype: torch.dtype) -> None:
    """A gradient that waits for a norm's backward, act' and the sums."""
    case = Case(shape, dtype)
    case.check_dgrad(case.waiting(), **case.normed)


@plain_shapes_in_turn
def test_dgrad_plain(shape: Shape, dtype: torch.dtype) -> None:
    """No norm on either side, with a further gradient of z."""
    case = Case(shape, dtype)
    case.check_dgrad(Grad(case.output()), add=case.input())


ENDINGS = {how: how for how in ("q", "sums", "finish", "stream")}


@in_turn("how, dtype", ENDINGS, DTYPES.items(), each=2)
def test_dgrad_endings(how: str, dtype: torch.dtype) -> None:
    """q and its sums, the sums alone, dx at once, dx in a float32 stream."""
    check_ending(ACTS["relu"], dtype, how)


@in_turn("act, how", ACTS, ENDINGS.items(), each=2)
def test_dgrad_endings_of_any_act(act: Act, how: str) -> None:
    check_ending(act, torch.bfloat16, how)


def check_ending(act: Act, dtype: torch.dtype, how: str) -> None:
    case = Case(SHAPES["3x3"], dtype)
    stream = torch.float32 if how == "stream" else dtype
    grad = Grad(case.output(), None, case.coef(case.k))
    options: dict[str, Any] = {"stats": case.stats, "act": act, "add": case.input()}
    h = case.input(stream)
    if how in ("finish", "stream"):
        options |= {"coef": case.coef(case.c), "identity": case.input(stream), "out_dtype": stream}
    if how != "sums":
        case.check_dgrad(grad, h, **options)
        return
    options["dtype"] = dtype
    none, sums = conv_dgrad(grad, case.weight, h, case.geometry, write=False, **options)
    assert none is None
    runs = [
        reference.conv_dgrad(
            *(double(a) if wide else a for a in (grad, case.weight, h, case.geometry)),
            **{k: double(v) if wide else v for k, v in options.items()}
            | {"dtype": torch.float64 if wide else dtype},
        )
        for wide in (False, True)
    ]
    draw = Draw({}, {}, {}, {})
    add_sums(draw, (sums, runs[0][1], runs[1][1]), runs[1][0], h, options["stats"])
    assert_yardstick(lambda *_: draw, 1, 1)


@tiles_in_turn
def test_dgrad_tiles(config: Config, dtype: torch.dtype) -> None:
    """Several tiles along rows, columns and channels, the last of each cut short."""
    case = Case((2, 35, 7, 9, 40, 3, 1, 1), dtype)
    case.check_dgrad(case.waiting(), config=config, **case.normed)


@pytest.mark.parametrize("block_m", [16, 64])
@pytest.mark.parametrize("name", ["3x3-stride2-even", "5x5-stride3-even", "2x2"])
def test_strided_dgrad_by_classes(name: str, block_m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of one class give what tiles of all positions give, at every end."""
    case = Case(SHAPES[name], torch.float32)
    grad = Grad(case.output())
    options = {"dtype": torch.float32, "config": Config(block_m, 16, 16), **case.normed}

    def run() -> list[Tensor]:
        q, grads = conv_dgrad(grad, case.weight, case.x, case.geometry, **options)
        assert q is not None
        assert grads is not None
        rest = {"coef": grads.coef, "identity": case.x}
        dx, _ = conv_dgrad(grad, case.weight, case.x, case.geometry, **options, **rest)
        return [q, dx, *grads]

    found = run()
    monkeypatch.setattr(sys.modules[conv_dgrad.__module__], "_classes", lambda conv: 1)
    for mine, other in zip(found, run(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-4)


def test_dgrad_of_a_wider_gradient() -> None:
    """A float32 gradient, as of a float32 stream, enters a bfloat16 convolution."""
    case = Case(SHAPES["3x3"], torch.bfloat16)
    grad = case.waiting(torch.float32)
    case.check_dgrad(grad, case.input(torch.float32), stats=case.stats, act=ACTS["silu"])


def test_running_statistics_do_not_multiply_h() -> None:
    """B = C = 0: an infinite h is no part of dx."""
    case = Case(SHAPES["3x3"], torch.float32)
    case.x[0, 0, 0, 0] = float("inf")
    coef = case.coef(case.c)
    coef[1:] = 0
    dx, _ = case.check_dgrad(
        Grad(case.output()),
        stats=case.stats.abs(),
        act=ACTS["relu"],
        coef=coef,
        identity=case.input(),
        training=False,
    )
    assert dx.isfinite().all()


# --- both ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, of Inf - Inf
@in_turn("value, dtype", {v: float(v) for v in ("nan", "inf", "-inf")}, DTYPES.items(), each=2)
def test_what_is_not_finite_passes(value: float, dtype: torch.dtype) -> None:
    """NaN and Inf reach the same elements as in eager PyTorch, and no others."""
    case = Case(SHAPES["3x3"], dtype)
    case.x[1, 3, 2, 2] = value
    options: dict[str, Any] = {"dtype": dtype, **case.normed}
    operands = case.x, case.weight, None, case.geometry
    got, _ = conv_forward(*operands, **options)
    expected, _ = reference.conv_forward(*operands, **options)
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.isinf(), expected.isinf())

    q = case.output()
    q[0, 5, 3, 3] = value
    backward = Grad(q), case.weight, case.x, case.geometry
    got, _ = conv_dgrad(*backward, **options)
    expected, _ = reference.conv_dgrad(*backward, **options)
    assert got is not None
    assert expected is not None
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.isinf(), expected.isinf())


@dtypes
def test_same_inputs_same_bits(dtype: torch.dtype) -> None:
    case = Case(SHAPES["3x3-stride2"], dtype)
    options: dict[str, Any] = {"dtype": dtype, "stats": case.stats, "act": ACTS["silu"]}
    grad = case.waiting()
    forward = case.x, case.weight, None, case.geometry
    runs = [
        tree_leaves(
            (
                conv_forward(*forward, with_moments=True, norm=NORM, **options),
                conv_dgrad(grad, case.weight, case.x, case.geometry, **options),
            )
        )
        for _ in range(2)
    ]
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_wide_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    """64-bit offsets, which tensors past 2**31 elements use, find the same elements."""
    case = Case(SHAPES["3x3-stride2"], torch.float32)

    def both() -> list[Tensor]:
        options: dict[str, Any] = {"dtype": torch.float32, "stats": case.stats}
        grad = Grad(case.x.new_ones(case.n, case.k, case.p, case.q))
        grad = Grad(grad.q.contiguous(memory_format=torch.channels_last))
        out, _ = conv_forward(case.x, case.weight, None, case.geometry, **options)
        q, _ = conv_dgrad(grad, case.weight, case.x, case.geometry, **options)
        assert q is not None
        return [out, q]

    narrow = both()
    for kernel in (conv_forward, conv_dgrad):
        monkeypatch.setattr(sys.modules[kernel.__module__], "is_wide", lambda *_: True)
    for a, b in zip(narrow, both(), strict=True):
        assert torch.equal(a, b)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    """Any sizes in the promised range, any options, forward and back."""
    kernel = data.draw(st.sampled_from([1, 3, 5]), "kernel")
    shape = (
        data.draw(st.integers(1, 3), "N"),
        data.draw(st.integers(1, 80), "C"),
        data.draw(st.integers(kernel, 11), "H"),
        data.draw(st.integers(kernel, 11), "W"),
        data.draw(st.integers(1, 80), "K"),
        kernel,
        data.draw(st.integers(1, 2), "stride"),
        data.draw(st.integers(0, kernel // 2), "padding"),
    )
    dtype = data.draw(st.sampled_from(list(DTYPES.values())), "dtype")
    stream = data.draw(st.sampled_from([dtype, torch.float32]), "stream")
    act = data.draw(st.sampled_from([ACTS["relu"], ACTS["leaky_relu"], ACTS["silu"]]), "act")
    case = Case(shape, dtype, seed=data.draw(st.integers(0, 99), "seed"))
    some = {name: data.draw(st.booleans(), name) for name in ("stats", "bias", "extra", "coef")}
    stats = case.stats if some["stats"] else None
    case.check_forward(
        case.input(stream),
        some["bias"],
        stats=stats,
        act=act,
        residual=case.output(stream) if some["extra"] else None,
        out_dtype=stream,
        with_moments=True,
    )
    coef = case.coef(case.k) if some["coef"] else None
    case.check_dgrad(
        Grad(case.output(), case.output() if some["bias"] and some["coef"] else None, coef),
        case.input(stream),
        stats=stats,
        act=act,
        add=case.input() if some["extra"] else None,
    )


# --- tiles --------------------------------------------------------------------------------------

# rows, channels, columns, taps of ResNet-1001 and ResNet-110 at batch 128, forward and dgrad
NETWORKS = [
    (128 * size * size, channels, columns, taps)
    for size, width in ((32, 16), (16, 32), (8, 64))
    for channels, columns, taps in (
        (4 * width, width, 1),
        (width, 4 * width, 1),
        (width, width, 9),
    )
]


@pytest.mark.parametrize("size", NETWORKS, ids=lambda s: "-".join(map(str, s)))
@dtypes
def test_two_programs_a_multiprocessor(size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """The heuristic fills an H100 at the networks' shapes, with tiles for a warpgroup."""
    h100 = launch.Device(132, "cuda", 90)
    rows, _, columns, _ = size
    for long_epilogue in (False, True):
        shape = configs.ConvShape(*size, dtype, long_epilogue)
        first = configs.conv(shape, h100)
        assert first.block_m >= 64
        assert min(first.block_n, first.block_k) >= 16
        assert -(-rows // first.block_m) * -(-columns // first.block_n) >= 264
