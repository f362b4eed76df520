"""`resnetv2 train` and `resnetv2 eval`: the command line of `resnetv2.train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .command import MOST_THREADS, PathName, clean_errors


def _choice(*names: str) -> click.Choice[str]:
    return click.Choice(names)


@click.command()
@click.option(
    "--recipe",
    metavar="NAME|FILE",
    help="Options from a file, which those given here override: paper, fast, or the path of a "
    ".yaml file.",
)
@click.option(
    "--data",
    metavar="NAME",
    help="digits (no download), cifar10, cifar100, imagefolder:PATH (with PATH/train and "
    "PATH/test or PATH/val, a folder of images for each class) or synthetic.  [default: digits]",
)
@click.option(
    "--depth", type=int, help="Layers: 6n+2 for basic, 9n+2 for bottleneck.  [default: 20]"
)
@click.option("--block", type=_choice("basic", "bottleneck"), help="[default: basic]")
@click.option("--stem", type=_choice("cifar", "imagenet"), help="[default: cifar]")
@click.option("--epochs", type=int, help="Passes over the training images.  [default: 30]")
@click.option("--steps", type=int, help="Optimizer steps of the whole run, instead of --epochs.")
@click.option("--batch-size", type=int, help="Images a step, of all processes.  [default: 128]")
@click.option(
    "--drop-last/--keep-last",
    default=None,
    help="Leave out or keep an epoch's last, smaller batch.  [default: leave out]",
)
@click.option("--lr", type=float, help="Learning rate, the schedule's highest.  [default: 0.1]")
@click.option(
    "--schedule",
    type=_choice("step", "cosine", "one-cycle", "constant"),
    help="step divides it by 10 at 1/2 and at 3/4 of all steps.  [default: step]",
)
@click.option(
    "--warmup-steps",
    type=int,
    help="Steps of warm-up.  [default: step 1 in 160, at most 400; cosine 5 %; one-cycle 30 %]",
)
@click.option("--momentum", type=float, help="[default: 0.9]")
@click.option("--nesterov/--no-nesterov", default=None, help="[default: no]")
@click.option("--weight-decay", type=float, help="[default: 0.0001]")
@click.option(
    "--decay-all/--decay-weights",
    default=None,
    help="Decay all parameters, or not those of norms and biases.  [default: all]",
)
@click.option("--label-smoothing", type=float, help="[default: 0]")
@click.option(
    "--ema", type=float, help="Decay of a moving average of the weights, which is tested.  [off]"
)
@click.option(
    "--crop-padding",
    type=int,
    help="Pixels around training images before a random crop.  [default: the data set's]",
)
@click.option(
    "--flip/--no-flip", default=None, help="Mirror half of them.  [default: the data set's]"
)
@click.option("--eager", is_flag=True, default=None, help="Train the same model unfused.")
@click.option(
    "--memory",
    type=_choice("recompute", "invert_h1", "invert", "segment", "auto"),
    help="What is kept from forward to backward; auto: the fastest mode that fits --budget.  "
    "[default: recompute]",
)
@click.option(
    "--budget",
    help='Bytes for all of a step with --memory auto, such as "8GiB".  [default: the GPU\'s free '
    "memory]",
)
@click.option(
    "--backend",
    type=_choice("auto", "triton", "aten", "eager"),
    help="auto: triton on a GPU, aten elsewhere.  [default: auto]",
)
@click.option(
    "--dtype",
    type=_choice("fp32", "bf16", "fp16"),
    help="bf16 and fp16 train under autocast.  [default: fp32]",
)
@click.option("--device", help="cpu, cuda, cuda:1, ...  [default: a GPU if there is one]")
@click.option(
    "--graph/--no-graph",
    default=None,
    help="Capture the whole step as a CUDA graph, where that is possible.  [default: no]",
)
@click.option(
    "--sync-bn/--no-sync-bn",
    default=None,
    help="Batch norms take the moments of all processes' images.  [default: yes]",
)
@click.option(
    "--channels-last/--contiguous", default=None, help="Memory format.  [default: channels last]"
)
@click.option(
    "--threads", type=click.IntRange(1, MOST_THREADS), help="CPU threads.  [default: torch's]"
)
@click.option("--seed", type=int, help="Of weights, order and augmentation.  [default: 0]")
@click.option("--root", help="Where CIFAR lies or is downloaded to.  [default: data]")
@click.option("--image-size", type=int, help="Resize and crop all images to this many pixels.")
@click.option(
    "--cache",
    type=_choice("auto", "memory", "stream"),
    help="Decode images once into memory, or for each batch.  [default: memory, if they fit]",
)
@click.option("--workers", type=int, help="Processes that make batches.  [default: 0]")
@click.option(
    "--limit-batches",
    type=int,
    help="At most so many training and test batches an epoch, for trying things out.",
)
@click.option(
    "--out",
    type=PathName(path_type=Path),
    help="Folder of the run.  [default: runs/DATA-BLOCK-DEPTH, with a number if that is taken]",
)
@click.option(
    "--resume",
    type=PathName(),
    metavar="auto|PATH",
    help="auto: go on from the newest usable checkpoint of the run's folder, or begin; or a "
    "checkpoint, or the folder of a run.",
)
@click.option("--overwrite", is_flag=True, help="Replace the run that --out holds.")
@click.option(
    "--checkpoint-every", type=int, help="Steps between checkpoints.  [default: every epoch]"
)
@click.option("--keep", type=int, help="Checkpoints kept besides the best.  [default: 3]")
@click.option(
    "--log-steps",
    is_flag=True,
    default=None,
    help="Write every step's loss and memory to metrics.jsonl.",
)
@click.option("--tensorboard", is_flag=True, default=None, help="Write TensorBoard's events.")
@click.option(
    "--progress/--no-progress", default=None, help="Progress bar.  [default: on a terminal]"
)
def train(
    recipe: str | None,
    out: Path | None,
    resume: str | None,
    overwrite: bool,
    threads: int | None,
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
    resnetv2 train --out runs/164 --resume auto
    """
    with clean_errors():
        import torch

        from ..data.host import keep_freed_memory
        from ..training.config import make_config
        from ..training.loop import train as run
        from ..training.parallel import alike

        keep_freed_memory()
        if threads is not None:
            torch.set_num_threads(threads)
        given = {name: value for name, value in options.items() if value is not None}
        with alike():
            if resume is not None and recipe is None:
                run_folder = _run_folder(out, resume, given)
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


