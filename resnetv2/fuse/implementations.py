"""What computes the convolutions of a block, for ``explain``."""

from __future__ import annotations

import torch
from torch import nn

from ..core.modules import UnitModules
from ..core.norms import groups_of
from ..kernels import choices
from ..kernels.choices import implementation
from ..kernels.dispatch import resolve_backend

# Behind an implementation that was measured, whose directions are in this order.
_MARK = "*"
_DIRECTIONS = (choices.FORWARD, choices.DGRAD, choices.WGRAD)


def computed_by(unit: UnitModules, backend: str) -> str:
    """ "fused, aten*, fused; fused": a unit's convolutions and its projection, each by what.

    The star: measured on this device, for one size of its input at least; then "written/aten/aten"
    are forward, dgrad and wgrad, where they differ.
    """
    weight = unit.convs[0].weight
    try:
        name = resolve_backend(backend, weight.device)
    except (ValueError, ImportError):
        return ""  # its call says so
    if name != "triton":
        return name
    words = [_one(conv, unit, i) for i, conv in enumerate(unit.convs)]
    text = ", ".join(words)
    return text if unit.projection is None else f"{text}; {_one(unit.projection, unit, -1)}"


def _one(conv: nn.Conv2d, unit: UnitModules, i: int) -> str:
    shape, geometry = tuple(conv.weight.shape), unit.geometry(i)
    if groups_of(unit.norms[max(i, 0)]) and (i >= 0 or unit.shortcut.reads_preact):
        return choices.ATEN  # it reads what a group norm's kernel has written
    usual = implementation(shape, geometry)
    found = choices.known(conv.weight, shape, geometry)
    if not found:
        return usual
    hows = ["|".join(found.get(direction, (usual,))) for direction in _DIRECTIONS]
    return (hows[0] if len({*hows}) == 1 else "/".join(hows)) + _MARK


def measured_note(device: torch.device, marked: bool) -> str:
    """The line below the table: where what is marked comes from, or why a file is not used."""
    try:
        if resolve_backend("auto", device) != "triton":
            return ""
    except (ValueError, ImportError):
        return ""
    name = choices.device_name(torch.empty(0, device=device))
    if name is None:
        return ""
    found = choices.measured(name)
    if marked:
        return f"{_MARK} measured on this device: {choices.path()} (digest {found.digest})"
    return found.note
