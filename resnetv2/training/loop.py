"""The main job: train a pre-activation ResNet on images.

`TrainConfig` says what is trained and how, its defaults the recipe of He et al. 2016 (appendix
"Implementation details") in proportion to the run's length. What decides a step's result is the
state that a checkpoint holds and the step's number: a run that was killed goes on bit for bit.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from tqdm import tqdm

from ..core.memory import BudgetError
from ..core.sync import convert_sync_batchnorm
from ..data.batches import Batches, ImageData
from ..data.datasets import as_image_data, create_synthetic_dataset, load_data
from ..data.host import memory_in_use, release_freed_memory
from ..data.streaming import FolderData
from ..errors import InputError
from ..models import PreActResNet
from ..planning.memory import plan
from .checkpoint import Checkpoints, check_parts
from .config import TrainConfig, check_resumable, check_steps, make_config
from .environment import device_name, package_versions, reproducible, select_device
from .evaluate import (
    DTYPES,
    build_model,
    check_backend,
    evaluate_as,
    load_weights,
    memory_format_of,
)
from .interrupts import StopRequests
from .log import RunLog, check_folder, holds_a_run, write_config
from .parallel import World, alike, distribute, local_device, processes
from .plots import plot_curves
from .schedule import learning_rate, optimizer_groups
from .step import Step, averaged_model, load_optimizer_state, optimizer_state

__all__ = [
    "DTYPES",
    "DivergenceError",
    "EpochMetrics",
    "InputError",
    "Interrupted",
    "TrainConfig",
    "TrainingResult",
    "create_synthetic_dataset",
    "learning_rate",
    "train",
    "train_resnet_v2",
]

# On a GPU, steps between looks at the loss and at requests to stop: a look waits for the device.
_STEPS_A_LOOK = 16
# Seconds between drawings of the curves while the run goes on.
_SECONDS_A_DRAWING = 300.0


class DivergenceError(RuntimeError):
    """The training loss is no longer a finite number."""


class Interrupted(KeyboardInterrupt):
    """A signal stopped the run, after the step in hand and a checkpoint. `signal`: its number."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


