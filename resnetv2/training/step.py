"""One step of training: forward, loss, backward, optimizer and average, eager or as a CUDA graph.

As a graph (``Step(graph=True)``) the whole step is captured once and replayed with one launch from
then on. What a replay reads that changes from step to step lies at fixed addresses: images, labels
and the learning rate. Warm-up, which capturing needs, is real training: the first steps run
ungraphed on a side stream, so that there is nothing to put back, in batch norm's buffers or
anywhere else, and a graphed run takes the course of an ungraphed one. Capturing itself carries
nothing out.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from ..core.checks import globally_hooked

__all__ = [
    "CudaRecorder",
    "Recorder",
    "Step",
    "averaged_model",
    "capture_stream",
    "compute_logits",
    "load_optimizer_state",
    "optimizer_state",
]

Tensors = tuple[Tensor, ...] | list[Tensor]

# torch.cuda.graphs' notes: a few iterations, and 11 under DistributedDataParallel, which counts and
# regroups its buckets in the first ten.
WARMUP_STEPS = 3
WARMUP_STEPS_DISTRIBUTED = 11

# How an optimizer computes, not what: the running program's choice, not a checkpoint's.
_IMPLEMENTATION = ("foreach", "fused", "capturable", "differentiable")


def compute_logits(
    model: nn.Module, images: Tensor, dtype: torch.dtype, memory_format: torch.memory_format
) -> Tensor:
    """Logits (B, classes) in float32 of images (B, C, H, W), under autocast unless float32."""
    images = images.contiguous(memory_format=memory_format)
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        logits = model(images)
    return logits.float()


def averaged_model(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of ``model`` for ``Step`` to keep as the exponential moving average.

    model: as it lies on the device; one in DistributedDataParallel is taken out of it. Batch norm's
    running statistics are averaged with the weights' decay, not copied: the statistics that belong
    to averaged weights are, to first order, the average of those that belonged to the weights. What
    copying gives are those of the last weights, whose noise the average is meant to be rid of.

    The first n updates decay by less, (1 + n)/(10 + n), or a run of a few hundred steps would still
    be averaging its initial weights: the correction of timm's and TensorFlow's moving averages.

    Raises:
        ValueError: a decay outside [0, 1].
    """
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"decay must be in [0, 1], got {decay}")

    @torch.no_grad()
    def average(averages: Tensors, values: Tensors, updates: Tensor | int) -> None:
        part = 1.0 - torch.clamp(torch.as_tensor((1 + updates) / (10 + updates)), max=decay)
        differences = torch._foreach_sub(values, averages)
        torch._foreach_mul_(differences, part.to(averages[0].dtype))
        torch._foreach_add_(averages, differences)

    first = next(model.parameters())
    return AveragedModel(
        _unwrapped(model), device=first.device, multi_avg_fn=average, use_buffers=True
    )


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """``optimizer.state_dict()`` for a checkpoint: learning rates as numbers, no switches of the
    implementation, so that graphed and ungraphed runs read each other's."""
    state = optimizer.state_dict()
    groups = []
    for group in state["param_groups"]:
        kept = {name: value for name, value in group.items() if name not in _IMPLEMENTATION}
        groups.append({**kept, "lr": float(kept["lr"])})
    return {**state, "param_groups": groups}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load what ``optimizer_state`` gave; the optimizer stays fused, or not, as it was built.

    A graphed ``Step`` of this optimizer notices, and captures anew.

    Raises:
        ValueError: the state of other parameter groups.
    """
    saved, own = state["param_groups"], optimizer.param_groups
    if len(saved) != len(own):
        raise ValueError(
            f"expected the state of {len(own)} parameter groups, got that of {len(saved)}"
        )
    groups = [
        {**theirs, **{name: mine[name] for name in _IMPLEMENTATION if name in mine}}
        for theirs, mine in zip(saved, own, strict=True)
    ]
    optimizer.load_state_dict({**state, "param_groups": groups})
    # Fused kernels want momentum to lie as the weights do, which may have another memory format.
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter).copy_(value)


class Recorder(Protocol):
    """What runs, captures and replays work for ``Step``; ``CudaRecorder`` in earnest."""

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


class Step:
    """One optimizer step on one batch, with sums that stay on the device.

    Create it once model, optimizer and average are on their device and a checkpoint, if any, is
    loaded. The loss is the mean cross entropy that is trained, with label smoothing, in nats.

    Args:
        model: logits (B, classes) from images (B, C, H, W), in training mode; may be wrapped in
            DistributedDataParallel, for a graph within ``capture_stream``.
        optimizer: of its parameters. All groups get the same learning rate. A graph needs one that
            reads the learning rate on the device: ``SGD(fused=True)``.
        dtype: float32, or bfloat16 or float16 under autocast.
        scaler: of the loss; None makes one that is enabled for float16.
        label_smoothing: share of the target that is spread over all classes.
        ema: from ``averaged_model``, updated after every step, or None.
        memory_format: that images are brought to.
        graph: capture the step as a CUDA graph. Between capture and the end, ``requires_grad``,
            training mode and hyperparameters other than the learning rate stay as they are.
        recorder: what captures, for tests; None is ``CudaRecorder``.

    Attributes:
        loss: of the last step, float32, a tensor of its own each time.
        sums: (3,) float64, since ``reset``: loss times images, correct predictions, images seen;
            ``loss_sum``, ``correct`` and ``seen`` are views of it.
        graph_reason: why steps are not graphed, in one line; None where they are or will be, or
            nobody asked.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        dtype: torch.dtype = torch.float32,
        scaler: torch.amp.GradScaler | None = None,
        label_smoothing: float = 0.0,
        ema: AveragedModel | None = None,
        memory_format: torch.memory_format = torch.channels_last,
        graph: bool = False,
        recorder: Callable[[torch.device], Recorder] | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.dtype = dtype
        self.label_smoothing = label_smoothing
        self.memory_format = memory_format
        self.device = next(model.parameters()).device
        if scaler is None:
            # float16 alone underflows: its gradients need scaling, bfloat16's do not.
            scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        self.scaler = scaler
        self._average = None if ema is None else _Average(ema, _unwrapped(model))
        wide = torch.float32 if self.device.type == "mps" else torch.float64  # MPS has no float64
        self.sums = torch.zeros(3, dtype=wide, device=self.device)
        self.loss_sum, self.correct, self.seen = self.sums.unbind()
        self.loss = torch.zeros((), device=self.device)
        _fill_momentum(optimizer, scaler)

        self.graph_reason: str | None = None
        self._recorder: Recorder | None = None
        self._batch: _StaticBatch | None = None
        if graph:
            if recorder is None and self.device.type != "cuda":
                self.graph_reason = f"a CUDA graph needs a GPU, the model is on {self.device}"
            else:
                self.graph_reason = _why_not(model, optimizer, scaler)
            if self.graph_reason is None:
                self._recorder = (recorder or CudaRecorder)(self.device)
                self._rate = torch.zeros((), dtype=torch.float32, device=self.device)
                self._warm: Counter[Any] = Counter()

    @property
    def graphed(self) -> bool:
        """Whether the step has been captured."""
        return self._batch is not None

    def reset(self) -> None:
        """Set the sums to zero."""
        self.sums.zero_()

    def __call__(self, images: Tensor, labels: Tensor, lr: float) -> None:
        """Train on images (B, C, H, W) and labels (B,) at the learning rate ``lr``.

        Nothing waits for the device, but for the first batches of a graph. Tensors elsewhere are
        copied to the device.
        """
        if self._recorder is not None:
            self._set_rate(lr)
            key = (images.shape, images.dtype, labels.shape, labels.dtype)
            if self._batch is None and self._warm[key] >= self._warmup_steps:
                self._capture(key, images, labels)
            if self._batch is not None and self._batch.key == key:
                self.loss = self._batch.replay(images, labels, self._recorder)
                return
            self._warm[key] += 1
        if self._recorder is None:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
        images = images.to(self.device, non_blocking=True)
        labels = labels.to(self.device, non_blocking=True)
        if self._recorder is None:
            self.loss = self._compute(images, labels)
        else:
            self.loss = self._recorder.run(lambda: self._compute(images, labels))

    def _compute(self, images: Tensor, labels: Tensor) -> Tensor:
        """The step itself; what is captured. Returns the loss."""
        # Before the forward: the last step's gradients need no memory beside the activations.
        self.optimizer.zero_grad(set_to_none=True)
        logits = compute_logits(self.model, images, self.dtype, self.memory_format)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            if self._average is not None:
                self._average.update()
            loss = loss.detach()
            self.loss_sum.add_(loss, alpha=len(labels))
            self.correct.add_((logits.argmax(1) == labels).sum())
            self.seen.add_(len(labels))
        return loss

    @property
    def _warmup_steps(self) -> int:
        wrapped = isinstance(self.model, DistributedDataParallel)
        return WARMUP_STEPS_DISTRIBUTED if wrapped else WARMUP_STEPS

    def _set_rate(self, lr: float) -> None:
        """Write the learning rate to where the optimizer's kernels read it."""
        groups = self.optimizer.param_groups
        if any(group["lr"] is not self._rate for group in groups):
            # New, or a state was loaded: then momentum lies elsewhere, and no graph knows.
            self._batch = None
            self._warm.clear()
            _fill_momentum(self.optimizer, self.scaler)
            for group in groups:
                group["lr"] = self._rate
        self._rate.fill_(lr)

    def _capture(self, key: Any, images: Tensor, labels: Tensor) -> None:
        """Capture the step for batches like this one, or fall back with a reason."""
        assert self._recorder is not None
        reason = _why_not(self.model, self.optimizer, self.scaler)  # a hook may be new
        if reason is not None:
            self.graph_reason, self._recorder = reason, None
            return
        before = _HostState(self.model, self.optimizer, self.scaler)
        self.optimizer.zero_grad(set_to_none=True)
        first: list[str] = []

        def work() -> Tensor:
            try:
                return self._compute(batch.images, batch.labels)
            except Exception as error:  # ending a capture that has failed raises once more
                first.append(_first_line(error))
                raise

        try:
            batch = _StaticBatch(key, images, labels, self.device, self.memory_format)
            batch.loss = self._recorder.capture(work)
            failure = before.beyond_replay()
        except BaseException as error:
            if not isinstance(error, Exception):
                before.restore()
                raise
            failure = (first or [_first_line(error)])[0]
        if failure is not None:  # whatever it is, the step can be run as it is
            before.restore()
            self.graph_reason, self._recorder = f"capturing failed: {failure}", None
            return
        batch.gradients = [(p, p.grad) for p in self.model.parameters() if p.grad is not None]
        self._batch = batch


