"""The main job: train a pre-activation ResNet on images.

The recipe is the paper's (He et al. 2016, appendix "Implementation details"): SGD with momentum
0.9, weight decay 1e-4, batches of 128, padded random crops and flips, a learning rate of 0.1 that
is divided by 10 at 32k and at 48k of 64k iterations after 400 iterations at 0.01. Shorter runs
keep the proportions.
"""

import contextlib
import json
import math
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from tqdm import tqdm

from resnetv2.data import (
    Batches,
    FolderData,
    ImageData,
    InputError,
    as_image_data,
    create_synthetic_dataset,
    load_data,
)
from resnetv2.plots import plot_curves

__all__ = [
    "DivergenceError",
    "EpochMetrics",
    "InputError",
    "TrainingResult",
    "create_synthetic_dataset",
    "learning_rate",
    "train_resnet_v2",
]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Section "Implementation details": 400 of 64k iterations at a tenth of the learning rate.
_WARMUP_FRACTION = 400 / 64_000


class DivergenceError(RuntimeError):
    """The training loss is no longer a finite number."""


@dataclass(frozen=True)
class EpochMetrics:
    """One epoch. Losses are means over images in nats, accuracies in 0..1.

    The training figures are those of the augmented batches while the weights still moved;
    `seconds` and `images_per_second` are of the training part alone.
    """

    epoch: int
    lr: float
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    seconds: float
    images_per_second: float


@dataclass
class TrainingResult:
    """What `train_resnet_v2` returns.

    `step_losses` holds the loss of every training step of this call, `config` what the run was
    asked for and ran with, as in the first line of metrics.jsonl.
    """

    model: nn.Module
    config: dict[str, Any]
    history: list[EpochMetrics] = field(default_factory=list)
    step_losses: list[float] = field(default_factory=list)

    @property
    def test_accuracy(self) -> float:
        """Test accuracy after the last epoch, 0..1."""
        return self.history[-1].test_accuracy


def learning_rate(
    step: int,
    total_steps: int,
    lr: float = 0.1,
    warmup_steps: int | None = None,
) -> float:
    """The paper's schedule at `step` (from 0) of `total_steps`.

    lr/10 during the warm-up, then lr, then lr/10 from a half and lr/100 from three quarters of all
    steps on. `warmup_steps` defaults to the paper's proportion, 400 in 64,000, and at most 400.
    """
    if warmup_steps is None:
        warmup_steps = min(400, round(total_steps * _WARMUP_FRACTION))
    if step < warmup_steps:
        return lr / 10
    if 4 * step >= 3 * total_steps:
        return lr / 100
    return lr / 10 if 2 * step >= total_steps else lr


