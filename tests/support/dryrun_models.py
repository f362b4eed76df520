"""A training step of ResNet-1001 and ResNet-110 at batch 128 in a dry run, as JSON on stdout.

    python -m tests.support.dryrun_models [--target sm_90] [--known FILE]

Run by test_compile.py in a process of its own: kernels cannot be compiled where they are
interpreted. A stage has its first unit (which projects) and two identical ones; the others of its
18 or 111 launch the same kernels as the second. Kernels that the file names, a list of (key, grid),
are not described again: counting the instructions of one takes half a second.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F

from resnetv2 import PreActResNet
from resnetv2.kernels.inspect import compile as matrix
from resnetv2.kernels.inspect.dryrun import Launch, dry_run

MODELS = {"resnet1001": "bottleneck", "resnet110": "basic"}
BATCH = 128


def training_step(block: str, target: str) -> list[Launch]:
    """The launches of one forward and backward under bfloat16 autocast."""
    torch.manual_seed(0)
    model = PreActResNet(block, [3, 3, 3], backend="triton").to(memory_format=torch.channels_last)
    images = torch.randn(BATCH, 3, 32, 32).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (BATCH,))
    with dry_run(target) as run:
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
    assert not run.failures, run.failures
    return run.launches


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="sm_90")
    parser.add_argument("--known", type=Path)
    options = parser.parse_args()
    target = options.target
    listed = json.loads(options.known.read_text()) if options.known else []
    known = {(key, tuple(grid)) for key, grid in listed}
    result = {}
    for name, block in MODELS.items():
        launches = training_step(block, target)
        distinct = {(x.kernel.key, x.grid): x for x in launches}
        result[name] = {
            "kernels": list(distinct),
            "rows": [
                asdict(matrix.row(target, "bf16", name, x))
                for at, x in distinct.items()
                if at not in known
            ],
        }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
