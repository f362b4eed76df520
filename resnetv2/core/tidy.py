"""Tidies recorded steps: fewer of them, and temporaries in one arena."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .steps import Alloc, Call, Launch, Pointer, Register, Step, View, is_view, registers, uses

_aten = torch.ops.aten

# Every offset in the arena is a multiple: vector loads want 16, cache lines 128.
_ALIGNMENT = 256


def tidy(
    steps: Sequence[Step],
    outputs: Sequence[int],
    roots: Sequence[int],
    views: dict[int, View],
) -> list[Step]:
    """Steps with the same results, and fewer of them.

    Args:
        steps: as recorded. outputs: the registers of the results. roots: of each register the one
            whose memory it shares. views: where registers that share memory lie in it.
    """
    steps = _without_copies(_without_unread(steps, outputs), outputs, roots)
    return _with_short_views(steps, views, outputs)


def _without_unread(steps: Sequence[Step], outputs: Sequence[int]) -> list[Step]:
    """Leave out what nothing reads: views that kernels took by address, tensors never written."""
    read = set(outputs)
    kept: list[Step] = []
    for step in reversed(steps):
        if isinstance(step, Call):
            if is_view(step.function) and not read.intersection(step.results):
                continue
            read.update(registers((step.args, step.kwargs)))
        elif isinstance(step, View):
            if step.register not in read:
                continue
            read.add(step.root)
        elif isinstance(step, Launch):
            read.update(a.register for a in step.args if isinstance(a, Pointer))
        elif isinstance(step, Alloc) and step.register not in read:
            continue
        kept.append(step)
    return kept[::-1]


def _without_copies(
    steps: Sequence[Step], outputs: Sequence[int], roots: Sequence[int]
) -> list[Step]:
    """Where tensors that kernels write are concatenated, let kernels write them in their places."""
    for place, cat in enumerate(steps):
        if not (isinstance(cat, Call) and cat.function is _aten.cat.default):
            continue
        (result,) = cat.results
        owners = [roots[number] for number in registers(cat.args)]
        allocs = {s.register: s for s in steps if isinstance(s, Alloc) and s.register in owners}
        # Views that lead to the concatenation, whatever else reads one of them.
        views = {
            at
            for at, step in enumerate(steps)
            if isinstance(step, Call)
            and step is not cat
            and not set(owners).isdisjoint(roots[number] for number in registers(step.args))
        }
        begins, total = {}, 0
        for owner in owners:
            begins[owner] = total
            total += allocs[owner].nbytes if owner in allocs else 0
        if (
            len(allocs) < len(owners)
            or total != cat.sizes[1]
            or len({alloc.dtype for alloc in allocs.values()}) > 1
            or any(begin % 16 for begin in begins.values())
            or not set(owners).isdisjoint(roots[number] for number in outputs)
            or any(not is_view(steps[at].function) for at in views)  # type: ignore[union-attr]
        ):
            continue
        dtype = allocs[owners[0]].dtype
        assert result is not None
        joined: list[Step] = [Alloc(result, (total // dtype.itemsize,), (1,), dtype)]
        for at, step in enumerate(steps):
            if at == place or at in views or (isinstance(step, Alloc) and step.register in allocs):
                continue
            if isinstance(step, Launch):
                args = tuple(
                    a._replace(register=result, offset=a.offset + begins[a.register])
                    if isinstance(a, Pointer) and a.register in begins
                    else a
                    for a in step.args
                )
                step = step._replace(args=args)
            joined.append(step)
        return _without_copies(joined, outputs, roots)
    return list(steps)


def _with_short_views(
    steps: Sequence[Step], views: dict[int, View], outputs: Sequence[int]
) -> list[Step]:
    """Make each view of its root at once, and once, instead of through others."""
    known: dict[tuple[Any, ...], int] = {}
    same: dict[int, int] = {}
    short: list[Step] = []
    for step in steps:
        if not isinstance(step, Call):
            short.append(step)
            continue
        made = [views.get(n) for n in step.results if n is not None]
        if is_view(step.function) and all(view is not None for view in made):
            for view in made:
                assert view is not None
                first = known.setdefault(view[1:], view.register)
                if view.register in outputs or first == view.register:
                    short.append(view)
                else:
                    same[view.register] = first
            continue
        if same:
            args = _renamed(step.args, same)
            step = step._replace(args=args, kwargs=_renamed(step.kwargs, same))
            # An operator in place gives its argument back.
            step = step._replace(results=tuple(same.get(n, n) for n in step.results))  # type: ignore[arg-type]
        short.append(step)
    return _without_unread(short, outputs)


def _renamed(value: Any, names: dict[int, int]) -> Any:
    """``value`` with other registers in the place of some."""
    if isinstance(value, Register):
        return Register(names.get(value.number, value.number))
    if isinstance(value, dict):
        return {key: _renamed(part, names) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_renamed(part, names) for part in value)
    return value


def place_in_arena(
    steps: Sequence[Step], outputs: Sequence[int], roots: Sequence[int]
) -> tuple[dict[int, int], int]:
    """The offset of each tensor that lies in the arena, and the arena's size.

    The largest first, each as low as it can lie beside those that live at the same time.
    """
    as_tensor, addressed = uses(steps, outputs)
    touched = {roots[number] for number in as_tensor}
    lives = [
        (step.nbytes, min(addressed[step.register]), max(addressed[step.register]), step.register)
        for step in steps
        if isinstance(step, Alloc) and step.register in addressed and step.register not in touched
    ]
    offsets: dict[int, int] = {}
    placed: list[tuple[int, int, int, int]] = []  # begin, end, first and last use
    for nbytes, first, last, number in sorted(lives, key=lambda life: (-life[0], life[3])):
        size = max(nbytes, 1) + -max(nbytes, 1) % _ALIGNMENT
        begin = 0
        for low, high, start, stop in sorted(placed):
            if start <= last and first <= stop:
                if begin + size <= low:
                    break
                begin = max(begin, high)
        placed.append((begin, begin + size, first, last))
        offsets[number] = begin
    return offsets, max((high for _, high, _, _ in placed), default=0)
