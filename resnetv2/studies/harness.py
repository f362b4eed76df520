"""What all studies share: options, seeds, training, capture by hooks, comparisons.

A study is a file of this package with one function:

    from resnetv2.studies.harness import Result, StudyOptions, Table, compare, study

    @study(
        "shortcuts",
        title="Shortcuts other than the identity",
        question="What happens to training when the shortcut is scaled, gated, ...? (Table 1)",
        defaults={"data": "digits", "depth": 20, "epochs": 5, "seeds": 2},
        presets={"paper": {"data": "cifar10", "depth": 110, "epochs": 164, "schedule": "paper"}},
    )
    def shortcuts(options: StudyOptions) -> Result:
        data = options.load()
        comparison = compare({"identity": make_identity, "1x1": make_projection}, data, options)
        return Result(
            tables=[comparison.table("Test accuracy")],
            conclusions=[comparison.sentence("identity", "1x1")],
            figures={"curves": ResNetV2Visualizer().plot_curves(comparison, "test_loss")},
            series=comparison.series(),
        )

`defaults` names every option that the study listens to (a flag of the command line each) with the
value that it has unless told otherwise; `presets` are named sets of values (`--preset paper`).
The decorated function is a `Study`: `shortcuts(epochs=3, data="cifar10")` runs it. Its line in
`resnetv2/studies/__init__.py` puts it on the command line and the page.

A model factory takes no argument and is called with all generators seeded: the same seed gives
variants of one architecture the same weights, the same order of images and the same augmentation.
`StudyNet` is the net that variants of a block are compared in.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from tqdm import tqdm

from resnetv2.blocks import Stage
from resnetv2.data import Batches, ImageData, InputError, Split, as_image_data, load_data
from resnetv2.run import activation
from resnetv2.studies.results import Result, Table
from resnetv2.train import (
    DTYPES,
    EpochMetrics,
    _device,
    _device_name,
    _reproducible,
    _versions,
    learning_rate,
)

__all__ = [
    "Capture",
    "Comparison",
    "History",
    "InputError",
    "Result",
    "Spread",
    "Study",
    "StudyNet",
    "StudyOptions",
    "Table",
    "compare",
    "gradient_norm",
    "study",
    "train_variant",
]

SCHEDULES = ("constant", "paper", "step")
NOISE = 800


@dataclass(frozen=True)
class StudyOptions:
    """What a study is asked for. Studies name the fields that they use and their own defaults.

    Args:
        data: a name of `resnetv2.data.load_data`, "noise" (800 images of white noise with random
            labels: what can be learned is their noise), or an `ImageData`.
        root, image_size: see `load_data`.
        depth: layers of the nets, or several numbers where a study compares depths.
        width: channels of the blocks.
        epochs, batch_size, lr, momentum, weight_decay: of SGD.
        schedule: "constant"; "step": a tenth every `step_epochs` epochs; "paper": warm-up at lr/10,
            then a tenth at a half and at three quarters of the run.
        warmup_steps: of "paper"; None keeps the paper's proportion.
        augment: whether training images are cropped and flipped, as the data set says.
        seeds: runs a variant, with seeds 0, 1, ...
        train_images, test_images: at most so many, drawn evenly from the classes; None for all.
        target: test accuracy, 0..1, whose first epoch is reported.
        samples: random inputs, of studies that draw them.
        dtype: "fp32", or "bf16" or "fp16" under autocast.
        device: "auto" is a GPU where there is one.
        progress: show progress bars; None means only on a terminal.
    """

    data: str | ImageData = "digits"
    root: str | Path = "data"
    image_size: int | None = None
    depth: int | Sequence[int] = 20
    width: int = 64
    epochs: int = 5
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: str = "paper"
    step_epochs: int = 10
    warmup_steps: int | None = None
    augment: bool = True
    seeds: int = 3
    train_images: int | None = None
    test_images: int | None = None
    target: float = 0.9
    samples: int = 100
    dtype: str = "fp32"
    device: str = "auto"
    progress: bool | None = None

    def __post_init__(self) -> None:
        for name in (
            "width",
            "epochs",
            "batch_size",
            "step_epochs",
            "seeds",
            "train_images",
            "test_images",
            "samples",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if not self.depths or any(depth < 1 for depth in self.depths):
            raise InputError(f"depth must be at least 1, got {_listed(self.depths)}")
        if not self.lr > 0:
            raise InputError(f"the learning rate must be positive, got {self.lr}")
        if not 0 <= self.target <= 1:
            raise InputError(f"target is an accuracy in 0..1, got {self.target}")
        if self.schedule not in SCHEDULES:
            raise InputError(
                f"unknown schedule {self.schedule!r}: choose from {', '.join(SCHEDULES)}"
            )
        if self.dtype not in DTYPES:
            raise InputError(f"unknown dtype {self.dtype!r}: choose from {', '.join(DTYPES)}")

    @property
    def depths(self) -> tuple[int, ...]:
        """All depths asked for."""
        return (self.depth,) if isinstance(self.depth, int) else tuple(self.depth)

    @property
    def one_depth(self) -> int:
        """The depth, where a study takes one."""
        if len(self.depths) != 1:
            raise InputError(f"this study takes one depth, got {_listed(self.depths)}")
        return self.depths[0]

    @property
    def place(self) -> torch.device:
        """The device. Raises InputError where there is none of that name."""
        return _device(self.device)

    def load(self) -> ImageData:
        """The data set, within the limits and with the augmentation asked for."""
        if isinstance(self.data, ImageData):
            data = self.data
        elif self.data == "noise":
            data = _noise(self.image_size or 32)
        else:
            data = load_data(
                self.data, root=self.root, image_size=self.image_size, progress=self.progress
            )
        if not self.augment:
            data = replace(data, crop_padding=0, flip=False)
        return replace(
            data,
            train=_first_of_each_class(data.train, self.train_images),
            test=_first_of_each_class(data.test, self.test_images),
        )

    def rate(self, step: int, steps_an_epoch: int) -> float:
        """Learning rate at `step`, from 0, of the whole run."""
        if self.schedule == "constant":
            return self.lr
        if self.schedule == "step":
            return self.lr * 0.1 ** (step // steps_an_epoch // self.step_epochs)
        return learning_rate(step, self.epochs * steps_an_epoch, self.lr, self.warmup_steps)


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values)) or "none"


def _noise(size: int) -> ImageData:
    """White noise with random labels; the test set is the training set, there being no pattern
    that other images could share."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(NOISE, 3, size, size, generator=generator)
    labels = torch.randint(10, (NOISE,), generator=generator)
    dataset = TensorDataset(images, labels)
    return as_image_data((dataset, dataset), "noise")


