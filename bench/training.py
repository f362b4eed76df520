"""What committed training runs show: accuracy and time, fused against eager, memory over steps.

    python -m bench.training RUNS [--whole] [--out bench/reports/training]

RUNS is a folder of run folders as `resnetv2 train --out` leaves them, whatever they are called.
Two runs whose configurations differ in `backend` alone are compared: after which epochs their
losses and accuracies are the same numbers, and whether their last common checkpoints hold the same
weights. Runs with --log-steps show whether their memory grows. Written are epochs.csv, steps.csv,
README.md and a plot; the tables are made from the two CSV files alone, but for the comparison of
weights, which is a column of epochs.csv.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from bench.report import table
from bench.schema import REPORTS
from resnetv2.training.checkpoint import read
from resnetv2.training.evaluate import evaluate_run

REPORT = REPORTS / "training"
IDENTITY = ("backend", "eager")

# How the committed runs were made, CIFAR-10 unpacked as folders of JPEG files in data/cifar10-jpeg.
COMMANDS = """\
resnetv2 train --recipe fast --data imagefolder:data/cifar10-jpeg --threads 2 --out RUNS/fused-0
for s in 0 1 2; do
  resnetv2 train --recipe fast --data imagefolder:data/cifar10-jpeg --limit-batches 39 \\
    --seed $s --threads 1 --keep 10 --out RUNS/short-fused-$s  # and with --eager: short-eager-$s
done
resnetv2 train --depth 1001 --block bottleneck --data imagefolder:data/cifar10-jpeg \\
  --memory auto --budget 4GiB --batch-size 32 --steps 100 --limit-batches 50 --warmup-steps 100 \\
  --log-steps --checkpoint-every 5 --threads 1 --out RUNS/r1001
python -m bench.training RUNS --whole
"""
EPOCH_COLUMNS = (
    "run", "model", "data", "image", "parameters", "backend", "memory", "budget", "dtype", "seed",
    "batch_size", "epochs", "total_steps", "lr_peak", "schedule", "threads", "processes", "device",
    "python", "torch", "resnetv2", "epoch", "step", "lr", "train_loss", "train_accuracy",
    "test_loss", "test_accuracy", "seconds", "images_per_second", "weights_equal",
    "tested_images", "whole_test_accuracy",
)  # fmt: skip
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
STEP_COLUMNS = ("run", "step", "loss", "lr", "memory")
# Memory is compared from here on: the first steps still fill caches.
FIRST_STEP = 10


def load(folder: Path) -> dict[str, Any]:
    """Configuration, epochs and steps of a run."""
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "folder": folder,
        "config": next(event for event in events if event["event"] == "config"),
        "epochs": [event for event in events if event["event"] == "epoch"],
        "steps": [event for event in events if event["event"] == "step"],
    }


def twin(run: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The eager run of the same configuration."""

    def rest(other: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in other["config"].items() if key not in IDENTITY}

    if run["config"]["eager"]:
        return None
    found = (r for r in runs if r["config"]["eager"] and rest(r) == rest(run))
    return next(found, None)


def weights_equal(first: dict[str, Any], second: dict[str, Any], step: int) -> bool | None:
    """Whether two runs' checkpoints of a step hold the same bits of every parameter.

    None where one is missing. Running statistics are left out: a chain moves them all at once, with
    a rounding of its own.
    """
    files = [run["folder"] / "checkpoints" / f"step-{step:08d}.pt" for run in (first, second)]
    if not all(file.exists() for file in files):
        return None
    mine, theirs = (read(file)["model"] for file in files)
    parameters = [name for name in mine if not name.endswith(BUFFERS)]
    return all(torch.equal(mine[name], theirs[name]) for name in parameters)


def whole_accuracy(
    run: dict[str, Any], wanted: bool, known: dict[tuple[str, str], str]
) -> float | str | None:
    """Accuracy on the whole test set after the last step, where a run tested on a part of it.

    known: from an earlier report, by run and training loss.
    """
    config = run["config"]
    before = known.get((run["folder"].name, str(run["epochs"][-1]["train_loss"])))
    if before:
        return before
    finished = run["epochs"][-1]["step"] == config["total_steps"]
    if config["limit_batches"] is None or not wanted or not finished:
        return None
    return evaluate_run(run["folder"], limit_batches=None, progress=False).accuracy


