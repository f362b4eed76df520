"""Orders of BN, ReLU, convolution and addition within a unit (Figure 4, Table 2)."""

from __future__ import annotations

from collections.abc import Mapping

from ..data.batches import ImageData
from .comparing import PAPER, TRAINING, Factory, network, report
from .harness import Comparison, Result, StudyOptions, compare, study
from .variants import (
    BN_AFTER_ADDITION,
    BN_CONV,
    FULL_PREACTIVATION,
    ORIGINAL,
    RELU_BEFORE_ADDITION,
    RELU_BN_CONV,
    RELU_ONLY_PREACTIVATION,
)

ORDERINGS = (
    ORIGINAL,
    BN_AFTER_ADDITION,
    RELU_BEFORE_ADDITION,
    RELU_ONLY_PREACTIVATION,
    FULL_PREACTIVATION,
    RELU_BN_CONV,
    BN_CONV,
)

# Test error on CIFAR-10, ResNet-110.
TABLE_2: Mapping[str, str | float] = {
    ORIGINAL.name: 6.61,
    BN_AFTER_ADDITION.name: 8.17,
    RELU_BEFORE_ADDITION.name: 7.84,
    RELU_ONLY_PREACTIVATION.name: 6.71,
    FULL_PREACTIVATION.name: 6.37,
}


def variants(options: StudyOptions, data: ImageData) -> dict[str, Factory]:
    """Table 2's five orders, and two with the pre-activation itself reordered or cut."""
    return {each.name: network(options, data, ordering=each) for each in ORDERINGS}


def summarise(comparison: Comparison, options: StudyOptions, data: ImageData) -> Result:
    """Tables, conclusions and figures from the histories."""
    return report(
        comparison,
        options,
        data,
        FULL_PREACTIVATION.name,
        paper=("Table 2 (ResNet-110, CIFAR-10)", TABLE_2),
        conclusions=[order_of_table_2(comparison)],
        notes=[
            f'"{FULL_PREACTIVATION.name}" is BN-ReLU-conv. In "{BN_CONV.name}" the only ReLU left '
            "is the one before the pooling."
        ],
    )


def order_of_table_2(comparison: Comparison) -> str:
    """How many of Table 2's pairs stand the same way round here, by mean test accuracy."""
    names = [name for name in comparison.histories if name in TABLE_2]
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    same = 0
    for a, b in pairs:
        here = comparison.difference(a, b).mean
        there = float(TABLE_2[b]) - float(TABLE_2[a])
        same += here * there > 0
    return (
        f"Of the {len(pairs)} pairs of Table 2's orders, {same} stand here as in the paper, by "
        "mean test accuracy (by chance half of them would)."
    )


@study(
    "ordering",
    title="The order of BN, ReLU, convolution and addition",
    question=(
        "Where in the unit should norm and activation stand: after the convolution, before it, "
        "before or after the addition? (Table 2)"
    ),
    defaults={**TRAINING, "depth": 56, "epochs": 6},
    presets={"paper": PAPER},
)
def ordering(options: StudyOptions) -> Result:
    """Train a net of each order and compare them."""
    data = options.load()
    return summarise(compare(variants(options, data), data, options), options, data)
