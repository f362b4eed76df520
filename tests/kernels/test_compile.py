"""Every kernel compiles for GPUs that are not here, without spills and with their matrix units.

The committed table (bench/reports/compile) says what an H100 would launch for the shapes of
ResNet-1001, ResNet-110 and others, in all dtypes, and a selection for the other targets
(kernels/inspect/cases.py). It is that of the present kernels, since their digests are listed anew
without compiling; a sample of every target is compiled again, and agrees. Where another version of
Triton is installed, the whole selection is compiled. Then a training step of real models. All in
processes of their own, since this one may interpret kernels.
"""

import json
import math
import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from triton.runtime.cache import get_cache_manager  # noqa: E402

from resnetv2.kernels.inspect import compile as matrix  # noqa: E402
from resnetv2.kernels.inspect import compile_report, dryrun  # noqa: E402
from resnetv2.kernels.inspect.cases import DTYPES, UNITS, sampled, selected  # noqa: E402
from tests.support.compile_checks import (  # noqa: E402
    MULTIPROCESSORS,
    RATIOS,
    TABLE,
    kernel_size,
    over_the_ratio,
    told,
)
from tests.support.compiled import compiled  # noqa: E402

_BLOCKS = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_J")
# Of these, which have sm_80's matrix unit, a single unit is compiled: none of its 1x1s is narrow
# enough for both gradients in one launch.
TOO_WIDE = ("sm_86", "sm_89", "sm_120")
LOW = ("fp16", "bf16", "bf16+fp32")
# Bytes a thread, by versions of Triton besides the table's: its ptxas takes 32 registers there.
SPILLS_OF_OTHERS = {("3.6", "sm_100", "_conv_wgrad_kernel", "64x16x64", 8)}


@pytest.fixture(scope="module")
def table():
    """The committed rows, or None of another version of the compiler."""
    found, versions = compile_report.read(TABLE)
    return found if versions == {compile_report.versions()} else None


@pytest.fixture(scope="module")
def rows(table):
    return matrix.compile_all() if table is None else table


@pytest.fixture(scope="module")
def fresh():
    """A sample of all targets, compiled now: what is read in its code and not in the table."""
    return matrix.compile_all(choose=sampled)


@pytest.fixture(scope="module")
def listed():
    return json.loads(compiled("-m", "tests.support.dryrun_models"))


def test_the_table_is_that_of_these_kernels(table, listed):
    if table is None:
        pytest.skip("the committed table is of other versions, so all was compiled")
    known = {r.identity for r in table}
    assert len(known) == len(table)
    now = {(*row[:-1], tuple(row[-1])) for row in listed["matrix"]}
    command = "python -m resnetv2.kernels.inspect.compile --report bench/reports/compile"
    changed = sorted({row[2] for row in known ^ now})
    assert known == now, f"{', '.join(changed)} changed since the table was made: {command}"


def test_the_table_says_what_the_compilers_say(table, fresh):
    if table is None:
        pytest.skip("the committed table is of other versions")
    known = {r.identity: r for r in table}
    for r in fresh:
        expected = replace(known[r.identity], key=r.key, seconds=r.seconds, case=r.case)
        assert r == expected


@pytest.fixture(scope="module")
def rated(table, rows):
    """The convolutions of ResNet-1001 and ResNet-110 at batch 128 on sm_90 in bf16."""
    if table is None:
        pytest.skip("instructions are those of the committed table's compiler")
    return [
        r
        for r in rows
        if (r.target, r.dtype) == ("sm_90", "bf16")
        and r.convolution
        and r.case.startswith(("resnet1001", "resnet110"))
    ]


@pytest.mark.parametrize("target", matrix.TARGETS)
def test_no_spills(rows, target):
    version = triton.__version__.rsplit(".", 1)[0]
    spilled = [
        r
        for r in rows
        if r.target == target
        and (r.spilled or r.local)
        and (version, target, r.kernel, r.tile, r.spilled) not in SPILLS_OF_OTHERS
    ]
    assert not spilled, told(spilled)


@pytest.mark.parametrize("dtype", [dtype for dtype in LOW if selected("sm_90", dtype)])
def test_wgmma_on_sm_90(rows, dtype):
    convolutions = [r for r in rows if (r.target, r.dtype) == ("sm_90", dtype) and r.convolution]
    assert {r.convolution for r in convolutions} == {"forward", "dgrad", "wgrad", "backward"}
    without = [r for r in convolutions if not r.wgmma]
    assert not without, told(without)