def _first_of_each_class(split: Split, limit: int | None) -> Split:
    """At most `limit` images, the first of each class in turn, in their own order."""
    if limit is None or limit >= len(split):
        return split
    rank = torch.zeros_like(split.labels)
    for label in split.labels.unique():
        mine = split.labels == label
        rank[mine] = torch.arange(int(mine.sum()))
    chosen = torch.argsort(rank, stable=True)[:limit].sort().values
    return Split(split.images[chosen], split.labels[chosen])


@dataclass(frozen=True)
class Study:
    """A study: call it with options by name (`depth(width=32)`), or `preset="paper"`."""

    function: Callable[[StudyOptions], Result]
    name: str
    title: str
    question: str
    defaults: Mapping[str, Any]
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def options(self, preset: str | None = None, **changes: Any) -> StudyOptions:
        """The study's defaults, changed by a preset and then by what is given.

        Raises:
            InputError: an option that the study does not listen to, or an impossible value.
        """
        if preset is not None and preset not in self.presets:
            known = ", ".join(self.presets) or "it has none"
            raise InputError(f"{self.name} has no preset {preset!r}: {known}")
        common = ("device", "progress")
        for name in changes:
            if name not in self.defaults and name not in common:
                takes = ", ".join([*self.defaults, *common])
                raise InputError(f"{self.name} has no option {name!r}; it takes {takes}")
        return StudyOptions(**{**self.defaults, **self.presets.get(preset or "", {}), **changes})

    def __call__(self, preset: str | None = None, **changes: Any) -> Result:
        """Run it. The global random state is left as it was; weights come from the seeds."""
        options = self.options(preset, **changes)
        place = options.place
        started = time.perf_counter()
        with _reproducible(place, 0):
            result = self.function(options)
        result.seconds = round(time.perf_counter() - started, 1)
        result.name, result.title, result.question = self.name, self.title, self.question
        settings = {name: getattr(options, name) for name in self.defaults}
        if isinstance(settings.get("data"), ImageData):
            settings["data"] = settings["data"].name
        settings.pop("root", None)  # a place on this machine says nothing about the result
        result.settings = {
            **settings,
            **result.settings,
            "device": _device_name(place),
            "threads": torch.get_num_threads(),
            "versions": _versions(),
        }
        return result


def study(
    name: str,
    *,
    title: str,
    question: str,
    defaults: Mapping[str, Any],
    presets: Mapping[str, Mapping[str, Any]] | None = None,
) -> Callable[[Callable[[StudyOptions], Result]], Study]:
    """Decorator: make a function from options to result a `Study` (see the module's docstring)."""
    known = {each.name for each in fields(StudyOptions)}
    for names in (defaults, *(presets or {}).values()):
        if unknown := set(names) - known:
            raise ValueError(f"study {name}: no such options: {_listed(sorted(unknown))}")

    def decorate(function: Callable[[StudyOptions], Result]) -> Study:
        return Study(function, name, title, question, dict(defaults), dict(presets or {}))

    return decorate


