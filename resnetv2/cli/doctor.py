"""``resnetv2 doctor``: is this installation right, and fast?"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from .command import PathName, WrongInput, clean_errors
from .options import net_of, net_options, threads


@click.command()
@click.option("--quick", is_flag=True, help="Half a minute instead of at most three.")
@click.option(
    "--json",
    "path",
    type=PathName(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Also write all of it to FILE, for a bug report.",
)
@click.option(
    "--tune",
    is_flag=True,
    help="Instead of the checks: time, for each convolution of a net (--model or --depth), what "
    "computes it, and keep the fastest in choices.json in RESNETV2_CACHE_DIR.  "
    "[default folder: ~/.cache/resnetv2]",
)
@net_options
@threads
def doctor(quick: bool, path: Path | None, tune: bool, threads: int | None, **net: Any) -> None:
    """Check whether this installation is right and fast on this device.

    Every kernel is held against float64, runs must repeat bit for bit, and a unit, a stage and a
    deep net are timed against eager PyTorch. Exit code 1 if anything is wrong. Later runs on this
    device use what --tune has measured, for the same shapes, dtype and versions.

    \b
    resnetv2 doctor --quick
    resnetv2 doctor --json doctor.json
    resnetv2 doctor --tune --model preact_resnet50 --batch-size 256 --dtype bf16
    """
    given = [
        f"--{name.replace('_', '-')}"
        for name in net
        if click.get_current_context().get_parameter_source(name) is not ParameterSource.DEFAULT
    ]
    if tune and (quick or path is not None):
        raise WrongInput("--tune measures and checks nothing else: leave out --quick and --json")
    if given and not tune:
        raise WrongInput(f"{', '.join(given)}: only with --tune")
    with clean_errors():
        # PyTorch's profiler, which counts a CPU's memory, tells on stderr that it starts and stops.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        import torch

        from ..doctor import doctor as examine

        if threads is not None:
            torch.set_num_threads(threads)
        if tune:
            sys.exit(_tuned(**net))
        if path is not None and not path.absolute().parent.is_dir():
            raise WrongInput(f"cannot write {path}: there is no folder {path.absolute().parent}")
        diagnosis = examine(quick=quick, say=_Progress())
        _clear()
        click.echo(str(diagnosis))
        if path is not None:
            diagnosis.write(path)
    sys.exit(0 if diagnosis.right else 1)


def _tuned(
    depth: int | None,
    block: str | None,
    model: str | None,
    batch_size: int,
    image_size: int | None,
    dtype: str,
) -> int:
    """``doctor --tune``; its exit code."""
    from ..doctor.tuning import tune

    net, size = net_of(depth, block, model, image_size)
    found = tune(net, batch_size, image_size=size, dtype=dtype, say=_Progress(whole=True))
    _clear()
    click.echo(str(found))
    return 0 if found.right else 1


def _clear() -> None:
    click.echo("\r\033[K" if sys.stderr.isatty() else "", nl=False, err=True)


class _Progress:
    """On a terminal one line that changes; elsewhere a line for each thing that is begun.

    whole: that is, for each text, and not for what stands in front of its second colon.
    """

    def __init__(self, whole: bool = False) -> None:
        self.whole = whole
        self.begun = time.perf_counter()
        self.last = ""

    def __call__(self, text: str) -> None:
        seconds = time.perf_counter() - self.begun
        if sys.stderr.isatty():
            click.echo(f"\r\033[K{seconds:4.0f} s  {text[:70]}", nl=False, err=True)
            return
        subject = text if self.whole else ":".join(text.split(":")[:2])
        if subject != self.last:
            click.echo(f"{seconds:4.0f} s  {subject}", err=True)
        self.last = subject
