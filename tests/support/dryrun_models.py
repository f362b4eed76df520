"""What launches are compiled for, as JSON on stdout: see test_compile.py.

    python -m tests.support.dryrun_models

``matrix``: the launches of the compile matrix, (target, dtype, kernel, digest, grid). ``models``:
those of a training step of ResNet-1001 and ResNet-110 at batch 128 in bf16 on sm_90. ``rows``: of
these the ones that the committed table lacks, compiled. In a process of its own: kernels cannot be
compiled where they are interpreted. A stage has its first unit (which projects) and two identical
ones; the others of its 18 or 111 launch the same kernels as the second.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict

import torch
import torch.nn.functional as F

from resnetv2 import PreActResNet
from resnetv2.kernels.inspect import compile as matrix
from resnetv2.kernels.inspect import compile_report
from resnetv2.kernels.inspect.cases import DTYPES
from resnetv2.kernels.inspect.dryrun import DryRun, dry_run
from tests.support.compile_checks import TABLE

MODELS = {"resnet1001": "bottleneck", "resnet110": "basic"}
BATCH = 128


def training_step(block: str, compiles: Callable[[str], bool]) -> DryRun:
    """One forward and backward under bfloat16 autocast."""
    torch.manual_seed(0)
    model = PreActResNet(block, [3, 3, 3], backend="triton").to(memory_format=torch.channels_last)
    images = torch.randn(BATCH, 3, 32, 32).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (BATCH,))
    with dry_run("sm_90", compiles) as run:
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
    assert not run.failures, run.failures
    return run


def main() -> int:
    listed = [
        (target, dtype, *found)
        for target in matrix.TARGETS
        for dtype in DTYPES
        for found in matrix.listed(target, dtype)
    ]
    known = {row.digest for row in compile_report.read(TABLE)[0]}
    rows, models = [], {}
    for name, block in MODELS.items():
        run = training_step(block, lambda digest: digest not in known)
        new = {(x.kernel.digest, x.grid): x for x in run.launches}
        rows += [asdict(matrix.row("sm_90", "bf16", name, x)) for x in new.values()]
        own = [(x.kernel.name, x.kernel.digest, x.grid) for x in new.values()]
        models[name] = list(dict.fromkeys([*run.listed, *own]))
    print(json.dumps({"matrix": listed, "models": models, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
