"""Time that the host takes for a residual unit, forward and backward, with a GPU that does nothing.

    env -u TRITON_INTERPRET python tests/support/host_time.py [--block basic] [--precision float32]

The real launcher over the stub (stub_driver.py), one thread, process time: the difference between
two stages of different depths, least of several steps, divided by the difference of their depths.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2])]

import torch  # noqa: E402

from tests.support import stub_driver  # noqa: E402

BLOCKS = {"basic": 16, "bottleneck": 64}


def step_seconds(block: str, depth: int, dtype: torch.dtype, steps: int) -> list[float]:
    """Process time of ``steps`` forward and backward passes of a stage of ``depth`` units each."""
    from resnetv2 import PreActResNet

    model = PreActResNet(block, [depth, 1, 1], backend="triton").to(
        memory_format=torch.channels_last
    )
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    seconds = []
    for _ in range(steps + 2):
        model.zero_grad()
        start = time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
            out = model(x)
        out.sum().backward()
        seconds.append(time.process_time() - start)
    return seconds[2:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--block", choices=BLOCKS, default="bottleneck")
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--depths", type=int, nargs=2, default=(4, 36))
    options = parser.parse_args()
    torch.set_num_threads(1)
    stub_driver.install()
    dtype = getattr(torch, options.precision)
    few, many = (step_seconds(options.block, d, dtype, options.steps) for d in options.depths)
    units = options.depths[1] - options.depths[0]
    for name, of in (("least", min), ("median", statistics.median)):
        print(f"{name}: {(of(many) - of(few)) / units * 1e6:.0f} us a {options.block} unit")
    return 0


if __name__ == "__main__":
    sys.exit(main())
