"""What a training run is asked for: options, recipes that preset them, and what a resumed run
has to keep."""

import dataclasses
import difflib
import math
import operator
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from numbers import Real
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import torch
import yaml

from ..core.memory import parse_bytes
from ..errors import InputError
from ..models import BLOCKS, STEMS
from ..names import BACKENDS, MEMORY_MODES
from .schedule import SCHEDULES

DTYPES = ("fp32", "bf16", "fp16")
CACHES = ("auto", "memory", "stream")
DEFAULT_EPOCHS = 30

# A recipe is a page of text; a longer file is something else, and is not read to its end.
_LONGEST_RECIPE = 2**20

# Options that a message names; of more their number.
_SHOWN = 3


@dataclass(frozen=True)
class _Between:
    """The numbers from `low` on, itself included unless it is open, and below `high`."""

    low: float
    high: float = math.inf
    open_low: bool = False

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.open_low else f"of at least {self.low:g}"
        return low if self.high == math.inf else f"{low} and below {self.high:g}"

    def allows(self, value: float) -> bool:
        return (value > self.low if self.open_low else value >= self.low) and value < self.high


class _Choice(tuple[str, ...]):
    """The words that an option may be."""

    __slots__ = ()


class _Bytes:
    """An amount of memory, as `resnetv2.memory.parse_bytes` reads it."""


Count = Annotated[int, _Between(1)]
Whole = Annotated[int, _Between(0)]
Positive = Annotated[float, _Between(0, open_low=True)]
NotNegative = Annotated[float, _Between(0)]
Part = Annotated[float, _Between(0, 1)]
# Beyond these a number is a slip of the finger that would take the machine's memory: a net of that
# many modules, processes of that number.
Layers = Annotated[int, _Between(1, 100_000)]
Processes = Annotated[int, _Between(0, 1024)]


