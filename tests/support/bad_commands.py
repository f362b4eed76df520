"""What people type wrongly, and files that are not what they should be: a table of commands.

Each is a command line after `resnetv2`, run in an empty folder, the part of the message that says
what is wrong, and where needed a function that puts files into that folder first.
"""

from __future__ import annotations

import os
import shutil
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from PIL import Image

from resnetv2.training.step import Step


@dataclass(frozen=True)
class Place:
    """An empty folder, and what can be put there.

    template: a finished run of `RUN`, 4 steps with checkpoints after 2 and 4.
    """

    folder: Path
    template: Path
    monkeypatch: pytest.MonkeyPatch

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def run(self) -> Path:
        """The finished run."""
        shutil.copytree(self.template, self / "run")
        return self / "run"

    def half_run(self) -> Path:
        """The run as it was after 2 steps of 4, but for its metrics."""
        checkpoints = self.run() / "checkpoints"
        for name in ("step-00000004.pt", "best.pt"):
            (checkpoints / name).unlink()
        return self / "run"

    def images(self, parts: tuple[str, ...] = ("train", "test"), size: int = 8) -> Path:
        """Four images of each of two classes."""
        for part in parts:
            for label in ("cat", "dog"):
                (self / "images" / part / label).mkdir(parents=True)
                for number in range(4):
                    color = (50 * number, 90 * (label == "dog"), 7)
                    path = self / "images" / part / label / f"{number}.png"
                    Image.new("RGB", (size, size), color).save(path)
        return self / "images"


Files = Callable[[Place], object]


@dataclass(frozen=True)
class Case:
    """A command, a part of its message, and what is there before it."""

    command: str
    says: str
    files: Files | None = None
    environment: dict[str, str] = field(default_factory=dict)
    without_gpu: bool = False


# The run that most cases spoil: two epochs of two steps.
RUN = (
    "train --depth 8 --epochs 2 --limit-batches 2 --backend aten --device cpu --out run "
    "--no-progress "
)
RESUME = "train --out run --resume auto --no-progress "
IMAGES = RUN + "--data imagefolder:images "
STREAM = IMAGES + "--cache stream --batch-size 2 "
RECIPE = RUN + "--recipe own.yaml"
PLAN = "plan --depth 20 --budget 8GiB "
WHOLE = "a whole number of at least"

CASES: dict[str, Case] = {}


def add(group: str, cases: dict[str, tuple[Any, ...]], **options: Any) -> None:
    for name, (command, says, *files) in cases.items():
        key = f"{group}-{name}"
        assert key not in CASES, key
        CASES[key] = Case(command, says, *files, **options)


# --- what is typed


add(
    "usage",
    {
        "command": ("tarin", "No such command 'tarin'; resnetv2 --help lists"),
        "option": ("train --dept 8", "'--depth', '--keep'?); resnetv2 train --help lists"),
        "option-of-another-command": ("eval run --lr 1", "No such option '--lr'"),
        "words-for-an-integer": ("train --depth twenty", "'twenty' is not a valid integer"),
        "half-an-integer": ("train --batch-size 12.5", "'12.5' is not a valid integer"),
        "words-for-a-number": ("train --lr fast", "'--lr': 'fast' is not a valid float"),
        "decimal-comma": ("train --lr 0,1", "'0,1' is not a valid float"),
        "empty-number": ("train --lr ''", "'' is not a valid float"),
        "no-value": ("train --lr", "Option '--lr' requires an argument; resnetv2 train --help"),
        "value-for-a-flag": ("train --eager=yes", "Option '--eager' does not take a value"),
        "block": ("train --block botleneck", "is not one of 'basic', 'bottleneck'"),
        "stem": ("train --stem mnist", "'mnist' is not one of 'cifar', 'imagenet'"),
        "memory": ("train --memory all", "'all' is not one of 'recompute', 'invert_h1'"),
        "dtype": ("train --dtype fp64", "'fp64' is not one of 'fp32', 'bf16', 'fp16'"),
        "schedule": ("train --schedule linear", "'linear' is not one of 'step', 'cosine'"),
        "backend": ("train --backend cudnn", "'cudnn' is not one of 'auto', 'triton'"),
        "cache": ("train --cache disk", "'disk' is not one of 'auto', 'memory', 'stream'"),
        "extra-argument": ("train digits", "unexpected extra argument (digits)"),
        "threads-0": ("train --threads 0", "0 is not in the range 1<=x<=1024"),
        "threads-negative": ("eval run --threads -1", "-1 is not in the range 1<=x<=1024"),
        # OpenMP would end the process.
        "threads-beyond-memory": ("train --threads 1000000000", "not in the range 1<=x<=1024"),
        "threads-beyond-integers": ("study depth --threads 99999999999", "not in the range"),
        "no-run": ("eval", "Missing argument 'RUN'; resnetv2 eval --help"),
        "two-runs": ("eval one two", "unexpected extra argument (two)"),
        "plan-without-depth": ("plan", "Missing option '--depth'"),
    },
)

