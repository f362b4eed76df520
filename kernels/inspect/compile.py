"""Compile every kernel for GPUs that are not there, and print what the compilers made of it.

    python -m resnetv2.kernels.inspect.compile   # every kernel, all targets
    python -m resnetv2.kernels.inspect.compile --target sm_90 --dtype bf16  # the static ratios
    python -m resnetv2.kernels.inspect.compile --target sm_90 --dtype bf16 --case 1x1 --kernel wgrad
    python -m resnetv2.kernels.inspect.compile --report bench/reports/compile   # --all: hours

The steps out of which a chain is made run on CPU tensors through the project's own launch path, in
a dry run (dryrun.py): what is listed is what that GPU would launch for these shapes. sm_90 in bf16
compiles nearly all units of cases.py, the rest a selection (--all: everything everywhere). Columns:

    regs, spill, smem   registers and spilled bytes a thread, bytes of shared memory a program
    s                   seconds of processor time that compiling it took
    mma                 matrix instructions that a warp executes, wgmma marked with w; where instr
                        is not counted, those that stand in the code
    programs            the launch's
    instr               instructions that a warp executes for a program (sass.py): on sm_90, of
                        ResNet-1001's and ResNet-110's in bf16, or with --count of all
    ratio               issue cycles over memory cycles, all tensors of the launch counted once
    tile                the same for the bytes that one tile touches itself (its rows of operands
                        that tiles of other columns read as well, without the weights)

Exit status 1: something spills, or a convolution in fp16 or bf16 lacks wgmma on sm_90.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch

from ..fallback import FallbackWarning
from . import compile_report, dryrun, tuning
from .cases import DTYPES, UNITS, Unit, rated, selected, steps
from .compile_row import Row

TARGETS = tuple(dryrun.DEVICES)
_WGMMA = r"wgmma\.mma_async"
_MATRIX = rf"mma\.sync|{_WGMMA}|tcgen05\.mma|v_mfma"
Task = tuple[str, str, int, str, bool, bool]  # the arguments of rows_of


def tile_bytes(launch: dryrun.Launch) -> float:
    """Distinct bytes of activations that one program touches, on average.

    A convolution's tile of columns reads all channels of its rows of the operands, which other
    tiles of columns read as well.
    """
    size = launch.kernel.constants
    nbytes = {name: t.nbytes for name, t in launch.tensors.items() if name != "weight_ptr"}
    parts = dict.fromkeys(nbytes, 1)  # how many programs read the same element
    if launch.kernel.name == "_conv_forward_kernel":
        parts["h_ptr"] = -(-size["K"] // size["BLOCK_N"])
    elif launch.kernel.name == "_conv_dgrad_kernel":
        parts["grad_ptr"] = parts["grad_h_ptr"] = -(-size["C"] // size["BLOCK_N"])
    elif launch.kernel.name == "_conv_backward_kernel":
        parts["q_ptr"] = parts["gh_ptr"] = -(-size["C"] // size["BLOCK_N"])
        del nbytes["workspace_ptr"]
    elif launch.kernel.name == "_conv_wgrad_kernel":
        columns = size["BLOCK_J"] * size["J_TILES"]
        groups = -(-size["R"] * size["S"] * size["C"] // columns)
        parts["q_ptr"] = parts["gh_ptr"] = groups
        blocks = -(-size["K"] // size["BLOCK_K"])
        parts["h_ptr"] = blocks * max(1, groups // -(-size["C"] // columns))
        del nbytes["workspace_ptr"]
    return sum(n * parts[name] for name, n in nbytes.items()) / launch.programs


def distinct_bytes(launch: dryrun.Launch) -> int:
    """Bytes that a launch moves at least: its tensors once each.

    Without the workspace of a split reduction, which must not flatter the ratio.
    """
    workspace = launch.tensors.get("workspace_ptr")
    return launch.nbytes - (workspace.nbytes if workspace else 0)


def instructions_named(names: str, kernel: dryrun.Kernel) -> int:
    """Instructions in the text of a kernel's assembly, each as often as it stands there."""
    text = kernel.text("ptx" if "ptx" in kernel.files else "amdgcn")
    return len(re.findall(rf"^\s*(?:@\S+\s+)?(?:{names})", text, re.MULTILINE))


