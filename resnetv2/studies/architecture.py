"""The two blocks side by side, drawn from the modules themselves.

A block is traced symbolically child by child (torch.fx); what is drawn and counted is its graph,
so that a block whose code changes has another diagram.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from ..blocks import PreActBlock, PreActUnit
from .harness import Result, StudyOptions, Table, study
from .variants import post_activation_block
from .visualizer import ResNetV2Visualizer

POST, PRE = "post-activation (ResNet V1)", "pre-activation (ResNet V2)"
SIZE = 32


@dataclass(frozen=True)
class Node:
    """One operation of a block.

    Args:
        name: of the child, or of the function.
        label: what is written into the diagram's box.
        kind: "input", "norm", "act", "conv", "add" or "other".
        inputs: names of the nodes that it reads.
        shape: of its output, without the batch.
        parameters: of the child.
        level: longest way from the input, in operations.
        main: whether it is on the longest way from input to output, the residual path.
    """

    name: str
    label: str
    kind: str
    inputs: tuple[str, ...]
    shape: tuple[int, ...]
    parameters: int
    level: int
    main: bool


@dataclass(frozen=True)
class Diagram:
    """A block's operations in the order of the computation; the last is its output."""

    nodes: tuple[Node, ...]

    def __getitem__(self, name: str) -> Node:
        return next(node for node in self.nodes if node.name == name)

    def shortest_path(self) -> list[Node]:
        """From input to output through as few operations as there can be: the shortcut."""
        paths: dict[str, list[Node]] = {}
        for node in self.nodes:
            before = min((paths[name] for name in node.inputs), key=len, default=[])
            paths[node.name] = [*before, node]
        return paths[self.nodes[-1].name]

    def after_addition(self) -> list[Node]:
        """What the sum of shortcut and residual still passes: f in equation (2)."""
        last = max(i for i, node in enumerate(self.nodes) if node.kind == "add")
        return list(self.nodes[last + 1 :])


class _Children(nn.Module):
    """A block run child by child, whatever kernels it would use."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Any:
        if isinstance(self.block, PreActUnit):
            return self.block.forward_children(x)
        return self.block(x)


def trace(block: nn.Module, channels: int, size: int = SIZE) -> Diagram:
    """The operations of `block` on an image (channels, size, size)."""
    module = fx.symbolic_trace(_Children(block))
    training = block.training
    # In eval mode: the shapes are wanted, not new running statistics.
    ShapeProp(module.eval()).propagate(torch.zeros(1, channels, size, size))
    block.train(training)
    graph = [node for node in module.graph.nodes if node.op != "output"]
    levels: dict[str, int] = {}
    for node in graph:
        levels[node.name] = 1 + max((levels[n.name] for n in node.all_input_nodes), default=-1)
    on_main: set[str] = set()
    here: fx.Node | None = graph[-1]
    while here is not None:
        on_main.add(here.name)
        here = max(here.all_input_nodes, key=lambda n: levels[n.name], default=None)
    nodes = []
    for node in graph:
        child = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        kind, label = _describe(node, child)
        nodes.append(
            Node(
                name=node.name,
                label=label,
                kind=kind,
                inputs=tuple(n.name for n in node.all_input_nodes),
                shape=tuple(node.meta["tensor_meta"].shape[1:]),
                parameters=sum(p.numel() for p in child.parameters()) if child else 0,
                level=levels[node.name],
                main=node.name in on_main,
            )
        )
    return Diagram(tuple(nodes))


def _describe(node: fx.Node, child: nn.Module | None) -> tuple[str, str]:
    """Kind and label of an operation."""
    if node.op == "placeholder":
        return "input", "x"
    if isinstance(child, nn.Conv2d):
        height, width = child.kernel_size
        stride = f", stride {child.stride[0]}" if child.stride[0] > 1 else ""
        return "conv", f"{height}x{width} conv, {child.out_channels}{stride}"
    if isinstance(child, nn.BatchNorm2d):
        return "norm", "BN"
    if child is not None:
        is_activation = type(child).__module__ == "torch.nn.modules.activation"
        return "act" if is_activation else "other", type(child).__name__
    name = getattr(node.target, "__name__", str(node.target))
    return ("add", "+") if name in ("add", "iadd") else ("other", name)


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
    """What the graphs say about the way from input to output over the shortcut."""
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