def _options_of(folder: Path, given: dict[str, Any]) -> dict[str, Any]:
    """The options of the run that is to go on, so that they need not be given again."""
    from ..training.config import checked_options
    from ..training.log import read_config

    if not (folder / "config.yaml").exists():
        return {}
    # Of epochs and steps the one that is given counts, and is held against the checkpoint.
    other = {"epochs": "steps", "steps": "epochs"}
    left_out = {other[name] for name in given if name in other}
    options = checked_options(read_config(folder), folder / "config.yaml").items()
    return {key: value for key, value in options if value is not None and key not in left_out}


def _run_folder(out: Path | None, resume: str | None, options: dict[str, Any]) -> Path:
    """The folder of the run that is to go on, or where a new one's files go."""
    from ..training.config import TrainConfig
    from ..training.log import holds_a_run
    from ..training.loop import run_of

    if resume is not None and resume != "auto":
        out = run_of(resume)
    if out is not None:
        return out
    chosen = {**vars(TrainConfig), **options}
    kind = chosen["data"].partition(":")[0]
    unfused = "-eager" if chosen["eager"] else ""
    name = f"{kind}-{chosen['block']}-{chosen['depth']}{unfused}"
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
@click.option("--data", help="Another data set of the same classes.  [default: the run's]")
@click.option("--root", help="Where CIFAR lies.  [default: the run's]")
@click.option("--device", help="cpu, cuda, cuda:1, ...  [default: the run's]")
@click.option(
    "--backend", type=_choice("auto", "triton", "aten", "eager"), help="[default: the run's]"
)
@click.option("--workers", type=int, help="Processes that make batches.  [default: the run's]")
@click.option(
    "--threads", type=click.IntRange(1, MOST_THREADS), help="CPU threads.  [default: torch's]"
)
@click.option(
    "--progress/--no-progress", default=None, help="Progress bar.  [default: on a terminal]"
)
def evaluate(
    run: Path, checkpoint: str, threads: int | None, progress: bool | None, **options: Any
) -> None:
    """Give the test error of the run in folder RUN again.

    \b
    resnetv2 eval runs/digits-basic-20
    resnetv2 eval runs/digits-basic-20 --checkpoint best
    """
    with clean_errors():
        import torch

        from ..training.evaluate import evaluate_run

        if threads is not None:
            torch.set_num_threads(threads)
        given = {name: value for name, value in options.items() if value is not None}
        found = evaluate_run(run, checkpoint, progress=progress, warn=click.echo, **given)
        average = ", moving average of the weights" if found.averaged else ""
        click.echo(f"{found.checkpoint}: {found.epoch} epochs, {found.step:,} steps{average}")
        click.echo(
            f"test error {100 * (1 - found.accuracy):.2f} %, loss {found.loss:.4f}, on "
            f"{found.images:,} images"
        )
        if found.recorded is not None and "data" not in given:
            error = f"{100 * (1 - found.recorded):.2f} %"
            same = "as" if found.recorded == found.accuracy else f"not as ({error})"
            click.echo(f"{same} the run recorded")
