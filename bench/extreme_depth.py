"""10,001 layers on real images: 20 steps in memory mode `segment`, and what one of them needs.

    python -m bench.extreme_depth DATA [--layers 10001] [--batch-size 4] [--steps 20]

DATA is what ``resnetv2 train --data`` takes. The steps go over two batches of randomly drawn images
in turn; the losses and the peak of a step's allocations beyond parameters, gradients and momentum
become the suite "extreme depth" of the device's report.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path

from bench.report import render
from bench.schema import MODE, REPORTS, Row, device_name, renew
from resnetv2.planning.memory import peak_bytes


def main() -> None:
    import torch
    import torch.nn.functional as F

    from resnetv2 import PreActResNet
    from resnetv2.data.datasets import load_data

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--layers", type=int, default=10001)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--out", type=Path, default=REPORTS / device_name())
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    data = load_data(args.data, cache="memory")
    generator = torch.Generator().manual_seed(0)
    picked = torch.randperm(len(data.train), generator=generator)[: 2 * args.batch_size]
    mean, std = data.statistics()
    images = ((data.train.images[picked].float() - mean) / std).permute(0, 3, 1, 2)
    labels = data.train.labels[picked]
    units = (args.layers - 2) // 9
    torch.manual_seed(0)
    model = PreActResNet("bottleneck", [units] * 3, in_channels=data.channels, memory="segment")
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)

    def step(number: int) -> float:
        part = slice(number % 2 * args.batch_size, (number % 2 + 1) * args.batch_size)
        x = images[part].to(device).contiguous(memory_format=torch.channels_last)
        loss = F.cross_entropy(model(x), labels[part].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    case = f"bottleneck ResNet-{args.layers}, batch {args.batch_size}"
    blank = Row("extreme depth", case, "segment", MODE, "peak", "MB", None, trials=1, dtype="fp32")
    rows = []
    for number in range(args.steps):
        start = time.perf_counter()
        loss = step(number)
        rows.append(replace(blank, mode=f"step {number}", metric="loss", unit="", value=loss))
        print(f"step {number:2}: loss {loss:.4f}, {time.perf_counter() - start:.1f} s", flush=True)
    optimizer.zero_grad()
    gradients = sum(p.numel() * p.element_size() for p in model.parameters())
    peak = (peak_bytes(lambda: step(args.steps), cuda) - gradients) / 1e6
    print(f"{args.layers} layers: {peak:.1f} MB beyond parameters, gradients and momentum")
    rows.append(replace(blank, value=peak))
    command = shlex.join(["python", "-m", "bench.extreme_depth", *sys.argv[1:]])
    renew(args.out, rows, torch.get_num_threads(), command)
    render(args.out)


if __name__ == "__main__":
    main()
