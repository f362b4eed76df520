"""The modules of one unit, in the order of the computation, as blocks and ``fuse`` hand them over.

A module that can be a unit of a chain offers ``chain_unit() -> UnitModules | str``: its children,
or the reason why they must run one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from ..kernels.operands import ACTS, Act, Geometry
from .norms import batch_statistics, groups_of
from .spec import Conv, Norm, Shortcut, Slot, Unit, slots
from .sync import group_number


class ChainUnit:
    """A module that can be a unit of a chain."""

    def chain_unit(self) -> UnitModules | str:
        """The module's children as a unit, or why the module must be called."""
        raise NotImplementedError

    def standing(self) -> Callable[[], bool] | None:
        """What says whether that which ``chain_unit`` has just found still holds, where modules,
        tensors and attributes are equal to those of then; None where nothing else counts."""
        return None


Pad = tuple[int, int, int, int]  # left, right, top, bottom
NO_PAD: Pad = (0, 0, 0, 0)


class Computed(NamedTuple):
    """Tensors of a unit that are no attributes of its modules.

    slots: theirs. run: computes all of them, in that order, of a block's second input or None.
    """

    slots: tuple[Slot, ...] = ()
    run: Callable[[Tensor | None], Sequence[Tensor]] = lambda _: ()


class UnitModules(NamedTuple):
    """One unit's children: norms[i] -> act -> convs[i], a projection or None, and what it reads.

    act: the activation's module, or its record where it is a function. pads: zeros that the model
    adds itself before each convolution, as in ``torch.nn.functional.pad``, and last before the
    projection; empty for none at all. computed: slots whose tensor is computed at every call and
    takes the attribute's place: a standardised weight; a convolution's bias (N, K), or a group
    norm's weight and bias (N, C), out of a block's second input.
    """

    norms: tuple[nn.Module, ...]
    convs: tuple[nn.Conv2d, ...]
    act: nn.Module | Act
    shortcut: Shortcut
    projection: nn.Conv2d | None = None
    add_in_place: bool = False
    pads: tuple[Pad, ...] = ()
    computed: Computed = Computed()

    def record(self) -> Unit:
        """The unit's present state, besides its tensors."""
        act = act_of(self.act)
        assert act is not None  # checks.why_not refuses the others
        norms = tuple(
            Norm(
                batch_statistics(norm),
                self._has("norms", i, "weight", norm),
                self._has("norms", i, "bias", norm),
                cast(float, norm.eps),
                group_number(norm),
                groups_of(norm),
            )
            for i, norm in enumerate(self.norms)
        )
        convs = tuple(self._conv(i) for i in range(len(self.convs)))
        projection = None if self.projection is None else self._conv(-1)
        return Unit(norms, convs, act, self.shortcut, projection, self.add_in_place)

    def tensors(self, record: Unit) -> list[Tensor]:
        """Parameters, and running statistics where they are used, in the order of ``slots``.

        For a computed one stands the attribute, or, where there is none, an empty tensor.
        """
        owners = {"norms": self.norms, "convs": self.convs, "projection": (self.projection,)}
        found = [getattr(owners[kind][i], name) for kind, i, name in slots(record)]
        return [_NOTHING if tensor is None else tensor for tensor in found]

    def _has(self, kind: str, i: int, name: str, module: nn.Module | None) -> bool:
        """Whether a slot is taken, by a module's attribute or by what is computed."""
        if module is not None and getattr(module, name) is not None:
            return True
        return (kind, i, name) in self.computed.slots

    def geometry(self, i: int) -> Geometry:
        """The geometry of convolution i, or of the projection where i = -1."""
        conv = self.projection if i < 0 else self.convs[i]
        assert conv is not None
        padding = padding_of(conv)
        assert padding is not None  # checks.why_not refuses the others
        extra = (0, 0)
        if self.pads:
            left, right, top, bottom = self.pads[i]
            padding = (padding[0] + top, padding[1] + left)
            extra = (bottom - top, right - left)
        stride, dilation = conv.stride, conv.dilation
        return Geometry(stride, padding, dilation, conv.groups, extra)  # type: ignore[arg-type]

    def _conv(self, i: int) -> Conv:
        conv = self.projection if i < 0 else self.convs[i]
        kind = ("projection", 0) if i < 0 else ("convs", i)
        return Conv(self.geometry(i), self._has(*kind, "bias", conv))


_NOTHING = torch.empty(0, device="cpu")


def activation(act: str | nn.Module) -> nn.Module:
    """The module for an activation's name: relu, leaky_relu, silu, gelu or identity.

    Raises:
        ValueError: an unknown name. A module is returned as it is.
    """
    if isinstance(act, nn.Module):
        return act
    modules: dict[str, Callable[[], nn.Module]] = {
        "relu": nn.ReLU,
        "leaky_relu": lambda: nn.LeakyReLU(0.1),
        "silu": nn.SiLU,
        "gelu": nn.GELU,
        "identity": nn.Identity,
    }
    if act not in modules:
        raise ValueError(f"act must be one of {', '.join(ACTS)} or a module, got {act!r}")
    return modules[act]()


_ACTS: dict[type, Act] = {
    nn.ReLU: Act("relu"),
    nn.SiLU: Act("silu"),
    nn.GELU: Act("gelu"),
    nn.Identity: Act("identity"),
}


def act_of(module: nn.Module | Act) -> Act | None:
    """The kernels' record of an activation module, or None for one they do not know."""
    if isinstance(module, Act):
        return module
    if type(module) is nn.LeakyReLU:
        return (
            Act("leaky_relu", float(module.negative_slope)) if module.negative_slope >= 0 else None
        )
    if type(module) is nn.GELU and module.approximate != "none":
        return None
    return _ACTS.get(type(module))


def padding_of(conv: nn.Conv2d) -> tuple[int, int] | None:
    """Padding of height and width, or None where the two sides differ ("same", even kernels)."""
    if conv.padding == "valid":
        return (0, 0)
    if conv.padding == "same":
        totals = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size)]
        return None if totals[0] % 2 or totals[1] % 2 else (totals[0] // 2, totals[1] // 2)
    return conv.padding  # type: ignore[return-value]  # Conv2d keeps pairs