def train_resnet_v2(
    data: str | TensorDataset | tuple[TensorDataset, TensorDataset] | ImageData = "digits",
    *,
    model: nn.Module | None = None,
    depth: int = 20,
    block: str = "basic",
    stem: str = "cifar",
    memory: str = "recompute",
    budget: str | int | None = None,
    backend: str = "auto",
    eager: bool = False,
    epochs: int = 30,
    batch_size: int = 128,
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    warmup_steps: int | None = None,
    dtype: str = "fp32",
    device: str | torch.device = "auto",
    channels_last: bool = True,
    seed: int = 0,
    root: str | Path = "data",
    image_size: int | None = None,
    limit_batches: int | None = None,
    out: str | Path | None = None,
    checkpoint: str | Path | None = None,
    resume: str | Path | None = None,
    log_steps: bool = False,
    verbose: bool = True,
    progress: bool | None = None,
) -> TrainingResult:
    """Train a pre-activation ResNet, or any image classifier, and test it after every epoch.

    Two calls with the same arguments on the same machine give bitwise equal weights. The global
    random state is left as it was.

    Args:
        data: a name that `resnetv2.data.load_data` knows; or tensors as
            `TensorDataset(images (N, C, H, W), labels (N,))`, one for training and one for testing,
            or a single one, of which the last fifth is held out; or an `ImageData`.
        model: train this module, logits (B, classes) from images (B, C, H, W), in place, instead of
            a new `PreActResNet` described by `depth`, `block`, `stem`, `memory` and `backend`.
        depth: 6n+2 for basic blocks, 9n+2 for bottlenecks.
        block: `basic` or `bottleneck`.
        stem: `cifar` or `imagenet`.
        memory: what the model keeps from forward to backward, one of `PreActResNet`'s modes.
        budget: bytes ("8GiB" or a number) for `memory="auto"`; a GPU's free memory if None.
        backend: `auto`, `triton`, `aten` or `eager`.
        eager: the same model child by child, unfused, for comparison: `backend="eager"`.
        epochs: passes over the training set.
        batch_size: images a step. A last, smaller batch is left out.
        lr: learning rate after the warm-up; `learning_rate` gives the schedule.
        momentum, weight_decay: of SGD, on all parameters, as in the paper.
        warmup_steps: steps at lr/10 in the beginning; None keeps the paper's proportion.
        dtype: `fp32`, or `bf16` or `fp16` under autocast; fp16 scales the loss.
        device: `auto` is a GPU where there is one.
        channels_last: memory format of weights and images.
        seed: of the initial weights, the order of images and the augmentation.
        root, image_size: see `load_data`.
        limit_batches: at most so many training and test batches an epoch, for trying things out.
        out: folder for metrics.jsonl (a header with configuration and versions, then a line an
            epoch) and curves.png; created if missing, an earlier run's files are replaced.
        checkpoint: file that holds the state of the run after every epoch.
        resume: checkpoint to go on from; a resumed run ends with the bits of one that was
            never stopped. The earlier epochs' metrics are carried over.
        log_steps: write every step's loss to metrics.jsonl as well.
        verbose: print what is trained and a line an epoch.
        progress: show a progress bar; None means only on a terminal.

    Raises:
        InputError: an argument, path or data set that cannot work, in one line.
        DivergenceError: the loss became infinite or NaN; metrics up to there are written.
    """
    _check(epochs=epochs, batch_size=batch_size, limit_batches=limit_batches)
    if not lr > 0:
        raise InputError(f"the learning rate must be positive, got {lr}")
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}: choose from {', '.join(DTYPES)}")
    if eager:
        if backend not in ("auto", "eager"):
            raise InputError(f"eager contradicts backend={backend!r}: give one of them")
        backend = "eager"
    place = _device(device)

    if isinstance(data, str):
        images: ImageData | FolderData = load_data(
            data, root=root, image_size=image_size, progress=progress, seed=seed
        )
    else:
        images = as_image_data(data)

    with _reproducible(place, seed):
        if model is None:
            if memory == "auto" and budget is None and place.type != "cuda":
                raise InputError('memory "auto" needs a budget, such as 8GiB, without a GPU')
            model = _build(images, depth, block, stem, memory, budget, backend)
            name = f"PreActResNet-{depth} ({block})"
        else:
            name, depth, block = type(model).__name__, 0, "given"
        format_ = torch.channels_last if channels_last else torch.contiguous_format
        model.to(place)
        model.to(memory_format=format_)  # type: ignore[call-overload]  # missing in torch's stub

        config = {
            "data": images.name,
            "model": name,
            "depth": depth,
            "block": block,
            "stem": stem,
            "memory": memory,
            "backend": backend,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "classes": len(images.classes),
            "image": [images.channels, *images.image_size],
            "train_images": len(images.train),
            "test_images": len(images.test),
            "epochs": epochs,
            "batch_size": batch_size,
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "warmup_steps": warmup_steps,
            "dtype": dtype,
            "channels_last": channels_last,
            "seed": seed,
            "limit_batches": limit_batches,
            "device": _device_name(place),
            "threads": torch.get_num_threads(),
            "versions": _versions(),
        }
        run = _Run(images, model, config, place, format_, progress)
        if resume is not None:
            run.load(Path(resume))
        if verbose:
            print(_describe(config), flush=True)
        with _Log(out, config, run.result.history) as log:
            for epoch in range(len(run.result.history) + 1, epochs + 1):
                entry, losses = run.epoch(epoch)
                first_step = (epoch - 1) * run.steps
                if log_steps:
                    for step, loss in enumerate(losses, first_step):
                        log.write({"event": "step", "step": step, "loss": loss})
                log.write({"event": "epoch", **asdict(entry)})
                if verbose:
                    print(_line(entry, epochs), flush=True)
                if not math.isfinite(entry.train_loss):
                    raise DivergenceError(
                        f"the training loss is {entry.train_loss} in epoch {epoch}: "
                        f"try a learning rate below {lr}"
                    )
                if checkpoint is not None:
                    run.save(Path(checkpoint))
        if out is not None and run.result.history:
            title = f"{name} on {images.name}, {backend} backend, {dtype}, seed {seed}"
            plot_curves(run.result.history, Path(out) / "curves.png", title)
    return run.result