@dataclass(frozen=True)
class EpochMetrics:
    """One epoch. Losses are means over images in nats, accuracies in 0..1.

    The training figures are those of the augmented batches while the weights still moved, the loss
    with label smoothing; the test figures are those of the moving average, where there is one.
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
    """What `train` returns.

    `step_losses` holds the loss of every training step of this call, `config` what the run was
    asked for and ran with, as in the first line of metrics.jsonl. `averaged` is the moving average
    of the weights that was tested, None without one.
    """

    model: nn.Module
    config: dict[str, Any]
    history: list[EpochMetrics] = field(default_factory=list)
    step_losses: list[float] = field(default_factory=list)
    averaged: nn.Module | None = None

    @property
    def test_accuracy(self) -> float:
        """Test accuracy after the last epoch, 0..1."""
        return self.history[-1].test_accuracy


Data = TensorDataset | tuple[TensorDataset, TensorDataset] | ImageData | FolderData


def train_resnet_v2(
    data: str | Data | None = None,
    *,
    recipe: str | Path | None = None,
    model: nn.Module | None = None,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    overwrite: bool = False,
    verbose: bool = True,
    progress: bool | None = None,
    **options: Any,
) -> TrainingResult:
    """Train a pre-activation ResNet, or any image classifier, and test it after every epoch.

    Two calls with the same arguments on the same machine give bitwise equal weights. The global
    random state is left as it was.

    Args:
        data: a name that `resnetv2.data.load_data` knows (default "digits"); or tensors as
            `TensorDataset(images (N, C, H, W), labels (N,))`, one for training and one for testing,
            or a single one, of which the last fifth is held out; or an `ImageData`.
        recipe: a recipe's name or file, see `resnetv2.training.config.make_config`.
        model, out, resume, overwrite, verbose, progress: see `train`.
        options: fields of `TrainConfig`: epochs=30, depth=20, batch_size=128, lr=0.1, ...

    Raises:
        InputError: an option, path or data set that cannot work, in one line.
        DivergenceError, Interrupted: see `train`.
    """
    if isinstance(data, str):
        options["data"] = data
    elif data is not None:
        options.setdefault("data", data.name if isinstance(data, ImageData) else "tensors")
    return train(
        make_config(recipe, **options),
        data=None if isinstance(data, str) else data,
        model=model,
        out=out,
        resume=resume,
        overwrite=overwrite,
        verbose=verbose,
        progress=progress,
    )


def train(
    config: TrainConfig,
    *,
    data: Data | None = None,
    model: nn.Module | None = None,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    overwrite: bool = False,
    verbose: bool = True,
    progress: bool | None = None,
) -> TrainingResult:
    """Train as `config` says, in this process or in all those that torchrun started.

    Args:
        config: every option of the run.
        data: the data set, instead of the one that `config.data` names.
        model: train this module, logits (B, classes) from images (B, C, H, W), in place, instead of
            a new `PreActResNet`. With several processes its batch norms become synchronised ones
            unless `config.sync_bn` is false.
        out: the run's folder: config.yaml, metrics.jsonl, curves.png and checkpoints/. None writes
            nothing.
        resume: "auto" goes on from the newest usable checkpoint of `out`, or begins where there is
            none; or a checkpoint, or the folder of a run. The result is, to the bit, that of a run
            that was never stopped.
        overwrite: let `out` hold a run, whose files are replaced.
        verbose: print what is trained and a line an epoch.
        progress: show a progress bar; None means only on a terminal.

    Raises:
        InputError: an option, path or data set that cannot work, in one line.
        DivergenceError: the loss became infinite or NaN. It names the step and the last checkpoint.
        Interrupted: SIGINT or SIGTERM came, and the run is saved (where `out` is given).
    """
    folder = None if out is None else Path(out)
    with alike():
        place = select_device(config.device)
        if model is None:
            check_backend(config.backend, place)
        if resume is not None and folder is None and str(resume) == "auto":
            raise InputError('resume "auto" looks for checkpoints in the run\'s folder: give out')
    place = local_device(place)
    with processes(place) as world, reproducible(place, config.seed):
        speak = verbose and world.is_main
        world.on_main(lambda: _check_folder(folder, resume, overwrite))
        images = _load(config, data, world, progress)

        def build() -> _Run:
            net = _model_for(config, images, place) if model is None else model
            if world.size > 1 and config.sync_bn:
                net = convert_sync_batchnorm(net)
            net.to(place)
            net.to(memory_format=memory_format_of(config))  # type: ignore[call-overload]  # torch's stub
            run = _Run(config, images, net, place, world, folder, own_model=model is not None)
            run.check()
            return run

        run = world.together(build)
        if resume is not None:
            run.load(resume, _printer(speak))
        if speak:
            print(run.describe(), flush=True)
        if run.done == run.total:
            _printer(speak)(f"the run is complete: all {run.total:,} steps are done")
            return run.result
        with _nothing_left_behind(None if run.done or not world.is_main else folder, run):
            run.train(overwrite, progress, speak)
    return run.result


@contextlib.contextmanager
def _nothing_left_behind(folder: Path | None, run: _Run) -> Iterator[None]:
    """Remove the files of a run that ends before its first step, where there were none before."""
    if folder is None or holds_a_run(folder):
        yield
        return
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        yield
    except BaseException:
        if not run.done:
            for name in ("config.yaml", "metrics.jsonl"):
                (folder / name).unlink(missing_ok=True)
            if folder in missing:
                shutil.rmtree(folder / "tensorboard", ignore_errors=True)
            with contextlib.suppress(OSError):
                for place in missing:
                    place.rmdir()
        raise


def _model_for(config: TrainConfig, data: ImageData | FolderData, place: torch.device) -> nn.Module:
    if config.memory == "auto" and config.budget is None and place.type != "cuda":
        raise InputError('memory "auto" needs a budget, such as 8GiB, without a GPU')
    return build_model(config, len(data.classes), data.channels)


def run_of(checkpoint: str | Path) -> Path | None:
    """The folder of the run that a checkpoint, a run's folder or its checkpoints/ belongs to."""
    path = Path(os.path.realpath(checkpoint))
    if path.is_dir():
        return path.parent if path.name == "checkpoints" else path
    return path.parent.parent if path.parent.name == "checkpoints" else None


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"it lacks {error.args[0]!r}"
    return str(error).partition("\n")[0].rpartition("__init__() ")[2]


def _printer(speak: bool) -> Any:
    return tqdm.write if speak else (lambda line: None)


