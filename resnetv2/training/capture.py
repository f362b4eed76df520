"""Capturing a training step as a CUDA graph: recording, replaying, and what stands in the way.

What a replay reads that changes from step to step lies at fixed addresses (``StaticBatch``).
Capturing carries nothing out on the device; what it changes in Python is put back where it fails
(``HostState``).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..core.checks import globally_hooked


class Recorder(Protocol):
    """Runs, captures and replays work for ``Step``: ``CudaRecorder``, or a test's stand-in."""

    def run(self, work: Callable[[], Tensor]) -> Tensor:
        """Do the work as capturing needs it to have been done before; its result."""

    def capture(self, work: Callable[[], Tensor]) -> Tensor:
        """Record the work and carry nothing out; the tensor that each replay fills.

        Whatever is raised, the device's state, its random one included, is as before.
        """

    def replay(self) -> None:
        """Do what was recorded, on the addresses of then."""


@functools.cache
def _stream(device_index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device_index)


@contextlib.contextmanager
def capture_stream(device: torch.device) -> Iterator[None]:
    """The stream on which steps warm up and are captured; nothing where ``device`` has no CUDA.

    DistributedDataParallel that is to be captured is made in it: it keeps gradient accumulators,
    these stay on the stream that they were made on, and the default stream cannot be captured.
    """
    if device.type != "cuda":
        yield
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    current, side = torch.cuda.current_stream(index), _stream(index)
    side.wait_stream(current)
    try:
        with torch.cuda.stream(side):
            yield
    finally:  # whoever handles an exception reads weights, too
        current.wait_stream(side)


class CudaRecorder:
    """A CUDA graph, captured on ``capture_stream``, and its memory pool."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.graph: torch.cuda.CUDAGraph | None = None

    def run(self, work: Callable[[], Tensor]) -> Tensor:
        with capture_stream(self.device):
            return work()

    def capture(self, work: Callable[[], Tensor]) -> Tensor:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
        random = generator.clone_state()
        try:
            # The outer context leaves the side stream also where ending a capture raises. Other
            # threads, a loader's that pins memory or NCCL's watchdog, may go on meanwhile.
            with capture_stream(self.device):
                side = torch.cuda.current_stream(self.device)
                with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                    result = work()
        except BaseException:
            # A generator whose capture has failed believes for good that it is being captured.
            generator.graphsafe_set_state(random)
            raise
        self.graph = graph
        return result

    def replay(self) -> None:
        assert self.graph is not None
        self.graph.replay()


class StaticBatch:
    """The inputs and results of a captured step, at fixed addresses."""

    loss: Tensor
    gradients: list[tuple[nn.Parameter, Tensor]]

    def __init__(
        self,
        key: Any,
        images: Tensor,
        labels: Tensor,
        device: torch.device,
        memory_format: torch.memory_format,
    ) -> None:
        self.key = key
        self.images = torch.empty(
            images.shape, dtype=images.dtype, device=device, memory_format=memory_format
        )
        self.labels = torch.empty(labels.shape, dtype=labels.dtype, device=device)
        self.fill(images, labels)

    def fill(self, images: Tensor, labels: Tensor) -> None:
        self.images.copy_(images, non_blocking=True)
        self.labels.copy_(labels, non_blocking=True)

    def replay(self, images: Tensor, labels: Tensor, recorder: Recorder) -> Tensor:
        self.fill(images, labels)
        recorder.replay()
        # An ungraphed step in between has left gradients of its own.
        if self.gradients and self.gradients[0][0].grad is not self.gradients[0][1]:
            for parameter, gradient in self.gradients:
                parameter.grad = gradient
        return self.loss.clone()


class HostState:
    """The Python state that capturing a step changes although the device carries nothing out."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
    ) -> None:
        self.optimizer = optimizer
        self.scaler = scaler
        self.buffers = [(module, dict(module._buffers)) for module in model.modules()]
        self.state = {key: dict(value) for key, value in optimizer.state.items()}
        self.random = torch.get_rng_state()

    def beyond_replay(self) -> str | None:
        """Why replays could not follow, or None: a tensor that is not changed in place, or random
        numbers that come from the host."""
        if not torch.equal(self.random, torch.get_rng_state()):
            return "random numbers are drawn on the host, where a replay draws none"
        for module, buffers in self.buffers:
            for name, buffer in module._buffers.items():
                if buffer is not buffers.get(name):
                    return f"{type(module).__name__}.{name} is replaced, not changed in place"
        for key, state in self.optimizer.state.items():
            for name, value in state.items():
                if isinstance(value, Tensor) and value is not self.state.get(key, {}).get(name):
                    return f"{name} is new to the optimizer"
        return None

    def restore(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        for module, buffers in self.buffers:
            module._buffers.update(buffers)
        self.optimizer.state.clear()
        self.optimizer.state.update(self.state)
        # A scaler keeps in which part of a step it is, and hands its tensors over by attributes.
        if self.scaler.is_enabled():
            self.scaler._per_optimizer_states.clear()
        for name in ("grad_scale", "found_inf"):
            self.optimizer.__dict__.pop(name, None)
        torch.set_rng_state(self.random)


def why_not(
    model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> str | None:
    """Why a step cannot be captured, as far as it can be known before, or None."""
    kind = type(optimizer).__name__
    for group in optimizer.param_groups:
        if not (group.get("fused") or group.get("capturable")):
            return f"{kind} reads the learning rate on the host: it needs fused=True"
    if scaler.is_enabled() and not getattr(optimizer, "_step_supports_amp_scaling", False):
        return f"float16: {kind} leaves overflown steps out on the host: it needs fused=True"
    if isinstance(model, DistributedDataParallel):
        backend = torch.distributed.get_backend(model.process_group)
        if backend != "nccl":
            return f"{backend} reduces gradients on the host: it needs nccl"
    if globally_hooked():
        return "a hook on all modules would not be called at a replay"
    for name, module in model.named_modules():
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
        ):
            return f"a hook on {name or 'the model'} would not be called at a replay"
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            return f"a hook on {name} would not be called at a replay"
    return None
