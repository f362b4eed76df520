"""The command `resnetv2`: thin layers over the library's functions.

A subcommand is a click command in a module of its own choice and a line in COMMANDS; its module
is imported when the command runs or `--help` lists it. Wrong input is one line and exit code 2.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

COMMANDS = {
    "train": "resnetv2.cli:train",
    "plan": "resnetv2.plan_cli:plan",
    "study": "resnetv2.study_cli:study",
}


class CommandGroup(click.Group):
    """Subcommands by name, imported when needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command


class WrongInput(click.ClickException):
    """One line on stderr; the user can put it right."""

    exit_code = 2


@contextmanager
def clean_errors() -> Iterator[None]:
    """Turn what the user can put right into one line: exit code 2, or 1 if the run itself failed.

    Everything else is a defect of the program and keeps its traceback.
    """
    from resnetv2.data import InputError
    from resnetv2.memory import BudgetError
    from resnetv2.train import DivergenceError

    try:
        yield
    except (InputError, BudgetError, ImportError) as error:
        raise WrongInput(str(error)) from error
    except DivergenceError as error:
        raise click.ClickException(str(error)) from error


@click.group(
    cls=CommandGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="resnetv2")
def main() -> None:
    """Pre-activation residual networks (ResNet V2) with fused kernels."""


@click.command()
@click.option(
    "--data",
    default="digits",
    show_default=True,
    metavar="NAME",
    help="digits (no download), cifar10, cifar100, imagefolder:PATH (with PATH/train and "
    "PATH/test, a folder of images for each class) or synthetic.",
)
@click.option(
    "--depth", default=20, show_default=True, help="Layers: 6n+2 for basic, 9n+2 for bottleneck."
)
@click.option(
    "--block", type=click.Choice(["basic", "bottleneck"]), default="basic", show_default=True
)
@click.option(
    "--stem", type=click.Choice(["cifar", "imagenet"]), default="cifar", show_default=True
)
@click.option("--epochs", default=30, show_default=True, help="Passes over the training images.")
@click.option("--batch-size", default=128, show_default=True, help="Images a step.")
@click.option(
    "--lr",
    default=0.1,
    show_default=True,
    help="Learning rate; divided by 10 at 1/2 and at 3/4 of all steps.",
)
@click.option("--momentum", default=0.9, show_default=True)
@click.option("--weight-decay", default=1e-4, show_default=True)
@click.option(
    "--warmup-steps",
    type=int,
    help="Steps at lr/10 in the beginning.  [default: the paper's 1 in 160, at most 400]",
)
@click.option("--eager", is_flag=True, help="Train the same model unfused, for comparison.")
@click.option(
    "--memory",
    default="recompute",
    show_default=True,
    type=click.Choice(["recompute", "invert_h1", "invert", "segment", "auto"]),
    help="What is kept from forward to backward; auto: the fastest mode that fits --budget.",
)
@click.option(
    "--budget",
    help='Bytes for all of a step with --memory auto, such as "8GiB".  [default: the GPU\'s free '
    "memory]",
)
@click.option(
    "--backend",
    type=click.Choice(["auto", "triton", "aten", "eager"]),
    default="auto",
    show_default=True,
    help="auto: triton on a GPU, aten elsewhere.",
)
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "bf16", "fp16"]),
    default="fp32",
    show_default=True,
    help="bf16 and fp16 train under autocast.",
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ...")
@click.option(
    "--channels-last/--contiguous", default=True, show_default=True, help="Memory format."
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: torch's]")
@click.option("--seed", default=0, show_default=True, help="Of weights, order and augmentation.")
@click.option(
    "--root",
    default="data",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Where CIFAR lies or is downloaded to.",
)
@click.option(
    "--image-size",
    type=int,
    help="Resize and crop all images to this many pixels.",
)
@click.option(
    "--limit-batches", type=int, help="At most so many batches an epoch, for trying things out."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder for metrics.jsonl and curves.png.  [default: runs/DATA-BLOCK-DEPTH]",
)
@click.option(
    "--checkpoint", type=click.Path(path_type=Path), help="Save the run's state here every epoch."
)
@click.option("--resume", type=click.Path(path_type=Path), help="Go on from this checkpoint.")
@click.option("--log-steps", is_flag=True, help="Write the loss of every step to metrics.jsonl.")
@click.option(
    "--progress/--no-progress", default=None, help="Progress bar.  [default: on a terminal]"
)
def train(threads: int | None, out: Path | None, **options: Any) -> None:
    """Train a pre-activation ResNet on images and test it after every epoch.

    The defaults are the paper's recipe on handwritten digits, without a download. The training set
    is kept in memory, and two runs from one seed give bitwise the same weights.

    \b
    resnetv2 train --data digits
    resnetv2 train --data cifar10 --depth 164 --block bottleneck --epochs 160 --dtype bf16
    resnetv2 train --data imagefolder:photos --image-size 64 --checkpoint photos.pt
    """
    with clean_errors():
        import torch

        from resnetv2.train import train_resnet_v2

        if threads is not None:
            torch.set_num_threads(threads)
        if out is None:
            kind = options["data"].partition(":")[0]
            unfused = "-eager" if options["eager"] else ""
            out = Path("runs") / f"{kind}-{options['block']}-{options['depth']}{unfused}"
        result = train_resnet_v2(out=out, **options)
    if result.history:
        click.echo(f"test accuracy {100 * result.test_accuracy:.2f} %")
    click.echo(f"wrote {out / 'metrics.jsonl'} and {out / 'curves.png'}")


if __name__ == "__main__":
    sys.exit(main())
