"""``resnetv2 plan``: the table of memory modes, before anything is run."""

from __future__ import annotations

import click

from ..models import PreActResNet
from ..names import DTYPES
from .command import WrongInput
from .options import net_of, net_options


@click.command()
@net_options
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
    net, image_size = net_of(depth, block, model, image_size)
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