for option, value, says in [
    ("depth", "0", f"depth must be {WHOLE} 1 and below 100000, got 0"),
    ("depth", "-3", "got -3"),
    ("depth", "2", "depth must be 6n+2 for PreActBlock, got 2; nearest: 8"),
    ("depth", "21", "got 21; nearest: 20 or 26"),
    ("depth", "6000000002", "below 100000, got 6000000002"),
    ("depth", "1" + "0" * 30, "depth is too large, got 1000"),
    ("epochs", "0", f"epochs must be {WHOLE} 1, got 0"),
    ("epochs", "-5", "got -5"),
    ("epochs", "9" * 20, "epochs is too large"),
    ("batch-size", "0", f"batch_size must be {WHOLE} 1, got 0"),
    ("batch-size", "-128", "got -128"),
    ("batch-size", str(2**63), "batch_size is too large"),
    ("lr", "0", "lr must be a number above 0, got 0.0"),
    ("lr", "-0.1", "got -0.1"),
    ("lr", "nan", "got nan"),
    ("lr", "inf", "got inf"),
    ("lr", "1e400", "lr must be a number above 0, got inf"),
    ("warmup-steps", "-1", f"warmup_steps must be {WHOLE} 0, got -1"),
    ("warmup-steps", "1000", "warmup_steps must be at most the run's 4 steps, got 1,000"),
    ("momentum", "1", "momentum must be a number of at least 0 and below 1, got 1.0"),
    ("momentum", "-0.1", "got -0.1"),
    ("momentum", "nan", "got nan"),
    ("weight-decay", "-1", "weight_decay must be a number of at least 0, got -1.0"),
    ("weight-decay", "inf", "got inf"),
    ("label-smoothing", "1", "label_smoothing must be a number of at least 0 and below 1"),
    ("label-smoothing", "nan", "got nan"),
    ("ema", "1", "ema must be a number of at least 0 and below 1, got 1.0"),
    ("ema", "-1", "got -1.0"),
    ("crop-padding", "-1", f"crop_padding must be {WHOLE} 0, got -1"),
    ("crop-padding", "1000000000", "crop_padding must be at most the images' 8 pixels"),
    ("seed", "-1", f"seed must be {WHOLE} 0, got -1"),
    ("seed", str(2**63), "seed is too large"),
    ("seed", "1.5", "'1.5' is not a valid integer"),
    ("image-size", "0", f"image_size must be {WHOLE} 1, got 0"),
    ("image-size", "-32", "got -32"),
    ("image-size", "1000000", "of memory that this process can have: --image-size makes them"),
    ("workers", "-1", f"workers must be {WHOLE} 0 and below 1024, got -1"),
    ("workers", "100000", "got 100000"),
    ("limit-batches", "0", f"limit_batches must be {WHOLE} 1, got 0"),
    ("checkpoint-every", "0", f"checkpoint_every must be {WHOLE} 1, got 0"),
    ("keep", "0", f"keep must be {WHOLE} 1, got 0"),
    ("keep", "9" * 20, "keep is too large"),
    ("steps", "0", f"steps must be {WHOLE} 1, got 0"),
    ("steps", "4", "epochs and steps both say how long to train: give one of them"),
    ("device", "tpu", "there is no device 'tpu': expected cpu, cuda, cuda:1, ... or auto"),
    ("device", "CPU", "there is no device 'CPU'"),
    ("device", "cuda:-1", "there is no device 'cuda:-1'"),
    ("device", "cuda:99", "cannot use device 'cuda:99': "),
    ("device", "mps", "cannot use device 'mps': this PyTorch does not compute there"),
    ("device", "hpu", "cannot use device 'hpu': this PyTorch does not compute there"),
    ("device", "mkldnn", "cannot use device 'mkldnn'"),
    ("device", "meta", "cannot use device 'meta': it computes nothing"),
    ("device", "''", "device must be some text, got ''"),
    ("root", "''", "root must be some text, got ''"),
    ("root", "'\udcff'", "root must be some text, got '\\udcff'"),
    ("resume", "''", "'--resume': expected a path, got nothing"),
    ("recipe", "''", "unknown recipe '': choose from fast, paper, or give the path"),
    ("out", "''", "'--out': expected a path, got nothing"),
    ("out", "'r\udcff'", "'r\\udcff' is not in UTF-8: take another name"),
    ("data", "''", "data must be some text, got ''"),
    ("data", "mnist", "unknown data set 'mnist': choose from digits, cifar10"),
    ("data", "Digits", "unknown data set 'Digits'"),
    ("data", "digits:x", "unknown data set 'digits:x'"),
    ("data", "imagefolder", "imagefolder needs a path with a train and a test folder"),
    ("data", "imagefolder:", "imagefolder needs a path"),
    ("data", "'imagefolder:a\nb'", "a\\nb does not exist: imagefolder:PATH needs PATH/train"),
]:
    add("value", {f"{option}={value[:12]!a}": (f"{RUN}--{option} {value}", says)})

for value in ("8 elephants", "-1GiB", "0", "nan", "GiB", "8GiBB", "inf", ""):
    says = f"budget must be bytes, such as \"8GiB\" or a number above 0, got '{value}'"
    add("budget", {value or "empty": (f"{RUN}--memory auto --budget '{value}'", says)})

