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
from pathlib import Path

from bench.report import render
from bench.schema import CSV_NAME, REPORTS, Row, device_name, merge, read, versions, write
from bench.suites import SUITES, describe
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
    rows = []
    for number in range(args.steps):
        start = time.perf_counter()
        loss = step(number)
        rows.append(
            Row("extreme depth", case, "segment", f"step {number}", "loss", "", loss, trials=1)
        )
        print(f"step {number:2}: loss {loss:.4f}, {time.perf_counter() - start:.1f} s", flush=True)
    optimizer.zero_grad()
    gradients = sum(p.numel() * p.element_size() for p in model.parameters())
    peak = (peak_bytes(lambda: step(args.steps), cuda) - gradients) / 1e6
    print(f"{args.layers} layers: {peak:.1f} MB beyond parameters, gradients and momentum")
    rows.append(
        Row("extreme depth", case, "segment", "forward+backward", "peak", "MB", peak, trials=1)
    )
    common = {
        "device": device_name(),
        "versions": versions(torch.get_num_threads()),
        "dtype": "fp32",
        "layout": "channels_last",
        "command": shlex.join(["python", "-m", "bench.extreme_depth", *sys.argv[1:]]),
    }
    path = args.out / CSV_NAME
    old = read(path) if path.exists() else []
    write(path, merge(old, describe(rows, common), SUITES))
    render(path.parent)


if __name__ == "__main__":
    main()
