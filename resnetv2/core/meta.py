"""A chain's programs for given shapes, recorded on tensors without memory (device "meta").

Nothing is allocated or computed, and no GPU is needed: what the programs hold (``Program.peak``),
move and multiply (``Program.costs``) is what they would on the device that is stated.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import recording
from . import execution
from .program import Program, record
from .reading import Reading
from .run import Plan
from .spec import Spec

if TYPE_CHECKING:
    from ..kernels.launch import Device


class MetaPrograms:
    """Programs by key, recorded and never replayed. last: what ``run`` found last."""

    last: Program

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[Program, list[Tensor], Any, Any]] = {}

    def run(
        self,
        key: Hashable,
        function: Callable[..., tuple[Sequence[Tensor], Any]],
        inputs: Sequence[Tensor],
        device: torch.device,
        named: Any = None,
    ) -> tuple[list[Tensor], Any]:
        """``Programs.run``: results are tensors without memory, new ones at each call."""
        key = (recording.gpu(), key)
        if key not in self._kept:
            self._kept[key] = *record(function, inputs, device), named
        self.last, results, static, _ = self._kept[key]
        # One that is given twice, as a part's output is, stays one.
        new = {id(tensor): on_meta(tensor) for tensor in results}
        return [new[id(tensor)] for tensor in results], static


def on_meta(tensor: Tensor) -> Tensor:
    """A new tensor like another one, without memory."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


class MetaPart(NamedTuple):
    """One part of a chain: its programs, and what they take and give, as ``execution`` has it.

    x: its input. grads: x's gradient where it is wanted, and the parameters'. walked: the input as
    its backward hands it to the part before, where that walks back from it.
    """

    spec: Spec
    forward: Program
    backward: Program
    x: Tensor
    params: list[Tensor]
    result: execution.Forward
    grads: list[Tensor]
    walked: Tensor | None


def chain_parts(
    readings: Sequence[Reading],
    tensors: Sequence[Sequence[Tensor]],
    x: Tensor,
    dtype: torch.dtype,
    memory: str,
    *,
    gpu: Device | None,
    programs: MetaPrograms,
    need_x: bool = True,
) -> tuple[list[MetaPart], Tensor]:
    """A chain's parts in order, and its output, for an input x, (N, C, H, W), on "meta".

    Args:
        readings, tensors: as of ``Plan``. dtype: in which convolutions multiply. memory: a mode.
        gpu: whose kernels run; None for ATen's operators. programs: those that are known already.
    """
    backend = "aten" if gpu is None else "triton"
    with torch.enable_grad():
        like = on_meta(x).requires_grad_(need_x)
        plan = Plan(readings, tensors, like, dtype, backend, memory, 0)
    params = [list(map(on_meta, its)) for its in plan.params_of(tensors)]
    weights = [w for spec, its in zip(plan.specs, params) for w in execution.weights_of(spec, its)]
    form = execution.chain_format(x, weights, backend)
    x = x.contiguous(memory_format=form)
    run: list[tuple[Program, Tensor, execution.Forward]] = []
    moments: Sequence[Tensor] = ()
    moments_form = None
    with torch.no_grad(), recording.for_gpu(gpu):
        for spec, its in zip(plan.specs, params):
            result = execution.forward(spec, x, its, form, moments, moments_form, programs)
            run.append((programs.last, x, result))
            x, moments, moments_form = result.out, result.moments, result.form
        parts: list[MetaPart] = []
        g: Tensor | None = on_meta(x)
        end: Tensor | None = None
        for spec, its, (forward, given, result) in zip(
            reversed(plan.specs), reversed(params), reversed(run)
        ):
            walks = memory != "recompute"
            if end is None:
                end = result.end
            assert g is not None
            grads, back_at = execution.backward(
                spec,
                g,
                None if spec.walks_to_x else given,
                end if walks else None,
                result.stats,
                result.kept,
                its,
                form,
                programs,
            )
            walked = back_at if walks and not spec.part.first else None
            parts.append(MetaPart(spec, forward, programs.last, given, its, result, grads, walked))
            g, end = grads[0] if spec.need_x else None, back_at
    return parts[::-1], x
