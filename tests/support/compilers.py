"""``torch.compile`` in tests: a backend that counts, and the names of what it wrapped."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

needs_inductor = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "clang++")),
    reason="inductor needs a C++ compiler",
)


class Compiler:
    """A backend that counts graphs and the chains in them, and runs them by aot_eager."""

    def __init__(self) -> None:
        self.graphs = self.chains = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        self.chains += sum("chain_forward" in str(node.target) for node in graph.graph.nodes)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


def renamed(result: dict[str, Tensor]) -> dict[str, Tensor]:
    """A compiled module's recording under the names of the module itself."""
    return {name.replace("_orig_mod.", ""): value for name, value in result.items()}
