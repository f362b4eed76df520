"""Options of the command line, made from the fields of a dataclass (``resnetv2.training.fields``).

A click option per field: its name, type, choices, metavar and words come from the annotation. An
option that is not given is None, so that a recipe, a preset or the dataclass has its value. Ranges
are the dataclass' to check: its message is the same from Python and from the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from ..models import BLOCKS, IMAGE_SIZES, MODELS, PreActResNet, standard_net
from ..names import DTYPES
from ..training.fields import Choice, Field, fields_of
from .command import WrongInput

F = TypeVar("F", bound=Callable[..., Any])

# The OpenMP runtime ends the process where it has no memory for so many.
_MOST_THREADS = 1024

threads = click.option(
    "--threads", type=click.IntRange(1, _MOST_THREADS), help="CPU threads.  [default: torch's]"
)
progress = click.option(
    "--progress/--no-progress", default=None, help="Progress bar.  [default: on a terminal]"
)


_NET = (
    click.option(
        "--depth",
        type=click.IntRange(1, 99_999),
        help="Layers: 6n+2 for basic, 9n+2 for bottleneck.",
    ),
    click.option("--block", type=click.Choice(list(BLOCKS)), help="For --depth.  [default: basic]"),
    click.option(
        "--model",
        type=click.Choice(list(MODELS)),
        metavar="NAME",
        help="A standard net by its name, instead of --depth and --block; resnetv2 train "
        "--list-models has them.",
    ),
    click.option(
        "--batch-size",
        type=click.IntRange(1, 2**31 - 1),
        default=128,
        show_default=True,
        help="Images a step.",
    ),
    click.option(
        "--image-size",
        type=click.IntRange(1, 2**16),
        help="Height and width in pixels.  [default: 32; 224 for a net of ImageNet]",
    ),
    click.option(
        "--dtype",
        type=click.Choice(list(DTYPES)),
        default="fp32",
        show_default=True,
        help="In which convolutions multiply (autocast).",
    ),
)


def net_options(command: F) -> F:
    """The options that say which net a step has, of which images, in which dtype."""
    for option in reversed(_NET):
        command = option(command)
    return command


def net_of(
    depth: int | None, block: str | None, model: str | None, image_size: int | None
) -> tuple[PreActResNet, int]:
    """The net of ``net_options``, without memory, and the size of its images.

    Raises:
        WrongInput: they name no net, or two.
    """
    import torch

    if (depth is None) == (model is None):
        raise WrongInput("give --depth or --model: one of them says which net it is")
    if model is not None and block is not None:
        raise WrongInput(f"--block belongs to --depth: {model} has its own")
    try:
        with torch.device("meta"):
            if depth is not None:
                net = PreActResNet.from_depth(depth, block or "basic")
            else:
                net = standard_net(str(model)).build()
    except ValueError as error:
        raise WrongInput(str(error)) from error
    return net, image_size or IMAGE_SIZES[net.stem]


def options_of(
    cls: type,
    *names: str,
    default: str | None = None,
    types: Mapping[str, click.ParamType[Any]] | None = None,
) -> Callable[[F], F]:
    """A decorator of a command: an option for each field of ``cls``, in their order.

    Args:
        cls: a dataclass whose fields carry an ``Option``.
        names: of the fields, if not all of them.
        default: words for the default of all of them, such as "the run's"; None: each one's own.
        types: click's types, by field, where the annotation's own does not do.
    """
    fields = fields_of(cls)
    chosen = [fields[name] for name in names] if names else list(fields.values())

    def decorate(command: F) -> F:
        # Decorators take effect from the last line to the first.
        for field in reversed(chosen):
            words = field.default_words if default is None else default
            command = _option(field, words, (types or {}).get(field.name))(command)
        return command

    return decorate


def _option(field: Field, default: str, kind: click.ParamType[Any] | None) -> Callable[[F], F]:
    option = field.option
    name = f"--{field.name.replace('_', '-')}"
    if option.off is not None:
        name = f"{name}/--{option.off}"
    words = [option.text, f"[default: {default}]" if default else ""]
    given: dict[str, Any] = {
        "help": "  ".join(word for word in words if word),
        "default": None,
        "metavar": option.metavar,
    }
    if field.kind is bool:
        return click.option(name, is_flag=True, **given)
    if kind is None:
        kind = click.Choice(field.rule) if isinstance(field.rule, Choice) else None
    return click.option(name, type=kind or field.kind, **given)