def rounded_operands(kernel: dryrun.Kernel) -> int:
    """Registers that a kernel's PTX rounds to TF32 (``activations.operand``); 0 of other code."""
    text = kernel.text("ptx") if "ptx" in kernel.files else ""
    # The comparison and the addition may read two registers that hold the same.
    added = re.findall(r"add\.s32\s+%r\d+, %r\d+, 4096;", text)
    compared = re.findall(r"setp\.(?:num|nan)\.f32\s+%p\d+, (%r\d+), \1;", text)
    return min(len(compared), len(added))


def row(target: str, dtype: str, case: str, launch: dryrun.Launch, counted: bool = True) -> Row:
    """What the table says of one launch; instructions where ``counted`` and for sm_90.

    The rates that cycles are counted with are an H100's.
    """
    kernel = launch.kernel
    constants = {
        k: v for k, v in kernel.constants.items() if isinstance(v, (int, float, str)) or v is None
    }
    count = launch.count() if counted and target == "sm_90" else None
    warps, nbytes, tile = kernel.num_warps, distinct_bytes(launch), tile_bytes(launch)
    return Row(
        target=target,
        dtype=dtype,
        case=case,
        kernel=kernel.name,
        constants=constants,
        key=kernel.key,
        digest=kernel.digest,
        grid=list(launch.grid),
        programs=launch.programs,
        num_warps=warps,
        num_stages=kernel.num_stages,
        registers=kernel.registers,
        spilled=kernel.spilled,
        shared=kernel.shared,
        seconds=kernel.seconds,
        matrix=count.matrix if count else instructions_named(_MATRIX, kernel),
        rounded=rounded_operands(kernel),
        wgmma=count.wgmma if count else instructions_named(_WGMMA, kernel),
        local=count.local if count else 0,
        multiply_adds=count.multiply_adds(warps) * launch.programs if count else 0,
        instructions=count.instructions if count else None,
        nbytes=nbytes,
        ratio=count.ratio(warps, nbytes / launch.programs) if count and nbytes else None,
        tile_ratio=count.ratio(warps, tile) if count and tile else None,
        unsure=count.unsure if count else "",
    )


def rows_of(
    target: str,
    dtype: str,
    number: int,
    case: str = "",
    candidates: bool = False,
    count: bool = False,
) -> list[Row]:
    """Compile the steps of ``UNITS[number]`` whose label contains ``case``, in this process.

    With ``candidates``, also the tiles that ``doctor --tune`` would time; with ``count``, the
    instructions of every kernel, beside those that ``cases.rated`` names.
    """
    count = count or rated(UNITS[number], target, dtype)
    rows = []
    for label, step in _steps(dtype, number, case):
        with dryrun.dry_run(target) as run, warnings.catch_warnings():
            # The table is about the kernels that should run, not about what replaces them.
            warnings.simplefilter("error", FallbackWarning)
            tuning.with_neighbours(step) if candidates else step()
        if run.failures:
            raise RuntimeError(f"{label} does not fit on {target}: {'; '.join(run.failures)}")
        rows += [row(target, dtype, label, launch, count) for launch in run.launches]
    return rows


def listed(target: str, dtype: str) -> list[dryrun.Listed]:
    """The distinct launches of ``cases.selected``, for which nothing is compiled: in seconds."""
    with dryrun.dry_run(target, compiles=lambda digest: False) as run:
        for unit in selected(target, dtype):
            for _, step in _steps(dtype, UNITS.index(unit)):
                step()
    return list(dict.fromkeys(run.listed))


def _steps(dtype: str, number: int, case: str = "") -> Iterator[tuple[str, Callable[[], object]]]:
    compute, stream, tf32 = DTYPES[dtype]
    torch.backends.cudnn.allow_tf32 = tf32
    for label, step in steps(UNITS[number], compute, stream):
        label = f"{UNITS[number].name}: {label}"
        if case in label:
            yield label, step


def _serve() -> None:
    """Answer tasks on standard input, arguments of ``rows_of`` as JSON, a line each."""
    for line in sys.stdin:
        print(json.dumps([asdict(r) for r in rows_of(*json.loads(line))]), flush=True)


