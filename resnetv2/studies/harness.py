"""The parts that all studies share: options, seeds, training, capture by hooks, comparisons.

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
`resnetv2.studies.variants` has the nets: the original ResNet and every variant of its unit.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import ImageData
from ..errors import InputError
from ..training.environment import device_name, package_versions, reproducible
from ..training.fields import fields_of
from .histories import Comparison, History, Spread
from .options import StudyOptions, listed
from .results import Result, Table
from .training import compare, gradient_norm, train_variant

__all__ = [
    "Capture",
    "Comparison",
    "History",
    "InputError",
    "Result",
    "Spread",
    "Study",
    "StudyOptions",
    "Table",
    "compare",
    "gradient_norm",
    "study",
    "train_variant",
]


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
        options = StudyOptions(**{**self.defaults, **self.presets.get(preset or "", {}), **changes})
        if isinstance(self.defaults.get("depth"), int) and len(options.depths) != 1:
            raise InputError(f"{self.name} takes one depth, got {listed(options.depths)}")
        return options

    def command(self, options: StudyOptions) -> str:
        """The command line that runs the study with these options, on as many threads as now.

        Without ``root``, a place on this machine. Data that were given as tensors have no name on
        the command line.
        """
        usual = StudyOptions(**self.defaults)
        words = ["resnetv2", "study", self.name]
        for name, described in fields_of(StudyOptions).items():
            value = getattr(options, name)
            if name == "root" or value is None or value == getattr(usual, name):
                continue
            option = f"--{name.replace('_', '-')}"
            if isinstance(value, bool):
                words.append(option if value else f"--{described.option.off}")
            elif isinstance(value, ImageData):
                words += [option, value.name]
            else:
                several = isinstance(value, (list, tuple))
                words += [option, ",".join(map(str, value)) if several else str(value)]
        return shlex.join([*words, "--threads", str(torch.get_num_threads())])

    def __call__(self, preset: str | None = None, **changes: Any) -> Result:
        """Run it. The global random state is left as it was; weights come from the seeds."""
        options = self.options(preset, **changes)
        place = options.place
        started = time.perf_counter()
        with reproducible(place, 0):
            result = self.function(options)
        result.seconds = round(time.perf_counter() - started, 1)
        result.name, result.title, result.question = self.name, self.title, self.question
        result.command = self.command(options)
        settings = {name: getattr(options, name) for name in self.defaults}
        if isinstance(settings.get("data"), ImageData):
            settings["data"] = settings["data"].name
        settings.pop("root", None)  # a place on this machine says nothing about the result
        result.settings = {
            **settings,
            **result.settings,
            "device": device_name(place),
            "threads": torch.get_num_threads(),
            "versions": package_versions(),
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
            raise ValueError(f"study {name}: no such options: {listed(sorted(unknown))}")

    def decorate(function: Callable[[StudyOptions], Result]) -> Study:
        return Study(function, name, title, question, dict(defaults), dict(presets or {}))

    return decorate


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
