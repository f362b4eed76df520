"""``resnetv2 train`` and ``resnetv2 eval``: the command line of ``resnetv2.train``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..training.config import TrainConfig, checked_options, make_config
from .command import PathName, clean_errors
from .options import options_of, progress, threads


def _list_models(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from ..planning.cost import models_table

        click.echo(models_table())
        ctx.exit()


@click.command()
@click.option(
    "--list-models",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_list_models,
    help="Name the nets of --model with their parameters and FLOPs, and end.",
)
@click.option(
    "--recipe",
    metavar="NAME|FILE",
    help="Options from a file, which those given here override: paper, fast, or the path of a "
    ".yaml file.",
)
@options_of(TrainConfig)
@click.option(
    "--out",
    type=PathName(path_type=Path),
    help="Folder of the run.  [default: runs/DATA-BLOCK-DEPTH or runs/DATA-MODEL, with a number if "
    "that is taken]",
)
@click.option(
    "--resume",
    type=PathName(),
    metavar="auto|PATH",
    help="auto: go on from the newest usable checkpoint of the run's folder, or begin with the "
    "given --data or --recipe; or a checkpoint, or the folder of a run.",
)
@click.option("--overwrite", is_flag=True, help="Replace the run that --out holds.")
@progress
def train(
    recipe: str | None,
    out: Path | None,
    resume: str | None,
    overwrite: bool,
    progress: bool | None,
    **options: Any,
) -> None:
    """Train a pre-activation ResNet on images and test it after every epoch.

    The defaults are the paper's recipe in proportion, on handwritten digits, without a download.
    Two runs from one seed give bitwise the same weights, and so does one that was killed and goes
    on by --resume. Many processes: torchrun --nproc-per-node N -m resnetv2 train ...

    \b
    resnetv2 train
    resnetv2 train --recipe fast --data cifar10 --dtype bf16
    resnetv2 train --recipe paper --data cifar10 --depth 164 --block bottleneck --out runs/164
    resnetv2 train --data imagefolder:photos --image-size 224 --model preact_resnet50
    resnetv2 train --out runs/164 --resume auto
    """
    with clean_errors():
        from ..data.host import keep_freed_memory
        from ..training.parallel import alike
        from ..training.run import train as run

        keep_freed_memory()
        given = {name: value for name, value in options.items() if value is not None}
        with alike():
            if resume is not None and recipe is None:
                run_folder = _run_folder(out, resume, given)
                _check_begun(run_folder, resume, given)
                given = {**_options_of(run_folder, given), **given}
            config = make_config(recipe, **given)
            out = out or _run_folder(None, resume, vars(config))
        run(
            config,
            out=out,
            resume=resume,
            overwrite=overwrite,
            progress=progress,
        )


def _check_begun(folder: Path, resume: str, given: dict[str, Any]) -> None:
    """Refuse to begin a run of defaults alone where one was to go on.

    Raises:
        InputError: the folder holds no run, and nothing says what would be trained.
    """
    from ..errors import InputError
    from ..training.log import holds_a_run

    if resume == "auto" and "data" not in given and holds_a_run(folder) is None:
        raise InputError(
            f"{folder} holds no run to go on with: give --data or --recipe to begin one there"
        )


def _options_of(folder: Path, given: dict[str, Any]) -> dict[str, Any]:
    """The options of the run that is to go on, so that they need not be given again."""
    from ..training.log import read_config

    if not (folder / "config.yaml").exists():
        return {}
    # Only the one of epochs and steps that is given is held against the checkpoint.
    other = {"epochs": "steps", "steps": "epochs"}
    left_out = {other[name] for name in given if name in other}
    left_out.add("threads")  # the checkpoint's, unless others are asked for
    options = checked_options(read_config(folder), folder / "config.yaml").items()
    return {key: value for key, value in options if value is not None and key not in left_out}


def _run_folder(out: Path | None, resume: str | None, options: dict[str, Any]) -> Path:
    """The folder of the run that is to go on, or where a new one's files go."""
    from ..training.log import holds_a_run
    from ..training.run import run_of

    if resume is not None and resume != "auto":
        out = run_of(resume)
    if out is not None:
        return out
    chosen = {**vars(TrainConfig), **options}
    kind = chosen["data"].partition(":")[0]
    unfused = "-eager" if chosen["eager"] else ""
    net = chosen["model"] or f"{chosen['block']}-{chosen['depth']}"
    name = f"{kind}-{net}{unfused}"
    folders = [Path("runs") / name]
    while holds_a_run(folders[-1]):
        folders.append(Path("runs") / f"{name}-{len(folders) + 1}")
    # The newest one, where a run is to go on.
    return folders[-2] if resume == "auto" and len(folders) > 1 else folders[-1]


@click.command(name="eval")
@click.argument("run", type=PathName(path_type=Path))
@click.option(
    "--checkpoint",
    type=PathName(),
    default="auto",
    show_default=True,
    metavar="auto|best|FILE",
    help="auto: the newest usable one.",
)
@options_of(TrainConfig, "data", "root", "device", "backend", "workers", default="the run's")
@threads
@progress
def evaluate(
    run: Path, checkpoint: str, threads: int | None, progress: bool | None, **options: Any
) -> None:
    """Give the test error of the run in folder RUN again, or on other data of the same classes.

    \b
    resnetv2 eval runs/digits-basic-20
    resnetv2 eval runs/digits-basic-20 --checkpoint best
    """
    with clean_errors():
        import torch

        from ..core.table import counted
        from ..training.evaluate import evaluate_run

        if threads is not None:
            torch.set_num_threads(threads)
        given = {name: value for name, value in options.items() if value is not None}
        found = evaluate_run(run, checkpoint, progress=progress, warn=click.echo, **given)
        average = ", moving average of the weights" if found.averaged else ""
        click.echo(
            f"{found.checkpoint}: {counted(found.epoch, 'epoch')}, "
            f"{counted(found.step, 'step')}{average}"
        )
        click.echo(
            f"test error {100 * (1 - found.accuracy):.2f} %, loss {found.loss:.4f}, on "
            f"{found.images:,} images"
        )
        if found.recorded is not None and "data" not in given:
            error = f"{100 * (1 - found.recorded):.2f} %"
            same = "as" if found.recorded == found.accuracy else f"not as ({error})"
            click.echo(f"{same} the run recorded")
