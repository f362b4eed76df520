"""``resnetv2 predict`` and ``resnetv2 export``: what becomes of a trained net."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import click

from .command import PathName, RunFailed, clean_errors
from .options import threads

run_folder = click.argument("run", type=PathName(path_type=Path))
checkpoint = click.option(
    "--checkpoint",
    type=PathName(),
    default="auto",
    show_default=True,
    metavar="auto|best|FILE",
    help="auto: the newest usable one.",
)


@click.command()
@run_folder
@click.argument("images", nargs=-1, required=True, type=PathName())
@checkpoint
@click.option(
    "--top", type=click.IntRange(1), default=1, show_default=True, help="Classes of each image."
)
@click.option("--device", help="cpu, cuda, cuda:1, ...  [default: the run's]")
@threads
def predict(
    run: Path,
    images: tuple[str, ...],
    checkpoint: str,
    top: int,
    device: str | None,
    threads: int | None,
) -> None:
    """Say which classes the net of folder RUN sees in IMAGES, files or folders of them.

    Prints CSV: image, class, probability.

    \b
    resnetv2 predict runs/photos-basic-20 photos/test/cat/1.jpg
    resnetv2 predict runs/photos-basic-20 photos/new --top 3 > classes.csv
    """
    with clean_errors():
        import torch

        from ..training.predict import predict as classes_of

        if threads is not None:
            torch.set_num_threads(threads)

        def warn(line: str) -> None:
            click.echo(line, err=True)

        found = classes_of(run, images, checkpoint=checkpoint, top=top, device=device, warn=warn)
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(("image", "class", "probability"))
        for image, classes, probabilities in found:
            for name, value in zip(classes, probabilities, strict=True):
                writer.writerow((image, name, f"{value:.4f}"))


@click.command()
@run_folder
@checkpoint
@click.option(
    "--out", type=PathName(path_type=Path), help="Folder for the files.  [default: the run's]"
)
@click.option(
    "--onnx/--no-onnx",
    default=None,
    help="Write ONNX as well.  [default: where onnx and onnxscript are installed]",
)
def export(run: Path, checkpoint: str, out: Path | None, onnx: bool | None) -> None:
    """Write the net of folder RUN for other programs: model.pt2 (torch.export) and model.onnx.

    The files give logits (N, classes) for images (N, C, H, W) with pixels from 0 to 255, float32;
    the run's normalisation is inside, and batch norms that alone read a convolution's output are
    part of it. Both are read again and compared with the run's own net.
    """
    with clean_errors():
        from ..core.table import counted
        from ..training.export import ExportError, export_run, has_onnx

        try:
            written = export_run(run, out, checkpoint=checkpoint, onnx=onnx, warn=click.echo)
        except ExportError as error:
            raise RunFailed(str(error)) from error
        for path, difference, folded in written:
            click.echo(
                f"wrote {path}; its logits differ from the run's by {difference:.1e}; "
                f"{counted(folded, 'batch norm')} folded into convolutions"
            )
        if onnx is None and not has_onnx():
            click.echo("no ONNX file: for it, python -m pip install onnx onnxscript")