add(
    "contradiction",
    {
        "eager-backend": (RUN + "--eager", "eager contradicts backend 'aten'"),
        "nesterov": (RUN + "--nesterov --momentum 0", "nesterov needs a momentum above 0"),
        "budget-without-auto": (RUN + "--budget 8GiB", 'budget is for memory "auto"'),
        "auto-without-budget": (RUN + "--memory auto", 'memory "auto" needs a budget'),
        "budget-of-any-size": (
            RUN + "--memory auto --budget 1e999",
            "budget is too large, got '1e999'",
        ),
        "budget-too-small": (
            RUN + "--memory auto --budget 1MB",
            "more than the budget of 1.0 MB; no batch fits it",
        ),
        "budget-for-a-smaller-batch": (
            RUN + "--memory auto --budget 4MB",
            "the largest batch that fits is",
        ),
        "stream-digits": (RUN + "--cache stream", 'cache "stream" is for images in a folder'),
        "block-depth": (RUN + "--block bottleneck", "depth must be 9n+2"),
        "one-value-a-channel": (
            RUN + "--batch-size 1 --image-size 4",
            "leaves the last norms one value a channel, which has no variance",
        ),
        "resume-overwrite": (
            RESUME + "--overwrite",
            "resume goes on with a run, overwrite replaces one: give one of them",
            Place.run,
        ),
    },
)
add(
    "device",
    {"cuda": (RUN.replace("cpu", "cuda"), "cannot use device 'cuda': ")},
    without_gpu=True,
)


# --- data sets


def spoil(write: Callable[[Path], object], image: str = "train/dog/2.png") -> Files:
    """A folder of images of which one is something else."""

    def make(place: Place) -> None:
        path = place.images() / image
        path.unlink()
        write(path)

    return make


def truncated(path: Path) -> None:
    Image.effect_noise((8, 8), 90).save(path, "png")
    path.write_bytes(path.read_bytes()[:-30])


def without(folder: str) -> Files:
    return lambda place: shutil.rmtree(place.images() / folder)


def emptied(folder: str) -> Files:
    def make(place: Place) -> None:
        for path in (place.images() / folder).iterdir():
            path.unlink()

    return make


def test_images_of_another_size(place: Place) -> None:
    place.images(("train",))
    place.images(("test",), size=9)


def one_class(place: Place) -> None:
    for part in ("train", "test"):
        shutil.rmtree(place.images((part,)) / part / "dog")