def _check_folder(folder: Path | None, resume: str | Path | None, overwrite: bool) -> None:
    """Refuse to mix a new run with the files of another."""
    if resume is not None and overwrite:
        raise InputError("resume goes on with a run, overwrite replaces one: give one of them")
    found = None if folder is None else holds_a_run(folder)
    if folder is not None:
        check_folder(folder)
    if found is None or overwrite or str(resume) == "auto":
        return
    if resume is not None and run_of(resume) != Path(os.path.realpath(folder or "")):
        raise InputError(
            f"{folder} holds another run ({found}) than {resume}: take another folder by --out"
        )
    if resume is None:
        raise InputError(
            f"{folder} holds a run ({found}): go on with it by --resume auto, replace it by "
            "--overwrite, or take another folder by --out"
        )


def _load(
    config: TrainConfig, data: Data | None, world: World, progress: bool | None
) -> ImageData | FolderData:
    if isinstance(data, FolderData):
        return data
    if data is not None:
        return as_image_data(data, config.data)
    loaded: list[ImageData | FolderData] = []

    def load(cache: str) -> str:
        loaded.append(
            load_data(
                config.data,
                root=config.root,
                image_size=config.image_size,
                cache=cache,
                progress=progress if world.is_main else False,
                seed=config.seed,
            )
        )
        return loaded[0].cache

    # One after the others: the first may have to download it, and decides where images are kept.
    cache = world.on_main(lambda: load(config.cache))
    if not loaded:
        load(cache)
    return loaded[0]