@dataclass(frozen=True)
class TrainConfig:
    """Every option that decides or shapes a training run. The defaults are the paper's recipe in
    proportion, on a data set that needs no download.

    Values are converted to their field's type where nothing is lost ("1e-4" and 64e3 are numbers,
    "yes" is a bool) and checked, each by itself and together; what depends on the data, the
    machine or the net is checked where these are known (`check_steps` for the warm-up).

    Args:
        data: a name that `resnetv2.data.load_data` knows, such as "imagefolder:PATH".
        root: folder where CIFAR lies or is downloaded to.
        image_size: resize and crop all images to this many pixels a side; None leaves them.
        cache: "memory" decodes all images once, "stream" decodes them for each batch (of
            "imagefolder:" only), "auto" takes memory where it suffices.
        workers: processes that make batches beside the training one.
        depth: layers, 6n+2 for basic blocks, 9n+2 for bottlenecks.
        block: "basic" or "bottleneck".
        stem: "cifar" or "imagenet".
        memory: what is kept from forward to backward, one of `PreActResNet`'s modes or "auto".
        budget: bytes of a step for memory "auto", as "8GiB" or a number; None: what a GPU has free.
        backend: "auto", "triton", "aten" or "eager".
        eager: the same net child by child, unfused; sets `backend` to "eager".
        channels_last: memory format of weights and images.
        epochs: passes over the training set; 30 if neither `epochs` nor `steps` is given.
        steps: optimizer steps of the whole run, instead of `epochs`.
        batch_size: images a step, of all processes together.
        drop_last: leave out an epoch's last batch if it is smaller.
        lr: learning rate, the highest of the schedule.
        schedule: "step", "cosine", "one-cycle" or "constant", see `schedule.learning_rate`.
        warmup_steps: steps of warm-up; None is the schedule's own proportion.
        momentum: of SGD, 0 or more and below 1.
        nesterov: Nesterov's momentum.
        weight_decay: of SGD.
        decay_all: decay every parameter; otherwise not those of norms and biases.
        label_smoothing: part of the target, 0 or more and below 1, spread over all classes.
        ema: weight of the past in an exponential moving average of the weights that is tested and
            kept, for each step; 0 or more and below 1, 0 means no average.
        crop_padding: pixels padded on each side before a random crop; None: as the data set says.
        flip: mirror half of the training images; None: as the data set says.
        dtype: "fp32", or "bf16" or "fp16" under autocast; fp16 scales the loss.
        device: "cpu", "cuda", "cuda:1", ...; "auto" is a GPU where there is one.
        graph: capture a whole step as a CUDA graph where that is possible.
        sync_bn: batch norms take the moments of all processes' images together.
        seed: of the initial weights, the order of images and the augmentation.
        limit_batches: at most so many training and test batches an epoch; None for all.
        checkpoint_every: steps between checkpoints; None: at the end of each epoch.
        keep: checkpoints that are kept besides the best.
        log_steps: write every step's loss, learning rate and bytes in use to metrics.jsonl as well.
        tensorboard: write TensorBoard's events as well.

    Raises:
        InputError: one line that names the option, what it may be, and what came.
    """

    data: str = "digits"
    root: str = "data"
    image_size: Count | None = None
    cache: Annotated[str, _Choice(CACHES)] = "auto"
    workers: Processes = 0
    depth: Layers = 20
    block: Annotated[str, _Choice(BLOCKS)] = "basic"
    stem: Annotated[str, _Choice(STEMS)] = "cifar"
    memory: Annotated[str, _Choice((*MEMORY_MODES, "auto"))] = "recompute"
    budget: Annotated[str, _Bytes()] | None = None
    backend: Annotated[str, _Choice(BACKENDS)] = "auto"
    eager: bool = False
    channels_last: bool = True
    epochs: Count | None = None
    steps: Count | None = None
    batch_size: Count = 128
    drop_last: bool = True
    lr: Positive = 0.1
    schedule: Annotated[str, _Choice(SCHEDULES)] = "step"
    warmup_steps: Whole | None = None
    momentum: Part = 0.9
    nesterov: bool = False
    weight_decay: NotNegative = 1e-4
    decay_all: bool = True
    label_smoothing: Part = 0.0
    ema: Part = 0.0
    crop_padding: Whole | None = None
    flip: bool | None = None
    dtype: Annotated[str, _Choice(DTYPES)] = "fp32"
    device: str = "auto"
    graph: bool = False
    sync_bn: bool = True
    seed: Whole = 0
    limit_batches: Count | None = None
    checkpoint_every: Count | None = None
    keep: Count = 3
    log_steps: bool = False
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name in FIELDS:
            object.__setattr__(self, name, _checked(name, getattr(self, name)))
        if self.epochs is not None and self.steps is not None:
            raise InputError(
                f"epochs and steps both say how long to train: give one of them, got epochs "
                f"{self.epochs} and steps {self.steps}"
            )
        if self.epochs is None and self.steps is None:
            object.__setattr__(self, "epochs", DEFAULT_EPOCHS)
        if self.eager:
            if self.backend not in ("auto", "eager"):
                raise InputError(f"eager contradicts backend {self.backend!r}: give one of them")
            object.__setattr__(self, "backend", "eager")
        if self.nesterov and self.momentum == 0:
            raise InputError("nesterov needs a momentum above 0, got momentum 0")
        if self.budget is not None and self.memory != "auto":
            raise InputError(
                f'budget is for memory "auto", which chooses by it: got budget {self.budget} with '
                f'memory "{self.memory}"'
            )
        if self.cache == "stream" and self.data.partition(":")[0] != "imagefolder":
            raise InputError(
                f'cache "stream" is for images in a folder, data imagefolder:PATH: got data '
                f"{_show(self.data)}"
            )


FIELDS = tuple(field.name for field in dataclasses.fields(TrainConfig))
_HINTS = get_type_hints(TrainConfig, include_extras=True)

# What each option means to a run that goes on from a checkpoint: every field is in one of three.
DECIDES = (
    "data",
    "image_size",
    "depth",
    "block",
    "stem",
    "epochs",
    "steps",
    "batch_size",
    "drop_last",
    "lr",
    "schedule",
    "warmup_steps",
    "momentum",
    "nesterov",
    "weight_decay",
    "decay_all",
    "label_smoothing",
    "ema",
    "crop_padding",
    "flip",
    "dtype",
    "sync_bn",
    "seed",
    "limit_batches",
)
ROUNDS = ("memory", "budget", "backend", "eager", "channels_last", "device", "graph")
FREE = (
    "root",
    "cache",
    "workers",
    "checkpoint_every",
    "keep",
    "log_steps",
    "tensorboard",
)


def recipe_names() -> list[str]:
    """The recipes that come with the library."""
    folder = resources.files(__package__) / "recipes"
    suffix = ".yaml"
    return sorted(
        file.name.removesuffix(suffix) for file in folder.iterdir() if file.name.endswith(suffix)
    )