def rows_of(
    runs: list[dict[str, Any]],
    whole: bool = False,
    earlier: list[dict[str, str]] | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of epochs.csv and of steps.csv."""
    epochs, steps = [], []
    known = {(r["run"], r["train_loss"]): r["whole_test_accuracy"] for r in earlier or []}
    for run in runs:
        config = run["config"]
        other = twin(run, runs)
        fixed = {name: config.get(name) for name in EPOCH_COLUMNS if name in config}
        channels, height, width = config["image"]
        fixed |= {
            "run": run["folder"].name,
            "image": f"{channels}x{height}x{width}",
            "lr_peak": config["lr"],
            "device": config["device_name"],
            **{name: config["versions"].get(name) for name in ("python", "torch", "resnetv2")},
        }
        for entry in run["epochs"]:
            equal = None if other is None else weights_equal(run, other, entry["step"])
            row = {**fixed, **{k: v for k, v in entry.items() if k in EPOCH_COLUMNS}}
            row["epochs"] = config["epochs"]
            limit = config["limit_batches"]
            images = config["test_images"]
            tested = images if limit is None else min(images, limit * config["batch_size"])
            last = entry is run["epochs"][-1]
            row |= {"weights_equal": equal, "tested_images": tested}
            row["whole_test_accuracy"] = whole_accuracy(run, whole, known) if last else None
            epochs.append(row)
        for entry in run["steps"]:
            steps.append({"run": run["folder"].name} | {k: entry.get(k) for k in STEP_COLUMNS[1:]})
    return epochs, steps


def write_csv(path: Path, columns: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def by_run(rows: list[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    result: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        result.setdefault(row["run"], []).append(row)
    return result


def accuracy_table(epochs: list[dict[str, str]]) -> str:
    """A line a run."""
    header = (
        "run", "net", "seed", "steps", "test accuracy", "of images", "training", "images/s",
        "threads",
    )  # fmt: skip
    lines = []
    for name, rows in by_run(epochs).items():
        last = rows[-1]
        seconds = sum(float(row["seconds"]) for row in rows)
        images = sum(float(row["seconds"]) * float(row["images_per_second"]) for row in rows)
        accuracy = last["whole_test_accuracy"] or last["test_accuracy"]
        tested = "all" if last["whole_test_accuracy"] else last["tested_images"]
        lines.append(
            [
                name,
                f"{last['model']}, {last['backend']}, {last['memory']}",
                last["seed"],
                f"{last['step']} of {last['total_steps']}",
                f"{100 * float(accuracy):.2f} %",
                tested,
                f"{seconds / 60:.1f} min",
                f"{images / seconds:.0f}",
                last["threads"],
            ]
        )
    return table(header, lines, left=2) + "\n"


def comparison(epochs: list[dict[str, str]]) -> str:
    """Fused against eager, in sentences."""
    runs = by_run(epochs)
    lines = []
    for name, rows in runs.items():
        fixed = ("model", "data", "seed", "lr_peak", "batch_size", "threads", "total_steps")
        others = [
            other
            for other in runs.values()
            if other[0]["backend"] == "eager" != rows[0]["backend"]
            and all(other[0][key] == rows[0][key] for key in fixed)
        ]
        for other in others:
            common = list(zip(rows, other))
            keys = ("train_loss", "train_accuracy", "test_accuracy")
            same = [all(a[key] == b[key] for key in keys) for a, b in common]
            apart = max(abs(float(a["test_loss"]) - float(b["test_loss"])) for a, b in common)
            weights = [a["weights_equal"] for a, _ in common if a["weights_equal"]]
            lines.append(
                f"- {name} and {other[0]['run']}: the same training loss, training and test "
                f"accuracy, digit for digit, in {sum(same)} of {len(common)} epochs, test losses "
                f"at most {apart:.1g} apart; the same bits of every parameter in "
                f"{weights.count('True')} of {len(weights)} checkpoints that both have kept."
            )
    return "\n".join(lines) + "\n"


def spread(epochs: list[dict[str, str]]) -> str:
    """Mean and deviation of the finished runs that differ in the seed alone."""
    groups: dict[tuple[str, ...], list[float]] = {}
    for rows in by_run(epochs).values():
        last = rows[-1]
        if last["step"] == last["total_steps"]:
            key = (last["model"], last["data"], last["backend"], last["total_steps"])
            accuracy = last["whole_test_accuracy"] or last["test_accuracy"]
            groups.setdefault(key, []).append(100 * float(accuracy))
    lines = [
        f"- {model}, {backend}, {steps} steps on {data}: {statistics.fmean(values):.2f} ± "
        f"{statistics.stdev(values):.2f} % ({len(values)} seeds)"
        for (model, data, backend, steps), values in groups.items()
        if len(values) > 1
    ]
    return "\n".join(lines) + "\n" if lines else ""


def steadiness(steps: list[dict[str, str]]) -> str:
    """Memory and loss of the runs that were logged step by step, in sentences."""
    lines = []
    for name, rows in by_run(steps).items():
        losses = [float(row["loss"]) for row in rows]
        memory = [float(row["memory"]) / 1e6 for row in rows]
        if len(rows) <= FIRST_STEP:
            continue
        first, last = memory[FIRST_STEP - 1], memory[-1]
        lines.append(
            f"- {name}: {len(rows)} steps; loss {statistics.fmean(losses[:10]):.3f} over the first "
            f"ten, {statistics.fmean(losses[-10:]):.3f} over the last ten; resident memory "
            f"{first:.0f} MB after step {FIRST_STEP}, {last:.0f} MB after step {len(rows)} "
            f"({100 * (last / first - 1):+.2f} %), {max(memory):.0f} MB at most."
        )
    return "\n".join(lines) + "\n"


def page(epochs: list[dict[str, str]], steps: list[dict[str, str]]) -> str:
    """README.md of the report."""
    conditions = sorted(
        {f"{r['device']}, python {r['python']}, torch {r['torch']}, resnetv2 {r['resnetv2']}"
         for r in epochs}
    )  # fmt: skip
    return (
        "# Training runs\n\n"
        f"{'; '.join(conditions)}. CIFAR-10 as JPEG files of quality 75, so accuracies are to be "
        "compared with each other. Times are of the training steps alone; runs with one thread "
        "shared the machine. Made by `python -m bench.training` from epochs.csv and steps.csv "
        "beside this page.\n\n"
        f"```\n{COMMANDS}```\n\n"
        f"## Accuracy\n\n{accuracy_table(epochs)}\n{spread(epochs)}\n"
        f"## Fused against eager\n\n{comparison(epochs)}\n"
        f"## Memory over steps\n\n{steadiness(steps)}\n![loss and memory](steps.png)\n"
    )


def plot(steps: list[dict[str, str]], path: Path) -> None:
    """Loss and memory of each step-logged run."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    losses, memory = figure.subplots(1, 2)
    for name, rows in by_run(steps).items():
        numbers = [int(row["step"]) + 1 for row in rows]
        losses.plot(numbers, [float(row["loss"]) for row in rows], label=name, color="#0072B2")
        memory.plot(numbers, [float(row["memory"]) / 1e6 for row in rows], color="#D55E00")
    losses.set(xlabel="step", ylabel="training loss", ylim=(0, None))
    memory.set(xlabel="step", ylabel="resident memory (MB)", ylim=(0, None))
    for panel in (losses, memory):
        panel.grid(alpha=0.3)
    if steps:
        losses.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, help="folder of run folders")
    parser.add_argument("--out", type=Path, default=REPORT)
    parser.add_argument(
        "--whole", action="store_true", help="test again, on all images, runs that tested on a part"
    )
    options = parser.parse_args()
    folders = sorted(path.parent for path in options.runs.glob("*/metrics.jsonl"))
    if not folders:
        parser.error(f"no run in {options.runs}: expected */metrics.jsonl")
    old = options.out / "epochs.csv"
    epochs, steps = rows_of(
        [load(folder) for folder in folders], options.whole, read_csv(old) if old.exists() else None
    )
    options.out.mkdir(parents=True, exist_ok=True)
    write_csv(options.out / "epochs.csv", EPOCH_COLUMNS, epochs)
    write_csv(options.out / "steps.csv", STEP_COLUMNS, steps)
    tables = read_csv(options.out / "epochs.csv"), read_csv(options.out / "steps.csv")
    plot(tables[1], options.out / "steps.png")
    (options.out / "README.md").write_text(page(*tables), encoding="utf-8")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
