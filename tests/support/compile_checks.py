"""What is asked of compiled convolutions, by the matrix (test_compile) and by real models."""

from pathlib import Path

from resnetv2.kernels.inspect import compile as matrix

TABLE = Path(__file__).parents[2] / "bench" / "reports" / "compile"
MULTIPROCESSORS = 132  # an H100's
# Issue cycles over memory cycles that a convolution may take at most (kernels/README.md, "What the
# compiler says"), for bytes that a tile touches: operands written once by an elementwise kernel are
# counted there and here.
RATIOS = {
    ("1x1", "forward"): 0.6,
    ("1x1", "dgrad"): 0.6,
    ("1x1", "wgrad"): 0.6,
    ("1x1", "backward"): 0.6,
    ("3x3", "forward"): 1.6,
    ("3x3", "dgrad"): 1.6,
    ("3x3", "wgrad"): 2.0,
}


def kernel_size(row):
    """ "1x1" or "3x3"."""
    size = row.constants["R"]
    return f"{size}x{size}"


def told(rows):
    """The rows as the table shows them, for an assertion's message."""
    return "\n" + matrix.table(rows)


def _passes(row):
    """What tells the passes of one dgrad from another dgrad."""
    names = ("C", "K", "H", "W", "P", "Q", "R", "S")
    return tuple(row.constants[name] for name in names)


def over_the_ratio(rows):
    """The convolutions whose ratio of issue to memory cycles is over ``RATIOS``.

    A dgrad that is run twice, for its sums and then for dx, is one operation: its
    passes are judged together, by the cycles of both.
    """
    second = {_passes(r): r for r in rows if r.convolution == "dgrad" and "sums_ptr" in r.constants}
    over = []
    for r in rows:
        if not r.convolution:
            continue
        ratio = r.tile_ratio
        if r.convolution == "dgrad" and "out_ptr" in r.constants and _passes(r) in second:
            passes = (r, second[_passes(r)])
            issue = sum(x.instructions * x.num_warps for x in passes)
            ratio = issue / sum(x.instructions * x.num_warps / x.tile_ratio for x in passes)
        if not ratio <= RATIOS[kernel_size(r), r.convolution]:
            over.append(r)
    return over
