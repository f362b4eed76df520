"""Compile every kernel for GPUs that are not there, and print what the compilers made of it.

    python -m resnetv2.kernels.compile                                # everything
    python -m resnetv2.kernels.compile --target sm_90 --dtype bf16    # the static ratios
    python -m resnetv2.kernels.compile --target sm_90 --dtype bf16 --case 1x1 --kernel wgrad

The steps out of which a chain is made run on CPU tensors through the project's own launch path, in
a dry run (dryrun.py): what is listed is what that GPU would launch for these shapes. Columns:

    regs, spill, smem   registers and spilled bytes a thread, bytes of shared memory a program
    mma                 matrix instructions that a warp executes, wgmma marked with w
    programs            the launch's
    instr               instructions that a warp executes for a program (sass.py; CUDA only)
    ratio               issue cycles over memory cycles, all tensors of the launch counted once
    tile                the same for the bytes that one tile touches itself (its rows of operands
                        that tiles of other columns read as well, without the weights)

Exit status 1: something spills, or a convolution in fp16 or bf16 lacks wgmma on sm_90.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from . import dryrun
from .cases import DTYPES, UNITS, steps

TARGETS = tuple(dryrun.DEVICES)


@dataclass(frozen=True)
class Row:
    """One distinct kernel and grid of a target and dtype, as the table and the JSON give it."""

    target: str
    dtype: str
    case: str
    kernel: str
    constants: dict[str, Any]
    grid: tuple[int, int, int]
    programs: int
    num_warps: int
    num_stages: int
    registers: int
    spilled: int
    shared: int
    matrix: int
    wgmma: int
    local: int
    multiply_adds: int
    instructions: int | None
    nbytes: int
    ratio: float | None
    tile_ratio: float | None
    unsure: str

    @property
    def convolution(self) -> str:
        """ "forward", "dgrad" or "wgrad" for a kernel that convolves, else ""."""
        found = re.fullmatch(r"_?conv_(forward|dgrad|wgrad)_kernel", self.kernel)
        return found[1] if found else ""

    @property
    def fault(self) -> str:
        """Why this kernel must not ship, or ""."""
        if self.spilled or self.local:
            return f"spills {self.spilled} bytes a thread"
        low = self.dtype in ("fp16", "bf16", "bf16+fp32")
        if self.target == "sm_90" and low and self.convolution and not self.wgmma:
            return "no wgmma"
        return ""


def tile_bytes(launch: dryrun.Launch) -> float:
    """Distinct bytes of activations that one program touches, on average.

    A convolution's tile of columns reads all channels of its rows of the operands, which other
    tiles of columns read as well.
    """
    size = launch.kernel.constants
    nbytes = {name: t.nbytes for name, t in launch.tensors.items() if name != "weight_ptr"}
    parts = dict.fromkeys(nbytes, 1)  # how many programs read the same element
    if launch.kernel.name == "conv_forward_kernel":
        parts["h_ptr"] = -(-size["K"] // size["BLOCK_N"])
    elif launch.kernel.name == "conv_dgrad_kernel":
        parts["grad_ptr"] = parts["grad_h_ptr"] = -(-size["C"] // size["BLOCK_N"])
    elif launch.kernel.name == "_conv_wgrad_kernel":
        columns = size["BLOCK_J"] * size["J_TILES"]
        groups = -(-size["KERNEL_H"] * size["KERNEL_W"] * size["C"] // columns)
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


def row(target: str, dtype: str, case: str, launch: dryrun.Launch) -> Row:
    """What the table says of one launch."""
    kernel = launch.kernel
    constants = {
        k: v for k, v in kernel.constants.items() if isinstance(v, (int, float, str)) or v is None
    }
    count = launch.count() if dryrun.DEVICES[target].target.backend == "cuda" else None
    warps, nbytes, tile = kernel.num_warps, distinct_bytes(launch), tile_bytes(launch)
    return Row(
        target=target,
        dtype=dtype,
        case=case,
        kernel=kernel.name,
        constants=constants,
        grid=launch.grid,
        programs=launch.programs,
        num_warps=warps,
        num_stages=kernel.num_stages,
        registers=kernel.registers,
        spilled=kernel.spilled,
        shared=kernel.shared,
        matrix=count.matrix if count else len(re.findall(r"v_mfma_", kernel.text("amdgcn"))),
        wgmma=count.wgmma if count else 0,
        local=count.local if count else 0,
        multiply_adds=count.multiply_adds(warps) * launch.programs if count else 0,
        instructions=count.instructions if count else None,
        nbytes=nbytes,
        ratio=count.ratio(warps, nbytes / launch.programs) if count and nbytes else None,
        tile_ratio=count.ratio(warps, tile) if count and tile else None,
        unsure=count.unsure if count else "",
    )


def matrix(target: str, dtype: str, case: str = "") -> list[Row]:
    """Compile the units' steps for one target and dtype; rows whose label contains ``case``.

    Units not marked ``every`` are compiled for sm_90 in bf16 alone.
    """
    compute, stream, tf32 = DTYPES[dtype]
    torch.backends.cudnn.allow_tf32 = tf32
    rows: dict[tuple[str, tuple[int, int, int]], Row] = {}
    for unit in UNITS:
        if not unit.every and (target, dtype) != ("sm_90", "bf16"):
            continue
        for label, step in steps(unit, compute, stream):
            label = f"{unit.name}: {label}"
            if case not in label:
                continue
            with dryrun.dry_run(target) as run:
                step()
            for launch in run.launches:
                key = (launch.kernel.key, launch.grid)
                if key not in rows:
                    rows[key] = row(target, dtype, label, launch)
    return list(rows.values())


def _subprocess(target: str, dtype: str, case: str) -> list[Row]:
    # A process each: Triton compiles on one core, and cannot compile where it interprets.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", __spec__.name, "--target", target, "--dtype", dtype]
    command += ["--case", case, "--json", "-", "--jobs", "0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1) or not done.stdout:
        raise RuntimeError(f"{target} {dtype}: compilation failed\n{done.stderr}")
    return [Row(**values) for values in json.loads(done.stdout)]


def compile_all(
    targets: Sequence[str] = TARGETS,
    dtypes: Sequence[str] = tuple(DTYPES),
    case: str = "",
    jobs: int = 2,
) -> list[Row]:
    """``matrix`` for each target and dtype, ``jobs`` processes at a time (0: in this process)."""
    pairs = [(target, dtype) for target in targets for dtype in dtypes]
    if jobs == 0:
        return [r for pair in pairs for r in matrix(*pair, case)]
    with ThreadPoolExecutor(jobs) as pool:
        parts = pool.map(lambda pair: _subprocess(pair[0], pair[1], case), pairs)
        return [r for part in parts for r in part]


def table(rows: Sequence[Row]) -> str:
    """The rows as text for a terminal."""
    lines = [
        f"{'target':7}{'dtype':10}{'kernel':26}{'tile':16}{'regs':>5}{'spill':>6}{'smem':>8}"
        f"{'mma':>6}{'programs':>9}{'instr':>7}{'ratio':>7}{'tile':>6}  case"
    ]
    for r in rows:
        tile = "x".join(str(v) for k, v in r.constants.items() if k.startswith("BLOCK"))
        tile += f" {r.num_warps}w{r.num_stages}s"
        ratios = (
            f"{r.ratio:7.2f}{r.tile_ratio:6.2f}"
            if r.ratio and r.tile_ratio
            else f"{'-':>7}{'-':>6}"
        )
        note = r.fault or r.unsure
        lines.append(
            f"{r.target:7}{r.dtype:10}{r.kernel.removesuffix('_kernel'):26}{tile:16}"
            f"{r.registers:5}{r.spilled:6}{r.shared:8}{f'{r.matrix}' + 'w' * (r.wgmma > 0):>6}"
            f"{r.programs:9}{r.instructions or '-':>7}{ratios}  {r.case}"
            + (f"  <- {note}" if note else "")
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m resnetv2.kernels.compile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--target", action="append", choices=TARGETS, help="all if not given")
    parser.add_argument("--dtype", action="append", choices=tuple(DTYPES), help="all if not given")
    parser.add_argument("--case", default="", help="only cases whose label contains this")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--json", metavar="FILE", help="write the rows there ('-': print them)")
    parser.add_argument("--jobs", type=int, default=2, help="processes; 0: none beside this one")
    options = parser.parse_args(arguments)
    rows = compile_all(
        options.target or TARGETS, options.dtype or tuple(DTYPES), options.case, options.jobs
    )
    rows = [r for r in rows if options.kernel in r.kernel]
    text = json.dumps([asdict(r) for r in rows])
    if options.json == "-":
        print(text)
    else:
        print(table(rows))
        if options.json:
            Path(options.json).write_text(text)
    return int(any(r.fault for r in rows))


if __name__ == "__main__":
    sys.exit(main())