def make_config(recipe: str | Path | None = None, **given: Any) -> TrainConfig:
    """The options of a recipe, overridden by those given, over `TrainConfig`'s defaults.

    Args:
        recipe: one of `recipe_names`, or the path of a YAML file, ending in .yaml or .yml, that
            maps options to values.
        given: options by name. None is a value like others: leave out what is not asked for. Of
            `epochs` and `steps`, one that is given takes the place of the recipe's.

    Raises:
        InputError: an unknown option or recipe, a file that cannot be read, or values that
            `TrainConfig` refuses; with the file's name if they are the recipe's.
    """
    _check_names(given)
    own = {name: _checked(name, value) for name, value in given.items()}
    if recipe is None:
        return TrainConfig(**own)
    preset, source = _read_recipe(recipe)
    preset = checked_options(preset, source)
    for length, other in (("epochs", "steps"), ("steps", "epochs")):
        if own.get(length) is not None:
            preset.pop(other, None)
    try:
        return TrainConfig(**{**preset, **own})
    except InputError as error:
        raise InputError(f"{error} (with the options of {source})") from error


def checked_options(options: Mapping[Any, Any], where: str | Path) -> dict[str, Any]:
    """Options by name, each converted to its field's type and checked by itself.

    Raises:
        InputError: an unknown one or a wrong value; `where` names the file.
    """
    _check_names(options, f"{where}: ")
    return {name: _checked(name, value, f"{where}: ") for name, value in options.items()}


def saved_config(saved: Mapping[str, Any], where: str | Path) -> TrainConfig:
    """The configuration that `dataclasses.asdict` gave and a file kept.

    What is not an option is ignored, one that is missing has its default: another version of the
    library may have written it.

    Raises:
        InputError: a value that no run can have; `where` names the file.
    """
    if not isinstance(saved, Mapping):
        raise InputError(f"{where}: expected a configuration by name, got {_show(saved)}")
    known = {name: saved[name] for name in FIELDS if name in saved}
    try:
        return TrainConfig(**known)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def check_resumable(saved: Mapping[str, Any], now: TrainConfig, where: str | Path) -> list[str]:
    """Hold the configuration of a checkpoint against that of the run that goes on from it.

    Args:
        saved: the configuration in the checkpoint, as `saved_config` takes it.
        now: of the run that is to go on.
        where: the checkpoint's name, for messages.

    Returns:
        A line for each option that differs and may: the run computes the same function, and those
        of `ROUNDS` may round otherwise.

    Raises:
        InputError: an option of `DECIDES` differs; the line names the first of them, with both
            values.
    """
    before = saved_config(saved, where)
    differing = {
        name: (getattr(before, name), getattr(now, name))
        for name in FIELDS
        if getattr(before, name) != getattr(now, name)
    }
    refused = [name for name in differing if name in DECIDES]
    if refused:
        shown = refused[:_SHOWN]
        then, here = (
            ", ".join(f"{name} {_show(differing[name][i])}" for name in shown) for i in (0, 1)
        )
        more = f" ({len(refused) - _SHOWN} more differ)" if len(refused) > _SHOWN else ""
        raise InputError(
            f"{where} was written with {then}, this run has {here}{more}: a resumed run keeps "
            "what decides its result"
        )
    return [
        f"{name} was {_show(then)} and is {_show(here)}"
        + (": the same function with other roundings" if name in ROUNDS else "")
        for name, (then, here) in differing.items()
    ]


def check_steps(config: TrainConfig, total_steps: int) -> None:
    """Check what can only be checked once the number of optimizer steps is known.

    Raises:
        InputError: the warm-up is longer than the run.
    """
    if config.warmup_steps is not None and config.warmup_steps > total_steps:
        raise InputError(
            f"warmup_steps must be at most the run's {total_steps:,} steps, got "
            f"{config.warmup_steps:,}"
        )


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which by itself takes the last of two values for one key."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{_show(key.value)} is there twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read_recipe(recipe: str | Path) -> tuple[dict[Any, Any], str]:
    """The options of a recipe, and what to call it in messages."""
    if not isinstance(recipe, (str, Path)):
        raise InputError(f"recipe must be a name or a path, got {_show(recipe)}")
    names = recipe_names()
    if str(recipe) in names:
        resource = resources.files(__package__) / "recipes" / f"{recipe}.yaml"
        return _parse(resource.read_text(encoding="utf-8"), f"recipe {recipe}")
    if not isinstance(recipe, Path) and not recipe.lower().endswith((".yaml", ".yml")):
        raise InputError(
            f"unknown recipe {_show(recipe)}: choose from {', '.join(names)}, or give the path of "
            f"a .yaml file{_nearest(recipe, names)}"
        )
    name = str(recipe) if str(recipe).isprintable() else repr(str(recipe))
    try:
        path = Path(recipe).expanduser()
        if not path.exists():
            raise InputError(f"no recipe at {name}")
        if not path.is_file():
            raise InputError(f"{name} is not a file: a recipe is a YAML file of options")
        with path.open("rb") as file:
            content = file.read(_LONGEST_RECIPE + 1)
    # RuntimeError: the home folder of a user that there is not.
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read the recipe {name}: {reason}") from error
    if len(content) > _LONGEST_RECIPE:
        raise InputError(f"{name} is longer than 1 MiB: a recipe is a YAML file of options")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not a text file: a recipe is YAML in UTF-8") from error
    return _parse(text, name)


