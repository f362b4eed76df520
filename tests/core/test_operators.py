"""``resnetv2::chain_forward`` and ``chain_backward`` as operators: opcheck, gradcheck, backends.

Promises: schema, fake implementations and autograd registration are what torch.library expects;
in float64 the analytic gradients are the numerical ones, for every shortcut, activation and mode.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from resnetv2 import BottleneckPreActBlock, PreActBlock
from resnetv2.blocks import PreActUnit
from resnetv2.core.modules import UnitModules
from resnetv2.core.operators import chain_backward, chain_forward
from resnetv2.core.reading import Reading
from resnetv2.core.run import describe
from resnetv2.core.spec import decode
from resnetv2.kernels import dispatch
from resnetv2.kernels.dispatch import resolve_backend
from tests.support.processes import python
from tests.support.yardstick import BACKENDS, DEVICE, images, needs_triton, randomise

pytestmark = pytest.mark.usefixtures("one_thread")

CHAINS: dict[str, Any] = {
    "identity": lambda: [PreActBlock(4, 4)],
    "identity-reads-preact": lambda: [PreActBlock(4, 4, identity="preact")],
    "projection-preact": lambda: [PreActBlock(4, 6, 2, bias=True)],
    "projection-raw": lambda: [PreActBlock(4, 6, 2, shortcut="raw", act="silu")],
    "bottleneck": lambda: [BottleneckPreActBlock(4, 8, 2, act="gelu")],
    "two-units": lambda: [BottleneckPreActBlock(4, 8), PreActBlock(8, 6, 2, act="leaky_relu")],
    "no-affine": lambda: [PreActBlock(4, 4, norm=lambda c: nn.BatchNorm2d(c, affine=False))],
}


def arguments(
    name: str,
    backend: str,
    *,
    dtype: torch.dtype = torch.float32,
    compute: torch.dtype | None = None,
    memory: str = "recompute",
    need_x: bool = True,
    training: bool = True,
) -> tuple[torch.Tensor, list[torch.Tensor], list[int], list[float]]:
    """What ``chain_forward`` takes for one of ``CHAINS``."""
    torch.manual_seed(0)
    blocks: list[PreActUnit] = CHAINS[name]()
    units = []
    for block in blocks:
        randomise(block).to(DEVICE, dtype).train(training)
        unit = block.unit_modules()
        assert isinstance(unit, UnitModules)
        units.append(Reading(unit))
    params, layout, constants = describe(
        units, compute or dtype, need_x=need_x, backend=backend, memory=memory, segment=1
    )
    x = images((2, 4, 5, 4), dtype=dtype).requires_grad_(need_x)
    return x, params, layout, constants


VARIANTS: dict[str, dict[str, Any]] = {
    "train": {},
    "eval": {"training": False},
    "x-without-grad": {"need_x": False},
    "bf16-compute": {"compute": torch.bfloat16},
    "fp16": {"dtype": torch.float16},
}
MEMORY = ("recompute", "invert", "invert_h1", "segment")


@pytest.mark.parametrize(
    ("name", "variant"),
    [(name, "train") for name in CHAINS]
    + [("projection-preact", variant) for variant in VARIANTS if variant != "train"],
)
def test_opcheck_forward_aten(name, variant):
    torch.library.opcheck(chain_forward, arguments(name, "aten", **VARIANTS[variant]))


@pytest.mark.parametrize("memory", MEMORY)
def test_opcheck_forward_memory_modes(memory):
    torch.library.opcheck(chain_forward, arguments("two-units", "aten", memory=memory))


@needs_triton
@pytest.mark.parametrize("name", ["identity", "projection-preact"])
def test_opcheck_forward_triton(name):
    torch.library.opcheck(chain_forward, arguments(name, "triton"))


@pytest.mark.parametrize(
    ("name", "memory", "backend"),
    [(name, "recompute", "aten") for name in CHAINS]
    + [("two-units", memory, "aten") for memory in MEMORY[1:]]
    + [pytest.param("two-units", "recompute", "triton", marks=needs_triton)],
)
def test_opcheck_backward(name, memory, backend):
    x, params, layout, constants = arguments(name, backend, memory=memory)
    with torch.no_grad():
        # As autograd calls it: kept tensors are there because a backward follows.
        assert decode(layout, constants).keep
        out, stats, *kept = chain_forward(x, params, layout, constants)
        saved = [t.detach() for t in params]
        torch.library.opcheck(
            chain_backward,
            (images(out.shape, 3), x.detach(), out, stats, kept, saved, layout, constants),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["projection-preact"])
def test_fake_tensors_have_the_real_shapes_dtypes_and_strides(name, variant, backend):
    args = arguments(name, backend, **VARIANTS[variant])
    real = chain_forward(*args)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x, params, layout, constants = args
        fakes = [mode.from_tensor(p) for p in params]
        fake = chain_forward(mode.from_tensor(x), fakes, layout, constants)
    assert len(real) == len(fake)
    for a, b in zip(real, fake):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def double_block(kind: type, act: str, case: str, training: bool) -> nn.Module:
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "identity": {},
        "identity-reads-preact": {"identity": "preact"},
        "projection-preact": {"stride": 2},
        "projection-raw": {"stride": 2, "shortcut": "raw"},
    }[case]
    width = 3 if kind is PreActBlock else 4
    in_channels = width if "identity" in case else 2
    block = kind(in_channels, width, act=act, bias=True, backend="aten", **options)
    return randomise(block).to(DEVICE).double().train(training)


SHORTCUTS = ("identity", "identity-reads-preact", "projection-preact", "projection-raw")
ACTS = ("relu", "leaky_relu", "silu", "gelu", "identity")


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("kind", "case", "act"),
    [(PreActBlock, case, act) for case in SHORTCUTS for act in ACTS]
    + [(BottleneckPreActBlock, case, "silu") for case in SHORTCUTS],
)
def test_gradcheck(kind, case, act, training):
    block = double_block(kind, act, case, training)
    names = [name for name, _ in block.named_parameters()]
    x = images((2, block.in_channels, 3, 3), dtype=torch.float64).requires_grad_()

    def run(x: torch.Tensor, *params: torch.Tensor) -> torch.Tensor:
        # functional_call would see functorch's tensors; the chain itself is wanted here.
        with torch.nn.utils.stateless._reparametrize_module(block, dict(zip(names, params))):
            return block(x)

    assert torch.autograd.gradcheck(run, (x, *block.parameters()), fast_mode=False)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", ["identity", "identity-reads-preact", "projection-preact"])
def test_gradgradcheck(case, training):
    block = double_block(PreActBlock, "silu", case, training)
    x = images((2, block.in_channels, 3, 3), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(block, (x,), atol=1e-4)


@pytest.fixture
def no_override(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.delenv("RESNETV2_BACKEND", raising=False)
    return monkeypatch


def test_backend_by_device(no_override):
    no_override.delenv("TRITON_INTERPRET", raising=False)
    assert resolve_backend("auto", torch.device("cpu")) == "aten"
    assert resolve_backend("aten", torch.device("cuda")) == "aten"


@needs_triton
def test_backend_triton_where_it_can_run(no_override):
    assert resolve_backend("auto", torch.device("cuda")) == "triton"
    no_override.setenv("TRITON_INTERPRET", "1")
    assert resolve_backend("auto", torch.device("cpu")) == "triton"
    no_override.delenv("TRITON_INTERPRET")
    assert resolve_backend("triton", torch.device("cpu")) == "triton"


@needs_triton
@pytest.mark.parametrize(
    ("capability", "backend"), [((7, 0), "aten"), ((7, 5), "aten"), ((8, 0), "triton")]
)
def test_backend_below_sm_80(capability, backend, no_override):
    """Triton's code for older GPUs spills and takes minutes to compile: ATen, said once."""
    no_override.setattr(torch.cuda, "is_available", lambda: True)
    no_override.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    no_override.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    dispatch._said_below_sm80.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert resolve_backend("auto", torch.device("cuda", 0)) == backend
        no_override.setenv("RESNETV2_BACKEND", "triton")
        assert resolve_backend("auto", torch.device("cuda", 0)) == "triton"
    dispatch._said_below_sm80.cache_clear()
    messages = [str(warning.message) for warning in caught]
    target = "sm_" + "".join(map(str, capability))
    assert len(messages) == (backend == "aten")
    assert all(f"Some GPU ({target})" in m and "RESNETV2_BACKEND=triton" in m for m in messages)


