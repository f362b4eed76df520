"""Whether this installation is right and fast on this device: ``resnetv2.doctor()``."""

from __future__ import annotations

from collections.abc import Callable

from .report import Diagnosis


def doctor(*, quick: bool = False, say: Callable[[str], None] | None = None) -> Diagnosis:
    """Check whether this installation is right and fast on this device: GPU, or CPU without one.

    Kernels, units of odd shapes, and the steps that are timed are held against float64; two runs,
    and one in a CUDA graph, must have the same bits; a unit, a stage and a deep net are timed
    against eager PyTorch and ``torch.compile``. What cannot be checked here is said.

    Args:
        quick: in half a minute instead of at most three: fewer dtypes, no ``torch.compile``.
        say: is told what is going on, in a few words.

    Returns:
        What was found; it prints as a table with a verdict, and ``write`` keeps it as JSON.

    Raises:
        InputError: ``RESNETV2_BACKEND`` asks for what there is not.
    """
    # Not above: training and its data sets take time to import.
    from .examination import examine

    return examine(quick, say or (lambda text: None))