def _work(tasks: queue.SimpleQueue[tuple[int, Task]], results: dict[int, list[Row]]) -> None:
    # A process: Triton compiles on one core, and cannot compile in one that interprets.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", f"from {__package__}.compile import _serve; _serve()"]
    with subprocess.Popen(
        command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        while not tasks.empty():
            number, task = tasks.get()
            process.stdin.write(json.dumps(task) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            if not answer:
                raise RuntimeError(f"compiling {task} failed, see the error above")
            results[number] = [Row(**values) for values in json.loads(answer)]
        process.stdin.close()


def compile_all(
    targets: Sequence[str] = TARGETS,
    dtypes: Sequence[str] = tuple(DTYPES),
    case: str = "",
    jobs: int = 2,
    choose: Callable[[str, str], Sequence[Unit]] = selected,
    candidates: bool = False,
    count: bool = False,
) -> list[Row]:
    """The units that ``choose`` names for a target and dtype, distinct kernels and grids.

    They are compiled by ``jobs`` processes. With ``candidates``, also the tiles that
    ``doctor --tune`` would time; with ``count``, every kernel's instructions on sm_90.
    """
    pairs = [(target, dtype) for target in targets for dtype in dtypes]
    tasks: queue.SimpleQueue[tuple[int, Task]] = queue.SimpleQueue()
    units = [(pair, unit) for pair in pairs for unit in choose(*pair)]
    for number, ((target, dtype), unit) in enumerate(units):
        tasks.put((number, (target, dtype, UNITS.index(unit), case, candidates, count)))
    results: dict[int, list[Row]] = {}
    with ThreadPoolExecutor(jobs) as pool:
        for done in [pool.submit(_work, tasks, results) for _ in range(jobs)]:
            done.result()
    distinct: dict[object, Row] = {}
    for number in sorted(results):
        for r in results[number]:
            distinct.setdefault(r.identity, r)
    return list(distinct.values())


def table(rows: Sequence[Row]) -> str:
    """The rows as text for a terminal."""
    lines = [
        f"{'target':7}{'dtype':10}{'kernel':26}{'tile':16}{'regs':>5}{'spill':>6}{'smem':>8}"
        f"{'s':>6}{'mma':>6}{'programs':>9}{'instr':>7}{'ratio':>7}{'tile':>6}  case"
    ]
    for r in rows:
        tile = f"{r.tile} {r.num_warps}w{r.num_stages}s"
        ratios = (
            f"{r.ratio:7.2f}{r.tile_ratio:6.2f}"
            if r.ratio and r.tile_ratio
            else f"{'-':>7}{'-':>6}"
        )
        note = r.fault or r.unsure
        lines.append(
            f"{r.target:7}{r.dtype:10}{r.kernel.removesuffix('_kernel'):26}{tile:16}"
            f"{r.registers:5}{r.spilled:6}{r.shared:8}"
            f"{'-' if r.seconds is None else f'{r.seconds:.1f}':>6}"
            f"{f'{r.matrix}' + 'w' * (r.wgmma > 0):>6}"
            f"{r.programs:9}{r.instructions or '-':>7}{ratios}  {r.case}"
            + (f"  <- {note}" if note else "")
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m resnetv2.kernels.inspect.compile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--target", action="append", choices=TARGETS, help="all if not given")
    parser.add_argument("--dtype", action="append", choices=tuple(DTYPES), help="all if not given")
    parser.add_argument("--case", default="", help="only cases whose label contains this")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--json", metavar="FILE", help="write the rows there too")
    parser.add_argument(
        "--report",
        metavar="FOLDER",
        help="write a page and a CSV there; other targets' and dtypes' rows in it stay",
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    parser.add_argument("--all", action="store_true", help="all units for all targets and dtypes")
    parser.add_argument(
        "--candidates", action="store_true", help="also the tiles that resnetv2 doctor --tune times"
    )
    parser.add_argument(
        "--count", action="store_true", help="count every kernel's instructions (sm_90; 0.4 s each)"
    )
    options = parser.parse_args(arguments)
    rows = compile_all(
        options.target or TARGETS,
        options.dtype or tuple(DTYPES),
        options.case,
        options.jobs,
        (lambda target, dtype: UNITS) if options.all else selected,
        options.candidates,
        options.count,
    )
    rows = [r for r in rows if options.kernel in r.kernel]
    print(table(rows))
    if options.report:
        compile_report.write(Path(options.report), rows)
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(r) for r in rows]))
    return int(any(r.fault for r in rows))


if __name__ == "__main__":
    sys.exit(main())
