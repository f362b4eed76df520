"""Predictions for image files, and exported nets: both are what the run's own net computes."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import nn

from resnetv2 import PreActResNet
from resnetv2.cli.command import main
from resnetv2.data.batches import Batches
from resnetv2.data.datasets import load_data
from resnetv2.train import InputError, create_synthetic_dataset, train_resnet_v2
from resnetv2.training import export as module
from resnetv2.training.checkpoint import Checkpoints
from resnetv2.training.evaluate import evaluate_run, load_run
from resnetv2.training.export import Exported, ExportError, export_run, fold_norms
from resnetv2.training.predict import from_pixels, predict

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, Any] = {"depth": 8, "device": "cpu", "backend": "aten", "verbose": False}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on handwritten digits: grey, with white at 16."""
    out = tmp_path_factory.mktemp("digits")
    torch.set_num_threads(1)
    train_resnet_v2(epochs=2, out=out, ema=0.5, **SMALL)
    return out


@pytest.fixture(scope="module")
def digit_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test set as PNGs of its own size, in its order."""
    folder = tmp_path_factory.mktemp("files")
    images = load_data("digits", cache="memory").test.images[..., 0].numpy()
    for number, image in enumerate(images):
        grey = np.rint(image * (255 / 16)).astype(np.uint8)
        Image.fromarray(grey).save(folder / f"{number:03}.png")
    return folder


def coloured(folder: Path, size: int) -> None:
    """Images of two classes, told apart by their colour, somewhat wider than high."""
    generator = np.random.default_rng(0)
    for part in ("train", "test"):
        for name, colour in (("blue", (0, 0, 200)), ("red", (200, 0, 0))):
            place = folder / part / name
            place.mkdir(parents=True)
            for number in range(8):
                noise = generator.integers(0, 55, (size, size + 4, 3))
                Image.fromarray((noise + colour).astype(np.uint8)).save(place / f"{number}.png")


@pytest.fixture(scope="module", params=["memory", "stream"])
def colours(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a folder of images, in memory or streamed; the folder is beside it."""
    place = tmp_path_factory.mktemp(request.param)
    coloured(place / "images", 20)
    train_resnet_v2(
        f"imagefolder:{place / 'images'}", out=place / "run", image_size=16, batch_size=8, epochs=2,
        cache=request.param, lr=0.02, **SMALL,
    )  # fmt: skip
    return place


def test_digits_as_files_give_the_test_accuracy(digits: Path, digit_files: Path) -> None:
    """255 of a file is the data set's 16, and the tested average is what predicts."""
    labels = load_data("digits", cache="memory").test.labels.tolist()
    found = predict(digits, [digit_files])
    right = sum(int(p.classes[0]) == label for p, label in zip(found, labels, strict=True))
    evaluated = evaluate_run(digits, progress=False)
    assert evaluated.averaged
    assert abs(right - evaluated.accuracy * len(labels)) <= 1  # files round to 255 levels
    assert right > 0.5 * len(labels)


def test_files_are_cropped_as_the_test_images(colours: Path) -> None:
    run, folder = colours / "run", colours / "images" / "test"
    images = sorted(folder.glob("*/*.png"))
    found = predict(run, [folder], top=2)
    assert [p.image for p in found] == [str(path) for path in images]
    trained = load_run(run)
    data = load_data(f"imagefolder:{colours / 'images'}", image_size=16, cache=trained.config.cache)
    logits = [
        trained.logits(trained.model.eval(), batch)
        for batch, _ in Batches(data, 8).testing(len(images))
    ]
    expected = torch.cat(logits).softmax(1).detach()
    for prediction, row in zip(found, expected, strict=True):
        mine = dict(zip(prediction.classes, prediction.probabilities, strict=True))
        assert [mine["blue"], mine["red"]] == pytest.approx(row.tolist(), rel=1e-4)
        assert prediction.probabilities[0] >= prediction.probabilities[1]


def test_command_prints_csv(digits: Path, digit_files: Path) -> None:
    files = [str(digit_files / f"{number:03}.png") for number in (3, 1)]
    result = CliRunner().invoke(main, ["predict", str(digits), *files, "--top", "3"])
    assert result.exit_code == 0, result.output
    rows = list(csv.DictReader(result.stdout.splitlines()))
    assert [row["image"] for row in rows] == [file for file in files for _ in range(3)]
    expected = predict(digits, files, top=3)
    assert [row["class"] for row in rows] == [name for p in expected for name in p.classes]
    given = [f"{value:.4f}" for p in expected for value in p.probabilities]
    assert [row["probability"] for row in rows] == given


