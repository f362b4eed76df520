"""Units without BN, with BN after and with BN before each convolution."""

from __future__ import annotations

from ..data.batches import ImageData
from .comparing import STACK, TRAINING, Factory, network, report
from .harness import Comparison, Result, Spread, StudyOptions, compare, study
from .variants import BN_AFTER_CONV, BN_BEFORE_CONV, NO_BN


def variants(options: StudyOptions, data: ImageData) -> dict[str, Factory]:
    """Three nets that differ in BN alone: ReLU stands before every convolution in all of them."""
    return {
        each.name: network(options, data, ordering=each)
        for each in (NO_BN, BN_AFTER_CONV, BN_BEFORE_CONV)
    }


def summarise(comparison: Comparison, options: StudyOptions, data: ImageData) -> Result:
    """Tables, conclusions and figures from the histories."""
    return report(
        comparison,
        options,
        data,
        BN_BEFORE_CONV.name,
        conclusions=[first_gradients(comparison)],
        notes=["The identity path is clean and ReLU stands before each convolution in all three."],
    )


def first_gradients(comparison: Comparison) -> str:
    """Gradient norms of the first epoch, over seeds."""
    parts = [
        f"{name} {Spread(tuple(run.gradient_norms[0] for run in runs))}"
        for name, runs in comparison.histories.items()
    ]
    return f"Gradient norm over the first epoch: {', '.join(parts)}."


@study(
    "bn-position",
    title="No BN, BN after and BN before the convolution",
    question="What does batch norm do for a deep net, and does its side of the convolution matter?",
    # 25 blocks, of fewer channels than the preset's 64 to end in minutes on a CPU.
    defaults={**TRAINING, "depth": 50, "stages": 1, "epochs": 5, "seeds": 3},
    presets={"cifar10": STACK},
)
def bn_position(options: StudyOptions) -> Result:
    """Train the three nets and compare them."""
    data = options.load()
    return summarise(compare(variants(options, data), data, options), options, data)