def test_wgmmas_stay_in_flight_in_weight_gradients(fresh):
    """ptxas waits after each wgmma where what it reads is overwritten in flight, and says so."""
    pointwise = [
        r
        for r in fresh
        if (r.target, r.dtype, r.convolution) == ("sm_90", "bf16", "wgrad")
        and r.constants["R"] == 1
    ]
    assert pointwise
    serialised = [r for r in pointwise if "serialized" in ptxas_says(r)]
    assert not serialised, told(serialised)


@pytest.mark.parametrize("target", matrix.TARGETS)
def test_a_barrier_on_both_sides_of_each_ticket(fresh, target):
    """Triton's releases the stores of one thread alone, and has its successors read early."""
    nvidia = target.startswith("sm_")
    atomic, barrier, store, read = (
        (r"\batom\.", r"\bbar\.sync", r"\bst\.global", r"\bld\.global")
        if nvidia
        else (r"_atomic_", r"\bs_barrier", r"(?:global|buffer)_store", r"(?:global|buffer)_load")
    )
    # One wave alone needs no barrier, and on AMD has none.
    kernels = {
        (r.key, r.kernel) for r in fresh if r.target == target and (nvidia or r.num_warps > 1)
    }
    counted = set()
    for key, kernel in kernels:
        files = get_cache_manager(key).get_group(f"{kernel}.json")
        text = Path(files[f"{kernel}.{'ptx' if nvidia else 'amdgcn'}"]).read_text()
        before, *rest = re.split(atomic, text)
        for after in rest:
            counted.add(kernel)
            last = re.findall(f"{barrier}|{store}", before)[-1]
            first = re.search(f"{barrier}|{read}", after)
            assert re.match(barrier, last), f"{kernel} on {target}: a store before a ticket"
            assert first, kernel
            assert re.match(barrier, first[0]), f"{kernel} on {target}: a load after a ticket"
            before = after
    names = ["conv_forward", "conv_dgrad", "conv_wgrad", "act_backward", *["moments"] * nvidia]
    names += ["conv_backward"] * (target not in TOO_WIDE)
    assert counted == {f"_{name}_kernel" for name in names}


@pytest.mark.parametrize("target", matrix.TARGETS)
def test_moments_are_summed_within_a_warp(rows, target):
    """Sums across warps put a float of each warp and channel into shared memory."""
    found = [r for r in rows if r.target == target and r.kernel == "_moments_kernel"]
    assert found
    across = [r for r in found if r.shared > 4 * r.constants["BLOCK_C"]]
    assert not across, told(across)


@pytest.mark.parametrize("target", matrix.TARGETS)
def test_matrix_units_in_half_precision(rows, target):
    without = [
        r for r in rows if r.target == target and r.dtype in LOW and r.convolution and not r.matrix
    ]
    assert not without, told(without)


def test_tf32_uses_matrix_units_and_float32_does_not(rows):
    convolutions = [r for r in rows if r.target == "sm_90" and r.convolution]
    assert all(r.matrix for r in convolutions if r.dtype == "tf32")
    assert not any(r.matrix for r in convolutions if r.dtype == "fp32")


@pytest.mark.parametrize("target", [t for t in matrix.TARGETS if selected(t, "tf32")])
def test_tf32_operands_are_rounded(rows, target):
    """Both operands, each thread its elements of either (test_tf32.py)."""
    convolutions = [r for r in rows if r.target == target and r.convolution]
    tf32 = [r for r in convolutions if r.dtype == "tf32"]
    assert {r.convolution for r in tf32} == {"forward", "dgrad", "wgrad", "backward"}
    cut_off = [r for r in tf32 if r.rounded < elements_of_operands(r)]
    assert not cut_off, told(cut_off)
    assert not any(r.rounded for r in convolutions if r.dtype != "tf32")


@pytest.mark.parametrize("target", matrix.TARGETS)
def test_every_kernel_is_compiled_in_every_dtype(rows, target):
    """A kernel that no case launches would not be checked."""
    folder = Path(matrix.__file__).parents[1]
    text = "".join(path.read_text() for path in folder.glob("*.py"))
    names = set(re.findall(r"@triton\.jit.*\ndef (\w+_kernel)\(", text))
    assert len(names) >= 9
    names -= {"_conv_backward_kernel"} if target in TOO_WIDE else set()
    for dtype in DTYPES:
        if selected(target, dtype):
            assert names <= {r.kernel for r in rows if (r.target, r.dtype) == (target, dtype)}


@pytest.mark.parametrize(
    ("size", "convolution"), list(RATIOS), ids=["-".join(key) for key in RATIOS]
)
def test_ratio_of_issue_to_memory_cycles(rated, size, convolution):
    found = [r for r in rated if (kernel_size(r), r.convolution) == (size, convolution)]
    assert found
    slow = over_the_ratio(found)
    assert not slow, told(slow)


