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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import dispatch, dryrun
from .operands import Act, Geometry, Grad, stats_dtype

TARGETS = tuple(dryrun.DEVICES)
# name: dtype of the multiplication, dtype of the residual stream, TF32.
DTYPES = {
    "fp32": (torch.float32, torch.float32, False),
    "tf32": (torch.float32, torch.float32, True),
    "fp16": (torch.float16, torch.float16, False),
    "bf16": (torch.bfloat16, torch.bfloat16, False),
    "bf16+fp32": (torch.bfloat16, torch.float32, False),
}
_RELU = Act("relu")


class Unit(NamedTuple):
    """A residual unit: channels in and out, inner width, input size, stride, images a batch.

    ``act`` and ``training`` are those of its norms; ``every`` says that it is compiled for all
    targets and dtypes, not for sm_90 in bf16 alone.
    """

    name: str
    convs: tuple[tuple[int, int, int, int], ...]  # (C, K, kernel size, stride)
    size: int
    batch: int
    projection: int = 0  # its stride
    act: Act = _RELU
    training: bool = True
    every: bool = False


def _bottleneck(
    name: str, c: int, k: int, size: int, batch: int, stride: int = 1, **options
) -> Unit:
    w = k // 4
    convs = ((c, w, 1, 1), (w, w, 3, stride), (w, k, 1, 1))
    return Unit(name, convs, size, batch, 0 if c == k else stride, **options)


def _basic(name: str, c: int, k: int, size: int, batch: int, stride: int = 1, **options) -> Unit:
    convs = ((c, k, 3, stride), (k, k, 3, 1))
    return Unit(name, convs, size, batch, 0 if c == k else stride, **options)


UNITS = (
    _bottleneck("resnet1001/1", 64, 64, 32, 128),
    _bottleneck("resnet1001/2", 128, 128, 16, 128, every=True),
    _bottleneck("resnet1001/3", 256, 256, 8, 128),
    _bottleneck("resnet1001/1 entry", 16, 64, 32, 128),
    _bottleneck("resnet1001/2 entry", 64, 128, 32, 128, 2, every=True),
    _bottleneck("resnet1001/3 entry", 128, 256, 16, 128, 2),
    _basic("resnet110/1", 16, 16, 32, 128, every=True),
    _basic("resnet110/2", 32, 32, 16, 128),
    _basic("resnet110/3", 64, 64, 8, 128),
    _basic("resnet110/2 entry", 16, 32, 32, 128, 2),
    _basic("resnet110/3 entry", 32, 64, 16, 128, 2),
    _bottleneck("imagenet/1", 256, 256, 56, 32),
    _bottleneck("imagenet/2", 512, 512, 28, 32),
    _bottleneck("imagenet/3", 1024, 1024, 14, 32, every=True),
    _bottleneck("imagenet/4", 2048, 2048, 7, 32),
    _bottleneck("imagenet/2 entry", 256, 512, 56, 32, 2),
    _basic("imagenet basic/4", 512, 512, 7, 32),
    _basic("odd channels", 17, 17, 13, 5, act=Act("silu"), training=False, every=True),
    _bottleneck("gelu", 48, 48, 15, 3, act=Act("gelu")),
    _basic("leaky_relu", 80, 80, 9, 8, act=Act("leaky_relu", 0.1)),
)
# How a kernel's columns are called, and the operands that each tile of columns reads whole.
_OPERANDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "conv_forward_kernel": ("K", ("h_ptr", "stats_ptr")),
    "conv_dgrad_kernel": ("C", ("grad_ptr", "grad_h_ptr", "grad_coef_ptr")),
}


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
    tile_bytes: float
    ratio: float | None
    tile_ratio: float | None
    unsure: str

    @property
    def convolution(self) -> str:
        """ "forward", "dgrad" or "wgrad" for a kernel that convolves, else ""."""
        for op in ("forward", "dgrad", "wgrad"):
            if self.kernel == f"conv_{op}_kernel":
                return op
        return ""

    @property
    def fault(self) -> str:
        """Why this kernel must not ship, or ""."""
        if self.spilled or self.local:
            return f"spills {self.spilled} bytes a thread"
        low = self.dtype in ("fp16", "bf16", "bf16+fp32")
        if self.target == "sm_90" and low and self.convolution and not self.wgmma:
            return "no wgmma"
        return ""


