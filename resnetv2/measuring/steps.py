"""A forward and backward of a module on one input: what it allocates and how long it takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..planning.memory import peak_bytes

Loss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]


def cross_entropy(out: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
    """The mean over a batch of logits (B, classes) and labels (B,)."""
    return F.cross_entropy(out, target), None


class GradientStep:
    """Forward and backward; call it to run them. Gradients add up until ``clear``.

    Args:
        module: may be wrapped by torch.compile. x, target: its input, and what the loss takes.
        loss: from output and target to what backward is called on, and with which gradient.
        dtype: in which convolutions multiply (autocast), float32 for what the module itself has.

    Attributes:
        loss: of the last step, a tensor.
    """

    def __init__(
        self,
        module: Any,
        x: Tensor,
        target: Tensor,
        loss: Loss = cross_entropy,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.module, self.x, self.target, self.dtype = module, x, target, dtype
        self.loss: Tensor | None = None
        self._loss_of = loss

    @classmethod
    def of_net(
        cls, model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype = torch.float32
    ) -> GradientStep:
        """Of a classifier's mean cross-entropy; it is put where the images are, channels_last."""
        form = torch.channels_last
        model.to(images.device, memory_format=form)  # type: ignore[call-overload]  # torch's stub
        if not images.is_contiguous(memory_format=form):
            images = images.contiguous(memory_format=form)
        return cls(model, images, labels, dtype=dtype)

    def forward(self) -> Tensor:
        """The output alone."""
        with self._autocast():
            out: Tensor = self.module(self.x)
        return out

    def __call__(self) -> Tensor:
        """Forward and backward; the output."""
        with self._autocast():
            out: Tensor = self.module(self.x)
            loss, gradient = self._loss_of(out, self.target)
        loss.backward(gradient)
        self.loss = loss.detach()
        return out

    def _autocast(self) -> torch.autocast:
        half = self.dtype in (torch.float16, torch.bfloat16)
        return torch.autocast(self.x.device.type, self.dtype if half else None, enabled=half)

    def clear(self) -> None:
        """Drop all gradients."""
        self.module.zero_grad(set_to_none=True)
        self.x.grad = None

    def gradient_bytes(self) -> int:
        """Of the parameters' gradients."""
        return sum(p.nbytes for p in plain(self.module).parameters())

    def peak(self, run: Callable[[], object] | None = None) -> int:
        """Most bytes that a step, or ``run``, allocates beyond parameters and what is there."""
        self.clear()
        synchronize()
        return peak_bytes(self if run is None else run, self.x.is_cuda)

    def peak_beyond_gradients(self) -> int:
        """The same of a step, without the gradients of parameters and input."""
        peak = self.peak()
        return peak - self.gradient_bytes() - (self.x.nbytes if self.x.requires_grad else 0)

    def seconds(self, run: Callable[[], object] | None = None, repeats: int = 1) -> float:
        """Of a step, or of so many of ``run``."""
        if run is None:
            self.clear()
        synchronize()
        started = time.perf_counter()
        for _ in range(repeats):
            (self if run is None else run)()
        synchronize()
        return time.perf_counter() - started


def plain(module: Any) -> nn.Module:
    """The module itself, without torch.compile's wrapper and the prefix that it gives to names."""
    return getattr(module, "_orig_mod", module)


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
