"""The dry run's own parts: launches, resources of binaries, loops and instructions counted."""

import json

import pytest

triton = pytest.importorskip("triton")

from resnetv2.kernels.inspect import dryrun, sass, trips  # noqa: E402
from tests.support.compiled import compiled  # noqa: E402


def test_refuses_where_kernels_are_interpreted():
    if not triton.knobs.runtime.interpret:
        pytest.skip("kernels are compiled in this process")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), dryrun.dry_run():
        pass


def test_refuses_an_unknown_target():
    with pytest.raises(ValueError, match="sm_90"), dryrun.dry_run("sm_42"):
        pass


TOY = """
import json
import sys

import torch
import triton
import triton.language as tl

from resnetv2.kernels.inspect.dryrun import dry_run


@triton.jit
def total(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        acc += tl.load(x_ptr + start + lanes, mask=start + lanes < n, other=0.0)
    tl.store(out_ptr + lanes, acc)


@triton.jit
def product(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, tl.dot(x, x).to(x.dtype))


before = triton.runtime.driver._active
result = {}
with dry_run("sm_90") as run:
    total[(3,)](torch.empty(1000), torch.empty(64), 1000, BLOCK=64, num_warps=1)
launch = run.launches[0]
count = launch.count()
result["total"] = {
    "grid": launch.grid,
    "nbytes": launch.nbytes,
    "signature": launch.kernel.signature,
    "registers": launch.kernel.registers,
    "spilled": launch.kernel.spilled,
    "loads": sum(n for name, n in count.memory.items() if name.startswith("LDG.")),
    "unsure": count.unsure,
}
for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
    with dry_run(target) as run:
        x = torch.empty(64, 64, dtype=torch.bfloat16)
        product[(1,)](x, torch.empty_like(x), N=64)
    kernel = run.kernels[0]
    result[target] = [kernel.target, kernel.registers, kernel.spilled]
    if target.startswith("sm"):
        count = run.launches[0].count()
        result[target] += [count.matrix, count.wgmma, count.multiply_adds(kernel.num_warps)]
with dry_run("gfx942") as run:
    x = torch.empty(256, 256, dtype=torch.bfloat16)
    try:
        product[(1,)](x, torch.empty_like(x), N=256)
    except triton.runtime.errors.OutOfResources as error:
        result["too large"] = [str(error), run.failures]
result["spills"] = 0
with dry_run("sm_90") as run:
    x = torch.empty(128, 128, dtype=torch.bfloat16)
    product[(1,)](x, torch.empty_like(x), N=128, num_warps=1)
kernel = run.kernels[0]
result["spills"] = [kernel.spilled, run.launches[0].count().local]
result["restored"] = triton.runtime.driver._active is before
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    file = tmp_path_factory.mktemp("toy") / "toy.py"
    file.write_text(TOY)
    return json.loads(compiled(str(file)))


def test_records_a_launch(toy):
    launch = toy["total"]
    assert launch["grid"] == [3, 1, 1]
    assert launch["nbytes"] == 4 * (1000 + 64)
    assert launch["signature"] == {"x_ptr": "*fp32", "out_ptr": "*fp32", "n": "i32"}
    assert 0 < launch["registers"] < 64
    assert launch["spilled"] == 0


SECONDS = """
import torch

from resnetv2.kernels import moments
from resnetv2.kernels.inspect.dryrun import dry_run

with dry_run("sm_90") as run:
    moments.moments(torch.empty(2, 16, 4, 4).to(memory_format=torch.channels_last))
print(run.kernels[0].seconds)
"""


def test_compile_time_is_kept_with_the_kernel(tmp_path, monkeypatch):
    """A later process, which finds the kernel in Triton's cache, knows what compiling it took."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    first, second = (float(compiled("-c", SECONDS)) for _ in range(2))
    assert first > 0
    assert second == first


WIDE = """
import torch

from resnetv2.kernels.conv_forward import conv_forward
from resnetv2.kernels.inspect.dryrun import dry_run
from resnetv2.kernels.operands import Geometry

h = torch.empty(32, 128, 28, 28, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
weight, padding = torch.empty(128, 128, 3, 3), Geometry(padding=(1, 1))
with dry_run("sm_100") as run:
    conv_forward(h, weight, None, padding, dtype=torch.bfloat16)
print(len(run.launches))
"""


def test_a_wide_3x3_fits_into_tensor_memory():
    """Triton gives each unrolled tap of a loop tensor memory of its own; sm_100 has 512 columns."""
    assert compiled("-c", WIDE) == "1\n"


GROUPS = """
import json

import torch

from resnetv2 import PreActBlock
from resnetv2.kernels.inspect.dryrun import dry_run

block = PreActBlock(24, 40, 2, norm="group:4", act="silu", backend="triton")
x = torch.randn(3, 24, 9, 7).to(memory_format=torch.channels_last).requires_grad_()
with dry_run("sm_90") as run:
    with torch.autocast("cpu", torch.bfloat16):
        out = block(x)
    out.float().square().mean().backward()
print(json.dumps([[x.kernel.name, x.kernel.spilled] for x in run.launches] + run.failures))
"""


