"""What a traced forward is given in the place of tensors, and what it may ask of them."""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, fx

from .reasons import NotAUnitError


class _Size:
    """The shape of a ``TracedValue``: rank and channels are known, N, H and W only symbolically."""

    def __init__(self, value: TracedValue) -> None:
        self.value = value

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: Any) -> Any:
        channels = self.value.layout.channels
        if index in (1, -3) and channels is not None:
            return channels
        return fx.Proxy.__getattr__(self.value, "shape")[index]  # type: ignore[index]

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(4))

    def __eq__(self, other: object) -> bool:
        mine = self.value.layout
        if not isinstance(other, _Size) or mine.channels is None:
            raise NotAUnitError("its course depends on the size of its input")
        theirs = other.value.layout
        if theirs.channels is not None and theirs.channels != mine.channels:
            return False
        if theirs == mine:
            return True
        raise NotAUnitError("its course depends on the size of its input")

    __hash__ = None  # type: ignore[assignment]


class Layout(NamedTuple):
    """What is known of a value's shape: channels, and the list of what changed height and width."""

    channels: int | None
    spatial: tuple[Any, ...] = ()


class TracedValue(fx.Proxy):
    """A proxy for (N, C, H, W) that answers what a forward may ask of any such tensor."""

    layout = Layout(None, ("unknown",))
    is_image = False

    @property
    def __class__(self) -> Any:
        # A forward that asks finds a tensor; fx finds what it has made.
        caller = sys._getframe(1)
        user = self.tracer.observer.is_user(caller)  # type: ignore[attr-defined]
        return Tensor if user or caller.f_code.co_name == "is_tensor" else TracedValue

    @__class__.setter
    def __class__(self, kind: Any) -> None:  # mypy wants both
        raise TypeError("a traced value has no other class")

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("node", "tracer", "is_image", "layout"):
            raise NotAUnitError(f"its forward sets {name} of a tensor", True)
        super().__setattr__(name, value)

    def dim(self) -> Any:
        return 4 if self.is_image else fx.Proxy.__getattr__(self, "dim")()

    @property
    def ndim(self) -> Any:
        return 4 if self.is_image else fx.Proxy.__getattr__(self, "ndim")

    @property
    def shape(self) -> Any:
        self.tracer.asked = True  # type: ignore[attr-defined]
        return _Size(self) if self.is_image else fx.Proxy.__getattr__(self, "shape")

    def size(self, *args: Any) -> Any:
        self.tracer.asked = True  # type: ignore[attr-defined]
        if self.is_image and not args:
            return _Size(self)
        if self.is_image and args[0] in (1, -3) and self.layout.channels is not None:
            return self.layout.channels
        return fx.Proxy.__getattr__(self, "size")(*args)

    # fx would take these for operations out of place.
    def __iadd__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __imul__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})

    def __itruediv__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.itruediv, (self, other), {})
