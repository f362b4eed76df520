"""The learning rate of every step, and which parameters are decayed.

The rate is a function of the step's number alone: a resumed run needs no scheduler's state, and
every rank computes the same number.
"""

import math
from typing import Any

from torch import nn

SCHEDULES = ("step", "cosine", "one-cycle", "constant")

# He et al. 2016, appendix "Implementation details": 400 of 64k iterations at a tenth of the rate.
_PAPER_WARMUP = 400
_PAPER_STEPS = 64_000

# One-cycle's first and last rates, as parts of its highest: lr/25, and 1/10,000 of that.
_START = 25
_END = 25 * 10_000

_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)


def default_warmup(total_steps: int, schedule: str = "step") -> int:
    """Steps of warm-up in a run of ``total_steps`` that names none.

    ``step``: the paper's proportion, 400 in 64,000, and at most 400. ``cosine``: 5 %.
    ``one-cycle``: 30 %, as in fast.ai. ``constant``: none.
    """
    if schedule == "step":
        return min(_PAPER_WARMUP, round(total_steps * (_PAPER_WARMUP / _PAPER_STEPS)))
    if schedule == "cosine":
        return round(0.05 * total_steps)
    if schedule == "one-cycle":
        return round(0.3 * total_steps)
    if schedule == "constant":
        return 0
    raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")


def learning_rate(
    step: int,
    total_steps: int,
    lr: float = 0.1,
    warmup_steps: int | None = None,
    schedule: str = "step",
) -> float:
    """The learning rate at ``step``, from 0, of a run of ``total_steps``.

    - ``step``, the paper's (He et al. 2016, appendix): lr/10 during the warm-up, then lr, then
      lr/10 from a half and lr/100 from three quarters of all steps on.
    - ``cosine`` (Loshchilov and Hutter 2017, equation 5, one period): linearly from lr/warmup_steps
      to lr, then half a cosine that would be 0 at ``total_steps``.
    - ``one-cycle`` (Smith and Topin 2018, with fast.ai's cosines): from lr/25 up to lr in the last
      step of the warm-up, then down to lr/250,000 in the last step of all.
    - ``constant``: linearly from lr/warmup_steps to lr, then lr.

    Args:
        step: from ``total_steps`` on, the last step's rate; for ``cosine`` 0.
        total_steps: optimizer steps of the whole run, at least 1.
        lr: the highest rate.
        warmup_steps: None means ``default_warmup``; of a warm-up longer than the run, the run sees
            its beginning (``resnetv2.training.config.check_steps`` refuses it).
        schedule: one of ``SCHEDULES``.

    Raises:
        ValueError: an unknown schedule.
    """
    warmup = default_warmup(total_steps, schedule) if warmup_steps is None else warmup_steps
    if schedule == "step":
        if step < warmup:
            return lr / 10
        if 4 * step >= 3 * total_steps:
            return lr / 100
        return lr / 10 if 2 * step >= total_steps else lr
    if schedule == "one-cycle":
        peak = max(warmup - 1, 0)
        if step < peak:
            return _cosine(step / peak, lr / _START, lr)
        return _cosine((step - peak) / max(1, total_steps - 1 - peak), lr, lr / _END)
    if schedule not in ("cosine", "constant"):
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if step < warmup:
        return lr * ((step + 1) / warmup)
    if schedule == "constant":
        return lr
    return _cosine((step - warmup) / max(1, total_steps - warmup), lr, 0.0)


def _cosine(part: float, start: float, end: float) -> float:
    """Half a cosine from ``start`` at part 0 to ``end`` at part 1 and after."""
    weight = (1 + math.cos(math.pi * min(part, 1.0))) / 2
    return weight * start + (1 - weight) * end


def optimizer_groups(
    model: nn.Module, weight_decay: float, decay_all: bool = True
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: each parameter once, in the model's order.

    With ``decay_all`` a single group, as in the paper. Without, a second one with a weight decay of
    0 for biases and the parameters of norms, which scale and shift what the weights' size cancels
    out of; it holds every parameter of at most one dimension and all of a norm module's own. An
    empty group is left out.
    """
    if decay_all:
        return [{"params": list(model.parameters()), "weight_decay": weight_decay}]
    norms = {
        parameter
        for module in model.modules()
        if isinstance(module, _NORMS)
        for parameter in module.parameters(recurse=False)
    }
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for parameter in model.parameters():
        (free if parameter.dim() <= 1 or parameter in norms else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
