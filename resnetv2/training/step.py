"""One step of training: forward, loss, backward, optimizer and average, eager or as a CUDA graph.

As a graph (``Step(graph=True)``) the whole step is captured once and replayed with one launch from
then on. What a replay reads that changes from step to step lies at fixed addresses: images, labels
and the learning rate. Warm-up, which capturing needs, is real training: the first steps run
ungraphed on a side stream, so that there is nothing to put back, in batch norm's buffers or
anywhere else, and a graphed run takes the course of an ungraphed one. Capturing itself carries
nothing out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from .average import Average, unwrapped
from .capture import CudaRecorder, HostState, Recorder, StaticBatch, why_not
from .optimizer import fill_momentum

# torch.cuda.graphs' notes: a few iterations, and 11 under DistributedDataParallel, which counts and
# regroups its buckets in the first ten.
WARMUP_STEPS = 3
WARMUP_STEPS_DISTRIBUTED = 11


def compute_logits(
    model: nn.Module, images: Tensor, dtype: torch.dtype, memory_format: torch.memory_format
) -> Tensor:
    """Logits (B, classes) in float32 of images (B, C, H, W), under autocast unless float32."""
    images = images.contiguous(memory_format=memory_format)
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        logits = model(images)
    return logits.float()


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
        self._average = None if ema is None else Average(ema, unwrapped(model))
        wide = torch.float32 if self.device.type == "mps" else torch.float64  # MPS has no float64
        self.sums = torch.zeros(3, dtype=wide, device=self.device)
        self.loss_sum, self.correct, self.seen = self.sums.unbind()
        self.loss = torch.zeros((), device=self.device)
        fill_momentum(optimizer, scaler)

        self.graph_reason: str | None = None
        self._recorder: Recorder | None = None
        self._batch: StaticBatch | None = None
        if graph:
            if recorder is None and self.device.type != "cuda":
                self.graph_reason = f"a CUDA graph needs a GPU, the model is on {self.device}"
            else:
                self.graph_reason = why_not(model, optimizer, scaler)
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
            fill_momentum(self.optimizer, self.scaler)
            for group in groups:
                group["lr"] = self._rate
        self._rate.fill_(lr)

    def _capture(self, key: Any, images: Tensor, labels: Tensor) -> None:
        """Capture the step for batches like this one, or fall back with a reason."""
        assert self._recorder is not None
        reason = why_not(self.model, self.optimizer, self.scaler)  # a hook may be new
        if reason is not None:
            self.graph_reason, self._recorder = reason, None
            return
        before = HostState(self.model, self.optimizer, self.scaler)
        self.optimizer.zero_grad(set_to_none=True)
        first: list[str] = []

        def work() -> Tensor:
            try:
                return self._compute(batch.images, batch.labels)
            except Exception as error:  # ending a capture that has failed raises once more
                first.append(_first_line(error))
                raise

        try:
            batch = StaticBatch(key, images, labels, self.device, self.memory_format)
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


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
