"""What people type wrongly, and files that are not what they should be: a table of commands.

Each is a command line after `resnetv2`, run in an empty folder, the part of the message that says
what is wrong, and where needed a function that puts files into that folder first. The table holds
what the command line adds: one line, exit code 2, nothing lost. The values that a field, a recipe,
a checkpoint or a folder of images may have are the tables of their own tests.
"""

from __future__ import annotations

import os
import shutil
import sys
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
        "command": ("tarin", "'tarin': did you mean train?; resnetv2 --help lists what there is"),
        "option": ("train --dept 8", "; resnetv2 train --help lists what there is"),
        "words-for-an-integer": ("train --depth twenty", "'--depth'"),
        "choice": ("train --block botleneck", "'--block'"),
        "no-run": ("eval", "'RUN'; resnetv2 eval --help"),
        # OpenMP would end the process.
        "threads-beyond-memory": ("train --threads 1000000000", "threads must be"),
        "threads-beyond-integers": ("study depth --threads 99999999999", "'--threads'"),
    },
)

for option, value, says in [
    ("depth", "0", "depth must be a whole number of at least 1 and below 100000, got 0"),
    ("depth", "2", "depth must be 6n+2 for PreActBlock, got 2; nearest: 8"),
    ("depth", "21", "got 21; nearest: 20 or 26"),
    ("depth", "1" + "0" * 30, "depth is too large, got 1000"),
    ("lr", "nan", "lr must be a number above 0, got nan"),
    ("warmup-steps", "1000", "warmup_steps must be at most the run's 4 steps, got 1,000"),
    ("crop-padding", "1000000000", "crop_padding must be at most the images' 8 pixels"),
    ("image-size", "1000000", "of memory that this process can have: --image-size makes them"),
    ("steps", "4", "epochs and steps both say how long to train: give one of them"),
    ("device", "tpu", "there is no device 'tpu': expected cpu, cuda, cuda:1, ... or auto"),
    ("device", "cuda:-1", "there is no device 'cuda:-1'"),
    ("device", "cuda:99", "cannot use device 'cuda:99': "),
    ("device", "hpu", "cannot use device 'hpu': this PyTorch does not compute there"),
    ("device", "mkldnn", "cannot use device 'mkldnn'"),
    ("device", "meta", "cannot use device 'meta': it computes nothing"),
    ("root", "'\udcff'", "root must be some text, got '\\udcff'"),
    ("resume", "''", "'--resume': expected a path, got nothing"),
    ("out", "''", "'--out': expected a path, got nothing"),
    ("out", "'r\udcff'", "'r\\udcff' is not in UTF-8: take another name"),
    ("data", "mnist", "unknown data set 'mnist': choose from digits, cifar10"),
    ("data", "digits:x", "unknown data set 'digits:x'"),
    ("data", "imagefolder:", "imagefolder needs a path"),
    ("data", "'imagefolder:a\nb'", "a\\nb does not exist: imagefolder:PATH needs PATH/train"),
]:
    add("value", {f"{option}={value[:12]!a}": (f"{RUN}--{option} {value}", says)})