def offline(place: Place) -> None:
    """No network, and torchvision's own file downloads are refused at once."""
    from resnetv2.data._torchvision import import_torchvision

    import_torchvision()
    from torchvision.datasets import cifar

    def refuse(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    place.monkeypatch.setattr(cifar, "download_and_extract_archive", refuse)


def half_a_cifar(place: Place) -> None:
    offline(place)
    folder = place / "root" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    (folder / "data_batch_1").write_bytes(b"half")


def hidden(module: str) -> Files:
    """A package that is not installed."""
    return lambda place: place.monkeypatch.setitem(sys.modules, module, None)


BROKEN_IMAGE = "cannot read the image images/train/dog/2.png: "
add(
    "data",
    {
        "gone": (RUN + "--data imagefolder:gone", "gone does not exist: imagefolder:PATH needs"),
        "no-home": (RUN + "--data imagefolder:~nobody-here/x", "~nobody-here/x does not exist"),
        "file": (
            RUN + "--data imagefolder:file",
            "file is a file, not a folder: imagefolder:PATH needs",
            lambda place: (place / "file").touch(),
        ),
        "link-to-itself": (
            IMAGES,
            "images cannot be opened (Too many levels of symbolic links)",
            lambda place: (place / "images").symlink_to("images"),
        ),
        "half": (IMAGES, "images/test does not exist", without("test")),
        "no-train": (IMAGES, "images/train does not exist", without("train")),
        "class-missing": (IMAGES, "images/test lacks dog, which images/train", without("test/dog")),
        "class-new": (IMAGES, "images/train lacks dog, which images/test", without("train/dog")),
        "class-empty": (IMAGES, "images/train/dog holds no image: add", emptied("train/dog")),
        "one-class": (IMAGES, "images/train has one class only, cat", one_class),
        "no-classes": (
            IMAGES,
            "images/train holds no folders: it needs a folder of images for every class",
            lambda place: [(place / "images" / p).mkdir(parents=True) for p in ("train", "test")],
        ),
        "text-for-an-image": (
            IMAGES,
            BROKEN_IMAGE + "not an image, or damaged; replace or remove it",
            spoil(lambda path: path.write_text("no image")),
        ),
        "empty-image": (IMAGES, BROKEN_IMAGE + "empty file", spoil(Path.touch)),
        "truncated-image": (IMAGES, BROKEN_IMAGE, spoil(truncated)),
        "broken-link": (
            IMAGES,
            "images/train/dog/2.png is not a file (a broken link?): remove it",
            spoil(lambda path: path.symlink_to("gone")),
        ),
        "pipe": (IMAGES, "images/train/dog/2.png is not a file", spoil(os.mkfifo)),
        "loop": (
            IMAGES,
            "images/train/dog/again is a link to a folder above it: remove the link",
            lambda place: (place.images() / "train" / "dog" / "again").symlink_to(".."),
        ),
        "newline": (
            IMAGES,
            "images/train/dog/a\\nb.png: not an image",
            lambda place: (place.images() / "train" / "dog" / "a\nb.png").write_bytes(b"x"),
        ),
        "not-in-utf-8": (
            IMAGES,
            "images/train/dog/\\udcff.png: empty file",
            lambda place: (place.images() / "train" / "dog" / "\udcff.png").touch(),
        ),
        "sizes": (
            IMAGES,
            "2.png is 5x9, others are 8x8; --image-size N makes all NxN",
            spoil(lambda path: Image.new("RGB", (5, 9)).save(path)),
        ),
        "sizes-in-memory": (
            IMAGES + "--cache memory",
            "images differ in size: images/test/cat/0.png is 9x9, others are 8x8",
            test_images_of_another_size,
        ),
        "streamed-image": (STREAM, BROKEN_IMAGE, spoil(Path.touch)),
        "streamed-image-workers": (
            STREAM + "--workers 1",
            BROKEN_IMAGE + "empty file",
            spoil(Path.touch),
        ),
        "streamed-beyond-memory": (
            STREAM + "--image-size 1000000",
            "a smaller --image-size or --batch-size needs less",
            Place.images,
        ),
        "cifar-offline": (
            RUN + "--data cifar10 --root none",
            "CIFAR10 is not under none and could not be downloaded (no route to host). Without",
            offline,
        ),
        "cifar-half": (
            RUN + "--data cifar10 --root root",
            "lacks data_batch_2, data_batch_3 and 4 more and has a damaged data_batch_1",
            half_a_cifar,
        ),
        "cifar-root-is-a-file": (
            RUN + "--data cifar10 --root file",
            "file is a file, expected the folder where CIFAR10 lies or goes",
            lambda place: (place / "file").touch(),
        ),
        "no-scikit-learn": (
            RUN,
            "the data set 'digits' needs scikit-learn: python -m pip install scikit-learn",
            hidden("sklearn.datasets"),
        ),
    },
)


# --- the run's folder


def in_the_way(name: str, make: Callable[[Path], object] = Path.mkdir) -> Files:
    """Something else where a run has a file or folder."""

    def put(place: Place) -> None:
        path = place / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        make(path)

    return put


def best_is_a_folder(place: Place) -> None:
    path = place.run() / "checkpoints" / "best.pt"
    path.unlink()
    path.mkdir()


def unwritable(place: Place) -> None:
    """A folder as it looks to everyone but root, who runs tests in containers."""
    (place / "run").mkdir()
    access = os.access

    def refuse(path: Any, mode: int, **options: Any) -> bool:
        refused = str(path) == "run" and mode & os.W_OK
        return not refused and access(path, mode, **options)

    place.monkeypatch.setattr(os, "access", refuse)


def out_of_memory(error: BaseException) -> Files:
    def make(place: Place) -> None:
        def step(*_: object) -> None:
            raise error

        place.monkeypatch.setattr(Step, "__call__", step)

    return make


NO_FILE = "is no file, and a run has a file there: remove it"
NO_FOLDER = "is no folder, and a run has a folder there: remove it"
OTHER_OUT = RUN.replace("--out run", "--out ")
add(
    "out",
    {
        "file": (RUN, "run is a file, expected a folder", lambda p: (p / "run").touch()),
        "pipe": (RUN, "run is a file, expected a folder", lambda p: os.mkfifo(p / "run")),
        "device": (OTHER_OUT.replace("--out ", "--out /dev/null"), "/dev/null is a file"),
        "link-to-itself": (
            RUN,
            "run is a broken link, expected a folder",
            lambda place: (place / "run").symlink_to("run"),
        ),
        "link-to-nothing": (
            RUN,
            "run is a broken link, expected a folder",
            lambda place: (place / "run").symlink_to("gone"),
        ),
        "below-a-file": (
            OTHER_OUT.replace("--out ", "--out file/run"),
            "file is a file",
            lambda place: (place / "file").touch(),
        ),
        "newline": (
            OTHER_OUT.replace("--out ", "--out 'a\nb'"),
            "a\\nb is a file, expected a folder",
            lambda place: (place / "a\nb").touch(),
        ),
        "long-name": (OTHER_OUT.replace("--out ", "--out " + "x" * 300), "File name too long"),
        "unwritable": (RUN, "cannot write to run: make it writable, or take another", unwritable),
        "holds-a-run": (
            RUN,
            "go on with it by --resume auto, replace it by --overwrite, or take another folder",
            Place.run,
        ),
        "config-in-the-way": (RUN, f"run/config.yaml {NO_FILE}", in_the_way("config.yaml")),
        "metrics-in-the-way": (
            RUN + "--overwrite",
            f"run/metrics.jsonl {NO_FILE}",
            in_the_way("metrics.jsonl"),
        ),
        "metrics-is-a-pipe": (
            RUN + "--overwrite",
            f"run/metrics.jsonl {NO_FILE}",
            in_the_way("metrics.jsonl", os.mkfifo),
        ),
        "curves-in-the-way": (RUN, f"run/curves.png {NO_FILE}", in_the_way("curves.png")),
        "checkpoints-in-the-way": (
            RUN,
            f"run/checkpoints {NO_FOLDER}",
            in_the_way("checkpoints", Path.touch),
        ),
        "checkpoint-in-the-way": (
            RUN + "--overwrite",
            f"run/checkpoints/step-00000002.pt {NO_FILE}",
            in_the_way("checkpoints/step-00000002.pt"),
        ),
        "best-in-the-way": (RUN + "--overwrite", f"best.pt {NO_FILE}", best_is_a_folder),
        "tensorboard-in-the-way": (
            RUN + "--tensorboard",
            f"run/tensorboard {NO_FOLDER}",
            in_the_way("tensorboard", Path.touch),
        ),
        "no-tensorboard": (
            RUN + "--tensorboard",
            "TensorBoard's events need the package tensorboard: python -m pip install",
            hidden("torch.utils.tensorboard"),
        ),
        "no-memory": (
            RUN,
            "there is not enough memory: a smaller batch or image size needs less",
            out_of_memory(MemoryError()),
        ),
        "no-memory-for-torch": (
            RUN,
            "--memory segment keeps less; resnetv2 plan tells how much",
            out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory")),
        ),
    },
)
# What is asked for in a run's place is wrong: the run stays.
add(
    "overwrite",
    {
        "data": (RUN + "--overwrite --data mnist", "unknown data set", Place.run),
        "number": (RUN + "--overwrite --batch-size 0", "batch_size must be", Place.run),
        "warmup": (RUN + "--overwrite --warmup-steps 99", "warmup_steps must be", Place.run),
        "budget": (
            RUN + "--overwrite --memory auto --budget 1MB",
            "more than the budget of 1.0 MB",
            Place.run,
        ),
        "one-value-a-channel": (
            RUN + "--overwrite --batch-size 1 --image-size 1",
            "a batch of one image of 1x1 pixels leaves the last norms one value",
            Place.run,
        ),
    },
)


# --- recipes


def text(content: str | bytes, name: str = "own.yaml") -> Files:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda place: (place / name).write_bytes(data)


add(
    "recipe",
    {
        "misspelt": (RUN + "--recipe fats", "give the path of a .yaml file: did you mean fast?"),
        "no-yaml": (RUN + "--recipe own.txt", "unknown recipe 'own.txt'", text("lr: 1", "own.txt")),
        "gone": (RECIPE, "no recipe at own.yaml"),
        "no-home": (RUN + "--recipe ~nobody-here/x.yaml", "cannot read the recipe ~nobody-here"),
        "folder": (RECIPE, "own.yaml is not a file", lambda p: (p / "own.yaml").mkdir()),
        "pipe": (RECIPE, "own.yaml is not a file", lambda p: os.mkfifo(p / "own.yaml")),
        "empty": (RECIPE, "expected a line for each option, such as epochs: 10, got", text("")),
        "list": (RECIPE, "such as epochs: 10, got ['lr', 0.1]", text("- lr\n- 0.1\n")),
        "broken": (RECIPE, "is not valid YAML at line 2, column 7", text("lr: [0.1\nepochs: 3")),
        "tab": (RECIPE, "is not valid YAML at line 1", text("lr:\t0.1\n\tepochs: 3\n")),
        "binary": (RECIPE, "own.yaml is not a text file", text(bytes(range(256)))),
        "zero-byte": (RECIPE, "own.yaml is not a text file", text(b"lr: 0.1\x00")),
        "unknown-option": (RECIPE, "unknown option 'speed'", text("speed: 1\n")),
        "misspelt-option": (RECIPE, "'batchsize': did you mean batch_size?", text("batchsize: 8")),
        "option-twice": (RECIPE, "line 2, column 1: 'lr' is there twice", text("lr: 1\nlr: 2\n")),
        "number-for-a-name": (RECIPE, "own.yaml: unknown option 1", text("1: 2\n")),
        "words": (RECIPE, "own.yaml: lr must be a number above 0, got 'fast'", text("lr: fast")),
        "nan": (RECIPE, "own.yaml: lr must be a number above 0, got nan", text("lr: .nan\n")),
        "nothing": (RECIPE, "own.yaml: lr must be a number above 0, got None", text("lr:\n")),
        "no-date": (RECIPE, "is not valid YAML: month must be", text("lr: 2026-13-45\n")),
        "object": (
            RECIPE,
            "could not determine a constructor for the tag",
            text("lr: !!python/object/apply:os.mkdir [trap]\n"),
        ),
        "contradiction": (RECIPE, "(with the options of own.yaml)", text("eager: true\n")),
        "too-long": (RECIPE, "own.yaml is longer than 1 MiB", text("#" + "x" * 2**20)),
    },
)


# --- resuming


def config_is(content: str | bytes) -> Files:
    return lambda place: text(content, "run/config.yaml")(_with_run(place))


def _with_run(place: Place) -> Place:
    place.run()
    return place


def config_made(make: Callable[[Path], object]) -> Files:
    def put(place: Place) -> None:
        path = place.run() / "config.yaml"
        path.unlink()
        make(path)

    return put


def metrics_made(make: Callable[[Path], object]) -> Files:
    def put(place: Place) -> None:
        path = place.half_run() / "metrics.jsonl"
        path.unlink()
        make(path)

    return put


def damaged(change: Callable[[bytes], bytes]) -> Files:
    """All checkpoints with other bytes."""

    def put(place: Place) -> None:
        for path in (place.run() / "checkpoints").iterdir():
            content = path.read_bytes()
            path.unlink()  # best.pt may be another name of it
            path.write_bytes(change(content))

    return put


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :]


