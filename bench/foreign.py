"""A training step of models from other packages, as they are and fused: time and peak memory.

    python -m bench.foreign                             # all, into bench/reports/foreign
    python -m bench.foreign --model NAME --out FOLDER

timm's BiT and diffusers' VAE and U-Net have group norms and random weights; timm's resnetv2_50 has
batch norms. A model runs in float32 and channels_last on random images, eagerly and fused in turn,
in one process; a ratio is the median of those within a round. Peaks are of a forward and backward,
without parameters and their gradients. Nothing is timed before gradients are within twice
eager's error of float64's.
"""

from __future__ import annotations

import argparse
import copy
import csv
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.schema import REPORTS, device_name, versions
from resnetv2 import explain, fuse
from resnetv2.kernels.inspect.yardstick import allowed, distance
from resnetv2.measuring.steps import GradientStep

OUT = REPORTS / "foreign"
MEMORY = ("recompute", "invert")


class Row(NamedTuple):
    """A line of the table. blocks: fused ones, of those that resemble one. seconds: of a step, the
    median. peak: in MB. error: of all gradients against float64, relative."""

    model: str
    memory: str
    blocks: str
    images: str
    seconds: float
    of_eager: float
    peak: float
    peak_of_eager: float
    error: float
    rounds: int
    versions: str
    device: str


class Sample(nn.Module):
    """A diffusers model as a function of one tensor."""

    def __init__(self, model: Any, *arguments: Tensor) -> None:
        super().__init__()
        self.model = model
        for number, argument in enumerate(arguments):
            self.register_buffer(f"argument{number}", argument)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x, *self._buffers.values()).sample  # type: ignore[no-any-return]


def _timm(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from resnetv2.data._torchvision import import_torchvision

        import_torchvision()  # which timm imports
        import timm

        return timm.create_model(name, num_classes=100)  # type: ignore[no-any-return]

    return make


def _vae() -> nn.Module:
    from diffusers import AutoencoderKL

    widths = (64, 128, 128)
    return Sample(
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            block_out_channels=widths,
            layers_per_block=2,
        )
    )


def _unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(1)
    model = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(64, 128),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
    )
    return Sample(model, torch.tensor(7), torch.randn(2, 8, 32))


# What makes it, and the shape of its input.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int, int]]] = {
    "timm resnetv2_50": (_timm("resnetv2_50"), (4, 3, 128, 128)),
    "timm resnetv2_50x1_bit": (_timm("resnetv2_50x1_bit"), (4, 3, 128, 128)),
    "diffusers AutoencoderKL": (_vae, (2, 3, 128, 128)),
    "diffusers UNet2DConditionModel": (_unet, (2, 4, 32, 32)),
}
PACKAGES = ("timm", "diffusers")


def _squares(out: Tensor, _: Tensor) -> tuple[Tensor, None]:
    return out.square().mean(), None


def _step(module: nn.Module, x: Tensor) -> GradientStep:
    return GradientStep(module, x, x, _squares)


def _gradients(step: GradientStep) -> Tensor:
    step.clear()
    step()
    return torch.cat([p.grad.flatten() for p in step.module.parameters() if p.grad is not None])


def measure(name: str, device: torch.device, seconds: float, threads: int) -> list[Row]:
    """A model's rows: eager and each memory mode."""
    make, shape = MODELS[name]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        eager = make().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
    modules = {"eager": eager}
    for memory in MEMORY:
        modules[memory] = fuse(copy.deepcopy(eager), memory=memory)
    steps = {memory: _step(module, x) for memory, module in modules.items()}
    exact = _gradients(_step(copy.deepcopy(eager).double(), x.double()))
    errors = {
        memory: float(distance(_gradients(step), exact) / exact.norm())
        for memory, step in steps.items()
    }
    most = allowed(errors["eager"], 1.0, torch.float32)
    wrong = {memory: error for memory, error in errors.items() if not error <= most}
    if wrong:
        raise RuntimeError(
            f"{name}: gradients are off float64's by {wrong}, eager's by {errors['eager']}"
        )
    peaks = {memory: step.peak_beyond_gradients() for memory, step in steps.items()}
    times: dict[str, list[float]] = {memory: [] for memory in steps}
    began = time.perf_counter()
    while len(times["eager"]) < 5 or time.perf_counter() - began < seconds:
        for memory, step in steps.items():
            times[memory].append(step.seconds())
    found = []
    for memory, taken in times.items():
        blocks = explain(modules[memory]).blocks
        ratios = [mine / theirs for mine, theirs in zip(taken, times["eager"])]
        row = Row(
            name, memory, f"{sum(block.fused for block in blocks)} of {len(blocks)}",
            "x".join(map(str, shape)), round(statistics.median(taken), 4),
            round(statistics.median(ratios), 3), round(peaks[memory] / 1e6, 1),
            round(peaks[memory] / peaks["eager"], 3), float(f"{errors[memory]:.1e}"),
            len(taken), _versions(threads), device_name(),
        )  # fmt: skip
        found.append(row)
    return found


def _versions(threads: int) -> str:
    found = [versions(threads)]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def write(folder: Path, rows: Sequence[Row]) -> None:
    """Write the rows as CSV and as a page; those of other models stay."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "models.csv"
    entries = [{name: str(value) for name, value in row._asdict().items()} for row in rows]
    if file.exists():
        with file.open(newline="") as lines:
            known = list(csv.DictReader(lines))
        entries += [e for e in known if e["model"] not in {row.model for row in rows}]
    entries.sort(key=lambda entry: list(MODELS).index(entry["model"]))
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, Row._fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(entries)
    (folder / "README.md").write_text(_page(entries), encoding="utf-8")


def _page(entries: Sequence[dict[str, str]]) -> str:
    lines = [
        "# Models of other packages, as they are and fused",
        "",
        f"By `python -m bench.foreign` ({entries[0]['device']}; {entries[0]['versions']}). A "
        "forward and backward in float32, channels_last, with random weights. Peaks are of "
        "activations and what a step needs besides, without parameters and their gradients; in "
        "brackets: of eager. Errors are of all gradients, relative to float64's.",
        "",
        "| model | input | memory | blocks fused | step | peak | error |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {e['model']} | {e['images']} | {e['memory']} | {e['blocks']} | "
        f"{1e3 * float(e['seconds']):.0f} ms ({float(e['of_eager']):.2f}x) | "
        f"{float(e['peak']):.1f} MB ({float(e['peak_of_eager']):.2f}x) | {e['error']} |"
        for e in entries
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.foreign",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", action="append", choices=list(MODELS), help="all if not given")
    parser.add_argument("--seconds", type=float, default=20, help="of timing each model")
    parser.add_argument("--threads", type=int, default=1, help="threads of a CPU")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the table")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in options.model or MODELS:
        rows = measure(name, device, options.seconds, options.threads)
        for row in rows:
            print(", ".join(f"{k} {v}" for k, v in list(row._asdict().items())[:9]), flush=True)
        write(options.out, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
