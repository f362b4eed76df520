"""The loop of a run: steps, epochs, tests and checkpoints, until all are done or it is stopped.

``RunState`` is what it moves; ``report`` has the words.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data.host import memory_in_use, release_freed_memory
from ..errors import InputError
from ..names import DTYPES
from . import report
from .checkpoint import Checkpoints
from .evaluate import evaluate_as, memory_format_of
from .interrupts import StopRequests
from .log import RunLog, write_config
from .metrics import Callback, EpochMetrics, StepMetrics
from .parallel import distribute
from .state import RunState, random_states, seed_generators, set_random_states
from .step import Step

# On a GPU, steps between looks at the loss and at requests to stop: a look waits for the device.
_STEPS_A_LOOK = 16
# Seconds between drawings of the curves while the run goes on.
_SECONDS_A_DRAWING = 300.0


class DivergenceError(RuntimeError):
    """The training loss is no longer a finite number."""


class Interrupted(KeyboardInterrupt):
    """A signal stopped the run, after the step in hand and a checkpoint. ``signal``: its number."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


class Loop:
    """All remaining steps of a run. Use it once, by ``run``.

    Args:
        run: the state, which the loop moves.
        folder: of the run; None writes nothing.
        checkpoints: of that folder.
        overwrite: a new run replaces the checkpoints that are there.
        progress: show a progress bar; None means only on a terminal.
        speak: print a line an epoch.
        callbacks: as ``run.train`` takes them.
    """

    log: RunLog
    stop: StopRequests
    bar: tqdm[Any]

    def __init__(
        self,
        run: RunState,
        folder: Path | None,
        checkpoints: Checkpoints | None,
        *,
        overwrite: bool,
        progress: bool | None,
        speak: bool,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.callbacks = callbacks
        self.state = run
        self.world = run.world
        self.folder = folder
        self.checkpoints = checkpoints
        self.progress = progress
        self.speak = speak
        fresh = run.resumed_at is None
        if self.world.is_main and checkpoints is not None and fresh and overwrite:
            checkpoints.clear()
        self.step = self._make_step(fresh)
        # Losses of steps that are not fetched from the device yet, and their records for the log.
        self._pending: list[tuple[dict[str, Any], Tensor | float]] = []
        self._drawn = time.monotonic()
        self._said: str | None = None
        self._compared = False

    def _make_step(self, fresh: bool) -> Step:
        run, config, world = self.state, self.state.config, self.world
        network = run.model
        if world.size > 1:
            # Two images give every norm more than one value, however small the last map is.
            size = (2, *run.result.config["image"])
            network = distribute(run.model, run.device, config.sync_bn, size)
        if fresh:
            # Not earlier: packages that loading imports for the first time draw from them.
            seed_generators(config.seed, world)
        step = Step(
            network,
            run.optimizer,
            dtype=DTYPES[config.dtype],
            scaler=run.scaler,
            label_smoothing=config.label_smoothing,
            ema=run.ema,
            memory_format=memory_format_of(config),
            graph=run.graph,
        )
        if run.sums is not None:
            step.sums.copy_(run.sums)
        if run.random is not None and len(run.random) == world.size:
            set_random_states(run.random[world.rank], run.device)
        return step

    def run(self) -> None:
        """Train, test and save until the last step.

        Raises:
            DivergenceError, Interrupted: see ``resnetv2.training.run.train``.
            InputError: a file cannot be written, or an image cannot be read.
        """
        run = self.state
        folder = self.folder if self.world.is_main else None
        fresh = run.resumed_at is None
        if folder is not None and (fresh or not (folder / "config.yaml").exists()):
            write_config(folder, {**asdict(run.config), "threads": run.result.config["threads"]})
        started = time.monotonic()
        with (
            RunLog(
                folder,
                run.result.config,
                resume_step=run.resumed_at,
                tensorboard=run.config.tensorboard,
            ) as self.log,
            StopRequests(self.folder is not None, quiet=not self.speak) as self.stop,
            self._bar() as self.bar,
        ):
            while run.done < run.total or run.in_hand:
                self._epoch()
                self._notice()
                if self.speak:
                    tqdm.write(report.epoch_line(run.result.history[-1], run.epochs))
                self._draw(time.monotonic() - self._drawn > _SECONDS_A_DRAWING)
            seconds = time.monotonic() - started
            self.log.write({"event": "end", "step": run.done, "seconds": seconds, "best": run.best})
            self._draw(True)
        if self.speak:
            print(report.summary(run, seconds, self.folder), flush=True)

    def _epoch(self) -> None:
        """The rest of the epoch in hand, its test and its checkpoint."""
        run, config = self.state, self.state.config
        rate = self._steps()
        loss_sum, correct, seen, seconds = self._training_figures()
        tested = run.model if run.ema is None else run.ema.module
        # Norms that are not synchronised have their own moments, a checkpoint has the main ones.
        self.world.share(tested.buffers())
        test_loss, test_accuracy = evaluate_as(config, tested, run.batches, self.world)
        entry = EpochMetrics(
            epoch=len(run.result.history) + 1,
            lr=rate,
            train_loss=loss_sum / seen,
            train_accuracy=correct / seen,
            test_loss=test_loss,
            test_accuracy=test_accuracy,
            seconds=seconds,
            images_per_second=seen / seconds,
        )
        run.result.history.append(entry)
        self.log.write({"event": "epoch", "step": run.done, **asdict(entry)})
        self._tell(entry)
        self._compare_memory()
        self.step.reset()
        run.seconds = 0.0
        best = test_accuracy > run.best
        run.best = max(run.best, test_accuracy)
        every = config.checkpoint_every
        if every is None or run.done % every == 0 or best or run.done == run.total:
            self.save(best)

    def _steps(self) -> float:
        """The rest of the epoch's steps. Returns the last one's learning rate."""
        run, config = self.state, self.state.config
        epoch = len(run.result.history) + 1
        first = (epoch - 1) * run.epoch_steps
        end = min(first + run.epoch_steps, run.total)
        on_cpu = run.device.type == "cpu"
        self.bar.set_description(f"epoch {epoch}/{run.epochs}")
        run.model.train()
        self._started = time.perf_counter() - run.seconds
        rate = run.rate(max(run.done - 1, 0))
        # Closed at once where an error or a request ends the epoch: its workers end with it.
        with contextlib.closing(run.batches.training(epoch, run.done - first)) as batches:
            for images, labels in itertools.islice(batches, end - run.done):
                rate = run.rate(run.done)
                self.step(images, labels, rate)
                record: dict[str, Any] = {"step": run.done, "lr": rate}
                if config.log_steps:
                    record["memory"] = memory_in_use(run.device)
                # A GPU is not waited for. On a CPU a tensor kept for long, allocated where the heap
                # is at its fullest, would hold it open there, and the next step's blocks go behind
                # it.
                self._pending.append((record, float(self.step.loss) if on_cpu else self.step.loss))
                run.done += 1
                self.bar.update(config.batch_size)
                run.seconds = time.perf_counter() - self._started
                last = run.done == end
                if on_cpu or last or run.done % _STEPS_A_LOOK == 0:
                    self._look()
                    if self.callbacks:
                        self._flush()
                every = config.checkpoint_every
                if every is not None and run.done % every == 0 and not last:
                    self.save()
                    self._started = time.perf_counter() - run.seconds
        return rate

    def _training_figures(self) -> tuple[float, float, float, float]:
        """The epoch's sums so far: loss times images, correct predictions, images and seconds."""
        loss_sum, correct, seen = self.world.sum(self.step.sums).tolist()
        self.state.seconds = time.perf_counter() - self._started
        self._flush()
        return loss_sum, correct, seen, self.state.seconds

    def _look(self) -> None:
        """Stop if anyone was asked to, or where the loss is no number any more."""
        loss = float(self.step.loss)
        self.bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        finite = math.isfinite(loss) and bool(self.step.loss_sum.isfinite())
        stopped, diverged = self.world.any(self.stop.signal is not None, not finite)
        if diverged:
            self._diverged()
        if stopped:
            self.save()
            numbers = [n for n in self.world.gather(self.stop.signal) if n is not None]
            self._draw(True)
            raise Interrupted(report.stopped(self.state, self.folder), numbers[0])

    def save(self, best: bool = False) -> None:
        """Write the state after the step in hand; all processes call it together."""
        # No checkpoint of a run that has diverged since the last look, or in its last step.
        good = self.step.loss_sum.isfinite() & self.state.finite()
        if any(self.world.any(not bool(good))):
            self._diverged()
        self._flush()
        sums = self.world.gather(self.step.sums.cpu())
        states = self.world.gather(random_states(self.state.device))
        checkpoints = self.checkpoints
        if checkpoints is None:
            return

        def write() -> Path:
            content = self.state.saved(sums, states)
            self.log.sync()
            return checkpoints.save(content, self.state.done, best)

        # The others wait: a full disk is the main process' error and ends all of them.
        self.state.last_checkpoint = self.world.on_main(write)
        release_freed_memory()

    def _diverged(self) -> None:
        losses = self._flush()
        bad = [(s, f"training loss is {x}") for s, x in losses if not math.isfinite(x)]
        # A loss is from before its step: the weights may be lost while it is still a number.
        lost = (self.state.done - 1, "weights are no finite numbers any more")
        step, what = bad[0] if bad else lost
        self.log.write({"event": "end", "step": self.state.done, "diverged": step})
        self._draw(True)
        raise DivergenceError(report.diverged(self.state, step, what))

    def _flush(self) -> list[tuple[int, float]]:
        """Fetch the losses of the steps since the last time, and log them if asked for."""
        if not self._pending:
            return []
        losses = [torch.as_tensor(loss, dtype=torch.float32) for _, loss in self._pending]
        local = torch.stack(losses)
        values = (self.world.sum(local) / self.world.size).tolist()
        records = [record for record, _ in self._pending]
        steps = [(record["step"], value) for record, value in zip(records, values)]
        if self.state.config.log_steps:
            for record, value in zip(records, values):
                self.log.write({"event": "step", "loss": value, **record})
        for record, value in zip(records, values):
            self._tell(StepMetrics(loss=value, **record))
        self._pending.clear()
        self.state.result.step_losses += values
        return steps

    def _tell(self, metrics: StepMetrics | EpochMetrics) -> None:
        if self.world.is_main:
            for callback in self.callbacks:
                callback(metrics)

    def _compare_memory(self) -> None:
        """Say and record what memory "auto" predicted and what came of it, after one epoch."""
        run = self.state
        if run.predicted is None or self._compared:
            return
        self._compared = True
        figures = {"predicted": run.predicted.peak, "measured": run.measured_peak()}
        record = {"event": "memory", "step": run.done, "mode": run.predicted.mode, **figures}
        self.log.write(record)
        if self.speak:
            tqdm.write(report.memory_line(run, figures["measured"]))

    def _notice(self) -> None:
        """Print why steps are not graphed, once for each reason."""
        reason = self.step.graph_reason
        if reason and reason != self._said and self.speak:
            tqdm.write(f"not graphed: {reason}")
        self._said = reason

    @contextlib.contextmanager
    def _bar(self) -> Iterator[tqdm[Any]]:
        """Images done of the whole run's, their rate and the time left."""
        run = self.state
        disable = None if self.progress is None else not self.progress
        with tqdm(
            total=run.total * run.config.batch_size,
            initial=run.done * run.config.batch_size,
            unit=" images",
            unit_scale=True,
            leave=False,
            smoothing=0.05,
            disable=disable if self.world.is_main else True,
        ) as bar:
            yield bar

    def _draw(self, now: bool) -> None:
        history = self.state.result.history
        if not (now and self.world.is_main and self.folder is not None and history):
            return
        path = self.folder / "curves.png"
        try:
            self.state.result.plot().savefig(path, dpi=150, format="png")
        except OSError as error:
            raise InputError(
                f"cannot write {path}: {error.strerror}; the checkpoints are untouched"
            ) from error
        self._drawn = time.monotonic()
