"""The net of a run as a file for other programs: by ``torch.export`` and as ONNX."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from .evaluate import TrainedNet, load_run
from .predict import from_pixels

# Exported operators add up in another order than the run's: a rounding of float32 is 1e-7, and a
# deep net's logits differ by some hundred of them. A weight or option gone wrong is beyond this.
_CLOSE = 1e-3
_ONNX = ("onnx", "onnxscript")


class ExportError(RuntimeError):
    """A file that does not compute what the run's net does."""


class Exported(NamedTuple):
    """A file, and how far its logits are from the run's: norm of the difference over the norm."""

    path: Path
    difference: float


def has_onnx() -> bool:
    """Whether the packages are there that PyTorch's ONNX exporter needs."""
    return all(importlib.util.find_spec(name) for name in _ONNX)


def export_run(
    run: str | Path,
    out: str | Path | None = None,
    *,
    checkpoint: str | Path = "auto",
    onnx: bool | None = None,
    warn: Callable[[str], object] = print,
) -> list[Exported]:
    """Write a run's net as model.pt2 (``torch.export``) and model.onnx, and check both.

    The files compute logits (N, classes) in float32 from images (N, C, H, W), float32 pixels from
    0 to 255: the run's normalisation is inside, and N is free. The net is in evaluation mode and
    unfused. Each file is read again and run beside the run's own net.

    Args:
        run, checkpoint, warn: as for ``evaluate_run``. out: a folder; None is the run's.
        onnx: write ONNX; None where the packages onnx and onnxscript are installed.

    Raises:
        InputError: as ``evaluate_run``; a file cannot be written.
        ImportError: ONNX was asked for, and its packages are missing.
        ExportError: a file computes something else than the run's net.
    """
    if onnx and not has_onnx():
        raise ImportError(f"ONNX needs other packages: python -m pip install {' '.join(_ONNX)}")
    folder = Path(run if out is None else out)
    # On the CPU in float32, whatever the run had; the one to compare with fused, as it trained.
    plain: dict[str, Any] = {"device": "cpu", "dtype": "fp32", "channels_last": False}
    trained = load_run(run, checkpoint, warn=warn, backend="eager", **plain)
    own = load_run(run, checkpoint, warn=warn, backend="aten", **plain)
    images = 255 * torch.rand(3, *trained.image, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = own.logits(from_pixels(own), images)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written = [_checked(_export(trained, folder / "model.pt2"), _run_pt2, images, expected)]
        if onnx or (onnx is None and has_onnx()):
            path = _export_onnx(trained, folder / "model.onnx")
            written.append(_checked(path, _run_onnx, images, expected))
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}") from error
    return written


def _example(trained: TrainedNet) -> tuple[Tensor, dict[str, dict[int, torch.export.Dim]]]:
    """Images to trace with, and their free dimension. Of one image it would become a constant."""
    return torch.zeros(2, *trained.image), {"images": {0: torch.export.Dim("batch", min=1)}}


def _export(trained: TrainedNet, path: Path) -> Path:
    images, free = _example(trained)
    program = torch.export.export(from_pixels(trained), (images,), dynamic_shapes=free)
    torch.export.save(program, path)
    return path


def _export_onnx(trained: TrainedNet, path: Path) -> Path:
    images, free = _example(trained)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        program = torch.onnx.export(
            from_pixels(trained), (images,), dynamo=True, dynamic_shapes=free, verbose=False
        )
    assert program is not None
    program.save(path, external_data=False)
    return path


def _run_pt2(path: Path, images: Tensor) -> Tensor:
    logits: Tensor = torch.export.load(path).module()(images)
    return logits


def _run_onnx(path: Path, images: Tensor) -> Tensor:
    from onnx.reference import ReferenceEvaluator

    (logits,) = ReferenceEvaluator(str(path)).run(None, {"images": images.numpy()})
    return torch.from_numpy(logits)


def _checked(
    path: Path, run: Callable[[Path, Tensor], Tensor], images: Tensor, expected: Tensor
) -> Exported:
    with torch.no_grad():
        logits = run(path, images)
    difference = float((logits - expected).norm() / expected.norm())
    if not difference <= _CLOSE:
        raise ExportError(
            f"{path} computes other logits than the run's net: they differ by {difference:.1e} of "
            "their norm"
        )
    return Exported(path, difference)
