"""``resnetv2 doctor``: is this installation right, and fast?"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import click

from .command import PathName, WrongInput, clean_errors
from .options import threads


@click.command()
@click.option("--quick", is_flag=True, help="Half a minute instead of at most three.")
@click.option(
    "--json",
    "path",
    type=PathName(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Also write all of it to FILE, for a bug report.",
)
@threads
def doctor(quick: bool, path: Path | None, threads: int | None) -> None:
    """Check whether this installation is right and fast on this device.

    Every kernel is held against float64, runs must repeat bit for bit, and a unit, a stage and a
    deep net are timed against eager PyTorch. Exit code 1 if anything is wrong.

    \b
    resnetv2 doctor --quick
    resnetv2 doctor --json doctor.json
    """
    with clean_errors():
        # PyTorch's profiler, which counts a CPU's memory, tells on stderr that it starts and stops.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        import torch

        from ..doctor import doctor as examine

        if threads is not None:
            torch.set_num_threads(threads)
        if path is not None and not path.absolute().parent.is_dir():
            raise WrongInput(f"cannot write {path}: there is no folder {path.absolute().parent}")
        diagnosis = examine(quick=quick, say=_Progress())
        click.echo("\r\033[K" if sys.stderr.isatty() else "", nl=False, err=True)
        click.echo(str(diagnosis))
        if path is not None:
            diagnosis.write(path)
    sys.exit(0 if diagnosis.right else 1)


class _Progress:
    """On a terminal one line that changes; elsewhere a line for each thing that is begun."""

    def __init__(self) -> None:
        self.begun = time.perf_counter()
        self.last = ""

    def __call__(self, text: str) -> None:
        seconds = time.perf_counter() - self.begun
        if sys.stderr.isatty():
            click.echo(f"\r\033[K{seconds:4.0f} s  {text[:70]}", nl=False, err=True)
            return
        subject = ":".join(text.split(":")[:2])
        if subject != self.last:
            click.echo(f"{seconds:4.0f} s  {subject}", err=True)
        self.last = subject
