"""ReLU, GELU and SiLU in pre-activation units."""

from __future__ import annotations

from ..data.batches import ImageData
from .comparing import STACK, TRAINING, Factory, library_network, report
from .harness import Comparison, Result, StudyOptions, compare, study

RELU = "ReLU"
ACTIVATIONS = {RELU: "relu", "GELU": "gelu", "SiLU": "silu"}


def variants(options: StudyOptions, data: ImageData) -> dict[str, Factory]:
    """`PreActResNet` with each activation."""
    return {name: library_network(options, data, act=act) for name, act in ACTIVATIONS.items()}


def summarise(comparison: Comparison, options: StudyOptions, data: ImageData) -> Result:
    """Tables, conclusions and figures from the histories."""
    return report(comparison, options, data, RELU)


@study(
    "activations",
    title="ReLU, GELU and SiLU",
    question="Does a smooth activation change what a pre-activation net learns?",
    defaults={**TRAINING, "epochs": 8, "seeds": 3},
    presets={"cifar10": STACK},
)
def activations(options: StudyOptions) -> Result:
    """Train a net with each activation and compare them."""
    data = options.load()
    return summarise(compare(variants(options, data), data, options), options, data)
