"""Pre- and post-activation units in one net."""

from __future__ import annotations

from ..data.batches import ImageData
from .comparing import STACK, TRAINING, Factory, network, report
from .harness import Comparison, Result, StudyOptions, compare, study
from .variants import FULL_PREACTIVATION, ORIGINAL, Ordering, layout

ALL_PRE = "all pre-activation"


def mixes(count: int) -> dict[str, list[Ordering]]:
    """The ordering of each of `count` units, by the mix's name."""
    half = count // 2
    pre, post = FULL_PREACTIVATION, ORIGINAL
    return {
        "all post-activation": [post] * count,
        "post, then pre": [post] * half + [pre] * (count - half),
        "pre, then post": [pre] * half + [post] * (count - half),
        "alternating": [post if index % 2 else pre for index in range(count)],
        ALL_PRE: [pre] * count,
    }


def variants(options: StudyOptions, data: ImageData) -> dict[str, Factory]:
    """Nets of each mix; the first unit decides about the stem, the last about the head."""
    layers, _ = layout(options.one_depth, options.width, options.stages)
    return {
        name: network(options, data, ordering=orderings)
        for name, orderings in mixes(sum(layers)).items()
    }


def summarise(comparison: Comparison, options: StudyOptions, data: ImageData) -> Result:
    """Tables, conclusions and figures from the histories."""
    layers, _ = layout(options.one_depth, options.width, options.stages)
    count = sum(layers)
    clean = {name: sum(o is FULL_PREACTIVATION for o in mix) for name, mix in mixes(count).items()}
    return report(
        comparison,
        options,
        data,
        ALL_PRE,
        conclusions=[dose(comparison, clean)],
        notes=[
            f"Of {count} units, pre-activation ones: "
            + ", ".join(f"{name} {number}" for name, number in clean.items())
            + "."
        ],
    )


def dose(comparison: Comparison, clean: dict[str, int]) -> str:
    """Whether mixes lie between their parts in test accuracy."""
    ends = [comparison.spread(name).mean for name in ("all post-activation", ALL_PRE)]
    mixed = [name for name in comparison.histories if 0 < clean[name] < max(clean.values())]
    between = [n for n in mixed if min(ends) <= comparison.spread(n).mean <= max(ends)]
    return (
        f"{len(between)} of {len(mixed)} mixes lie between the two pure nets in mean test accuracy"
        + (f": {', '.join(between)}." if between else ".")
    )


@study(
    "hybrid",
    title="Pre- and post-activation units mixed",
    question="Does a net need all of its identity paths clean, or does a part of them do?",
    defaults={**TRAINING, "depth": 56, "epochs": 6},
    presets={"cifar10": STACK},
)
def hybrid(options: StudyOptions) -> Result:
    """Train a net of each mix and compare them."""
    data = options.load()
    return summarise(compare(variants(options, data), data, options), options, data)