class StudyNet(nn.Module):
    """Stem, stages of one kind of block, pooling, classifier: the net around a variant of a block.

    Args:
        block: (in_channels, out_channels, stride) to a module; or one of these for each block of
            the net in order. Blocks of the library's own classes run fused.
        layers: blocks a stage; the first block of every stage but the first has stride 2.
        widths: channels a stage. "Eight blocks of 64" is layers=[8], widths=[64].
        in_channels: of the images.
        num_classes: of the classifier.
        preact: a last norm and activation after the last addition (He et al. 2016, appendix);
            without it the stem has them, as in the original ResNet.
        norm, act: of the stem or the end.
        memory: of the stages, as in `PreActResNet`.

    Weights are initialised as the paper's: convolutions N(0, sqrt(2/(k*k*out_channels))).
    """

    def __init__(
        self,
        block: Callable[[int, int, int], nn.Module]
        | Sequence[Callable[[int, int, int], nn.Module]],
        layers: Sequence[int],
        widths: Sequence[int],
        *,
        in_channels: int = 3,
        num_classes: int = 10,
        preact: bool = True,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
        act: str | nn.Module = "relu",
        memory: str = "recompute",
    ) -> None:
        super().__init__()
        factories = [block] * sum(layers) if callable(block) else list(block)
        if len(factories) != sum(layers) or len(layers) != len(widths):
            raise ValueError(
                f"{len(factories)} blocks for layers {list(layers)} and widths {list(widths)}"
            )
        self.preact = preact
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.stages = nn.ModuleList()
        channels = widths[0]
        for number, (count, width) in enumerate(zip(layers, widths)):
            blocks = []
            for i in range(count):
                stride = 2 if number > 0 and i == 0 else 1
                blocks.append(factories.pop(0)(channels, width, stride))
                channels = width
            self.stages.append(Stage(*blocks, memory=memory))
        self.norm = norm(channels if preact else widths[0])
        self.act = activation(act)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.zeros_(self.fc.bias)

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks in order."""
        return [block for stage in self.stages for block in stage.children()]

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, in_channels, H, W) to logits (N, num_classes)."""
        x = self.conv1(x)
        if not self.preact:
            x = self.act(self.norm(x))
        for stage in self.stages:
            x = stage(x)
        if self.preact:
            x = self.act(self.norm(x))
        return self.fc(x.mean((2, 3)))