@needs_triton
@pytest.mark.parametrize("name", ["aten", "triton"])
def test_environment_overrides_auto_but_not_an_argument(name, no_override):
    no_override.setenv("RESNETV2_BACKEND", name)
    assert resolve_backend("auto", torch.device("cpu")) == name
    assert resolve_backend("aten", torch.device("cpu")) == "aten"


def test_environment_with_an_unknown_name(no_override):
    no_override.setenv("RESNETV2_BACKEND", "cudnn")
    with pytest.raises(ValueError, match=r"RESNETV2_BACKEND must be one of .*'cudnn'"):
        PreActBlock(4, 4)(torch.randn(2, 4, 5, 5))


@needs_triton
def test_the_argument_decides_which_kernels_run(monkeypatch):
    """backend="triton" launches kernels, backend="aten" none."""
    from resnetv2.kernels import conv_forward

    launched = []
    original = conv_forward.conv_forward
    monkeypatch.setattr(
        conv_forward, "conv_forward", lambda *a, **k: launched.append(1) or original(*a, **k)
    )
    for backend, expected in (("aten", 0), ("triton", 2)):
        launched.clear()
        with torch.no_grad():
            PreActBlock(2, 2, backend=backend).to(DEVICE)(images((2, 2, 3, 3)))
        assert len(launched) == expected


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
import resnetv2
block = resnetv2.PreActBlock(4, 8, 2)
x = torch.randn(2, 4, 5, 5, requires_grad=True)
block(x).sum().backward()
assert x.grad.isfinite().all()
block.backend = "triton"
try:
    block(x)
except ImportError as error:
    assert "pip install triton" in str(error), error
else:
    raise AssertionError("backend='triton' ran without triton")
"""


def test_without_triton():
    """Import and ATen work; asking for Triton names the package."""
    python(
        "-c", WITHOUT_TRITON,
        without=["TRITON_INTERPRET", "RESNETV2_BACKEND"], env={"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_import_does_not_load_triton():
    python("-c", "import sys, resnetv2; assert 'triton' not in sys.modules")