class _StaticBatch:
    """What a captured step reads and leaves behind, at fixed addresses."""

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


class _HostState:
    """What capturing a step changes in Python, where the device carries nothing out."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
    ) -> None:
        self.optimizer = optimizer
        self.scaler = scaler
        self.buffers = [(module, dict(module._buffers)) for module in model.modules()]
        self.state = {key: dict(value) for key, value in optimizer.state.items()}
        self.random = torch.get_rng_state()

    def beyond_replay(self) -> str | None:
        """What replays could not follow: a tensor that is not changed in place, random numbers
        that come from the host; or None."""
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


class _Average:
    """``AveragedModel.update_parameters`` without its question to the device, which waits for it
    and cannot be captured; and ``num_batches_tracked`` copied, of which averaging makes a number
    that stands still."""

    def __init__(self, ema: AveragedModel, model: nn.Module) -> None:
        if ema.multi_avg_fn is None:
            raise ValueError("expected an AveragedModel with a multi_avg_fn, got one without")
        self.average = ema.multi_avg_fn
        device = next(model.parameters()).device
        ema.n_averaged = ema.n_averaged.to(device)
        self.count = ema.n_averaged
        self.started = int(self.count) > 0
        self.averaged: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        self.copied: tuple[list[Tensor], list[Tensor]] = ([], [])
        pairs = [
            *zip(ema.module.parameters(), model.parameters(), strict=True),
            *zip(ema.module.buffers(), model.buffers(), strict=True),
        ]
        for mine, theirs in pairs:
            lists = self.copied
            if mine.is_floating_point():
                lists = self.averaged.setdefault(mine.dtype, ([], []))
            lists[0].append(mine.detach())
            lists[1].append(theirs.detach())

    def update(self) -> None:
        for mine, theirs in self.averaged.values():
            if self.started:
                self.average(mine, theirs, self.count)
            else:
                torch._foreach_copy_(mine, theirs)
        if self.copied[0]:
            torch._foreach_copy_(*self.copied)
        self.started = True
        self.count.add_(1)


def _unwrapped(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def _fill_momentum(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
    """Give fused SGD under a scaler its momentum, zero, before its first step.

    It would take uninitialised memory and leave it so where that step overflows and is left out, as
    float16's first steps are. Zero is the same first step where nothing is damped.
    """
    if not (isinstance(optimizer, torch.optim.SGD) and scaler.is_enabled()):
        return
    for group in optimizer.param_groups:
        if not group["fused"] or not group["momentum"] or group["dampening"]:
            continue
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if parameter.requires_grad and state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)


def _why_not(
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


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