def test_ratio_is_of_a_certain_count(rated):
    """Loops of the machine code were matched with the source's, and cover its arithmetic."""
    for r in rated:
        assert not r.unsure, told([r])
        rows_of_result, c, k, taps = result_rows(r), *channels(r)
        own = rows_of_result * c * k * taps * (2 if r.convolution == "backward" else 1)
        # wgmma is 64 wide on one side: 16 columns and 16 channels are padded to that.
        assert own <= r.multiply_adds <= 4.5 * own, told([r])


def elements_of_operands(row):
    """Elements of both operands that a thread multiplies in one step of the main loop."""
    block = {key.removeprefix("BLOCK_"): row.constants.get(key, 0) for key in _BLOCKS}
    if row.convolution == "wgrad":
        elements = block["M"] * (block["K"] + block["J"])
    elif row.convolution == "backward":
        elements = block["M"] * (block["K"] + block["N"]) + block["K"] * block["N"]
    else:
        elements = block["K"] * (block["M"] + block["N"])
    return max(1, elements // (32 * row.num_warps))


def ptxas_says(row):
    """The messages of ptxas on a kernel's PTX, which Triton keeps in its cache."""
    files = get_cache_manager(row.key).get_group(f"{row.kernel}.json")
    command = [triton.knobs.nvidia.ptxas.path, "-arch=sm_90a", "-v", files[f"{row.kernel}.ptx"]]
    done = subprocess.run([*command, "-o", os.devnull], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def channels(row):
    """C, K and the number of taps of a convolution: of program 0's class, which has the most."""
    c = row.constants
    strides = (c["STRIDE_H"], c["STRIDE_W"]) if c.get("CLASSED") else (1, 1)
    taps = (-(-size // stride) for size, stride in zip((c["R"], c["S"]), strides, strict=True))
    return c["C"], c["K"], math.prod(taps)


def result_rows(row):
    """Rows that a convolution multiplies: of its result, or of the gradient."""
    c = row.constants
    unit = next(unit for unit in UNITS if row.case.startswith(f"{unit.name}:"))
    height, width = (c[name] for name in (("H", "W") if row.convolution == "dgrad" else ("P", "Q")))
    return unit.batch * height * width


def test_two_programs_for_each_multiprocessor(rated):
    few = [r for r in rated if r.programs < 2 * MULTIPROCESSORS]
    assert not few, told(few)


# --- a training step of real models ---------------------------------------------------------------


@pytest.fixture(scope="module")
def step(rows, listed):
    """Model to the rows of its distinct kernels, most of which the matrix has."""
    mine = [r for r in rows if (r.target, r.dtype) == ("sm_90", "bf16") and r.instructions]
    every = {(r.digest, tuple(r.grid)): r for r in mine}
    every |= {(r["digest"], tuple(r["grid"])): matrix.Row(**r) for r in listed["rows"]}
    return {
        name: [every[digest, tuple(grid)] for _, digest, grid in model]
        for name, model in listed["models"].items()
    }


MODELS = pytest.mark.parametrize("model", ["resnet1001", "resnet110"])


@MODELS
def test_models_kernels_have_no_spills_and_wgmma(step, model):
    faults = [r for r in step[model] if r.fault]
    assert not faults, told(faults)


@MODELS
def test_shared_memory_of_models_fits_twice(step, model):
    """Two programs have to stand on one multiprocessor beside each other."""
    large = [r for r in step[model] if r.shared > dryrun.DEVICES["sm_90"].shared_memory // 2]
    assert not large, told(large)


@MODELS
def test_two_programs_of_models_for_each_multiprocessor(step, model):
    few = [r for r in step[model] if r.convolution and r.programs < 2 * MULTIPROCESSORS]
    assert not few, told(few)


@MODELS
@pytest.mark.usefixtures("rated")
def test_ratio_of_models_issue_to_memory_cycles(step, model):
    slow = over_the_ratio(step[model])
    assert not slow, told(slow)


@MODELS
def test_a_models_step_launches_every_part(step, model):
    names = {r.kernel for r in step[model]}
    assert {"_conv_forward_kernel", "_conv_dgrad_kernel", "_conv_wgrad_kernel"} <= names
    assert ("_conv_backward_kernel" in names) == (model == "resnet1001")


def test_command_line_prints_the_table(capsys, tmp_path):
    file = tmp_path / "rows.json"
    arguments = ["--target", "sm_80", "--dtype", "bf16", "--case", "odd channels: moments"]
    assert matrix.main([*arguments, "--jobs", "1", "--json", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["target", "dtype", "kernel"]
    assert lines[1].startswith("sm_80  bf16      _moments")
    assert file.read_text().startswith('[{"target": "sm_80"')
