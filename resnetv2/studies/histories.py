"""Records of training runs: one history each, comparisons of variants, spreads over seeds."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import Any

from ..training.metrics import EpochMetrics
from .results import Table


@dataclass
class History:
    """One training run of one variant.

    Args:
        variant, seed, parameters: what was trained.
        epochs: metrics an epoch, as of `resnetv2 train`.
        gradient_norms: mean over an epoch's steps of the norm of all gradients together.
        diverged: the epoch in which the loss stopped being a finite number; its metrics are the
            last.
    """

    variant: str
    seed: int
    parameters: int
    epochs: list[EpochMetrics] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    diverged: int | None = None

    def curve(self, metric: str) -> list[float]:
        """A metric's value after every epoch: "gradient_norm" or a field of EpochMetrics."""
        if metric == "gradient_norm":
            return list(self.gradient_norms)
        return [float(getattr(entry, metric)) for entry in self.epochs]

    def final(self, metric: str) -> float:
        """A metric after the last epoch. A diverged run has accuracy as it stands, loss NaN."""
        return self.curve(metric)[-1]

    @property
    def seconds(self) -> float:
        """Seconds of training, without the tests."""
        return sum(entry.seconds for entry in self.epochs)

    def epochs_to(self, accuracy: float) -> int | None:
        """The first epoch whose test accuracy is at least `accuracy`; None if there was none."""
        reached = (entry.epoch for entry in self.epochs if entry.test_accuracy >= accuracy)
        return next(reached, None)


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (of a sample; 0 for a single value) of a number over seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def std(self) -> float:
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    def __str__(self) -> str:
        if not all(map(math.isfinite, self.values)):
            return "not finite"
        return f"{self.mean:.4g} ± {self.std:.2g}" if len(self.values) > 1 else f"{self.mean:.4g}"


@dataclass
class Comparison:
    """Histories of each variant, one a seed, and what they say together.

    Metrics are those of `History.final`, or "seconds".
    """

    histories: dict[str, list[History]]
    target: float = 0.9

    def spread(self, variant: str, metric: str = "test_accuracy") -> Spread:
        """The metric after the last epoch, over seeds."""
        runs = self.histories[variant]
        if metric == "seconds":
            return Spread(tuple(run.seconds for run in runs))
        return Spread(tuple(run.final(metric) for run in runs))

    def diverged(self, variant: str) -> int:
        """How many runs of the variant ended with a loss that is not finite."""
        return sum(run.diverged is not None for run in self.histories[variant])

    def epochs_to_target(self, variant: str) -> str:
        """Mean epochs to the target accuracy, and how many runs reached it if not all did."""
        runs = self.histories[variant]
        reached = [epoch for run in runs if (epoch := run.epochs_to(self.target)) is not None]
        if not reached:
            return "not reached"
        mean = f"{statistics.fmean(reached):.3g}"
        return mean if len(reached) == len(runs) else f"{mean} ({len(reached)} of {len(runs)} runs)"

    def epoch_seconds(self, variant: str) -> float:
        """Of training, the median over all epochs of all seeds: a mean would also tell what else
        the machine did, and what the first epoch prepared."""
        return statistics.median(e.seconds for run in self.histories[variant] for e in run.epochs)

    def table(self, title: str) -> Table:
        """A row a variant: final accuracy and losses with their spread, gradient norm, time."""
        rows = []
        for name, runs in self.histories.items():
            rows.append(
                [
                    name,
                    runs[0].parameters,
                    _percent(self.spread(name, "test_accuracy")),
                    str(self.spread(name, "train_loss")),
                    str(self.spread(name, "test_loss")),
                    str(Spread(tuple(run.gradient_norms[0] for run in runs))),
                    str(self.spread(name, "gradient_norm")),
                    self.epochs_to_target(name),
                    self.epoch_seconds(name),
                    self.diverged(name),
                ]
            )
        columns = [
            "variant",
            "parameters",
            "test accuracy %",
            "training loss",
            "test loss",
            "gradient norm, first epoch",
            "gradient norm, last epoch",
            f"epochs to {100 * self.target:g} %",
            "seconds an epoch",
            "diverged",
        ]
        return Table(title, columns, rows)

    def difference(self, first: str, second: str, metric: str = "test_accuracy") -> Spread:
        """first - second over the seeds that both have: same seed, same weights and batches."""
        seconds = {run.seed: run for run in self.histories[second]}
        return Spread(
            tuple(
                run.final(metric) - seconds[run.seed].final(metric)
                for run in self.histories[first]
                if run.seed in seconds
            )
        )

    def standing(self, first: str, second: str, metric: str = "test_accuracy") -> int:
        """Whether the first ends above (1) or below (-1) the second; 0 if these runs cannot tell.

        They can if there are two seeds or more, all of them agree on the sign, and the mean
        difference exceeds the standard deviation over seeds of either.
        """
        difference = self.difference(first, second, metric)
        values, mean = difference.values, difference.mean
        if len(values) < 2 or any(not value * mean > 0 for value in values):
            return 0
        if abs(mean) <= max(self.spread(name, metric).std for name in (first, second)):
            return 0
        return 1 if mean > 0 else -1

    def sentence(self, first: str, second: str) -> str:
        """How the two compare in test accuracy, in words that the spread over seeds bears out."""
        difference = self.difference(first, second)
        points = 100 * difference.mean
        side = self.standing(first, second)
        n = len(difference.values)
        over = f"{n} seeds" if n > 1 else "1 seed"
        a = f"{first} ({_percent(self.spread(first))} %)"
        b = f"{second} ({_percent(self.spread(second))} %)"
        for name in (first, second):
            if count := self.diverged(name):
                a += f" [{name} diverged in {count} of {len(self.histories[name])} runs]"
        if points == 0:
            return f"{a} and {b} end at the same test accuracy over {over}."
        if side == 0:
            return f"No order can be read over {over}: {a} ends {points:+.2f} points from {b}."
        words = "above" if side > 0 else "below"
        return f"{a} ends {abs(points):.2f} points {words} {b} over {over}, in every one of them."

    def series(self) -> dict[str, Any]:
        """Every curve, as JSON-able numbers: variant, a list of runs, metric, a value an epoch."""
        metrics = ("train_loss", "train_accuracy", "test_loss", "test_accuracy", "gradient_norm")
        return {
            name: [
                {
                    "seed": run.seed,
                    "diverged": run.diverged,
                    "seconds": round(run.seconds, 2),
                    **{metric: run.curve(metric) for metric in metrics},
                }
                for run in runs
            ]
            for name, runs in self.histories.items()
        }


def _percent(spread: Spread) -> str:
    mean = f"{100 * spread.mean:.2f}"
    return f"{mean} ± {100 * spread.std:.2f}" if len(spread.values) > 1 else mean