class _Run:
    """The state of a run: what a checkpoint holds, and how one epoch moves it."""

    def __init__(
        self,
        data: ImageData | FolderData,
        model: nn.Module,
        config: dict[str, Any],
        device: torch.device,
        memory_format: torch.memory_format,
        progress: bool | None,
    ) -> None:
        self.model = model
        self.device = device
        self.dtype = DTYPES[config["dtype"]]
        self.memory_format = memory_format
        self.config = config
        self.disable_bar = None if progress is None else not progress
        self.batches = Batches(data, config["batch_size"], config["seed"], device)
        self.limit = config["limit_batches"]
        self.steps = min(self.batches.steps, self.limit or self.batches.steps)
        self.optimizer = torch.optim.SGD(
            model.parameters(),
            lr=config["lr"],
            momentum=config["momentum"],
            weight_decay=config["weight_decay"],
        )
        # float16 alone underflows: its gradients need scaling, bfloat16's do not.
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.result = TrainingResult(model, config)

    def epoch(self, epoch: int) -> tuple[EpochMetrics, list[float]]:
        """Train on every batch, then test. Returns the metrics and the steps' losses."""
        started = time.perf_counter()
        self.model.train()
        losses, correct = [], torch.zeros((), dtype=torch.int64, device=self.device)
        rate = self.config["lr"]
        bar = tqdm(
            zip(range(self.steps), self.batches.training(epoch), strict=False),
            total=self.steps,
            desc=f"epoch {epoch}/{self.config['epochs']}",
            unit="batch",
            leave=False,
            disable=self.disable_bar,
        )
        images_seen = 0
        for index, (images, labels) in bar:
            rate = learning_rate(
                (epoch - 1) * self.steps + index,
                self.config["epochs"] * self.steps,
                self.config["lr"],
                self.config["warmup_steps"],
            )
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            logits = self._forward(images)
            loss = F.cross_entropy(logits, labels)
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            # Kept on the device: reading a value here would make the host wait for every step.
            losses.append(loss.detach())
            correct += (logits.argmax(1) == labels).sum()
            images_seen += len(labels)
        step_losses = torch.stack(losses).tolist()
        seconds = time.perf_counter() - started
        test_loss, test_accuracy = self._test()
        entry = EpochMetrics(
            epoch=epoch,
            lr=rate,
            train_loss=math.fsum(step_losses) / len(step_losses),
            train_accuracy=correct.item() / images_seen,
            test_loss=test_loss,
            test_accuracy=test_accuracy,
            seconds=seconds,
            images_per_second=images_seen / seconds,
        )
        self.result.history.append(entry)
        self.result.step_losses += step_losses
        return entry, step_losses

    @torch.no_grad()
    def _test(self) -> tuple[float, float]:
        self.model.eval()
        total = torch.zeros((), device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        count = 0
        for index, (images, labels) in enumerate(self.batches.testing()):
            if self.limit is not None and index >= self.limit:
                break
            logits = self._forward(images)
            total += F.cross_entropy(logits, labels, reduction="sum")
            correct += (logits.argmax(1) == labels).sum()
            count += len(labels)
        return total.item() / count, correct.item() / count

    def _forward(self, images: Tensor) -> Tensor:
        images = images.contiguous(memory_format=self.memory_format)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits = self.model(images)
        return logits.float()

    def save(self, path: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "torch_generator": torch.get_rng_state(),
            "config": self.config,
            "history": [asdict(entry) for entry in self.result.history],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        # Written beside and moved, so that an interrupted run leaves the last whole checkpoint.
        partial = path.with_name(path.name + ".partial")
        torch.save(state, partial)
        partial.replace(path)

    def load(self, path: Path) -> None:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            saved, history = state["config"], state["history"]
        except FileNotFoundError as error:
            raise InputError(f"no checkpoint at {path}") from error
        except Exception as error:
            # torch.load fails in many ways on a file that is something else; none of them is ours.
            reason = str(error).strip().partition("\n")[0]
            raise InputError(f"{path} is not a checkpoint of this program: {reason}") from error
        same = (
            "data",
            "model",
            "classes",
            "image",
            "batch_size",
            "epochs",
            "seed",
            "limit_batches",
        )
        for key in same:
            if saved[key] != self.config[key]:
                raise InputError(
                    f"{path} was written with {key} = {saved[key]!r}, this run has "
                    f"{self.config[key]!r}: a resumed run keeps it"
                )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["torch_generator"])
        self.result.history = [EpochMetrics(**entry) for entry in history]


class _Log:
    """metrics.jsonl: one JSON object a line, readable while the run goes on."""

    def __init__(
        self, out: str | Path | None, config: dict[str, Any], history: list[EpochMetrics]
    ) -> None:
        self.file: TextIO | None = None
        if out is not None:
            try:
                Path(out).mkdir(parents=True, exist_ok=True)
                self.file = (Path(out) / "metrics.jsonl").open("w", encoding="utf-8")
            except OSError as error:
                raise InputError(f"cannot write to {out}: {error}") from error
        self.write({"event": "config", **config})
        for entry in history:
            self.write({"event": "epoch", **asdict(entry)})

    def write(self, record: dict[str, Any]) -> None:
        if self.file is not None:
            # JSON has no NaN: what is not a finite number becomes null.
            clean = {
                key: None if isinstance(value, float) and not math.isfinite(value) else value
                for key, value in record.items()
            }
            self.file.write(json.dumps(clean, allow_nan=False) + "\n")
            self.file.flush()

    def __enter__(self) -> "_Log":
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()


def _build(
    data: ImageData | FolderData,
    depth: int,
    block: str,
    stem: str,
    memory: str,
    budget: str | int | None,
    backend: str,
) -> nn.Module:
    from resnetv2.models import PreActResNet

    try:
        return PreActResNet.from_depth(
            depth,
            block=block,
            num_classes=len(data.classes),
            in_channels=data.channels,
            stem=stem,
            memory=memory,
            budget=budget,
            backend=backend,
        )
    except ValueError as error:
        raise InputError(str(error)) from error


def _check(**values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    # torch.device raises RuntimeError for an unknown name, AssertionError without CUDA support.
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"cannot use device {str(device)!r}: {reason}") from error
    return place


@contextlib.contextmanager
def _reproducible(device: torch.device, seed: int) -> Iterator[None]:
    """Seed every generator and pin cuDNN's choices, then put all back."""
    cuda = [device] if device.type == "cuda" else []
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        cudnn.deterministic, cudnn.benchmark = True, False
        try:
            yield
        finally:
            cudnn.deterministic, cudnn.benchmark = before


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {os.cpu_count()} cores)"


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in ("resnetv2", "torchvision", "triton", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def _describe(config: dict[str, Any]) -> str:
    channels, height, width = config["image"]
    return (
        f"{config['data']}: {config['train_images']:,} training and {config['test_images']:,} test "
        f"images, {channels}x{height}x{width}, {config['classes']} classes\n"
        f"{config['model']}: {config['parameters']:,} parameters, backend {config['backend']}, "
        f"memory {config['memory']}, {config['dtype']} on {config['device']}"
    )


def _line(entry: EpochMetrics, epochs: int) -> str:
    width = len(str(epochs))
    return (
        f"epoch {entry.epoch:{width}}/{epochs}  lr {entry.lr:<6.4g}"
        f"  train loss {entry.train_loss:.4f} accuracy {100 * entry.train_accuracy:6.2f} %"
        f"  test loss {entry.test_loss:.4f} accuracy {100 * entry.test_accuracy:6.2f} %"
        f"  {entry.seconds:.1f} s, {entry.images_per_second:,.0f} images/s"
    )
