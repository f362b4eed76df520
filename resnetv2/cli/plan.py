"""``resnetv2 plan``: the table of memory modes, before anything is run."""

from __future__ import annotations

import click

from ..models import BLOCKS, IMAGE_SIZES, MODELS, PreActResNet, standard_net
from ..names import DTYPES
from .command import WrongInput


@click.command()
@click.option(
    "--depth",
    type=click.IntRange(1, 99_999),
    help="Layers: 6n+2 for basic, 9n+2 for bottleneck.",
)
@click.option("--block", type=click.Choice(list(BLOCKS)), help="For --depth.  [default: basic]")
@click.option(
    "--model",
    type=click.Choice(list(MODELS)),
    metavar="NAME",
    help="A standard net by its name, instead of --depth and --block; resnetv2 train "
    "--list-models has them.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(1, 2**31 - 1),
    default=128,
    show_default=True,
    help="Images a step.",
)
@click.option(
    "--image-size",
    type=click.IntRange(1, 2**16),
    help="Height and width in pixels.  [default: 32; 224 for a net of ImageNet]",
)
@click.option(
    "--dtype",
    type=click.Choice(list(DTYPES)),
    default="fp32",
    show_default=True,
    help="In which convolutions multiply (autocast).",
)
@click.option(
    "--budget",
    help='Bytes for everything: "8GiB", "500MB".  [default: the free memory of the GPU]',
)
@click.option(
    "--optimizer-states",
    default=1.0,
    show_default=True,
    help="Values an optimizer keeps per parameter: 1 for momentum, 2 for Adam.",
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    help="Where the step will run.  [default: cuda where there is one]",
)
@click.option(
    "--time",
    "with_time",
    is_flag=True,
    help="Also print the time that a step cannot go below in each mode (bytes and FLOPs of every "
    "kernel over the device's rates).",
)
@click.option(
    "--rates",
    type=click.Choice(["measured", "h100"]),
    help="For --time: rates measured here, or of an H100's data sheet.  [default: measured, where "
    "the device is here]",
)
def plan(
    depth: int | None,
    block: str | None,
    model: str | None,
    batch_size: int,
    image_size: int | None,
    dtype: str,
    budget: str | None,
    optimizer_states: float,
    device: str | None,
    with_time: bool,
    rates: str | None,
) -> None:
    """Predict the memory of a training step in each mode, and which one `auto` takes.

    Without a GPU the budget must be given, unless --time is all that is asked.
    """
    import torch

    from ..planning.memory import plan as predict

    if rates is not None and not with_time:
        raise WrongInput("--rates belongs to --time: give both")
    if rates == "h100":
        device = device or "cuda"
    if budget is None and not with_time and not torch.cuda.is_available():
        raise WrongInput("there is no GPU whose free memory could be asked: give --budget")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    net = _net(depth, block, model)
    image_size = image_size or IMAGE_SIZES[net.stem]
    try:
        result = predict(
            net,
            batch_size,
            budget,
            image_size=image_size,
            dtype=dtype,
            optimizer_states=optimizer_states,
            device=device,
        )
    except ValueError as error:
        raise WrongInput(str(error)) from error
    click.echo(result)
    if with_time:
        click.echo()
        click.echo(_floors(net, batch_size, image_size, dtype, device, rates))


def _net(depth: int | None, block: str | None, model: str | None) -> PreActResNet:
    """The net of the options, without memory."""
    import torch

    if (depth is None) == (model is None):
        raise WrongInput("give --depth or --model: one of them says which net it is")
    if model is not None and block is not None:
        raise WrongInput(f"--block belongs to --depth: {model} has its own")
    try:
        with torch.device("meta"):
            if depth is not None:
                return PreActResNet.from_depth(depth, block or "basic")
            return standard_net(str(model)).build()
    except ValueError as error:
        raise WrongInput(str(error)) from error


def _floors(
    net: PreActResNet,
    batch_size: int,
    image_size: int,
    dtype: str,
    device: str,
    rates: str | None,
) -> str:
    """The table of ``cost.modes_table`` for the command's options."""
    import torch

    from ..planning.cost import h100_rates, measure_rates, modes_table

    here = torch.cuda.is_available()
    if rates == "measured" and device == "cuda" and not here:
        raise WrongInput("there is no GPU whose rates could be measured: give --rates h100")
    multiply = DTYPES[dtype]
    on_paper = rates == "h100" or (device == "cuda" and not here)
    found = h100_rates(multiply) if on_paper else measure_rates(device, multiply)
    return modes_table(net, batch_size, image_size, multiply, found, triton=device == "cuda")
