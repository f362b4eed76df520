"""``resnetv2.doctor.tune``: the fastest implementation and tile of each convolution of a net."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..core import execution
from ..core.table import text_table
from ..errors import InputError
from ..kernels import choices
from ..measuring.cases import device
from ..models import PreActResNet
from ..names import DTYPES
from ..planning.cost import step_costs
from .surroundings import backend_of


class Tuned(NamedTuple):
    """What ``tune`` measured; prints as a table.

    rows: of each convolution what it is, the cost model's seconds, the fastest's, and its name, or
    why there is none. path, digest: of the file. reason: why nothing was measured, or "".
    """

    rows: tuple[tuple[str, float | None, float | None, str], ...] = ()
    path: Path | None = None
    digest: str = ""
    seconds: float = 0.0
    reason: str = ""

    @property
    def right(self) -> bool:
        """Whether no candidate's results were wrong."""
        return not any("wrong: " in by for *_, by in self.rows)

    def __str__(self) -> str:
        if self.reason:
            return f"nothing to choose: {self.reason}"
        head = ("convolution", "cost model", "fastest", "gain", "by")
        lines = [
            (what, _microseconds(before), _microseconds(after), _gain(before, after), by)
            for what, before, after, by in self.rows
        ]
        others = sum(before != after for _, before, after, _ in self.rows)
        return "\n".join(
            [
                text_table(head, lines, [False, True, True, True, False]),
                f"{others} of {len(self.rows)} others than the cost model's, in "
                f"{self.seconds:.0f} s; {self.path} (digest {self.digest}) has them",
            ]
        )


def _microseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e6 * seconds:.1f} us"


def _gain(before: float | None, after: float | None) -> str:
    return f"{before / after:.2f}x" if before and after else ""


def tune(
    model: PreActResNet,
    batch_size: int,
    *,
    image_size: int = 32,
    dtype: str = "fp32",
    say: Callable[[str], None] | None = None,
    timer: Callable[[Callable[[], Any]], float] | None = None,
    check: bool = True,
) -> Tuned:
    """Measure how each convolution of a net's training step is computed fastest on this device.

    Every implementation and the tiles worth trying are held against float64 and timed, forward and
    backward; the file of ``kernels.choices`` keeps the fastest, and later runs on this device with
    these versions use them for these shapes.

    Args:
        model: may lie on the device "meta". batch_size: images a step. dtype: "fp32", "bf16" or
            "fp16": in which convolutions multiply.
        say: is told what is going on. timer, check: of ``Tuner``, for tests.

    Raises:
        InputError: the file cannot be written; nothing was measured.
    """
    say = say or (lambda text: None)
    where = device()
    if backend_of(where) != "triton":
        return Tuned(reason=f"ATen's kernels are the only ones on {where.type}")
    from ..kernels.inspect.tuning import RefusedError, Tuner, tasks_of

    try:
        choices.check_writable()
    except OSError as error:
        raise InputError(f"cannot write {choices.path()}: {error.strerror}") from error
    began = time.perf_counter()
    tasks = tasks_of(lambda: step_costs(model, batch_size, image_size, DTYPES[dtype], triton=True))
    if not tasks:
        return Tuned(reason="each of the net's convolutions has one implementation alone")
    rows: list[tuple[str, float | None, float | None, str]] = []
    kept: dict[str, choices.Choice] = {}
    for number, task in enumerate(tasks, start=1):
        say(f"{number} of {len(tasks)}: {task}")
        try:
            found = Tuner(task, where, timer, check).tune()
        except RefusedError as error:
            rows.append((str(task), None, None, f"not measured: {error}"))
            continue
        kept |= found.choices
        wrong = [f"{name} is {why}" for name, why in found.refused.items() if "wrong" in why]
        words = "; ".join([found.name, *wrong])
        rows.append((str(task), found.before, found.after, words))
    name = choices.device_name(torch.empty(0, device=where))
    assert name is not None
    try:
        digest = choices.write(name, kept)
    except OSError as error:
        raise InputError(f"cannot write {choices.path()}: {error.strerror}") from error
    # Programs of this process have the earlier choices.
    execution.PROGRAMS.clear()
    return Tuned(tuple(rows), choices.path(), digest, time.perf_counter() - began)