class _Run:
    """The state of a run, what a checkpoint holds of it, and how an epoch moves it."""

    def __init__(
        self,
        config: TrainConfig,
        data: ImageData | FolderData,
        model: nn.Module,
        device: torch.device,
        world: World,
        folder: Path | None,
        own_model: bool,
    ) -> None:
        self.config = config
        self.device = device
        self.world = world
        self.folder = folder
        self.model = model
        self.batches = Batches(
            data,
            config.batch_size,
            config.seed,
            device,
            rank=world.rank,
            world_size=world.size,
            workers=config.workers,
            crop_padding=config.crop_padding,
            flip=config.flip,
            drop_last=config.drop_last,
        )
        self.epoch_steps = min(self.batches.steps, config.limit_batches or self.batches.steps)
        self.total = config.steps or (config.epochs or 1) * self.epoch_steps
        self.epochs = math.ceil(self.total / self.epoch_steps)
        check_steps(config, self.total)
        last = self.batches.size(self.epoch_steps - 1)
        if last % world.size:
            # DDP's mean over the processes would weigh the smaller shares' images more.
            raise InputError(
                f"the last batch of an epoch has {last} images, which {world.size} processes "
                "cannot share equally: leave it out by --drop-last"
            )
        graphed = config.graph and device.type == "cuda"
        self.optimizer = torch.optim.SGD(
            optimizer_groups(model, config.weight_decay, config.decay_all),
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            fused=True if graphed else None,
        )
        # float16 alone underflows: its gradients need scaling, bfloat16's do not.
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.dtype == "fp16")
        self.ema = averaged_model(model, config.ema) if config.ema else None
        self.result = TrainingResult(model, self._facts(data, own_model))
        self.result.averaged = None if self.ema is None else self.ema.module
        self.facts = {key: self.result.config[key] for key in ("model", "classes", "image")}
        self.facts["own_model"] = own_model
        # Images in memory and streamed ones are augmented each in their own way.
        self.facts["cache"] = data.cache
        self.checkpoints = None if folder is None else Checkpoints(folder / "checkpoints")
        if self.checkpoints is not None:
            self.checkpoints.keep = config.keep

        # A model may have infinities of its own, such as a mask.
        names = list(model.state_dict())
        self._numbers = [n for n, good in zip(names, _finite(model, names)) if bool(good)]
        self.done = 0  # optimizer steps
        self.seconds = 0.0  # of training, in the epoch in hand
        self.best = -1.0
        self.resumed_at: int | None = None
        self.last_checkpoint: Path | None = None
        # What a checkpoint has for the parts that are made when training begins.
        self._sums: Tensor | None = None
        self._random: list[dict[str, Any]] | None = None
        self._pending: list[tuple[dict[str, Any], Tensor | float]] = []
        self._drawn = time.monotonic()

    def _facts(self, data: ImageData | FolderData, own_model: bool) -> dict[str, Any]:
        config = self.config
        name = f"PreActResNet-{config.depth} ({config.block})"
        return {
            **asdict(config),
            "model": type(self.model).__name__ if own_model else name,
            **({"depth": 0, "block": "given"} if own_model else {}),
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "classes": len(data.classes),
            "image": [data.channels, *data.image_size],
            "train_images": len(data.train),
            "test_images": len(data.test),
            "augmentation": self.batches.augmentation,
            "steps_an_epoch": self.epoch_steps,
            "total_steps": self.total,
            "device_name": device_name(self.device),
            "processes": self.world.size,
            "threads": torch.get_num_threads(),
            "versions": package_versions(),
        }

    def describe(self) -> str:
        """What is trained, in a few lines."""
        facts, config = self.result.config, self.config
        channels, height, width = facts["image"]
        lines = [
            f"{facts['data']}: {facts['train_images']:,} training and {facts['test_images']:,} "
            f"test images, {channels}x{height}x{width}, {facts['classes']} classes; "
            f"augmentation: {facts['augmentation']}",
            f"{facts['model']}: {facts['parameters']:,} parameters, backend {config.backend}, "
            f"memory {config.memory}, {config.dtype} on {facts['device_name']}",
        ]
        if self.world.size > 1:
            synced = "synchronised" if config.sync_bn else "each its own"
            lines.append(
                f"{self.world.size} processes, {config.batch_size // self.world.size} images each "
                f"a step, batch norm's moments {synced}"
            )
        lines.append(
            f"{self.total:,} steps of {config.batch_size} images, {_epochs(self.epochs)}, schedule "
            f"{config.schedule}, lr {config.lr:g}"
        )
        if self.resumed_at is not None:
            lines.append(f"going on after step {self.done:,} from {self.last_checkpoint}")
        return "\n".join(lines)

    def check(self) -> None:
        """Refuse what the first step would refuse, before the run's files are made or replaced."""
        model, world = self.model, self.world
        if not isinstance(model, PreActResNet):
            return
        _, height, width = self.result.config["image"]
        smallest = min(self.batches.size(0), self.batches.size(self.epoch_steps - 1))
        if not self.config.sync_bn:
            smallest //= world.size
        shrinks = 2 ** (len(model.stages) - 1) * (4 if model.stem == "imagenet" else 1)
        if smallest == 1 and max(height, width) <= shrinks:
            raise InputError(
                f"a batch of one image of {height}x{width} pixels leaves the last norms one value "
                "a channel, which has no variance: take a larger batch or image size"
            )
        if self.config.memory == "auto":
            try:
                plan(
                    model,
                    self.config.batch_size // world.size,
                    self.config.budget,
                    image_size=(height, width),
                    dtype=self.config.dtype,
                    device=self.device,
                )
            except BudgetError as error:
                raise InputError(str(error)) from error

    # --- checkpoints

    def load(self, resume: str | Path, warn: Any) -> None:
        """Take over a checkpoint's state; the main process reads it for all."""

        def read() -> tuple[Path, dict[str, Any]] | None:
            found = (self.checkpoints or Checkpoints(Path("."))).load(str(resume), warn)
            if found is None:
                return None
            path, state = found
            check_parts(state, path)
            notes = check_resumable(state["config"], self.config, path)
            facts = state["run"]
            for name, mine in self.facts.items():
                saved = facts.get(name)
                if saved != mine:
                    advice = f": --cache {saved} keeps it" if name == "cache" else ""
                    raise InputError(
                        f"{path} was written with {name} {saved!r}, this run has {mine!r}{advice}"
                    )
            load_weights(self.model, state["model"], path)
            saved = state["processes"]
            if saved != self.world.size:
                notes.append(
                    f"processes were {saved} and are {self.world.size}: the same function with "
                    "other roundings"
                )
            for note in notes:
                warn(f"{path}: {note}")
            return path, state

        found = self.world.on_main(read)
        if found is None:
            return
        path, state = found
        load_weights(self.model, state["model"], path)
        try:
            load_optimizer_state(self.optimizer, state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            if self.ema is not None:
                self.ema.load_state_dict(state["ema"])
            self.result.history = [EpochMetrics(**entry) for entry in state["history"]]
            self.done, self.seconds = state["step"], state["seconds"]
            self.best = state["best"]
            self._random = state["random"]
            self._sums = self._own_part(state["sums"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"cannot go on from {path}, which another version or program has written: "
                f"{_reason(error)}"
            ) from error
        if self.done > self.total:
            raise InputError(f"{path} is from step {self.done:,}, beyond this run's {self.total:,}")
        self.resumed_at = self.done
        self.last_checkpoint = path

    def _own_part(self, sums: list[Tensor]) -> Tensor:
        """This process' sums of an epoch in hand, or all where their number has changed."""
        if len(sums) == self.world.size:
            return sums[self.world.rank]
        return torch.stack(sums).sum(0) * self.world.is_main

    def save(self, step: Step, log: RunLog, best: bool = False) -> None:
        """Write the state after the step in hand; all processes call it together."""
        self._check_finite(step, log)
        self._flush(log)
        sums = self.world.gather(step.sums.cpu())
        random_states = self.world.gather(_random_states(self.device))
        if self.checkpoints is None:
            return
        # The others wait: a full disk is the main process' error and ends all of them.
        self.last_checkpoint = self.world.on_main(
            lambda: self._write(sums, random_states, log, best)
        )
        release_freed_memory()

    def _write(
        self, sums: list[Tensor], random_states: list[dict[str, Any]], log: RunLog, best: bool
    ) -> Path:
        assert self.checkpoints is not None
        epoch = len(self.result.history)
        state = {
            "config": asdict(self.config),
            "run": {**self.facts, "epoch_ends_at": min(epoch * self.epoch_steps, self.total)},
            "processes": self.world.size,
            "model": self.model.state_dict(),
            "optimizer": optimizer_state(self.optimizer),
            "scaler": self.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "history": [asdict(entry) for entry in self.result.history],
            "seconds": self.seconds,
            "best": self.best,
            "sums": sums,
            "random": random_states,
        }
        log.sync()
        return self.checkpoints.save(state, self.done, best)

    # --- training

    def train(self, overwrite: bool, progress: bool | None, speak: bool) -> None:
        """All remaining steps."""
        world, config = self.world, self.config
        fresh = self.resumed_at is None
        if world.is_main and self.folder is not None and fresh and overwrite:
            assert self.checkpoints is not None
            self.checkpoints.clear()
        network = self.model
        if world.size > 1:
            # Two images give every norm more than one value, however small the last map is.
            size = (2, *self.result.config["image"])
            network = distribute(self.model, self.device, config.sync_bn, size)
        if world.size > 1 and fresh:
            # Where a model draws random numbers itself, ranks must not draw the same ones.
            torch.manual_seed(config.seed + (world.rank << 32))
        if fresh:
            # Not earlier: packages that loading imports for the first time draw from them.
            random.seed((config.seed << 32) + world.rank)
            np.random.seed([config.seed % 2**32, config.seed >> 32, world.rank])  # noqa: NPY002
        step = Step(
            network,
            self.optimizer,
            dtype=DTYPES[config.dtype],
            scaler=self.scaler,
            label_smoothing=config.label_smoothing,
            ema=self.ema,
            memory_format=memory_format_of(config),
            graph=config.graph,
        )
        if self._sums is not None:
            step.sums.copy_(self._sums)
        if self._random is not None and len(self._random) == world.size:
            _set_random_states(self._random[world.rank], self.device)
        folder = self.folder if world.is_main else None
        if folder is not None and (fresh or not (folder / "config.yaml").exists()):
            write_config(folder, asdict(config))
        started = time.monotonic()
        with (
            RunLog(
                folder,
                self.result.config,
                resume_step=self.resumed_at,
                tensorboard=config.tensorboard,
            ) as log,
            StopRequests(self.folder is not None, quiet=not speak) as stop,
            self._bar(progress) as bar,
        ):
            notice = _Notice(speak)
            while self.done < self.total or self._in_hand():
                self._epoch(step, log, stop, bar)
                notice(step.graph_reason and f"not graphed: {step.graph_reason}")
                if speak:
                    tqdm.write(_line(self.result.history[-1], self.epochs))
                self._draw(time.monotonic() - self._drawn > _SECONDS_A_DRAWING)
            seconds = time.monotonic() - started
            log.write({"event": "end", "step": self.done, "seconds": seconds, "best": self.best})
            self._draw(True)
        if speak:
            print(self._summary(seconds), flush=True)

    def _in_hand(self) -> bool:
        """Whether the last epoch's steps are done and it is not tested yet."""
        return len(self.result.history) < math.ceil(self.done / self.epoch_steps)

    def _epoch(self, step: Step, log: RunLog, stop: StopRequests, bar: tqdm[Any]) -> None:
        """The rest of the epoch in hand, its test and its checkpoint."""
        config, world = self.config, self.world
        epoch = len(self.result.history) + 1
        first = (epoch - 1) * self.epoch_steps
        end = min(first + self.epoch_steps, self.total)
        bar.set_description(f"epoch {epoch}/{self.epochs}")
        self.model.train()
        started = time.perf_counter() - self.seconds
        rate = self._rate(max(self.done - 1, 0))
        # Closed at once where an error or a request ends the epoch: its workers end with it.
        with contextlib.closing(self.batches.training(epoch, self.done - first)) as batches:
            for images, labels in itertools.islice(batches, end - self.done):
                rate = self._rate(self.done)
                step(images, labels, rate)
                record: dict[str, Any] = {"step": self.done, "lr": rate}
                if config.log_steps:
                    record["memory"] = memory_in_use(self.device)
                # A GPU is not waited for. On a CPU a tensor kept for long, allocated where the heap
                # is at its fullest, would hold it open there, and the next step's blocks go behind
                # it.
                loss = step.loss if self.device.type != "cpu" else float(step.loss)
                self._pending.append((record, loss))
                self.done += 1
                bar.update(config.batch_size)
                self.seconds = time.perf_counter() - started
                last = self.done == end
                if self.device.type == "cpu" or last or self.done % _STEPS_A_LOOK == 0:
                    self._look(step, log, stop, bar)
                every = config.checkpoint_every
                if every is not None and self.done % every == 0 and not last:
                    self.save(step, log)
                    started = time.perf_counter() - self.seconds
        loss_sum, correct, seen = world.sum(step.sums).tolist()
        self.seconds = time.perf_counter() - started
        self._flush(log)
        tested = self.model if self.ema is None else self.ema.module
        # Norms that are not synchronised have their own moments, a checkpoint has the main ones.
        world.share(tested.buffers())
        test_loss, test_accuracy = evaluate_as(config, tested, self.batches, world)
        entry = EpochMetrics(
            epoch=epoch,
            lr=rate,
            train_loss=loss_sum / seen,
            train_accuracy=correct / seen,
            test_loss=test_loss,
            test_accuracy=test_accuracy,
            seconds=self.seconds,
            images_per_second=seen / self.seconds,
        )
        self.result.history.append(entry)
        log.write({"event": "epoch", "step": self.done, **asdict(entry)})
        step.reset()
        self.seconds = 0.0
        best = test_accuracy > self.best
        self.best = max(self.best, test_accuracy)
        every = config.checkpoint_every
        if every is None or self.done % every == 0 or best or self.done == self.total:
            self.save(step, log, best)

    def _rate(self, step: int) -> float:
        config = self.config
        return learning_rate(step, self.total, config.lr, config.warmup_steps, config.schedule)

    def _look(self, step: Step, log: RunLog, stop: StopRequests, bar: tqdm[Any]) -> None:
        """Stop if anyone was asked to, or where the loss is no number any more."""
        loss = float(step.loss)
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        stopped, diverged = self.world.any(
            stop.signal is not None, not (math.isfinite(loss) and bool(step.loss_sum.isfinite()))
        )
        if diverged:
            self._diverged(log)
        if stopped:
            self.save(step, log)
            numbers = [number for number in self.world.gather(stop.signal) if number is not None]
            self._draw(True)
            raise Interrupted(self._stopped(), numbers[0])

    def _check_finite(self, step: Step, log: RunLog) -> None:
        """No checkpoint of a run that has diverged since the last look, or in its last step."""
        good = torch.stack([step.loss_sum.isfinite(), *_finite(self.model, self._numbers)]).all()
        if any(self.world.any(not bool(good))):
            self._diverged(log)

    def _diverged(self, log: RunLog) -> None:
        losses = self._flush(log)
        bad = [(s, f"training loss is {x}") for s, x in losses if not math.isfinite(x)]
        # A loss is from before its step: the weights may be lost while it is still a number.
        step, what = bad[0] if bad else (self.done - 1, "weights are no finite numbers any more")
        epoch = step // self.epoch_steps + 1
        log.write({"event": "end", "step": self.done, "diverged": step})
        self._draw(True)
        kept = (
            f"the last good checkpoint is {self.last_checkpoint}"
            if self.last_checkpoint is not None
            else "there is no checkpoint before it"
        )
        raise DivergenceError(
            f"the {what} in step {step:,} (epoch {epoch}): try a learning rate below "
            f"{self.config.lr:g}; {kept}"
        )

    def _stopped(self) -> str:
        command = f"resnetv2 train --out {self.folder} --resume auto"
        return (
            f"stopped after step {self.done:,} of {self.total:,}; saved "
            f"{self.last_checkpoint}; go on with: {command}"
        )

    def _flush(self, log: RunLog) -> list[tuple[int, float]]:
        """Fetch the losses of the steps since the last time, and log them if asked for."""
        if not self._pending:
            return []
        losses = [torch.as_tensor(loss, dtype=torch.float32) for _, loss in self._pending]
        local = torch.stack(losses)
        values = (self.world.sum(local) / self.world.size).tolist()
        records = [record for record, _ in self._pending]
        steps = [(record["step"], value) for record, value in zip(records, values)]
        if self.config.log_steps:
            for record, value in zip(records, values):
                log.write({"event": "step", "loss": value, **record})
        self._pending.clear()
        self.result.step_losses += values
        return steps

    @contextlib.contextmanager
    def _bar(self, progress: bool | None) -> Iterator[tqdm[Any]]:
        """Images done of the whole run's, their rate and the time left."""
        disable = None if progress is None else not progress
        with tqdm(
            total=self.total * self.config.batch_size,
            initial=self.done * self.config.batch_size,
            unit=" images",
            unit_scale=True,
            leave=False,
            smoothing=0.05,
            disable=disable if self.world.is_main else True,
        ) as bar:
            yield bar

    def _draw(self, now: bool) -> None:
        if not (now and self.world.is_main and self.folder is not None and self.result.history):
            return
        facts = self.result.config
        title = (
            f"{facts['model']} on {facts['data']}, {facts['backend']} backend, {facts['dtype']}, "
            f"seed {facts['seed']}"
        )
        try:
            plot_curves(self.result.history, self.folder / "curves.png", title)
        except OSError as error:
            raise InputError(
                f"cannot write {self.folder / 'curves.png'}: {error.strerror}; the checkpoints are "
                "untouched"
            ) from error
        self._drawn = time.monotonic()

    def _summary(self, seconds: float) -> str:
        history = self.result.history
        best = max(history, key=lambda entry: entry.test_accuracy)
        trained = sum(entry.seconds for entry in history)
        images = sum(entry.seconds * entry.images_per_second for entry in history)
        text = (
            f"{self.total:,} steps, {_epochs(len(history))} in {_duration(seconds)}"
            + (" since it was resumed" if self.resumed_at is not None else "")
            + f", {images / trained:,.0f} images/s in training\n"
            f"test accuracy {100 * history[-1].test_accuracy:.2f} %"
        )
        if best.test_accuracy > history[-1].test_accuracy:
            text += f" (best: {100 * best.test_accuracy:.2f} % after epoch {best.epoch})"
        if self.folder is not None:
            text += f"\nwrote {self.folder}: config.yaml, metrics.jsonl, curves.png, checkpoints"
        return text


def _finite(model: nn.Module, names: list[str]) -> list[Tensor]:
    """For each of these tensors of the model's state, whether all its numbers are finite."""
    state = model.state_dict()
    return [state[name].isfinite().all() for name in names]


class _Notice:
    """Prints a line when it is a new one."""

    def __init__(self, speak: bool) -> None:
        self.speak = speak
        self.said: str | None = None

    def __call__(self, line: str | None) -> None:
        if line and line != self.said and self.speak:
            tqdm.write(line)
        self.said = line


def _random_states(device: torch.device) -> dict[str, Any]:
    """Of every generator that a model or its data might draw from."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
    }


def _set_random_states(states: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002


def _epochs(count: int) -> str:
    return f"{count:,} epoch{'s' if count > 1 else ''}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [f"{hours} h" if hours else "", f"{minutes} min" if minutes or hours else ""]
    return " ".join([part for part in parts if part] + [f"{seconds} s"])


def _line(entry: EpochMetrics, epochs: int) -> str:
    width = len(str(epochs))
    return (
        f"epoch {entry.epoch:{width}}/{epochs}  lr {entry.lr:<6.4g}"
        f"  train loss {entry.train_loss:.4f} accuracy {100 * entry.train_accuracy:6.2f} %"
        f"  test loss {entry.test_loss:.4f} accuracy {100 * entry.test_accuracy:6.2f} %"
        f"  {entry.seconds:.1f} s, {entry.images_per_second:,.0f} images/s"
    )