def steps(
    unit: Unit, dtype: torch.dtype, stream: torch.dtype
) -> Iterator[tuple[str, Callable[[], object]]]:
    """(label, what a chain does there) for each step of a unit's forward and backward.

    Tensors hold whatever their memory held: nothing runs on them.
    """
    engine = dispatch.TritonEngine()

    def activation(channels: int, size: int, dtype: torch.dtype) -> Tensor:
        shape = (unit.batch, channels, size, size)
        return torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)

    def stats_of(channels: int) -> Tensor:
        return torch.empty(5, channels, dtype=stats_dtype(dtype))

    def forward(
        h: Tensor, weight: Tensor, geometry: Geometry, out: Tensor, residual: Tensor | None
    ) -> None:
        _, partials = engine.conv_forward(
            h, weight, None, geometry, dtype=dtype, stats=stats_of(h.shape[1]), act=unit.act,
            residual=residual, out_dtype=out.dtype, with_moments=True,
        )  # fmt: skip
        assert partials is not None
        affine = torch.empty(weight.shape[0])
        engine.norm_stats(partials, affine, affine, 1e-5)

    def backward(
        h: Tensor, weight: Tensor, geometry: Geometry, out: Tensor, first: bool, last: bool
    ) -> None:
        grad = Grad(out)
        if not last:
            coef = torch.empty(3, out.shape[1], dtype=stats_dtype(dtype))
            grad = Grad(out, torch.empty_like(out) if unit.training else None, coef)
        other = torch.empty_like(h) if first else None
        engine.norm_conv_backward(
            grad, h, stats_of(h.shape[1]), unit.act, weight, geometry, training=unit.training,
            dtype=dtype, need_input=True, need_weight=True, need_bias=False, final=first,
            add=other if unit.projection else None, identity=None if unit.projection else other,
        )  # fmt: skip

    size, last = unit.size, len(unit.convs) - 1
    x = h = activation(unit.convs[0][0], size, stream)
    yield "moments", lambda: engine.moments(x)
    for i, (c, k, kernel, stride) in enumerate(unit.convs):
        geometry = Geometry((stride, stride), (kernel // 2, kernel // 2))
        size = geometry.output_size((size, size), (kernel, kernel))[0]
        out = activation(k, size, stream if i == last else dtype)
        weight = torch.empty(k, c, kernel, kernel)
        label = f"{kernel}x{kernel} {c}>{k}" + (f" /{stride}" if stride > 1 else "")
        residual = torch.empty_like(out) if i == last else None
        yield f"{label} forward", partial(forward, h, weight, geometry, out, residual)
        yield f"{label} backward", partial(backward, h, weight, geometry, out, i == 0, i == last)
        h = out
    if unit.projection:
        geometry = Geometry((unit.projection, unit.projection))
        weight = torch.empty(h.shape[1], x.shape[1], 1, 1)
        label = f"shortcut {x.shape[1]}>{h.shape[1]} /{unit.projection}"
        stats = stats_of(x.shape[1])
        yield (
            f"{label} forward",
            lambda: engine.conv_forward(
                x, weight, None, geometry, dtype=dtype, stats=stats, act=unit.act
            ),
        )
        yield (
            f"{label} backward",
            lambda: engine.conv_backward(
                h, x, weight, geometry, dtype=dtype, stats=stats, act=unit.act,
                need_input=True, need_weight=True, need_bias=False,
            ),
        )  # fmt: skip


def row(target: str, dtype: str, case: str, launch: dryrun.Launch) -> Row:
    """What the table says of one launch."""
    kernel = launch.kernel
    constants = {
        k: v for k, v in kernel.constants.items() if isinstance(v, (int, float, str)) or v is None
    }
    tile_bytes = launch.nbytes / launch.programs
    columns, operands = _OPERANDS.get(kernel.name, ("", ()))
    if columns:
        column_tiles = -(-constants[columns] // constants["BLOCK_N"])
        tile_bytes = sum(
            t.nbytes / launch.programs * (column_tiles if name in operands else 1)
            for name, t in launch.tensors.items()
            if name != "weight_ptr"
        )
    count = launch.count() if dryrun.DEVICES[target].target.backend == "cuda" else None
    warps = kernel.num_warps
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
        nbytes=launch.nbytes,
        tile_bytes=tile_bytes,
        ratio=count.ratio(warps, launch.nbytes / launch.programs) if count else None,
        tile_ratio=count.ratio(warps, tile_bytes) if count else None,
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
        parts = pool.map(lambda pair: _subprocess(*pair, case), pairs)
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
            f"{r.ratio:7.2f}{r.tile_ratio:6.2f}" if r.ratio is not None else f"{'-':>7}{'-':>6}"
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