def gradient_norm(module: nn.Module | Iterable[Tensor]) -> Tensor:
    """Euclidean norm of all parameters' gradients together, a scalar; 0 where there are none."""
    parameters = module.parameters() if isinstance(module, nn.Module) else module
    gradients = [p.grad for p in parameters if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


class Capture:
    """Record what passes modules' outputs in a forward and backward, by hooks.

        with Capture({"block 0": net.blocks[0]}) as captured:
            loss_of(net(images)).backward()
        captured.mean["block 0"], captured.std["block 0"], captured.gradient["block 0"]

    Args:
        modules: by the names under which they are recorded.

    Attributes, each a dictionary in the order of the forward: `shape`, `mean` and `std` (biased)
    of the output, `norm` (Euclidean, mean over the images), and, after a backward, `gradient`:
    the Euclidean norm of the loss's gradient at the output. A module that is called twice keeps
    its last call. Hooks on a block let a stage run block by block; hooks on a block's children
    let the block run unfused.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = dict(modules)
        self.shape: dict[str, tuple[int, ...]] = {}
        self.mean: dict[str, float] = {}
        self.std: dict[str, float] = {}
        self.norm: dict[str, float] = {}
        self.gradient: dict[str, float] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Capture:
        for name, module in self.modules.items():
            self._handles.append(module.register_forward_hook(self._hook(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def keep_gradient(gradient: Tensor) -> None:
            self.gradient[name] = float(gradient.norm())

        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            values = output.detach().float()
            self.shape[name] = tuple(values.shape)
            self.mean[name] = float(values.mean())
            self.std[name] = float(values.std(correction=0))
            self.norm[name] = float(values.flatten(1).norm(dim=1).mean())
            if output.requires_grad:
                output.register_hook(keep_gradient)

        return hook


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


def train_variant(
    make: Callable[[], nn.Module],
    data: ImageData,
    options: StudyOptions,
    seed: int = 0,
    name: str = "",
) -> History:
    """Train what `make` builds by SGD for `options.epochs`, testing after each.

    A loss that stops being finite ends the run and is recorded in `History.diverged`.
    Two calls with the same arguments on the same machine give the same numbers but for times.
    """
    device, dtype = options.place, DTYPES[options.dtype]
    hide = None if options.progress is None else not options.progress
    with _reproducible(device, seed):
        model = make().to(device)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.SGD(
            model.parameters(),
            lr=options.lr,
            momentum=options.momentum,
            weight_decay=options.weight_decay,
        )
        # float16 alone underflows: its gradients need scaling, bfloat16's do not.
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        batches = Batches(data, options.batch_size, torch.Generator().manual_seed(seed), device)
        history = History(name, seed, sum(p.numel() for p in model.parameters()))

        def logits_of(images: Tensor) -> Tensor:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits: Tensor = model(images)
            return logits.float()

        for epoch in range(1, options.epochs + 1):
            model.train()
            started = time.perf_counter()
            losses, norms, rate = [], [], options.lr
            correct = torch.zeros((), dtype=torch.int64, device=device)
            seen = 0
            bar = tqdm(
                batches.training(),
                total=batches.steps,
                desc=f"{name}, seed {seed}, epoch {epoch}/{options.epochs}",
                unit="batch",
                leave=False,
                disable=hide,
            )
            for index, (images, labels) in enumerate(bar):
                rate = options.rate((epoch - 1) * batches.steps + index, batches.steps)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                logits = logits_of(images)
                loss = F.cross_entropy(logits, labels)
                optimizer.zero_grad(set_to_none=True)
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                norms.append(gradient_norm(model))
                scaler.step(optimizer)
                scaler.update()
                losses.append(loss.detach())
                correct += (logits.argmax(1) == labels).sum()
                seen += len(labels)
            train_loss = float(torch.stack(losses).double().mean())
            seconds = time.perf_counter() - started
            test_loss, test_accuracy = _test(model, batches, logits_of)
            history.epochs.append(
                EpochMetrics(
                    epoch=epoch,
                    lr=rate,
                    train_loss=train_loss,
                    train_accuracy=correct.item() / seen,
                    test_loss=test_loss,
                    test_accuracy=test_accuracy,
                    seconds=seconds,
                    images_per_second=seen / seconds,
                )
            )
            history.gradient_norms.append(float(torch.stack(norms).double().mean()))
            if not math.isfinite(train_loss):
                history.diverged = epoch
                break
    return history


@torch.no_grad()
def _test(
    model: nn.Module, batches: Batches, logits_of: Callable[[Tensor], Tensor]
) -> tuple[float, float]:
    """Loss and accuracy on the test set."""
    model.eval()
    loss, correct, count = 0.0, 0, 0
    for images, labels in batches.testing():
        logits = logits_of(images)
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        correct += int((logits.argmax(1) == labels).sum())
        count += len(labels)
    return loss / count, correct / count


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
                    self.spread(name, "seconds").mean,
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
            "seconds",
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

    def sentence(self, first: str, second: str) -> str:
        """How the two compare in test accuracy, in words that the spread over seeds bears out."""
        difference = self.difference(first, second)
        points = 100 * difference.mean
        n = len(difference.values)
        over = f"{n} seeds" if n > 1 else "1 seed"
        a = f"{first} ({_percent(self.spread(first))} %)"
        b = f"{second} ({_percent(self.spread(second))} %)"
        for name in (first, second):
            if count := self.diverged(name):
                a += f" [{name} diverged in {count} of {len(self.histories[name])} runs]"
        if points == 0:
            return f"{a} and {b} end at the same test accuracy over {over}."
        side = "above" if points > 0 else "below"
        agree = all((value > 0) == (points > 0) and value != 0 for value in difference.values)
        if n == 1:
            weight = "one seed says nothing about chance"
        elif agree:
            weight = "in every one of them"
        else:
            weight = "but not in every one of them, so this may be chance"
        return f"{a} ends {abs(points):.2f} points {side} {b} over {over}, {weight}."

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


def compare(
    variants: Mapping[str, Callable[[], nn.Module]],
    data: ImageData,
    options: StudyOptions,
    settings: Mapping[str, StudyOptions] | None = None,
) -> Comparison:
    """Train every variant with every seed, seed by seed so that all see the same machine.

    Args:
        variants: model factories by name.
        data: the same for all.
        options: how they are trained.
        settings: options of single variants that differ from it, made by `dataclasses.replace`.
    """
    settings = settings or {}
    histories: dict[str, list[History]] = {name: [] for name in variants}
    hide = None if options.progress is None else not options.progress
    runs = [(name, seed) for seed in range(options.seeds) for name in variants]
    for name, seed in tqdm(runs, desc="runs", unit="run", leave=False, disable=hide):
        mine = settings.get(name, options)
        histories[name].append(train_variant(variants[name], data, mine, seed, name))
    return Comparison(histories, options.target)