def test_a_unit_of_group_norms():
    """No fused convolution reads what is of each image; ATen's stand between these."""
    launches = json.loads(compiled("-c", GROUPS))
    backward = 2 * ["_group_affine_kernel", "_act_backward_kernel", "_input_grad_kernel"]
    forward = ["_moments_kernel", "_norm_act_kernel"]
    # A projection reads the activation as well, written again in the backward.
    expected = [*2 * forward, "_norm_act_kernel", "_moments_kernel", *backward, "_norm_act_kernel"]
    assert sorted(name for name, _ in launches) == sorted(expected)
    assert {spilled for _, spilled in launches} == {0}


def test_a_loop_counts_as_often_as_it_runs(toy):
    """64 elements are two loads of a warp, 1000 are 16 times that.

    The assembler unrolls by four, and the rest of up to three is counted though it does not run.
    """
    assert toy["total"]["unsure"] == ""
    assert 2 * 16 <= toy["total"]["loads"] <= 2 * (16 + 3)


def test_matrix_instructions(toy):
    for target in ("sm_80", "sm_90", "sm_100"):
        name, registers, spilled, matrix_instructions, wgmma, multiply_adds = toy[target]
        assert name == target
        assert registers > 0
        assert spilled == 0
        assert matrix_instructions > 0
        assert (wgmma > 0) == (target == "sm_90")
        if target != "sm_100":
            assert multiply_adds == 64**3
    assert toy["gfx942"][2] == 0


def test_names_what_does_not_fit(toy):
    error, failures = toy["too large"]
    assert "shared memory" in error
    assert len(failures) == 1


def test_sees_spills(toy):
    assert all(toy["spills"])


def test_restores_the_driver(toy):
    assert toy["restored"]


SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA 0x50 ;
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   HGMMA.64x16x16.F32.BF16 R8, gdesc[UR4], R8 ;
        /*0040*/               @P0 BRA 0x20 ;
        /*0050*/                   STL [R1], R4 ;
        /*0060*/                   CALL.REL.NOINC 0x90 ;
        /*0070*/                   STG.E.U16 desc[UR4][R2.64], R4 ;
        /*0080*/                   EXIT ;
        /*0090*/                   MUFU.RCP R0, R0 ;
        /*00a0*/                   RET.REL.NODEC R20 0x0 ;
        /*00b0*/                   BRA 0xb0 ;
"""


def test_counts_instructions():
    count = sass.count(SASS, [5])
    # The subroutine and the padding behind it do not count.
    assert count.instructions == 2 + 5 * 3 + 4
    assert count.wgmma == count.matrix == 5
    assert count.local == 1
    assert count.memory == {"LDG.16": 5, "STG.2": 1}
    assert count.multiply_adds(num_warps=8) == 5 * 64 * 16 * 16 * 2
    assert count.issue_cycles(4) == 21
    assert count.ratio(4, 14.5 * 42) == 0.5


def test_an_unrolled_loop_runs_less_often():
    assert sass.count(SASS, [8], bodies=[1]).wgmma == 4
    assert sass.count(SASS, [8], bodies=[2]).wgmma == 8


def test_is_unsure_of_a_loop_without_trips():
    assert "1 loops in the code, 0 in TTGIR" in sass.count(SASS).unsure


TTGIR = """
  tt.func public @kernel(%x: !tt.ptr<f32>, %n: i32, %split: i32 {tt.divisibility = 16 : i32}) attributes {noinline = false} {
    %c0_i32 = arith.constant 0 : i32
    %c9_i32 = arith.constant 9 : i32
    %c1_i32 = arith.constant 1 : i32
    %c64_i32 = arith.constant 64 : i32
    %pid = tt.get_program_id x : i32
    %start = arith.muli %pid, %split : i32
    %next = arith.addi %start, %split : i32
    %stop = arith.minsi %next, %n : i32
    %acc:2 = scf.for %i = %start to %stop step %c64_i32 iter_args(%a = %x, %k = %c0_i32) -> (f32, i32)  : i32 {
      scf.for %tap = %c0_i32 to %c9_i32 step %c1_i32  : i32 {
      } loc(#loc3)
      scf.yield %a, %k : f32, i32
    }
    scf.for %j = %c0_i32 to %n step %c64_i32  : i32 {
    }
"""  # noqa: E501


def test_trips_of_loops():
    found = trips.loop_trips(TTGIR, [None, 1000, 256], (4, 1, 1))
    assert found == [
        trips.Trip(4, 0, False),
        trips.Trip(9, 1, True),
        trips.Trip(16, 0, False),
    ]
    with pytest.raises(ValueError, match="not known"):
        trips.loop_trips(TTGIR, [None, None, 256], (4, 1, 1))
