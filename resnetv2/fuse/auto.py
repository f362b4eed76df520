"""``fuse(model, memory="auto")``: the fastest memory mode that fits a budget.

What a step holds depends on the shapes of its inputs. So the model chooses at its first training
step, and again where a step's inputs are of another shape or dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.utils._pytree import tree_leaves, tree_map_only

from ..core.checks import is_followed
from ..core.footprint import Footprint, footprint, without_memory
from ..core.memory import (
    BudgetError,
    ModeCost,
    choose_mode,
    format_budget,
    format_bytes,
    parse_bytes,
    planned_gpu,
    step_limit,
)
from ..core.meta import MetaPrograms
from ..names import AUTO, MEMORY_MODES

# The attribute that ``fuse`` leaves in a block.
FUSION = "_resnetv2_fusion"


def check_memory(memory: str, budget: str | int | None) -> None:
    """Refuse what ``fuse`` cannot honour.

    Raises:
        ValueError: an unknown mode or budget, or one that the other does not go with.
    """
    if memory not in (*MEMORY_MODES, AUTO):
        raise ValueError(f"memory must be one of {', '.join(MEMORY_MODES)}, auto, got {memory!r}")
    if budget is not None:
        parse_bytes(budget)
        if memory != AUTO:
            raise ValueError(
                f'budget is for memory "auto", which chooses by it: got budget {budget!r} with '
                f"memory {memory!r}"
            )
    elif memory == AUTO and not torch.cuda.is_available():
        raise ValueError('memory="auto" needs a budget where there is no GPU')


class AutoMemory:
    """Called before a fused model's forward: lets its blocks run in the mode that fits.

    chosen: the mode's row by the inputs' shapes and dtypes, autocast's dtype, and training or not.
    """

    def __init__(self, budget: str | int | None) -> None:
        self.budget = budget
        self.chosen: dict[Any, ModeCost] = {}

    def __call__(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """Choose, where a training step begins."""
        if torch.is_grad_enabled() and not is_followed():
            self._choose(model, args, kwargs)

    @_disable_dynamo  # torch.compiler.disable imports the compiler at once, for two seconds
    def _choose(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        # Layouts and the like decide little, and change little from step to step.
        key = (
            tuple((tuple(t.shape), t.dtype, t.requires_grad) for t in tensors),
            tuple(_autocast(t.device.type) for t in tensors),
            model.training,
        )
        if key not in self.chosen:
            self.chosen[key] = self._row(model, args, kwargs, tensors)
        set_memory(model, self.chosen[key].mode)

    def _row(self, model: nn.Module, args: Any, kwargs: Any, tensors: Sequence[Tensor]) -> ModeCost:
        device = _device(model, tensors)
        if self.budget is None and device.type != "cuda":
            raise ValueError('memory="auto" needs a budget where there is no GPU')
        limit = step_limit(device, self.budget)
        batch = next((t.shape[0] for t in tensors if t.dim()), 1)
        step = steps_of(model, args, kwargs, batch, device)
        before = {id(module): module.__dict__[FUSION] for module in _fused(model)}
        try:
            choice = choose_mode(model, step, batch, limit)
        except (BudgetError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise ValueError(
                f'memory="auto" cannot follow the forward of {type(model).__name__} on tensors '
                f"without values ({reason}): name a memory mode"
            ) from error
        finally:
            for module in _fused(model):
                module.__dict__[FUSION] = before[id(module)]
        return choice.chosen

    def describe(self) -> str:
        """The modes chosen so far, for people to read."""
        what = "the GPU's free memory" if self.budget is None else _words(self.budget)
        if not self.chosen:
            return f"memory auto: chosen at the first training step, to fit {what}"
        lines = []
        for (tensors, _, _), row in self.chosen.items():
            shapes = ", ".join("x".join(map(str, shape)) for shape, *_ in tensors)
            lines.append(
                f"memory auto: {row.mode} for inputs of {shapes}, predicted peak "
                f"{format_bytes(row.peak)}, to fit {what}"
            )
        return "\n".join(lines)


def _words(budget: str | int) -> str:
    return format_budget(parse_bytes(budget))


def auto_memory(model: nn.Module) -> AutoMemory | None:
    """The hook of ``model``, if it has one."""
    hooks = model._forward_pre_hooks.values()
    return next((hook for hook in hooks if isinstance(hook, AutoMemory)), None)


def remove_auto_memory(model: nn.Module) -> None:
    """Take the hook off again."""
    for number, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, AutoMemory):
            del model._forward_pre_hooks[number]
            model._forward_pre_hooks_with_kwargs.pop(number, None)


def set_memory(model: nn.Module, memory: str) -> None:
    """Let the blocks that ``fuse`` recognised run in a mode."""
    for module in _fused(model):
        fusion = module.__dict__[FUSION]
        if fusion.memory != memory:
            module.__dict__[FUSION] = fusion._replace(memory=memory)


def _fused(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if FUSION in module.__dict__]


def _device(model: nn.Module, tensors: Sequence[Tensor]) -> torch.device:
    parameter = next(model.parameters(), None)
    if parameter is not None:
        return parameter.device
    return tensors[0].device if tensors else torch.device("cpu")


def _autocast(device: str) -> torch.dtype | None:
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def steps_of(
    model: nn.Module, args: Any, kwargs: Mapping[str, Any], batch: int, device: torch.device
) -> Callable[[int, str], Footprint]:
    """A function of a batch size and a mode: what a step with inputs like these holds."""
    gpu = planned_gpu(device) if device.type == "cuda" else None
    programs = MetaPrograms()

    def step(batch_size: int, mode: str) -> Footprint:
        def sized(tensor: Tensor) -> Tensor:
            if not tensor.dim() or tensor.shape[0] != batch:
                return without_memory(tensor)
            shape = (batch_size, *tensor.shape[1:])
            made = torch.empty_strided(
                shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
            )
            return made.requires_grad_(tensor.requires_grad)

        set_memory(model, mode)
        inputs: Any = lambda: tree_map_only(Tensor, sized, (args, kwargs))  # noqa: E731
        return footprint(model, inputs, gpu=gpu, programs=programs)

    return step
