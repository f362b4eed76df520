"""Launches and distinct bytes of a unit in the middle of a chain: within budget, and as documented.

A unit's share is what a chain of two units takes more than a chain of one: the first unit's own
moments and what is done once a chain (running statistics) are no unit's. Bytes of activations, in
units of w channels times M rows, are held against the budget. Two kinds are counted and bounded
apart, since they do not grow with the activations: the weights and their gradients, with the
workspace of a split weight gradient; and values per channel, or per channel and tile of rows.
"""

import re
from pathlib import Path

import pytest
import torch

from resnetv2 import BottleneckPreActBlock, PreActBlock
from resnetv2.core.reading import Reading
from resnetv2.core.run import run_chain

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("bytes are counted in Triton's interpreter", allow_module_level=True)
counting = pytest.importorskip("resnetv2.kernels.inspect.counting")

README = Path(__file__).parents[2] / "kernels" / "README.md"
BATCH, SIZE, WIDTH = 4, 8, 16
ROWS = BATCH * SIZE * SIZE
ITEM = 4  # bytes of a float32
BLOCKS = {"bottleneck": (BottleneckPreActBlock, 4 * WIDTH), "basic": (PreActBlock, WIDTH)}

# (bytes in w*M, launches). Each operand of a 3x3 that an elementwise kernel writes once
# may add 2w and one launch: that kernel writes w, and the convolution reads that instead of h. A
# gradient made of two tensors (A*q + B*h + C) is read once where it was read twice by then.
BUDGET = {
    ("bottleneck", "forward"): (16, 3),
    ("bottleneck", "backward"): (32, 4),
    ("basic", "forward"): (5, 2),
    ("basic", "backward"): (15, 4),
}
# Operands written once: z of each 3x3 in both directions, and in the backward a waiting gradient.
MOST_WRITTEN = {
    ("bottleneck", "forward"): 1,
    ("bottleneck", "backward"): 2,
    ("basic", "forward"): 2,
    ("basic", "backward"): 3,
}


def is_activation(tensor):
    return len(tensor.shape) == 4 and tensor.shape[0] == BATCH


def run(kind, units, **options):
    torch.manual_seed(0)
    block, channels = BLOCKS[kind]
    units = [block(channels, channels, backend="triton", **options) for _ in range(units)]
    x = torch.randn(BATCH, channels, SIZE, SIZE).to(memory_format=torch.channels_last)
    x.requires_grad_()
    with counting.count() as forward:
        out = run_chain(
            [Reading(block.unit_modules()) for block in units],
            x,
            backend="triton",
            memory="recompute",
        )
    g = torch.randn_like(out)
    with counting.count() as backward:
        out.backward(g)
    return {"forward": forward, "backward": backward}


@pytest.fixture(scope="module")
def counted():
    """(kind, direction) to the counts of chains of one and of two units."""
    return {
        (kind, direction): (one[direction], two[direction])
        for kind in BLOCKS
        for one, two in [(run(kind, 1), run(kind, 2))]
        for direction in ("forward", "backward")
    }


CASES = pytest.mark.parametrize("case", list(BUDGET), ids="-".join)


def written_operands(launches):
    """Launches that do nothing but write an operand of a convolution."""
    return sum(
        2 * (launch.name == "_operands_kernel")
        + (launch.name == "_norm_act_kernel")
        + (launch.name == "_input_grad_kernel" and "identity_ptr" not in launch.tensors)
        for launch in launches
    )


@CASES
def test_bytes_of_activations(counted, case):
    one, two = counted[case]
    moved = [sum(launch.bytes_where(is_activation) for launch in c.launches) for c in (one, two)]
    written = written_operands(two.launches) - written_operands(one.launches)
    assert written <= MOST_WRITTEN[case]
    assert (moved[1] - moved[0]) / (ITEM * WIDTH * ROWS) <= BUDGET[case][0] + 2 * written