def state(change: Callable[[dict[str, Any]], object]) -> Files:
    """The newest checkpoint with another content, and no other."""

    def put(place: Place) -> None:
        folder = place.run() / "checkpoints"
        path = folder / "step-00000004.pt"
        content = torch.load(path, weights_only=True)
        for other in folder.iterdir():
            other.unlink()
        change(content)
        torch.save(content, path)

    return put


def saved(content: Any) -> Files:
    return lambda place: torch.save(content, place / "other.pt")


def archive(place: Place) -> None:
    with zipfile.ZipFile(place / "other.pt", "w") as file:
        file.writestr("notes/readme.txt", "no checkpoint")


NEWEST = "run/checkpoints/step-00000004.pt"
OTHER = RUN + "--resume other.pt"
add(
    "resume",
    {
        "gone": ("train --resume gone.pt", "no checkpoint at gone.pt"),
        "empty-folder": (
            "train --resume empty",
            "no checkpoint in empty: expected step-*.pt there or in checkpoints/",
            lambda place: (place / "empty").mkdir(),
        ),
        "text": (OTHER, "other.pt is not a checkpoint of resnetv2", text("hello", "other.pt")),
        "empty-file": (OTHER, "other.pt is empty, not a checkpoint", text("", "other.pt")),
        "pipe": (OTHER, "other.pt is no file", lambda p: os.mkfifo(p / "other.pt")),
        "endless-device": (RUN + "--resume /dev/zero", "/dev/zero is no file, expected a"),
        "link-to-itself": (
            OTHER,
            "cannot read other.pt: Too many levels of symbolic links",
            lambda place: (place / "other.pt").symlink_to("other.pt"),
        ),
        "weights": (OTHER, "or weights without the state of a run", saved({"w": torch.ones(2)})),
        "module": (OTHER, "objects other than tensors and plain", saved(torch.nn.Linear(2, 2))),
        "zip": (OTHER, "other.pt is not a checkpoint of resnetv2", archive),
        "truncated": (
            RESUME,
            f"none of the 3 checkpoints in run/checkpoints can be used; the newest: {NEWEST} is",
            damaged(lambda content: content[: len(content) // 2]),
        ),
        "all-empty": (RESUME, f"{NEWEST} is empty", damaged(lambda content: b"")),
        "flipped-bit": (f"train --resume {NEWEST}", "fails its checksum", damaged(flipped)),
        "newer-format": (
            RESUME,
            "written by a newer version of resnetv2 (format 99, this one reads up to 1): upgrade",
            state(lambda content: content.update(format=99)),
        ),
        "later-than-the-end": (
            RESUME,
            "is from step 5, beyond this run's 4",
            state(lambda content: content.update(step=5)),
        ),
        "before-the-beginning": (
            RESUME,
            "is no checkpoint that a run has written: step -5",
            state(lambda content: content.update(step=-5)),
        ),
        "wrong-option-inside": (
            RESUME,
            f"{NEWEST}: depth must be a whole number",
            state(lambda content: content["config"].update(depth="eight")),
        ),
        "unknown-field-inside": (
            RESUME,
            "which another version or program has written: got an unexpected keyword argument",
            state(lambda content: content["history"][0].update(colour=1)),
        ),
        "config-broken": (RESUME, "run/config.yaml is not YAML (line 2", config_is("depth: [8\n")),
        "config-list": (RESUME, "must be a mapping of options to values", config_is("- depth\n")),
        "config-empty": (RESUME, "to values, it holds nothing", config_is("")),
        "config-binary": (RESUME, "run/config.yaml is not YAML", config_is(bytes(range(256)))),
        "config-unknown": (
            RESUME,
            "run/config.yaml: unknown option 'dept': did you mean depth?",
            config_is("dept: 8\n"),
        ),
        "config-words": (RESUME, "run/config.yaml: depth must be", config_is("depth: eight\n")),
        "config-number": (RESUME, "every option must be a name, got 1", config_is("1: 2\n")),
        "config-folder": (RESUME, f"run/config.yaml {NO_FILE}", config_made(Path.mkdir)),
        "config-pipe": (RESUME, f"run/config.yaml {NO_FILE}", config_made(os.mkfifo)),
        "config-gone": (
            RESUME,
            "was written with depth 8, epochs 2, limit_batches 2, this run has depth 20",
            config_made(lambda path: None),
        ),
        "metrics-folder": (RESUME, f"run/metrics.jsonl {NO_FILE}", metrics_made(Path.mkdir)),
        "metrics-pipe": (RESUME, f"run/metrics.jsonl {NO_FILE}", metrics_made(os.mkfifo)),
        "recipe": (RESUME + "--recipe fast", "more differ): a resumed run keeps", Place.run),
        "another-run": (
            "train --out images --resume run",
            "images is",
            lambda place: (place.run(), (place / "images").touch()),
        ),
    },
)
for part in ("config", "run", "processes", "model", "optimizer", "sums", "random", "history"):
    add(
        "resume",
        {
            f"without-{part}": (
                RESUME,
                f"{NEWEST} is no checkpoint that a run has written: it has no {part}",
                state(lambda content, part=part: content.pop(part)),
            ),
            f"text-for-{part}": (
                RESUME,
                f"its {part} is of another kind",
                state(lambda content, part=part: content.update({part: "text"})),
            ),
        },
    )
for option, then, now in [
    ("depth 14", "depth 8", "depth 14"),
    ("seed 1", "seed 0", "seed 1"),
    ("batch-size 64", "batch_size 128", "batch_size 64"),
    ("lr 0.2", "lr 0.1", "lr 0.2"),
    ("epochs 3", "epochs 2", "epochs 3"),
    ("steps 9", "epochs 2, steps None", "epochs None, steps 9"),
    ("data synthetic", "data 'digits'", "data 'synthetic'"),
    ("image-size 16", "image_size None", "image_size 16"),
    ("schedule cosine", "schedule 'step'", "schedule 'cosine'"),
    ("dtype bf16", "dtype 'fp32'", "dtype 'bf16'"),
    ("ema 0.9", "ema 0.0", "ema 0.9"),
]:
    says = f"{NEWEST} was written with {then}, this run has {now}: a resumed run keeps what"
    add("resume-with", {option: (f"{RESUME}--{option}", says, Place.run)})


# --- eval

add(
    "eval",
    {
        "gone": ("eval gone", "gone is not the folder of a run: there is no such folder"),
        "empty-name": ("eval ''", "'RUN': expected a path, got nothing"),
        "file": ("eval run/checkpoints/best.pt", "give that, and a checkpoint by", Place.run),
        "empty-folder": (
            "eval empty",
            "empty has no checkpoint: nothing was trained there yet",
            lambda place: (place / "empty").mkdir(),
        ),
        "no-checkpoints": (
            "eval run",
            "run has no checkpoint",
            lambda place: shutil.rmtree(place.run() / "checkpoints"),
        ),
        "no-best": (
            "eval run --checkpoint best",
            "no checkpoint at run/checkpoints/best.pt",
            lambda place: (place.run() / "checkpoints" / "best.pt").unlink(),
        ),
        "other-checkpoint": ("eval run --checkpoint x.pt", "no checkpoint at x.pt", Place.run),
        "damaged": (
            "eval run",
            "is a damaged checkpoint, cut off or overwritten",
            damaged(lambda content: content[:99]),
        ),
        "own-model": (
            "eval run",
            "holds a model of the caller's own",
            state(lambda content: content["run"].update(own_model=True)),
        ),
        "without-model": ("eval run", "it has no model", state(lambda c: c.pop("model"))),
        "text-for-ema": ("eval run", "its ema is of", state(lambda c: c.update(ema="text"))),
        "another-depth": (
            "eval run",
            "holds the weights of another net: stage1.1.bn1.weight and 35 others differ",
            state(lambda content: content["config"].update(depth=14)),
        ),
        "other-classes": (
            "eval run --data imagefolder:images",
            "was trained on 10 classes of images with 1 channels, imagefolder:images has 2",
            lambda place: (place.run(), place.images()),
        ),
        "other-channels": (
            "eval run --data synthetic",
            "synthetic has 10 classes and 3 channels: take data of the same kind",
            Place.run,
        ),
        "data-gone": (
            "eval run",
            "gone does not exist: imagefolder:PATH needs",
            state(lambda content: content["config"].update(data="imagefolder:gone")),
        ),
        "data-unknown": ("eval run --data mnist", "unknown data set 'mnist'", Place.run),
        "device": ("eval run --device tpu", "there is no device 'tpu'", Place.run),
        "workers": ("eval run --workers -1", "workers must be a whole number", Place.run),
        "backend": ("eval run --backend x", "'x' is not one of 'auto'", Place.run),
    },
)


# --- the environment of torchrun

TORCHRUN = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
for name, environment, says in [
    ("rank-alone", {"RANK": "1"}, "RANK in the environment without WORLD_SIZE, MASTER_ADDR"),
    ("size-alone", {"WORLD_SIZE": "2"}, "WORLD_SIZE in the environment without RANK"),
    ("rank-empty", {**TORCHRUN, "RANK": ""}, "WORLD_SIZE in the environment without RANK:"),
    ("rank-words", {**TORCHRUN, "RANK": "zero"}, "must be a whole number in 0..1, got 'zero'"),
    ("rank-high", {**TORCHRUN, "RANK": "5"}, "RANK in the environment must be a whole number"),
    ("rank-negative", {**TORCHRUN, "RANK": "-5"}, "in 0..1, got '-5': start with torchrun, or"),
    ("size-words", {**TORCHRUN, "WORLD_SIZE": "two"}, "WORLD_SIZE in the environment must be"),
    ("size-0", {**TORCHRUN, "WORLD_SIZE": "0"}, "in 1..1000000, got '0'"),
    ("local-rank", {**TORCHRUN, "LOCAL_RANK": "x"}, "LOCAL_RANK in the environment must be"),
    ("port-words", {**TORCHRUN, "MASTER_PORT": "http"}, "MASTER_PORT in the environment must"),
    ("port-high", {**TORCHRUN, "MASTER_PORT": "99999"}, "in 0..65535, got '99999'"),
]:
    add("torchrun", {name: (RUN, says)}, environment=environment)


add(
    "environment",
    {"backend": (RUN.replace("aten", "auto"), "RESNETV2_BACKEND must be one of")},
    environment={"RESNETV2_BACKEND": "cudnn"},
)


# --- plan and study

for option, says in {
    "--depth 21": "depth must be 6n+2 for PreActBlock, got 21; nearest: 20 or 26",
    "--depth 0": "0 is not in the range 1<=x<=99999",
    "--depth 6000000002": "is not in the range 1<=x<=99999",
    "--batch-size 0": "0 is not in the range",
    "--batch-size 99999999999999999999": "is not in the range",
    "--image-size 0": "0 is not in the range 1<=x<=65536",
    "--image-size -3": "-3 is not in the range",
    "--dtype fp8": "'fp8' is not one of 'fp32'",
    "--budget x": 'expected bytes like "8GiB", "500MB" or a number, got \'x\'',
    "--budget 0": "a budget must be positive, got '0'",
    "--budget ''": "expected bytes like",
    "--budget 1kB": "more than the budget of 1.0 kB; no batch fits it",
    "--optimizer-states -1": "optimizer_states must be a number from 0 on, got -1.0",
    "--optimizer-states nan": "optimizer_states must be a number from 0 on, got nan",
    "--optimizer-states inf": "optimizer_states must be a number from 0 on, got inf",
    "--device tpu": "'tpu' is not one of 'cpu', 'cuda'",
    "--rates h100": "--rates belongs to --time: give both",
    "--block bottleneck --depth 21": "depth must be 9n+2 for BottleneckPreActBlock, got 21",
    "extra": "unexpected extra argument (extra)",
}.items():
    add("plan", {option: (PLAN + option, says)})
add(
    "plan",
    {
        "no-gpu-no-budget": ("plan --depth 20", "there is no GPU whose free memory could be"),
        "no-gpu-to-measure": (
            PLAN + "--time --rates measured --device cuda",
            "there is no GPU whose rates could be measured: give --rates h100",
        ),
    },
    without_gpu=True,
)

for option, says in {
    "": "name a study: architecture, block, depth",
    "depht": "unknown study 'depht': choose from architecture",
    "depth --preset huge": "depth has no preset 'huge': paper",
    "depth --depth x": "'x' is not a number of layers, nor several separated by commas",
    "depth --depth 20,,50": "'20,,50' is not a number of layers",
    "depth --depth 0": "depth must be at least 1, got 0",
    "depth --depth 6000000002": "depth must be below 100000",
    "depth --width 0": "width must be at least 1, got 0",
    "depth --width 100000000": "width must be in 1..8192",
    "depth --epochs 3": "depth has no option 'epochs'; it takes data",
    "depth --batch-size 0": "batch_size must be at least 1, got 0",
    "depth --device tpu": "there is no device 'tpu'",
    "depth --data mnist": "unknown data set 'mnist'",
    "depth --data imagefolder:gone": "gone does not exist",
    "depth --image-size 0": "the image size must be at least 1, got 0",
    "depth --out file": "cannot write to file: ",
    "depth --out file/below": "cannot write to file/below: ",
    "depth --out ''": "'--out': expected a path, got nothing",
    "versions --depth 20,50": "versions takes one depth, got 20, 50",
    "versions --depth 21": "depth must be 6n+2 with 3 stage(s), got 21; try 20 or 26",
    "versions --lr nan": "the learning rate must be positive, got nan",
    "versions --lr inf": "the learning rate must be positive, got inf",
    "versions --momentum 2": "momentum must be in 0..1 and below 1, got 2.0",
    "versions --weight-decay nan": "weight_decay must be a number from 0 on, got nan",
    "versions --warmup-steps -1": "warmup_steps must not be negative, got -1",
    "versions --schedule x": "unknown schedule 'x': choose from constant, paper, step",
    "versions --seeds 0": "seeds must be at least 1, got 0",
    "versions --stages 99": "stages must be in 1..8, got 99",
    "versions --target nan": "target is an accuracy in 0..1, got nan",
    "versions --dtype fp8": "unknown dtype 'fp8': choose from fp32, bf16, fp16",
    "versions --train-images 0": "train_images must be at least 1, got 0",
    "identity --samples 0": "samples must be at least 1, got 0",
    "versions norms --samples 3": "none of these studies has the option --samples",
    "versions norms --preset x": "none of these studies has the preset 'x'",
}.items():
    add(
        "study",
        {option or "none": (f"study {option}", says, lambda place: (place / "file").touch())},
    )
