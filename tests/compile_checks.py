"""What is asked of compiled convolutions, by the matrix (test_compile) and by real models."""

from resnetv2.kernels import compile as matrix

MULTIPROCESSORS = 132  # an H100's
# Issue cycles over memory cycles that a convolution may take at most (kernel-notes), for bytes that
# a tile touches: operands written once by an elementwise kernel are counted there and here.
RATIOS = {
    ("1x1", "forward"): 0.6,
    ("1x1", "dgrad"): 0.6,
    ("1x1", "wgrad"): 0.6,
    ("3x3", "forward"): 1.6,
    ("3x3", "dgrad"): 1.6,
    ("3x3", "wgrad"): 2.0,
}


def kernel_size(row):
    """ "1x1" or "3x3"."""
    size = row.constants.get("R", row.constants.get("KERNEL_H"))
    return f"{size}x{size}"


def told(rows):
    """The rows as the table shows them, for an assertion's message."""
    return "\n" + matrix.table(rows)
