"""The options of a training run, recipes that preset them, and what a resumed run has to keep."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from ..data.datasets import CACHES
from ..errors import InputError
from ..models import BLOCKS, MODELS, STEMS
from ..names import BACKENDS, DTYPES, MEMORY_MODES
from .fields import Between, Bytes, Choice, Option, documented, fields_of, nearest, show
from .recipe import read_recipe
from .schedule import SCHEDULES

DEFAULT_EPOCHS = 30
GRAPHS = ("auto", "on", "off")

# A message about differing options names so many of them, and counts the rest.
_SHOWN = 3

Count = Annotated[int, Between(1)]
Whole = Annotated[int, Between(0)]
Positive = Annotated[float, Between(0, open_low=True)]
NotNegative = Annotated[float, Between(0)]
Part = Annotated[float, Between(0, 1)]
# Beyond these a number is a slip of the finger that would take the machine's memory: a net of that
# many modules, processes of that number.
Layers = Annotated[int, Between(1, 100_000)]
Processes = Annotated[int, Between(0, 1024)]
# The OpenMP runtime ends the process where it has no memory for so many.
Threads = Annotated[int, Between(1, 1024, open_high=False)]


@documented
@dataclass(frozen=True)
class TrainConfig:
    """Every option that decides or shapes a training run. The defaults are the paper's recipe in
    proportion, on a data set that needs no download.

    Values are converted to their field's type where nothing is lost ("1e-4" and 64e3 are numbers,
    "yes" is a bool) and checked, each by itself and together. What depends on the data, the
    machine or the net is checked where these are known (``check_steps`` for the warm-up).

    Args:
        {options}

    Raises:
        InputError: one line that names the option, what it may be, and what came.
    """

    data: Annotated[
        str,
        Option(
            "digits (no download), cifar10, cifar100, imagefolder:PATH (with PATH/train and "
            "PATH/test or PATH/val, a folder of images for each class) or synthetic.",
            metavar="NAME",
        ),
    ] = "digits"
    root: Annotated[str, Option("Where CIFAR lies or is downloaded to.", resume="free")] = "data"
    image_size: Annotated[
        Count | None, Option("Resize and crop all images to this many pixels a side.")
    ] = None
    cache: Annotated[
        str,
        Choice(CACHES),
        Option(
            "Decode images once into memory, or for each batch (imagefolder only).",
            default="memory, if they fit",
            resume="free",
        ),
    ] = "auto"
    workers: Annotated[Processes, Option("Processes that make batches.", resume="free")] = 0
    threads: Annotated[
        Threads | None,
        Option("CPU threads.", default="torch's, or those of the run resumed", resume="machine"),
    ] = None
    model: Annotated[
        Annotated[str, Choice(MODELS)] | None,
        Option(
            "A standard net by its name, such as preact_resnet50, instead of depth, block and "
            "stem; --list-models has them.",
            metavar="NAME",
        ),
    ] = None
    depth: Annotated[Layers, Option("Layers: 6n+2 for basic, 9n+2 for bottleneck.")] = 20
    block: Annotated[str, Choice(BLOCKS), Option()] = "basic"
    stem: Annotated[str, Choice(STEMS), Option()] = "cifar"
    memory: Annotated[
        str,
        Choice((*MEMORY_MODES, "auto")),
        Option(
            "What is kept from forward to backward; auto: the fastest mode that fits the budget.",
            resume="rounds",
        ),
    ] = "recompute"
    budget: Annotated[
        Annotated[str, Bytes()] | None,
        Option(
            'Bytes for all of a step with memory auto, such as "8GiB".',
            default="the GPU's free memory",
            resume="rounds",
        ),
    ] = None
    backend: Annotated[
        str, Choice(BACKENDS), Option("auto: triton on a GPU, aten elsewhere.", resume="rounds")
    ] = "auto"
    eager: Annotated[bool, Option("Train the same model unfused.", resume="rounds")] = False
    channels_last: Annotated[
        bool,
        Option("Memory format.", default="channels last", off="contiguous", resume="rounds"),
    ] = True
    epochs: Annotated[
        Count | None, Option("Passes over the training images.", default=str(DEFAULT_EPOCHS))
    ] = None
    steps: Annotated[
        Count | None, Option("Optimizer steps of the whole run, instead of epochs.")
    ] = None
    batch_size: Annotated[Count, Option("Images a step, of all processes.")] = 128
    drop_last: Annotated[
        bool,
        Option(
            "Leave out or keep an epoch's last, smaller batch.",
            default="leave out",
            off="keep-last",
        ),
    ] = True
    lr: Annotated[Positive, Option("Learning rate, the schedule's highest.")] = 0.1
    schedule: Annotated[
        str, Choice(SCHEDULES), Option("step divides it by 10 at 1/2 and at 3/4 of all steps.")
    ] = "step"
    warmup_steps: Annotated[
        Whole | None,
        Option(
            "Steps of warm-up.",
            default="step 1 in 160, at most 400; cosine 5 %; one-cycle 30 %",
        ),
    ] = None
    momentum: Annotated[Part, Option("Of SGD.")] = 0.9
    nesterov: Annotated[bool, Option("Nesterov's momentum.", off="no-nesterov")] = False
    weight_decay: Annotated[NotNegative, Option("Of SGD.")] = 1e-4
    decay_all: Annotated[
        bool,
        Option(
            "Decay all parameters, or not those of norms and biases.",
            default="all",
            off="decay-weights",
        ),
    ] = True
    label_smoothing: Annotated[
        Part, Option("Part of the target that is spread over all classes.")
    ] = 0.0
    ema: Annotated[
        Part,
        Option("Decay of a moving average of the weights, which is tested.", default="off"),
    ] = 0.0
    crop_padding: Annotated[
        Whole | None,
        Option("Pixels around training images before a random crop.", default="the data set's"),
    ] = None
    flip: Annotated[
        bool | None,
        Option("Mirror half of the training images.", default="the data set's", off="no-flip"),
    ] = None
    dtype: Annotated[
        str,
        Choice(DTYPES),
        Option("bf16 and fp16 train under autocast; fp16 scales the loss."),
    ] = "fp32"
    device: Annotated[
        str,
        Option("cpu, cuda, cuda:1, ...", default="a GPU if there is one", resume="rounds"),
    ] = "auto"
    graph: Annotated[
        str,
        Choice(GRAPHS),
        Option(
            "Capture the whole step as a CUDA graph and say why where that is not possible; auto: "
            "on a GPU.",
            resume="free",
        ),
    ] = "auto"
    sync_bn: Annotated[
        bool,
        Option("Batch norms take the moments of all processes' images.", off="no-sync-bn"),
    ] = True
    seed: Annotated[Whole, Option("Of weights, order and augmentation.")] = 0
    limit_batches: Annotated[
        Count | None,
        Option("At most so many training and test batches an epoch, for trying things out."),
    ] = None
    checkpoint_every: Annotated[
        Count | None,
        Option("Steps between checkpoints.", default="every epoch", resume="free"),
    ] = None
    keep: Annotated[Count, Option("Checkpoints kept besides the best.", resume="free")] = 3
    log_steps: Annotated[
        bool,
        Option("Write every step's loss, rate and memory to metrics.jsonl.", resume="free"),
    ] = False
    tensorboard: Annotated[bool, Option("Write TensorBoard's events.", resume="free")] = False

    def __post_init__(self) -> None:
        for name, field in FIELDS.items():
            object.__setattr__(self, name, field.checked(getattr(self, name)))
        if self.model is not None:
            parts = {name: getattr(self, name) for name in NET}
            _check_net(self.model, {n: v for n, v in parts.items() if v != FIELDS[n].default})
            for name in NET:
                object.__setattr__(self, name, getattr(MODELS[self.model], name))
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
                f"{show(self.data)}"
            )


FIELDS = fields_of(TrainConfig)

# The options that say which net is built, where no name does.
NET = ("depth", "block", "stem")


def make_config(recipe: str | Path | None = None, **given: Any) -> TrainConfig:
    """The options of a recipe, overridden by those given, over ``TrainConfig``'s defaults.

    Args:
        recipe: one of ``recipe.recipe_names``, or the path of a YAML file, ending in .yaml or .yml,
            that maps options to values.
        given: options by name. None is a value like others: leave out what is not asked for. Of
            ``epochs`` and ``steps``, one that is given takes the place of the recipe's, and so
            does ``model`` of depth, block and stem, or one of these of the recipe's ``model``.

    Raises:
        InputError: an unknown option or recipe, a file that cannot be read, or values that
            ``TrainConfig`` refuses; with the file's name if they are the recipe's.
    """
    _check_names(given)
    own = {name: FIELDS[name].checked(value) for name, value in given.items()}
    if own.get("model") is not None:
        # Here, where a depth of 20 that was given is told from the default.
        _check_net(own["model"], {name: own[name] for name in NET if name in own})
    if recipe is None:
        return TrainConfig(**own)
    preset, source = read_recipe(recipe)
    preset = checked_options(preset, source)
    replaced = [("epochs", "steps"), ("steps", "epochs")]
    replaced += [pair for name in NET for pair in (("model", name), (name, "model"))]
    for chosen, other in replaced:
        if own.get(chosen) is not None:
            preset.pop(other, None)
    try:
        return TrainConfig(**{**preset, **own})
    except InputError as error:
        raise InputError(f"{error} (with the options of {source})") from error


def checked_options(options: Mapping[Any, Any], where: str | Path) -> dict[str, Any]:
    """Options by name, each converted to its field's type and checked by itself.

    Raises:
        InputError: an unknown one or a wrong value; ``where`` names the file.
    """
    _check_names(options, f"{where}: ")
    return {name: FIELDS[name].checked(value, f"{where}: ") for name, value in options.items()}


def saved_config(saved: Mapping[str, Any], where: str | Path) -> TrainConfig:
    """The configuration that ``dataclasses.asdict`` gave and a file kept.

    What is not an option is ignored, one that is missing has its default: another version of the
    library may have written it.

    Raises:
        InputError: a value that no run can have; ``where`` names the file.
    """
    if not isinstance(saved, Mapping):
        raise InputError(f"{where}: expected a configuration by name, got {show(saved)}")
    known = {name: saved[name] for name in FIELDS if name in saved}
    try:
        return TrainConfig(**known)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def check_resumable(saved: Mapping[str, Any], now: TrainConfig, where: str | Path) -> list[str]:
    """Hold the configuration of a checkpoint against that of the run that goes on from it.

    Args:
        saved: the configuration in the checkpoint, as ``saved_config`` takes it.
        now: of the run that is to go on.
        where: the checkpoint's name, for messages.

    Returns:
        A line for each option that differs and may, see ``Option.resume``.

    Raises:
        InputError: an option that decides the result differs; the line names the first ones, with
            both values.
    """
    before = saved_config(saved, where)
    differing = {
        name: (getattr(before, name), getattr(now, name))
        for name in FIELDS
        if getattr(before, name) != getattr(now, name) and FIELDS[name].option.resume != "machine"
    }
    refused = [name for name in differing if FIELDS[name].option.resume == "decides"]
    if refused:
        shown = refused[:_SHOWN]
        then, here = (
            ", ".join(f"{name} {show(differing[name][i])}" for name in shown) for i in (0, 1)
        )
        more = f" ({len(refused) - _SHOWN} more differ)" if len(refused) > _SHOWN else ""
        raise InputError(
            f"{where} was written with {then}, this run has {here}{more}: a resumed run keeps "
            "what decides its result"
        )
    return [
        f"{name} was {show(then)} and is {show(here)}"
        + (
            ": the same function with other roundings"
            if FIELDS[name].option.resume == "rounds"
            else ""
        )
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


def _check_net(model: str, parts: Mapping[str, Any]) -> None:
    """Refuse a depth, block or stem that is not the named net's.

    Raises:
        InputError: it names the first one.
    """
    for name, value in parts.items():
        own = getattr(MODELS[model], name)
        if value != own:
            raise InputError(
                f"{name} contradicts model {model}, whose {name} is {show(own)}: got {show(value)}"
            )


def _check_names(options: Iterable[Any], where: str = "") -> None:
    for name in options:
        if name not in FIELDS:
            raise InputError(f"{where}unknown option {show(name)}{nearest(name, FIELDS)}")
