"""What a first step compiles: distinct kernels and seconds of three networks, for each target.

    python -m bench.compiling                           # all, into bench/reports/compile
    python -m bench.compiling --net preact_resnet50 --target sm_90 --out FOLDER

A training step in bfloat16 (autocast, channels_last) is run dry (kernels/inspect/dryrun.py), with
an empty cache of Triton's, by ``--jobs`` processes: each compiles what no other has begun. Then the
whole step is run once more with that cache, as the next run does: nothing may be left to compile,
and every kernel must fit the device. No GPU is needed. Rows of other networks and targets stay.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import platform
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from bench.schema import REPORTS

# Images a step, and their size.
NETS = {
    "preact_resnet1001": (128, 32),
    "preact_resnet50": (32, 224),
    "wide_resnet28_10": (128, 32),
}
# Units of a deep net's stages that launch all of its kernels: more than a part of a chain has (16).
FEW = {"preact_resnet1001": (18, 18, 18)}
# On these ATen computes unless it is told otherwise (kernels/README.md).
ATENS = {"sm_75": (7, 5)}
OUT = REPORTS / "compile"
_FILES = "networks.csv", "networks.md"
# Seconds that compiling a first step may take on two cores.
LIMIT = 60


class Row(NamedTuple):
    """A line of the table.

    kernels, launches: distinct ones, and all of a step. cpu_seconds: processor time that compiling
    the kernels took, in one process. wall_seconds: until all were there, with the dry runs that
    ``jobs`` processes made for it. again: kernels that the next run compiled. slowest: kernel and
    its processor seconds. load: processes that waited for a core when it began.
    """

    network: str
    target: str
    backend: str
    launches: int
    kernels: int
    cpu_seconds: float
    wall_seconds: float
    again: int
    slowest: str
    batch: int
    jobs: int
    load: float
    cpus: int
    versions: str


def step_of(net: str, backend: str, units: Sequence[int] | None = None) -> Callable[[], object]:
    """A training step of a network on CPU tensors; units: of each stage, fewer than it has."""
    import torch
    import torch.nn.functional as F

    from resnetv2.models import PreActResNet, standard_net

    batch, size = NETS[net]
    if backend == "aten":
        batch, size = 2, 32  # ATen's kernels run: their number is the same
    standard = standard_net(net)
    model: PreActResNet = standard.build(backend=backend)
    if units is not None:
        for stage, number in zip(model.stages, units):
            del stage[number:]  # type: ignore[operator]
    model = model.to(memory_format=torch.channels_last)
    images = torch.zeros(batch, 3, size, size).to(memory_format=torch.channels_last)
    labels = torch.zeros(batch, dtype=torch.long)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()

    return step


def backend_on(target: str) -> str:
    """ "triton" or "aten": what a GPU of that kind runs on by default."""
    import torch

    from resnetv2.kernels import dispatch

    if target not in ATENS:
        return "triton"
    cuda = mock.patch.multiple(
        torch.cuda,
        is_available=lambda: True,
        get_device_capability=lambda number: ATENS[target],
        get_device_name=lambda number: target,
    )
    dispatch._said_below_sm80.cache_clear()
    with cuda, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return dispatch.resolve_backend("auto", torch.device("cuda", 0))


def _claimed(folder: Path, digest: str) -> bool:
    """Whether this process is the first to ask for a kernel."""
    try:
        (folder / digest).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _share(net: str, target: str, cache: str, claims: str) -> None:
    """Compile what no other process has begun."""
    os.environ["TRITON_CACHE_DIR"] = cache
    os.environ.pop("TRITON_INTERPRET", None)
    import torch

    from resnetv2.kernels.inspect.dryrun import dry_run

    torch.set_num_threads(1)
    step = step_of(net, "triton", FEW.get(net))
    with dry_run(target, lambda digest: _claimed(Path(claims), digest)) as run:
        step()
    if run.failures:
        raise RuntimeError(f"{net} on {target}: {'; '.join(run.failures)}")


def _whole(net: str, target: str, cache: str, backend: str, answers: Any) -> None:
    """A step by the cache: launches, and of each kernel its name and seconds; what is compiled."""
    os.environ["TRITON_CACHE_DIR"] = cache
    os.environ.pop("TRITON_INTERPRET", None)
    import torch

    from resnetv2.kernels.fallback import FallbackWarning
    from resnetv2.kernels.inspect.dryrun import DEVICES, dry_run

    torch.set_num_threads(1)
    before = {path.parent.name for path in Path(cache).rglob("compile_seconds")}
    step = step_of(net, backend)
    with dry_run(target if target in DEVICES else "sm_80") as run, warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        step()
    kernels = [(kernel.name, kernel.seconds or 0.0) for kernel in run.kernels]
    after = {path.parent.name for path in Path(cache).rglob("compile_seconds")}
    answers.put((len(run.launches), kernels, len(after - before), run.failures))


def measure(net: str, target: str, jobs: int = 2) -> Row:
    """Compile a network's step for a target with an empty cache.

    Raises:
        RuntimeError: a kernel does not compile, or does not fit the device.
    """
    from resnetv2.kernels.inspect.compile_report import versions

    context = multiprocessing.get_context("spawn")
    backend = backend_on(target)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        cache, claims = f"{folder}/cache", f"{folder}/claims"
        os.mkdir(claims)
        began = time.perf_counter()
        if backend == "triton":
            shares = [
                context.Process(target=_share, args=(net, target, cache, claims))
                for _ in range(jobs)
            ]
            _finish(shares, net, target)
        wall = time.perf_counter() - began
        answers = context.SimpleQueue()
        last = context.Process(target=_whole, args=(net, target, cache, backend, answers))
        last.start()
        last.join()
        if last.exitcode or answers.empty():
            raise RuntimeError(f"{net} on {target} failed: see the error above")
        launches, kernels, again, failures = answers.get()
    if failures:
        raise RuntimeError(f"{net} on {target}: {'; '.join(failures)}")
    name, most = max(kernels, key=lambda kernel: kernel[1], default=("", 0.0))
    return Row(
        net, target, backend, launches, len(kernels),
        round(sum(seconds for _, seconds in kernels), 1), round(wall, 1) if kernels else 0.0, again,
        f"{name} {most:.1f}" if name else "", NETS[net][0], jobs, round(load, 1),
        os.cpu_count() or 1, versions(),
    )  # fmt: skip


def _finish(processes: Sequence[Any], net: str, target: str) -> None:
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError(f"{net} on {target} failed: see the error above")


def write(folder: Path, rows: Sequence[Row], command: str) -> None:
    """Write the table as CSV and as a page; rows of other networks and targets stay."""
    from resnetv2.kernels.inspect.dryrun import DEVICES

    folder.mkdir(parents=True, exist_ok=True)
    file, page = (folder / name for name in _FILES)
    entries = [{name: str(value) for name, value in row._asdict().items()} for row in rows]
    new = {(row.network, row.target) for row in rows}
    if file.exists():
        with file.open(newline="") as lines:
            known = list(csv.DictReader(lines))
        entries += [e for e in known if (e["network"], e["target"]) not in new]
    nets, targets = list(NETS), [*ATENS, *DEVICES]
    entries.sort(key=lambda e: (nets.index(e["network"]), targets.index(e["target"])))
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, Row._fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(entries)
    page.write_text(_page(entries, command), encoding="utf-8")


def _page(entries: Sequence[dict[str, str]], command: str) -> str:
    first = entries[0]
    most = max(float(e["cpu_seconds"]) for e in entries)
    lines = [
        "# What a first step compiles",
        "",
        f"By `{command}` ({first['versions']}; {platform.machine()}, {first['cpus']} cores). A "
        "training step in bfloat16 is run dry, without a GPU, and with an empty cache. Processor "
        "seconds are of compiling alone, in one process; wall seconds are of two that share the "
        "kernels, their start and their dry runs included. Load: processes that waited for a core "
        "when a row began, beside which wall seconds are to be read. The next run compiled the "
        "kernels of the column *again*.",
        "",
        f"Most processor seconds of a network and target: {most:.1f}. The limit is what two cores "
        f"have in {LIMIT} s; from Triton 3.7 on a run compiles as many kernels at a time as there "
        "are processors.",
        "",
        "| network | target | runs on | launches | kernels | processor s | wall s | again | "
        "slowest kernel, s | images | load |",
        "|---|---|---|--:|--:|--:|--:|--:|---|--:|--:|",
    ]
    names = ("network", "target", "backend", "launches", "kernels", "cpu_seconds", "wall_seconds",
             "again", "slowest", "batch", "load")  # fmt: skip
    lines += ["| " + " | ".join(entry[name] for name in names) + " |" for entry in entries]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns its exit status: 1 if more is compiled than ``LIMIT`` allows."""
    from resnetv2.kernels.inspect.dryrun import DEVICES

    parser = argparse.ArgumentParser(
        prog="python -m bench.compiling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    targets = [*ATENS, *DEVICES]
    parser.add_argument("--net", action="append", choices=list(NETS), help="all if not given")
    parser.add_argument("--target", action="append", choices=targets, help="all if not given")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the table")
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    for net in options.net or NETS:
        for target in options.target or targets:
            row = measure(net, target, options.jobs)
            rows.append(row)
            print(", ".join(f"{k} {v}" for k, v in list(row._asdict().items())[:9]), flush=True)
            given = arguments if arguments is not None else sys.argv[1:]
            command = shlex.join(["python", "-m", "bench.compiling", *given])
            write(options.out, rows, command)
    return int(any(row.cpu_seconds > 2 * LIMIT or row.again for row in rows))


if __name__ == "__main__":
    sys.exit(main())
