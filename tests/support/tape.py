"""A stand-in for a CUDA graph where there is no GPU.

``Tape`` records the operators of a step, undoes what they did, and replays them on the tensors of
then. What a graph would bake in, it bakes in; where a graph could not be captured because the host
reads a value, it raises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class HostReads(TorchDispatchMode):
    """Refuses what makes the host wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("the host reads a value of the device\nas no graph can")
        return func(*args, **(kwargs or {}))


class Tape(HostReads):
    """A recorder for tensors on a CPU; see the module."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.ran = self.replayed = 0
        self.captures = 0

    def run(self, work: Callable[[], Tensor]) -> Tensor:
        self.ran += 1
        return work()

    def capture(self, work: Callable[[], Tensor]) -> Tensor:
        self.captures += 1
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.made: set[int] = set()
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        try:
            with self:
                return work()
        finally:
            with torch.no_grad():
                for whole, content in self.before.values():
                    whole.copy_(content)
            self.before.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = {storage(tensor) for tensor in tensors((args, kwargs))}
        named = {**dict(zip([a.name for a in func._schema.arguments], args)), **kwargs}
        for argument in func._schema.arguments:
            # native_batch_norm writes these two, and its schema does not say so.
            silent = argument.name in ("running_mean", "running_var")
            if silent or (argument.alias_info is not None and argument.alias_info.is_write):
                for tensor in tensors(named.get(argument.name)):
                    self.keep(tensor)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.made |= {storage(tensor) for tensor in tensors(result)} - inputs
        self.calls.append((func, args, kwargs, result))
        return result

    def keep(self, tensor: Tensor) -> None:
        """Remember all of the memory that a tensor from outside lies in."""
        where = storage(tensor)
        if where not in self.made and where not in self.before:
            memory = tensor.untyped_storage()
            whole = torch.empty(0, dtype=torch.uint8).set_(memory, 0, (memory.nbytes(),))
            self.before[where] = (whole, whole.clone())

    @torch.no_grad()
    def replay(self) -> None:
        self.replayed += 1
        for func, args, kwargs, recorded in self.calls:
            inputs = {storage(tensor) for tensor in tensors((args, kwargs))}
            result = func(*args, **kwargs)
            for old, new in zip(tensors(recorded), tensors(result), strict=True):
                if storage(old) not in inputs:
                    old.copy_(new)
