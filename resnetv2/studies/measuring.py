"""A training step of a net on one batch: what it allocates and how long it takes."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..planning.memory import peak_bytes
from ..training.step import compute_logits


class NetStep:
    """Forward, mean cross-entropy and backward; call it to run it. Gradients add up until
    ``clear``.

    Args:
        model: logits (B, classes) from images; is put on their device, in channels_last.
        images: (B, C, H, W); with ``requires_grad`` they get a gradient too. labels: (B,), int64.
        dtype: in which convolutions multiply (autocast), float32 for none.

    Attributes:
        loss: of the last step.
    """

    def __init__(
        self, model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype = torch.float32
    ) -> None:
        self.model = model
        self.images, self.labels, self.dtype = images, labels, dtype
        self.loss = float("nan")
        model.to(images.device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub

    def __call__(self) -> None:
        logits = compute_logits(self.model, self.images, self.dtype, torch.channels_last)
        loss = F.cross_entropy(logits, self.labels)
        loss.backward()
        self.loss = float(loss.detach())  # waits for a GPU
        if self.images.is_cuda:
            torch.cuda.synchronize()

    def clear(self) -> None:
        """Drop all gradients."""
        self.model.zero_grad(set_to_none=True)
        self.images.grad = None

    def peak(self) -> int:
        """Most bytes that a step allocates beyond parameters and gradients."""
        self.clear()
        before = peak_bytes(self, self.images.is_cuda)
        kept = [p.grad for p in (self.images, *self.model.parameters()) if p.grad is not None]
        return before - sum(gradient.nbytes for gradient in kept)

    def seconds(self) -> float:
        """Of one step."""
        self.clear()
        started = time.perf_counter()
        self()
        return time.perf_counter() - started