def _parse(text: str, source: str) -> tuple[dict[Any, Any], str]:
    try:
        options = yaml.load(text, _Loader)  # _Loader is a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = " ".join((error.problem or error.context or "").split())
        raise InputError(f"{source} is not valid YAML{place}: {problem}") from error
    except yaml.reader.ReaderError as error:
        raise InputError(f"{source} is not a text file: {error.reason}") from error
    # SafeLoader converts dates and numbers that look right and are not, and recurses into lists.
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{source} is not valid YAML: {reason}") from error
    if not isinstance(options, dict):
        what = "nothing" if options is None else _show(options)
        raise InputError(
            f"{source}: expected a line for each option, such as epochs: 10, got {what}"
        )
    return options, source


def _check_names(options: Iterable[Any], where: str = "") -> None:
    for name in options:
        if name not in FIELDS:
            raise InputError(f"{where}unknown option {_show(name)}{_nearest(name, FIELDS)}")


def _checked(name: str, value: Any, where: str = "") -> Any:
    """`value` as `name`'s type if it is one that the field may have."""
    hint = _HINTS[name]
    optional = get_origin(hint) is not Annotated and type(None) in get_args(hint)
    if optional:
        if value is None:
            return None
        (hint,) = (part for part in get_args(hint) if part is not type(None))
    kind, *rules = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    rule = rules[0] if rules else None
    message = f"{where}{name} must be {_expected(kind, rule)}, got {_show(value)}"
    if isinstance(rule, _Choice) and isinstance(value, str) and value not in rule:
        raise InputError(message + _nearest(value, rule))
    try:
        if isinstance(rule, _Bytes):
            # Numbers from a command line come as text: one spelling for both in the file.
            value = value if isinstance(value, str) else str(_CONVERT[int](value))
            parse_bytes(value)
        else:
            value = _CONVERT[kind](value)
    except OverflowError as error:
        raise InputError(f"{where}{name} is too large, got {_show(value)}") from error
    except (TypeError, ValueError) as error:
        raise InputError(message) from error
    if isinstance(rule, _Between) and not rule.allows(value):
        raise InputError(message)
    return value


def _expected(kind: type, rule: object) -> str:
    if isinstance(rule, _Bytes):
        return 'bytes, such as "8GiB" or a number above 0'
    if isinstance(rule, _Choice):
        return f"one of {', '.join(rule)}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "some text"}
    return words[kind] if rule is None else f"{words[kind]} {rule}"


def _to_bool(value: Any) -> bool:
    words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    raise TypeError


def _to_int(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    if isinstance(value, str):
        try:
            value = int(value)
        except ValueError:
            value = float(value)
    if isinstance(value, float):
        if not value.is_integer():
            raise ValueError
        value = int(value)
    number = operator.index(value)
    if number >= 2**63:  # torch's integers end here
        raise OverflowError
    return number


def _to_float(value: Any) -> float:
    # A tensor of one element has a __float__ too; here it is likelier a mistake than a wish.
    if isinstance(value, bool) or not isinstance(value, (Real, str)):
        raise TypeError
    value = float(value)
    if not math.isfinite(value):
        raise ValueError
    return value


def _to_text(value: Any) -> str:
    if not isinstance(value, (str, os.PathLike, torch.device)):
        raise TypeError
    text = str(value)
    if not text.strip() or "\0" in text:  # no system's path holds a zero
        raise ValueError
    text.encode()  # ValueError where a path is not in UTF-8: it is printed, and written to files
    return text


_CONVERT = {bool: _to_bool, int: _to_int, float: _to_float, str: _to_text}


def _show(value: Any) -> str:
    """`value` for a message: on one line, not too long."""
    try:
        text = repr(value)
    except ValueError:  # an int of more digits than Python converts
        text = "a huge number"
    text = " ".join(text.split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def _nearest(word: Any, words: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(word).lower().replace("-", "_"), list(words), n=1)
    return f": did you mean {near[0]}?" if near else ""
