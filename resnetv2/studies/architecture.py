"""The two blocks side by side, drawn from the modules themselves.

What is drawn and counted is the graph that `trace` finds.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..blocks import PreActBlock
from .harness import Result, StudyOptions, Table, study
from .tracing import Diagram, trace
from .variants import post_activation_block
from .visualizer import ResNetV2Visualizer

POST, PRE = "post-activation (ResNet V1)", "pre-activation (ResNet V2)"


@study(
    "architecture",
    title="Architecture: post- and pre-activation blocks",
    question="Where do norm and activation stand, and what lies on the shortcut's way?",
    defaults={"width": 64},
)
def architecture(options: StudyOptions) -> Result:
    """Diagrams of both blocks, with and without a change of shape, and their operations."""
    w = options.width
    blocks: dict[str, dict[str, nn.Module]] = {
        "same shape": {POST: post_activation_block(w, w), PRE: PreActBlock(w, w)},
        "stride 2": {POST: post_activation_block(w, 2 * w, 2), PRE: PreActBlock(w, 2 * w, 2)},
    }
    visualizer = ResNetV2Visualizer()
    tables, figures, conclusions = [], {}, []
    for case, pair in blocks.items():
        diagrams = {name: trace(block, w) for name, block in pair.items()}
        rows = [
            [name, i, node.label, "x".join(map(str, node.shape)), node.parameters, node.main]
            for name, diagram in diagrams.items()
            for i, node in enumerate(diagram.nodes)
        ]
        columns = ["block", "step", "operation", "output", "parameters", "on the residual path"]
        tables.append(Table(f"Operations, {case}", columns, rows))
        figures[f"blocks-{case.replace(' ', '-')}"] = visualizer.plot_architecture(diagrams)
        conclusions += _conclusions(case, diagrams)
    return Result(tables, conclusions, figures)


def _conclusions(case: str, diagrams: Mapping[str, Diagram]) -> list[str]:
    """Sentences about the way from input to output over the shortcut, from the graphs."""
    sentences = []
    for name, diagram in diagrams.items():
        way = [node.label for node in diagram.shortest_path()[1:] if node.kind != "add"]
        after = [node.label for node in diagram.after_addition()]
        order = " → ".join(node.label for node in diagram.nodes if node.main and node.inputs)
        passes = f"passes {' → '.join(way)}" if way else "passes nothing but the addition"
        ends = f"{' → '.join(after)} follows" if after else "nothing follows"
        sentences.append(
            f"{name}, {case}: {order}; the shortcut's way from input to output {passes}; "
            f"{ends} the addition."
        )
    totals = [sum(node.parameters for node in diagram.nodes) for diagram in diagrams.values()]
    same = "the same number of" if len(set(totals)) == 1 else "different numbers of"
    counts = " and ".join(f"{total:,}" for total in totals)
    sentences.append(f"Both blocks have {same} parameters, {case}: {counts}.")
    return sentences
