"""Where launches and other steps of a chain are written down: the recorder of the moment, if any.

``resnetv2/core/recorder.py`` records; ``launch`` and collectives come by here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

_recorder: ContextVar[Any] = ContextVar("recorder", default=None)
_gpu: ContextVar[Any] = ContextVar("gpu", default=None)
_listed: ContextVar[list[Any] | None] = ContextVar("listed", default=None)


def current() -> Any:
    """The recorder that is at work, or None."""
    return _recorder.get()


@contextmanager
def to(recorder: Any) -> Iterator[None]:
    """Write what is done inside the block down in ``recorder``."""
    token = _recorder.set(recorder)
    try:
        yield
    finally:
        _recorder.reset(token)


@contextmanager
def paused() -> Iterator[None]:
    """Write nothing down inside the block: trial runs are no part of a program."""
    token = _recorder.set(None)
    try:
        with _disable_current_modes():
            yield
    finally:
        _recorder.reset(token)


def call(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``, to be called again by a program: a collective, say."""
    recorder = _recorder.get()
    return function(*args) if recorder is None else recorder.call(function, *args)


def counters(number: int, device: torch.device) -> Tensor:
    """``number`` int32 zeros for the programs of the next launch to count in, and no others.

    A program has all of its launches' in one tensor, which one step fills at its beginning.
    """
    recorder = _recorder.get()
    if recorder is None:
        return torch.zeros(number, dtype=torch.int32, device=device)
    found: Tensor = recorder.counters(number)
    return found


def flops(number: int) -> None:
    """Say what the next launch multiplies and adds: of a convolution."""
    recorder = _recorder.get()
    if recorder is not None:
        recorder.flops = number


def gpu() -> Any:
    """The ``launch.Device`` that tensors without memory (device "meta") stand for, or None."""
    return _gpu.get()


@contextmanager
def for_gpu(device: Any) -> Iterator[None]:
    """Tensors without memory stand for ``device``'s inside the block: tiles are chosen for it."""
    token = _gpu.set(device)
    try:
        yield
    finally:
        _gpu.reset(token)


def list_launch(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> None:
    """Note a launch on tensors without memory, where somebody lists them (``ahead``)."""
    listed = _listed.get()
    if listed is not None:
        listed.append((kernel, args, constants))


@contextmanager
def listing() -> Iterator[list[Any]]:
    """The list that ``list_launch`` fills inside the block."""
    listed: list[Any] = []
    token = _listed.set(listed)
    try:
        yield listed
    finally:
        _listed.reset(token)