def test_what_cannot_be_predicted(digits: Path, tmp_path: Path) -> None:
    def says(*arguments: Any) -> str:
        with pytest.raises(InputError) as caught:
            predict(*arguments)
        return str(caught.value)

    assert says(digits, [tmp_path / "none.png"]) == f"there is no file {tmp_path / 'none.png'}"
    assert "holds no image" in says(digits, [tmp_path])
    (tmp_path / "page.png").write_text("<html>")
    assert "not an image, or damaged" in says(digits, [tmp_path])
    assert "there is no such folder" in says(tmp_path / "run", [tmp_path])
    data = create_synthetic_dataset(num_samples=60, image_size=8)
    train_resnet_v2(data, steps=1, out=tmp_path / "tensors", **SMALL)
    assert "trained on tensors, not on image files" in says(tmp_path / "tensors", [tmp_path])


def test_a_checkpoint_of_an_older_version(digits: Path, tmp_path: Path) -> None:
    _, state = Checkpoints(digits / "checkpoints").load() or (None, {})
    del state["run"]["pixels"]
    Checkpoints(tmp_path / "checkpoints").save(state, state["step"])
    assert evaluate_run(tmp_path, progress=False).images == 360
    with pytest.raises(InputError, match="does not say how its images are normalised"):
        export_run(tmp_path)


@pytest.fixture(scope="module")
def exported(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    written, *_ = export_run(digits, tmp_path_factory.mktemp("exported"))
    return written


@torch.no_grad()
def test_exported_program_computes_the_run_s_logits(digits: Path, exported: Exported) -> None:
    assert exported.path.name == "model.pt2"
    assert exported.difference < 1e-5
    trained = load_run(digits)
    program = torch.export.load(exported.path).module()
    for number in (1, 5):  # any number of images
        images = 255 * torch.rand(number, 1, 8, 8)
        expected = trained.logits(from_pixels(trained), images)
        torch.testing.assert_close(program(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "folded"),
    [
        ({"block": "basic"}, 3 + 1),
        ({"block": "bottleneck"}, 6 + 1),
        ({"block": "basic", "stem": "imagenet"}, 3),
        ({"block": "basic", "first_identity": "raw", "layers": [2, 1]}, 3 + 0),
    ],
    ids=["basic", "bottleneck", "imagenet-stem", "raw-identity"],
)
@torch.no_grad()
def test_norms_behind_convolutions_are_folded(options: dict[str, Any], folded: int) -> None:
    """In float64, where folding differs by roundings alone; all other norms stay."""
    torch.manual_seed(0)
    given = {"layers": [1, 1, 1], "stem_width": 8, "backend": "eager", **options}
    if options.get("first_identity") == "raw":
        given["widths"] = [8, 16]  # the first unit's shortcut is x itself
    model = PreActResNet(given.pop("block"), given.pop("layers"), **given).double().eval()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            nn.init.uniform_(tensor, 0.5, 1.5)
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    expected = model(images)
    assert fold_norms(model) == folded
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == len(norms) - folded
    torch.testing.assert_close(model(images), expected, rtol=1e-12, atol=1e-12)


def test_the_exported_program_has_no_norm_behind_a_convolution(exported: Exported) -> None:
    """ResNet-8: the last norm is left, and the first of the units behind the first."""
    nodes = torch.export.load(exported.path).graph.nodes
    norms = [node for node in nodes if "batch_norm" in str(node.target)]
    assert not any("conv" in str(node.args[0].target) for node in norms)
    assert (exported.folded, len(norms)) == (4, 3)


@torch.no_grad()
def test_onnx_computes_the_run_s_logits(digits: Path, exported: Exported) -> None:
    reference = pytest.importorskip("onnx.reference")
    pytest.importorskip("onnxscript")
    trained = load_run(digits)
    model = reference.ReferenceEvaluator(str(exported.path.with_name("model.onnx")))
    for number in (1, 5):
        images = 255 * torch.rand(number, 1, 8, 8)
        (logits,) = model.run(None, {"images": images.numpy()})
        expected = trained.logits(from_pixels(trained), images)
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def quick(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exporting is copying what was exported before."""
    monkeypatch.setattr(module, "_export", lambda trained, path: shutil.copy(exported.path, path))


@pytest.mark.usefixtures("quick")
def test_command_says_what_onnx_needs(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "has_onnx", lambda: False)
    result = CliRunner().invoke(main, ["export", str(digits), "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    first, second = result.stdout.splitlines()
    assert first.startswith(f"wrote {tmp_path / 'model.pt2'}; its logits differ from the run's by ")
    assert second == "no ONNX file: for it, python -m pip install onnx onnxscript"
    result = CliRunner().invoke(main, ["export", str(digits), "--onnx"])
    assert result.exit_code == 2
    assert result.stderr == (
        "Error: ONNX needs other packages: python -m pip install onnx onnxscript\n"
    )


@pytest.mark.usefixtures("quick")
def test_a_file_with_other_logits_is_a_failure(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_pt2 = module._run_pt2
    monkeypatch.setattr(module, "_run_pt2", lambda path, images: 1.01 * run_pt2(path, images))
    says = r"computes other logits than the run's net: they differ by 1.0e-02"
    with pytest.raises(ExportError, match=says):
        export_run(digits, tmp_path, onnx=False)
    result = CliRunner().invoke(main, ["export", str(digits), "--out", str(tmp_path), "--no-onnx"])
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
