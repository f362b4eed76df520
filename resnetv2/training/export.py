"""The net of a run as a file for other programs: by ``torch.export`` and as ONNX."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..blocks import PreActUnit
from ..errors import InputError
from ..models import PreActResNet
from .evaluate import TrainedNet, load_run
from .predict import from_pixels

# Exported operators add up in another order than the run's: a rounding of float32 is 1e-7, and a
# deep net's logits differ by some hundred of them. A weight or option gone wrong is beyond this.
_CLOSE = 1e-3
_ONNX = ("onnx", "onnxscript")


class ExportError(RuntimeError):
    """A file that does not compute what the run's net does."""


class Exported(NamedTuple):
    """A file, and how far its logits are from the run's: norm of the difference over the norm.

    folded: how many of the net's batch norms are part of the convolution before them.
    """

    path: Path
    difference: float
    folded: int


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
    unfused, and batch norms are folded into convolutions as by ``fold_norms``. Each file is read
    again and run beside the run's own net.

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
    folded = fold_norms(trained.model)
    own = load_run(run, checkpoint, warn=warn, backend="aten", **plain)
    images = 255 * torch.rand(3, *trained.image, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = own.logits(from_pixels(own), images)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = _export(trained, folder / "model.pt2")
        written = [_checked(path, _run_pt2, images, expected, folded)]
        if onnx or (onnx is None and has_onnx()):
            path = _export_onnx(trained, folder / "model.onnx")
            written.append(_checked(path, _run_onnx, images, expected, folded))
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}") from error
    return written


def fold_norms(model: nn.Module) -> int:
    """Fold batch norms into the convolution whose output they alone read, in place; how many.

    With running statistics such a norm is a scale and a shift for each channel: of a unit, all
    norms but the first, which reads x; of a net whose first unit activates before its two paths
    part, that unit's first as well, behind a stem without pooling. ``model`` is in evaluation
    mode, or put there.
    """
    model.eval()
    units = [module for module in model.modules() if isinstance(module, PreActUnit)]
    pairs = [
        (unit, f"conv{i - 1}", unit, f"bn{i}") for unit in units for i in range(2, unit.depth + 1)
    ]
    if isinstance(model, PreActResNet) and model.stem == "cifar":
        first = model.stages[0][0]
        if isinstance(first, PreActUnit) and first.reads_preact():
            pairs.append((model, "conv1", first, "bn1"))  # type: ignore[arg-type]
    folded = 0
    for before, conv_name, after, norm_name in pairs:
        conv, norm = getattr(before, conv_name), getattr(after, norm_name)
        if type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d and norm.track_running_stats:
            setattr(before, conv_name, fuse_conv_bn_eval(conv, norm))
            setattr(after, norm_name, nn.Identity())
            folded += 1
    return folded


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
    path: Path,
    run: Callable[[Path, Tensor], Tensor],
    images: Tensor,
    expected: Tensor,
    folded: int,
) -> Exported:
    with torch.no_grad():
        logits = run(path, images)
    difference = float((logits - expected).norm() / expected.norm())
    if not difference <= _CLOSE:
        raise ExportError(
            f"{path} computes other logits than the run's net: they differ by {difference:.1e} of "
            "their norm"
        )
    return Exported(path, difference, folded)
