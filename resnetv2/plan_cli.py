"""``resnetv2 plan``: the table of memory modes, before anything is run."""

from __future__ import annotations

import click

from .cli import WrongInput


@click.command()
@click.option(
    "--depth",
    type=int,
    required=True,
    help="Layers: 6n+2 for basic, 9n+2 for bottleneck.",
)
@click.option(
    "--block", type=click.Choice(["basic", "bottleneck"]), default="basic", show_default=True
)
@click.option("--batch-size", default=128, show_default=True, help="Images a step.")
@click.option("--image-size", default=32, show_default=True, help="Height and width in pixels.")
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "bf16", "fp16"]),
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
def plan(
    depth: int,
    block: str,
    batch_size: int,
    image_size: int,
    dtype: str,
    budget: str | None,
    optimizer_states: float,
    device: str | None,
) -> None:
    """Predict the memory of a training step in each mode, and which one `auto` takes.

    Without a GPU the budget must be given.
    """
    import torch

    from .memory import plan as predict

    if budget is None and not torch.cuda.is_available():
        raise WrongInput("there is no GPU whose free memory could be asked: give --budget")
    try:
        result = predict(
            depth,
            batch_size,
            budget,
            block=block,
            image_size=image_size,
            dtype=dtype,
            optimizer_states=optimizer_states,
            device=device,
        )
    except ValueError as error:
        raise WrongInput(str(error)) from error
    click.echo(result)