add(
    "contradiction",
    {
        "eager-backend": (RUN + "--eager", "eager contradicts backend 'aten'"),
        "auto-without-budget": (RUN + "--memory auto", 'memory "auto" needs a budget'),
        "budget-too-small": (
            RUN + "--memory auto --budget 1MB",
            "more than the budget of 1.0 MB; no batch fits it",
        ),
        "budget-for-a-smaller-batch": (
            RUN + "--memory auto --budget 4MB",
            "the largest batch that fits is",
        ),
        "block-depth": (RUN + "--block bottleneck", "depth must be 9n+2"),
        "one-value-a-channel": (
            RUN + "--batch-size 1 --image-size 4",
            "leaves the last norms one value a channel, which has no variance",
        ),
        "resume-nothing": (
            "train --out run --resume auto --depth 8",
            "run holds no run to go on with: give --data or --recipe to begin one there",
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


def without(folder: str) -> Files:
    return lambda place: shutil.rmtree(place.images() / folder)


def of_another_size(place: Place) -> None:
    place.images(("train",))
    place.images(("test",), size=9)


def offline(place: Place) -> None:
    """No network, and torchvision's own file downloads are refused at once."""
    from resnetv2.data._torchvision import import_torchvision

    import_torchvision()
    from torchvision.datasets import cifar

    def refuse(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    place.monkeypatch.setattr(cifar, "download_and_extract_archive", refuse)


def hidden(module: str) -> Files:
    """A package that is not installed."""
    return lambda place: place.monkeypatch.setitem(sys.modules, module, None)


BROKEN_IMAGE = "cannot read the image images/train/dog/2.png: "
add(
    "data",
    {
        "no-home": (RUN + "--data imagefolder:~nobody-here/x", "~nobody-here/x does not exist"),
        "text-for-an-image": (
            IMAGES,
            BROKEN_IMAGE + "not an image, or damaged; replace or remove it",
            spoil(lambda path: path.write_text("no image")),
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
        "sizes-in-memory": (
            IMAGES + "--cache memory",
            "images differ in size: images/test/cat/0.png is 9x9, others are 8x8",
            of_another_size,
        ),
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
NOT_A_FOLDER = "is a file, expected a folder"
BROKEN_LINK = "run is a broken link, expected a folder"
OVERWRITE = RUN + "--overwrite "


def out(name: str) -> str:
    return RUN.replace("--out run", f"--out {name}")


def touched(name: str) -> Files:
    return lambda place: (place / name).touch()


def linked(name: str, target: str) -> Files:
    return lambda place: (place / name).symlink_to(target)


add(
    "out",
    {
        "file": (RUN, f"run {NOT_A_FOLDER}", touched("run")),
        "pipe": (RUN, f"run {NOT_A_FOLDER}", lambda place: os.mkfifo(place / "run")),
        "device": (out("/dev/null"), "/dev/null is a file"),
        "link-to-itself": (RUN, BROKEN_LINK, linked("run", "run")),
        "link-to-nothing": (RUN, BROKEN_LINK, linked("run", "gone")),
        "below-a-file": (out("file/run"), "file is a file", touched("file")),
        "newline": (out("'a\nb'"), f"a\\nb {NOT_A_FOLDER}", touched("a\nb")),
        "long-name": (out("x" * 300), "File name too long"),
        "unwritable": (RUN, "cannot write to run: make it writable, or take another", unwritable),
        "holds-a-run": (
            RUN,
            "go on with it by --resume auto, replace it by --overwrite, or take another folder",
            Place.run,
        ),
        "config-in-the-way": (RUN, f"run/config.yaml {NO_FILE}", in_the_way("config.yaml")),
        "metrics-is-a-pipe": (
            OVERWRITE,
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
            OVERWRITE,
            f"run/checkpoints/step-00000002.pt {NO_FILE}",
            in_the_way("checkpoints/step-00000002.pt"),
        ),
        "best-in-the-way": (OVERWRITE, f"best.pt {NO_FILE}", best_is_a_folder),
        "tensorboard-in-the-way": (
            RUN,
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
        "data": (OVERWRITE + "--data mnist", "unknown data set", Place.run),
        "warmup": (OVERWRITE + "--warmup-steps 99", "warmup_steps must be", Place.run),
        "budget": (
            OVERWRITE + "--memory auto --budget 1MB",
            "more than the budget of 1.0 MB",
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
        "gone": (RECIPE, "no recipe at own.yaml"),
        "broken": (RECIPE, "is not valid YAML at line 2, column 7", text("lr: [0.1\nepochs: 3")),
        "unknown-option": (RECIPE, "unknown option 'speed'", text("speed: 1\n")),
        "contradiction": (RECIPE, "(with the options of own.yaml)", text("eager: true\n")),
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


def damaged(change: Callable[[bytes], bytes]) -> Files:
    """All checkpoints with other bytes."""

    def put(place: Place) -> None:
        for path in (place.run() / "checkpoints").iterdir():
            content = path.read_bytes()
            path.unlink()  # best.pt may be another name of it
            path.write_bytes(change(content))

    return put


def state(change: Callable[[dict[str, Any]], object] | None = None, **values: Any) -> Files:
    """The newest checkpoint with other values, those of a dict one by one, and no other file."""

    def put(place: Place) -> None:
        folder = place.run() / "checkpoints"
        path = folder / "step-00000004.pt"
        content = torch.load(path, weights_only=True)
        for other in folder.iterdir():
            other.unlink()
        for name, value in values.items():
            content[name] = {**content[name], **value} if isinstance(value, dict) else value
        if change is not None:
            change(content)
        torch.save(content, path)

    return put


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
        "endless-device": (RUN + "--resume /dev/zero", "/dev/zero is no file, expected a"),
        "link-to-itself": (
            OTHER,
            "cannot read other.pt: Too many levels of symbolic links",
            lambda place: (place / "other.pt").symlink_to("other.pt"),
        ),
        "truncated": (
            RESUME,
            f"none of the 3 checkpoints in run/checkpoints can be used; the newest: {NEWEST} is",
            damaged(lambda content: content[: len(content) // 2]),
        ),
        "later-than-the-end": (RESUME, "is from step 5, beyond this run's 4", state(step=5)),
        "before-the-beginning": (
            RESUME,
            "is no checkpoint that a run has written: step -5",
            state(step=-5),
        ),
        "wrong-option-inside": (
            RESUME,
            f"{NEWEST}: depth must be a whole number",
            state(config={"depth": "eight"}),
        ),
        "unknown-field-inside": (
            RESUME,
            "which another version or program has written: got an unexpected keyword argument",
            state(lambda content: content["history"][0].update(colour=1)),
        ),
        "config-unknown": (
            RESUME,
            "run/config.yaml: unknown option 'dept': did you mean depth?",
            config_is("dept: 8\n"),
        ),
        "config-folder": (RESUME, f"run/config.yaml {NO_FILE}", config_made(Path.mkdir)),
        "config-pipe": (RESUME, f"run/config.yaml {NO_FILE}", config_made(os.mkfifo)),
        "config-gone": (
            RESUME,
            "was written with depth 8, epochs 2, limit_batches 2, this run has depth 20",
            config_made(lambda path: None),
        ),
        "recipe": (RESUME + "--recipe fast", "more differ): a resumed run keeps", Place.run),
        "another-run": (
            "train --out images --resume run",
            "images is",
            lambda place: (place.run(), (place / "images").touch()),
        ),
    },
)
for part in ("config", "history"):
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
                state(**{part: "text"}),
            ),
        },
    )
for option, then, now in [
    ("seed 1", "seed 0", "seed 1"),
    ("steps 9", "epochs 2, steps None", "epochs None, steps 9"),
    ("data synthetic", "data 'digits'", "data 'synthetic'"),
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
        "damaged": (
            "eval run",
            "is a damaged checkpoint, cut off or overwritten",
            damaged(lambda content: content[:99]),
        ),
        "own-model": (
            "eval run",
            "holds a model of the caller's own",
            state(run={"own_model": True}),
        ),
        "without-model": ("eval run", "it has no model", state(lambda c: c.pop("model"))),
        "text-for-ema": ("eval run", "its ema is of", state(ema="text")),
        "another-depth": (
            "eval run",
            "holds the weights of another net: missing: stage1.1.bn1.weight, stage1.1.bn1.bias, ",
            state(config={"depth": 14}),
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
            state(config={"data": "imagefolder:gone"}),
        ),
        "device": ("eval run --device tpu", "there is no device 'tpu'", Place.run),
        "tensors": ("eval run", "unknown data set 'tensors'", state(config={"data": "tensors"})),
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
    "--batch-size 99999999999999999999": "'--batch-size'",
    "--budget x": 'expected bytes like "8GiB", "500MB" or a number, got \'x\'',
    "--budget 0": "a budget must be positive, got '0'",
    "--budget 1kB": "more than the budget of 1.0 kB; no batch fits it",
    "--optimizer-states nan": "optimizer_states must be a number from 0 on, got nan",
    "--rates h100": "--rates belongs to --time: give both",
    "--block bottleneck --depth 21": "depth must be 9n+2 for BottleneckPreActBlock, got 21",
}.items():
    add("plan", {option: (PLAN + option, says)})
add(
    "plan",
    {
        "no-gpu-no-budget": ("plan --depth 20", "there is no GPU whose free memory could be"),
        "no-net": ("plan --budget 8GiB", "give --depth or --model: one of them says which"),
        "two-nets": (PLAN + "--model preact_resnet50", "give --depth or --model: one of them"),
        "block-of-a-model": (
            "plan --model preact_resnet50 --block basic --budget 8GiB",
            "--block belongs to --depth: preact_resnet50 has its own",
        ),
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
    "depth --depth 0": "depth must be a whole number of at least 1 and below 100000, got 0",
    "depth --depth 6000000002": "of at least 1 and below 100000, got 6000000002",
    "depth --width 0": "width must be a whole number of at least 1 and at most 8192, got 0",
    "depth --epochs 3": "depth has no option 'epochs'; it takes data",
    "depth --batch-size 0": "batch_size must be a whole number of at least 1, got 0",
    "depth --device tpu": "there is no device 'tpu'",
    "depth --data mnist": "unknown data set 'mnist'",
    "depth --data imagefolder:gone": "gone does not exist",
    "depth --image-size 0": "image_size must be a whole number of at least 1, got 0",
    "depth --out file": "cannot write to file: ",
    "depth --out file/below": "cannot write to file/below: ",
    "depth --out ''": "'--out': expected a path, got nothing",
    "versions --depth 20,50": "versions takes one depth, got 20, 50",
    "versions --depth 21": "depth must be 6n+2 with 3 stage(s), got 21; try 20 or 26",
    "versions --lr inf": "lr must be a number above 0, got inf",
    "versions --warmup-steps -1": "warmup_steps must be a whole number of at least 0, got -1",
    "versions --schedule x": "'x' is not one of 'constant', 'paper', 'step'",
    "versions --stages 99": "stages must be a whole number of at least 1 and at most 8, got 99",
    "versions --target 1.5": "target must be a number of at least 0 and at most 1, got 1.5",
    "versions norms --samples 3": "none of these studies has the option --samples",
    "versions norms --preset x": "none of these studies has the preset 'x'",
}.items():
    add(
        "study",
        {option or "none": (f"study {option}", says, lambda place: (place / "file").touch())},
    )
