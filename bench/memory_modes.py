"""Memory and time of a training step in each memory mode, against eager and checkpointing.

    python -m bench.memory_modes [--depth 1001] [--batch-size 16] [--rounds 8] [--threads 2]

Each provider has a process of its own, so that no allocator serves two; the processes take their
steps in turns, round after round, so that all see the same machine. A provider whose gradients do
not agree with eager's is not reported. Peak bytes are those of a step's allocations (the
profiler's memory events on a CPU, the allocator's on a GPU) beyond parameters and gradients.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import platform
import re
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from resnetv2.memory import peak_bytes

REPORTS = Path(__file__).parent / "reports"
PROVIDERS = (
    "eager",
    "checkpoint_sequential 5",
    "checkpoint_sequential 10",
    "checkpoint_sequential 20",
    "recompute",
    "invert_h1",
    "invert",
    "segment",
)


def device_name() -> str:
    """A folder's name for this machine's GPU, or for its processor."""
    import torch

    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        name = f"cpu-{platform.machine()}-{multiprocessing.cpu_count()}-cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _model(provider: str, depth: int) -> Any:
    import torch
    from torch.utils.checkpoint import checkpoint_sequential

    from resnetv2 import PreActResNet

    torch.manual_seed(0)
    ours = provider in ("recompute", "invert_h1", "invert", "segment")
    options = {"memory": provider} if ours else {"backend": "eager"}
    model = PreActResNet.from_depth(depth, "bottleneck", **options)
    if provider.startswith("checkpoint"):
        segments = min(int(provider.split()[1]), len(model.stages[0]))
        for stage in model.stages:
            # The stage's blocks, unfused, in PyTorch's own checkpointed sequence.
            blocks = torch.nn.Sequential(*stage)
            stage.forward = lambda x, blocks=blocks: checkpoint_sequential(
                blocks, segments, x, use_reentrant=False
            )
    return model


def _work(provider: str, depth: int, batch: int, threads: int, pipe: Any) -> None:
    """A provider's process: answers "step", "peak" and "gradient" until the pipe closes."""
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(threads)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    model = _model(provider, depth).to(device, memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, 32, 32, generator=generator).to(device)
    x = x.contiguous(memory_format=torch.channels_last)
    labels = (torch.arange(batch) % 10).to(device)

    def step() -> None:
        model.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        if cuda:
            torch.cuda.synchronize()

    while (order := pipe.recv()) is not None:
        if order == "step":
            start = time.perf_counter()
            step()
            pipe.send(time.perf_counter() - start)
        elif order == "gradient":
            pipe.send(torch.stack([p.grad.double().norm() for p in model.parameters()]).tolist())
        elif order == "peak":
            model.zero_grad()
            gradients = sum(p.numel() * p.element_size() for p in model.parameters())
            pipe.send(peak_bytes(step, cuda) - gradients)
        else:
            pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    pipe.close()


def measure(depth: int, batch: int, rounds: int, threads: int) -> list[dict[str, Any]]:
    """One row per provider: peak bytes, milliseconds (p20, p50, p80), both against eager."""
    context = multiprocessing.get_context("spawn")
    pipes = {}
    processes = []
    for provider in PROVIDERS:
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_work, args=(provider, depth, batch, threads, theirs), daemon=True
        )
        process.start()
        pipes[provider] = ours
        processes.append(process)

    def ask(provider: str, order: str) -> Any:
        pipes[provider].send(order)
        return pipes[provider].recv()

    for provider in PROVIDERS:  # first steps fault their pages in
        for _ in range(2):
            ask(provider, "step")
        print(f"{provider}: warm", file=sys.stderr, flush=True)
    expected = ask("eager", "gradient")
    right = []
    for provider in PROVIDERS:
        got = ask(provider, "gradient")
        worst = max(abs(a - b) / (b + 1e-12) for a, b in zip(got, expected))
        if worst > 1e-2:
            print(f"{provider} refused: a gradient's norm is off by {worst:.1e}", file=sys.stderr)
        else:
            right.append(provider)
    times: dict[str, list[float]] = {provider: [] for provider in right}
    for number in range(rounds):
        for provider in right:
            times[provider].append(ask(provider, "step"))
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    resident = {provider: ask(provider, "resident") for provider in right}
    peaks = {provider: ask(provider, "peak") for provider in right}
    for provider in PROVIDERS:
        pipes[provider].send(None)
    for process in processes:
        process.join()
    rows = []
    for provider in right:
        seconds = times[provider]
        p20, p50, p80 = (statistics.quantiles(seconds, n=10)[i] for i in (1, 4, 7))
        ratios = [a / b for a, b in zip(seconds, times["eager"])]
        rows.append(
            {
                "provider": provider,
                "depth": depth,
                "batch": batch,
                "peak_mb": round(peaks[provider] / 1e6, 1),
                "peak_to_eager": round(peaks[provider] / peaks["eager"], 3),
                "ms_p20": round(1e3 * p20),
                "ms_p50": round(1e3 * p50),
                "ms_p80": round(1e3 * p80),
                "time_to_eager": round(statistics.median(ratios), 3),
                "resident_mb": round(resident[provider] / 1e6),
            }
        )
    return rows


def table(path: Path) -> str:
    """The Markdown table of a report, with the conditions under it; the README holds a copy."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = ["| provider | peak | of eager | a step | of eager |", "|---|---|---|---|---|"]
    lines += [
        f"| `{r['provider']}` | {r['peak_mb']} MB | {r['peak_to_eager']}x "
        f"| {r['ms_p50']} ms | {r['time_to_eager']}x |"
        for r in rows
    ]
    r = rows[0]
    lines += [
        "",
        f"ResNet-{r['depth']} (bottleneck) at 32x32, batch {r['batch']}, {r['dtype']}, "
        f"{r['layout']}; {r['device']}, {r['threads']} threads, torch {r['torch']}; median of "
        f"{r['trials']} interleaved steps, each provider in a process of its own; peak of a step's "
        f"allocations beyond parameters and gradients. `{r['command']}`",
    ]
    return "\n".join(lines)


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=1001)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    rows = measure(args.depth, args.batch_size, args.rounds, args.threads)
    common = {
        "device": device_name(),
        "threads": args.threads,
        "torch": torch.__version__,
        "dtype": "fp32",
        "layout": "channels_last",
        "trials": args.rounds,
        "command": f"python -m bench.memory_modes --depth {args.depth} --batch-size "
        f"{args.batch_size} --rounds {args.rounds} --threads {args.threads}",
    }
    folder = REPORTS / device_name()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"memory-modes-{args.depth}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *common])
        writer.writeheader()
        writer.writerows({**row, **common} for row in rows)
    for row in rows:
        print(
            f"{row['provider']:26} {row['peak_mb']:>9,} MB  {row['peak_to_eager']:6.3f}x  "
            f"{row['ms_p50']:>6} ms  {row['time_to_eager']:.2f}x"
        )
    print(path)


if __name__ == "__main__":
    main()
