"""A block as records: its operations as a graph, and its values step by step.

A block is traced symbolically child by child (torch.fx), so that a block whose code changes has
another graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from ..blocks import PreActBlock, PreActUnit

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
        """The operations after the sum of shortcut and residual: f in equation (2)."""
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


@dataclass(frozen=True)
class Step:
    """One step of a block: what it is and its output (N, C, H, W)."""

    name: str
    what: str
    output: Tensor


def trace_block(block: PreActBlock, x: Tensor) -> list[Step]:
    """The steps of a block whose shape stays, by hand; the last output is the block's."""
    steps = [Step("x", "input", x)]
    for i, (bn, conv) in enumerate(((block.bn1, block.conv1), (block.bn2, block.conv2)), 1):
        h = bn(steps[-1].output)
        z = F.relu(h)
        steps += [
            Step(f"bn{i}", "batch norm", h),
            Step(f"relu{i}", "F.relu", z),
            Step(f"conv{i}", "3x3 convolution" + ("" if i == 1 else ": F(x)"), conv(z)),
        ]
    return [*steps, Step("out", "x + F(x)", x + steps[-1].output)]