@CASES
def test_launches(counted, case):
    one, two = counted[case]
    written = written_operands(two.launches) - written_operands(one.launches)
    kernels = len(two.launches) - len(one.launches)
    aten = len(two.aten) - len(one.aten)
    assert kernels + aten <= BUDGET[case][1] + written, f"{kernels} kernels and {aten} of ATen's"


@CASES
def test_readme_has_the_counts(counted, case):
    """kernels/README.md, "Bytes and launches"."""
    one, two = counted[case]
    cell = r"(\d+)w, (\d+) launches"
    row = re.search(rf"^\| {case[0]} \| {cell} \| {cell} \|$", README.read_text("utf-8"), re.M)
    assert row, "the table is gone"
    moved = [sum(launch.bytes_where(is_activation) for launch in c.launches) for c in (one, two)]
    launches = [len(c.launches) + len(c.aten) for c in (one, two)]
    documented = row.groups()[:2] if case[1] == "forward" else row.groups()[2:]
    assert documented == (
        f"{(moved[1] - moved[0]) / (ITEM * WIDTH * ROWS):.0f}",
        f"{launches[1] - launches[0]}",
    )


@CASES
def test_aten_touches_no_activation(counted, case):
    """What is left to ATen works on channels: its bytes would not have been counted."""
    for c in counted[case]:
        assert all(op.numel < WIDTH * ROWS for op in c.aten), c.aten


def small_bytes(counted):
    """Distinct bytes of weights, their gradients and workspaces; and of all else that is small."""
    weights = channels = 0
    for launch in counted.launches:
        for name, tensor in launch.tensors.items():
            if is_activation(tensor):
                continue
            if name == "workspace_ptr" or len(tensor.shape) == 4:
                weights += tensor.read + tensor.written
            else:
                channels += tensor.read + tensor.written
    return weights, channels


@CASES
def test_bytes_of_weights_and_channels(counted, case):
    kind, direction = case
    one, two = (small_bytes(c) for c in counted[case])
    block, channels = BLOCKS[kind]
    weights = sum(p.numel() for p in block(channels, channels).parameters() if p.dim() == 4)
    # Forward: read once. Backward: read at most twice (a dgrad run again), dW written once, and at
    # most five splits of the workspace written and read (the interpreter is one multiprocessor).
    most = 1 if direction == "forward" else 2 + 1 + 2 * 5
    assert two[0] - one[0] <= most * weights * ITEM
    # Each norm: three values a tile of at least 64 rows and channel, written and read, as many a
    # group of tiles, and at most 40 a channel: statistics, coefficients and affine parameters.
    norms = (channels + 2 * WIDTH) if kind == "bottleneck" else 2 * channels
    assert two[1] - one[1] <= norms * ITEM * (7 * ROWS // 64 + 40)


@pytest.mark.parametrize("kind", BLOCKS)
def test_first_unit_reads_x_once_more(counted, kind):
    """Only a chain's first norm has to read its input for moments."""
    for number, c in enumerate(counted[kind, "forward"]):
        names = [launch.name for launch in c.launches]
        assert names.count("_moments_kernel") == 1, f"chain of {number + 1}"


def test_a_unit_of_group_norms():
    """kernels/README.md, "Norms over groups": outside of its convolutions, which are ATen's."""
    one, two = (run("basic", units, norm="group:4") for units in (1, 2))
    found = []
    for direction in ("forward", "backward"):
        small, large = one[direction], two[direction]
        moved = [
            sum(launch.bytes_where(is_activation) for launch in c.launches) for c in (small, large)
        ]
        launches = len(large.launches) - len(small.launches)
        found.append(f"{(moved[1] - moved[0]) / (ITEM * WIDTH * ROWS):.0f}w in {launches} launches")
        others = {op.name for op in large.aten if op.numel >= WIDTH * ROWS}
        assert all("conv" in name for name in others), others
    assert f"moves {found[0]} forward and {found[1]} backward outside" in README.read_text("utf-8")
