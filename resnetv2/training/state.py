"""The state of a run: the net and what trains it, how far it is, and what a checkpoint holds of it.

A checkpoint's state and the number of a step decide that step's result: a run that was killed goes
on bit for bit.
"""

from __future__ import annotations

import math
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.memory import BudgetError, ModeCost
from ..data.batches import Batches, ImageData
from ..data.host import forget_peak, memory_in_use, peak_memory
from ..data.streaming import FolderData
from ..errors import InputError
from ..models import PreActResNet
from ..planning.memory import plan
from .average import averaged_model
from .checkpoint import Checkpoints, check_parts
from .config import TrainConfig, check_resumable, check_steps
from .environment import (
    choices_digest,
    device_name,
    machine,
    machine_changes,
    package_versions,
)
from .evaluate import load_weights
from .metrics import EpochMetrics
from .optimizer import load_optimizer_state, optimizer_state
from .parallel import World
from .result import TrainingResult
from .schedule import learning_rate, optimizer_groups


class RunState:
    """A run between two steps.

    Args:
        model: on ``device``, its norms synchronised if they are to be.
        own_model: it is the caller's, not made from the configuration.

    Attributes:
        done, total: optimizer steps, so far and of the whole run; epoch_steps: of an epoch.
        seconds: of training, in the epoch in hand.
        predicted: of memory "auto", the mode that it takes (``check``); None with any other.
        best: the highest test accuracy so far.
        sums, random: of a checkpoint, for the parts that are made when training begins.

    Raises:
        InputError: the data cannot be divided, or the warm-up is longer than the run.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: ImageData | FolderData,
        model: nn.Module,
        device: torch.device,
        world: World,
        own_model: bool,
    ) -> None:
        self.config = config
        self.device = device
        self.world = world
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
        cuda = device.type == "cuda"
        self.graph = config.graph == "on" or (config.graph == "auto" and cuda)
        self.optimizer = torch.optim.SGD(
            optimizer_groups(model, config.weight_decay, config.decay_all),
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            # What a graph needs; without one too, so that both compute the same bits.
            fused=True if cuda else None,
        )
        # float16 alone underflows: its gradients need scaling, bfloat16's do not.
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.dtype == "fp16")
        self.ema = averaged_model(model, config.ema) if config.ema else None
        self.result = TrainingResult(model, self._facts(data, own_model))
        self.result.averaged = None if self.ema is None else self.ema.module
        # A run that goes on must have these alike. Images in memory and streamed ones are augmented
        # each in their own way.
        kept = ("model", "classes", "image")
        self._identity = {
            **{key: self.result.config[key] for key in kept},
            "own_model": own_model,
            "cache": data.cache,
        }
        # A model may have infinities of its own, such as a mask.
        names = list(model.state_dict())
        self._numbers = [name for name, good in zip(names, self._finite(names)) if bool(good)]
        # The mode that memory "auto" takes, and its bytes.
        self.predicted: ModeCost | None = None
        self._held: int | None = None
        self.done = 0
        self.seconds = 0.0
        self.best = -1.0
        self.resumed_at: int | None = None
        self.last_checkpoint: Path | None = None
        self.sums: Tensor | None = None
        self.random: list[dict[str, Any]] | None = None

    def _facts(self, data: ImageData | FolderData, own_model: bool) -> dict[str, Any]:
        config = self.config
        name = config.model or f"PreActResNet-{config.depth} ({config.block})"
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
            "measured_choices": choices_digest(self.device, config.backend),
            "versions": package_versions(),
        }

    @property
    def in_hand(self) -> bool:
        """Whether an epoch has steps done and is not tested yet."""
        return len(self.result.history) < math.ceil(self.done / self.epoch_steps)

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 0."""
        config = self.config
        return learning_rate(step, self.total, config.lr, config.warmup_steps, config.schedule)

    def check(self) -> None:
        """Refuse what the first step would refuse, before the run's files are made or replaced.

        Raises:
            InputError: norms would have one value a channel, or no memory mode fits the budget.
        """
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
                found = plan(
                    model,
                    self.config.batch_size // world.size,
                    self.config.budget,
                    image_size=(height, width),
                    dtype=self.config.dtype,
                    device=self.device,
                )
            except BudgetError as error:
                raise InputError(str(error)) from error
            assert found.mode is not None
            self.predicted = found.row(found.mode)
            self.result.config["memory_mode"] = found.mode
            self.result.config["memory_predicted"] = self.predicted.peak
            forget_peak(self.device)
            self._held = memory_in_use(self.device)

    def measured_peak(self) -> int | None:
        """Bytes to hold against ``predicted.peak``, after some steps: on a GPU what torch has
        allocated, else what has come to be resident since before the first step, with the
        parameters. None where the system does not tell."""
        peak = peak_memory(self.device)
        if self.device.type == "cuda" or peak is None:
            return peak
        if self._held is None or self.predicted is None:
            return None
        return peak - self._held + self.predicted.parameters

    def finite(self) -> Tensor:
        """Whether all numbers of the net are finite that were so in the beginning."""
        return torch.stack(self._finite(self._numbers)).all()

    def _finite(self, names: list[str]) -> list[Tensor]:
        state = self.model.state_dict()
        return [state[name].isfinite().all() for name in names]

    def saved(self, sums: list[Tensor], random_states: list[dict[str, Any]]) -> dict[str, Any]:
        """The content of a checkpoint; sums and random states of all processes, by rank."""
        epoch = len(self.result.history)
        ends = min(epoch * self.epoch_steps, self.total)
        return {
            "config": asdict(self.config),
            "run": {**self._identity, "epoch_ends_at": ends, "pixels": self._pixels()},
            "processes": self.world.size,
            "machine": self._machine(),
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

    def _pixels(self) -> dict[str, Any]:
        """What turns an image file into an image of this run, and a class into its name."""
        data = self.batches.data
        return {
            "classes": list(data.classes),
            "mean": self.batches.mean.tolist(),
            "std": self.batches.std.tolist(),
            "white": data.white,
        }

    def load(self, resume: str | Path, checkpoints: Checkpoints, warn: Any) -> None:
        """Take over a checkpoint's state; the main process reads it for all.

        Args:
            resume: as ``Checkpoints.load`` takes it; where "auto" finds none, the state stays.
            warn: is called with a line about a file that is passed over, or an option that differs.

        Raises:
            InputError: no usable checkpoint, or one of another run.
        """
        found = self.world.on_main(lambda: self._read(resume, checkpoints, warn))
        if found is None:
            return
        path, state = found
        load_weights(self.model, state["model"], path)
        self._take_machine(state)
        try:
            load_optimizer_state(self.optimizer, state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            if self.ema is not None:
                self.ema.load_state_dict(state["ema"])
            self.result.history = [EpochMetrics(**entry) for entry in state["history"]]
            self.done, self.seconds = state["step"], state["seconds"]
            self.best = state["best"]
            self.random = state["random"]
            self.sums = self._own_part(state["sums"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"cannot go on from {path}, which another version or program has written: "
                f"{_reason(error)}"
            ) from error
        if self.done > self.total:
            raise InputError(f"{path} is from step {self.done:,}, beyond this run's {self.total:,}")
        self.resumed_at = self.done
        self.last_checkpoint = path

    def _read(
        self, resume: str | Path, checkpoints: Checkpoints, warn: Any
    ) -> tuple[Path, dict[str, Any]] | None:
        found = checkpoints.load(str(resume), warn)
        if found is None:
            return None
        path, state = found
        check_parts(state, path)
        notes = check_resumable(state["config"], self.config, path)
        for name, mine in self._identity.items():
            saved = state["run"].get(name)
            if saved != mine:
                advice = f": --cache {saved} keeps it" if name == "cache" else ""
                raise InputError(
                    f"{path} was written with {name} {saved!r}, this run has {mine!r}{advice}"
                )
        load_weights(self.model, state["model"], path)
        processes = state["processes"]
        if processes != self.world.size:
            notes.append(
                f"processes were {processes} and are {self.world.size}: the same function with "
                "other roundings"
            )
        before = _machine_of(state)
        notes += machine_changes(before, {**self._machine(), "threads": self._threads(before)})
        for note in notes:
            warn(f"{path}: {note}")
        if self._threads(before) != torch.get_num_threads():
            warn(
                f"{path}: goes on with threads {self._threads(before)} as before, without --resume "
                f"it would be {torch.get_num_threads()}"
            )
        return path, state

    def _machine(self) -> dict[str, Any]:
        """What decides the bits beside the options, the mode that memory "auto" takes included."""
        chosen = {} if self.predicted is None else {"mode of memory auto": self.predicted.mode}
        return {**machine(self.device, self.config.backend), **chosen}

    def _threads(self, before: dict[str, Any]) -> int:
        """The CPU threads to go on with: those asked for, or the checkpoint's."""
        own: int = before.get("threads", torch.get_num_threads())
        return own if self.config.threads is None else self.config.threads

    def _take_machine(self, state: dict[str, Any]) -> None:
        """Take over what decided the bits so far and can be had again."""
        threads = self._threads(_machine_of(state))
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)
        self.result.config["threads"] = threads

    def _own_part(self, sums: list[Tensor]) -> Tensor:
        """This process' sums of an epoch in hand, or all where their number has changed."""
        if len(sums) == self.world.size:
            return sums[self.world.rank]
        return torch.stack(sums).sum(0) * self.world.is_main


def _machine_of(state: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of ``environment.machine``; empty where it is of an older version."""
    return state.get("machine") or {}


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"it lacks {error.args[0]!r}"
    return str(error).partition("\n")[0].rpartition("__init__() ")[2]


def random_states(device: torch.device) -> dict[str, Any]:
    """The state of every generator that a model or its data might draw from."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
    }


def set_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Put back what ``random_states`` gave."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002


def seed_generators(seed: int, world: World) -> None:
    """Seed Python's and NumPy's generators, other ones in each process.

    A model that draws random numbers itself must not draw the same ones in every process; of a
    single process, torch's generator goes on from the initial weights.
    """
    if world.size > 1:
        torch.manual_seed(seed + (world.rank << 32))
    random.seed((seed << 32) + world.rank)
    np.random.seed([seed % 2**32, seed >> 32, world.rank])  # noqa: NPY002
