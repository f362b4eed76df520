"""``resnetv2 demo``: the memory modes on this machine, as a table and a picture."""

from __future__ import annotations

from pathlib import Path

import click

from .command import PathName, WrongInput, clean_errors
from .options import progress, threads
from .study import check_out


@click.command()
@click.option(
    "--depth", type=click.IntRange(1, 99_999), default=1001, show_default=True, help="Layers: 9n+2."
)
@click.option(
    "--batch-size",
    type=click.IntRange(1, 2**31 - 1),
    help="Images a step.  [default: 2 on a CPU; on a GPU 128, or as many as fit]",
)
@click.option(
    "--seconds", type=float, default=10.0, show_default=True, help="Of timing, at least 3 rounds."
)
@click.option("--device", default="auto", help="As for train.  [default: a GPU if there is one]")
@click.option(
    "--out",
    type=PathName(path_type=Path),
    default="demo.png",
    show_default=True,
    help="The picture.",
)
@threads
@progress
def demo(
    depth: int,
    batch_size: int | None,
    seconds: float,
    device: str,
    out: Path,
    threads: int | None,
    progress: bool | None,
) -> None:
    """Train one step of a deep net in four ways, and draw what each takes.

    Eager PyTorch against the memory modes recompute, invert and segment, in about half a minute
    and without a download; on a GPU the first run also compiles the kernels.
    """
    with clean_errors():
        import torch

        from ..studies.demo import demo as measure

        check_out(out.parent)
        if out.is_dir():
            raise WrongInput(f"{out} is a folder: --out names the picture's file")
        if threads is not None:
            torch.set_num_threads(threads)
        result = measure(depth, batch_size, seconds=seconds, device=device, progress=progress)
        click.echo(result)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            result.figures["demo"].savefig(out, dpi=150, format="png")
        except OSError as error:
            raise WrongInput(f"cannot write {out}: {error.strerror or error}") from error
        click.echo(f"\nwrote {out} in {result.seconds:.0f} s")
