"""Two studies on CIFAR-10 images, at a depth where the paper's differences are large.

    python -m bench.studies_cifar10 versions --seed 0 [--minutes 5]
    python -m bench.studies_cifar10 shortcuts --seed 0
    python -m bench.studies_cifar10 report

The first two train what `resnetv2 study versions` and `resnetv2 study shortcuts` train, one seed a
call, and keep each finished run under runs/studies-cifar10, so that a call may be cut short and
repeated, and seeds may run side by side. `report` puts the runs together and writes JSON and PNGs
to bench/reports/studies. Images are those of data/cifar10-jpeg (train/ and test/, a folder a
class), scaled down to 16x16.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import time
from pathlib import Path
from types import ModuleType

import torch

from bench.schema import REPORTS, device_name
from resnetv2.data.batches import ImageData
from resnetv2.studies import STUDIES, StudyOptions
from resnetv2.studies.harness import Comparison, History, train_variant
from resnetv2.training.loop import EpochMetrics

RUNS = Path("runs/studies-cifar10")
SEEDS = {"versions": 3, "shortcuts": 2}
COMMON = {
    "data": "imagefolder:data/cifar10-jpeg",
    "image_size": 16,
    "depth": 110,
    "width": 16,
    "batch_size": 32,
    "train_images": 2500,
    "test_images": 1000,
    "epochs": 4,
    "target": 0.3,
    "device": "cpu",
    "progress": False,
}
SETTINGS = {
    # One epoch of warm-up, as the paper's 400 steps of 128 images for ResNet-110.
    "versions": {**COMMON, "lr": 0.1, "warmup_steps": 78},
    # A rate at which the original units start without one.
    "shortcuts": {**COMMON, "depth": 56, "epochs": 3, "lr": 0.02, "warmup_steps": 0},
}


def module_of(name: str) -> ModuleType:
    """The study's file: its function stands in the package under the same name."""
    return importlib.import_module(f"resnetv2.studies.{name}")


def command(name: str) -> str:
    """The same in one go."""
    flags = {**SETTINGS[name], "seeds": SEEDS[name]}
    words = [f"--{key.replace('_', '-')} {value}" for key, value in flags.items()]
    words = [word for word in words if not word.startswith("--progress")]
    return f"resnetv2 study {name} {' '.join(words)} --threads 1"


def path_of(name: str, variant: str, seed: int) -> Path:
    return RUNS / name / f"{''.join(c if c.isalnum() else '-' for c in variant)}-{seed}.json"


def train(name: str, seed: int, minutes: float) -> None:
    """Every variant of the study that has no finished run of this seed, while minutes last."""
    end = time.monotonic() + 60 * minutes
    options = STUDIES[name].options(**SETTINGS[name])
    data = cached_data(options)
    for variant, make in module_of(name).variants(options, data).items():
        path = path_of(name, variant, seed)
        if path.exists():
            continue
        if time.monotonic() > end:
            print(f"{name}, seed {seed}: out of time before {variant}")
            return
        history = train_variant(make, data, options, seed, variant)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dataclasses.asdict(history)))
        print(f"{variant}, seed {seed}: {100 * history.final('test_accuracy'):.1f} %", flush=True)
    print(f"{name}, seed {seed}: all runs finished")


def cached_data(options: StudyOptions) -> ImageData:
    """The images, decoded once: 60,000 JPEGs take longer than an epoch of this."""
    path = RUNS / f"images-{options.image_size}-{options.train_images}.pt"
    if path.exists():
        return torch.load(path, weights_only=False)
    data = options.load()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written beside and moved: another seed may be reading.
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    torch.save(data, partial)
    partial.replace(path)
    return data


def report(name: str) -> None:
    """The study's own tables, conclusions and figures from the runs that are there."""
    options = STUDIES[name].options(**SETTINGS[name], seeds=SEEDS[name])
    data = cached_data(options)
    histories: dict[str, list[History]] = {}
    for variant in module_of(name).variants(options, data):
        runs = []
        for seed in range(SEEDS[name]):
            path = path_of(name, variant, seed)
            if not path.exists():
                raise SystemExit(
                    f"{path} is missing: python -m bench.studies_cifar10 {name} --seed {seed}"
                )
            record = json.loads(path.read_text())
            record["epochs"] = [EpochMetrics(**epoch) for epoch in record["epochs"]]
            runs.append(History(**record))
        histories[variant] = runs
    result = module_of(name).summarise(Comparison(histories, options.target), options, data)
    # The runs shared the machine with other work, side by side and at different times.
    result.conclusions = [line for line in result.conclusions if not line.startswith("An epoch of")]
    result.notes.append("These runs shared the machine with other work: their seconds say nothing.")
    study = STUDIES[name]
    result.name, result.title, result.question = study.name, study.title, study.question
    result.seconds = round(sum(run.seconds for runs in histories.values() for run in runs), 1)
    result.settings = {
        **{key: getattr(options, key) for key in study.defaults if key != "root"},
        "command": command(name),
        "machine": "2 cores of an x86 CPU, one thread a run, two runs side by side",
        "device": device_name(),
        "torch": torch.__version__,
    }
    paths = result.save(REPORTS / "studies" / f"{name}-cifar10")
    print(result, *paths, sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=[*SETTINGS, "report"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=5.0, help="start no run after these")
    args = parser.parse_args()
    # Two runs side by side use two cores better than one run with two threads.
    torch.set_num_threads(1)
    if args.what == "report":
        for name in SETTINGS:
            report(name)
    else:
        train(args.what, args.seed, args.minutes)


if __name__ == "__main__":
    main()
