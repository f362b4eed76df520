"""The studies' harness, page and command line, and the studies that train little or nothing."""

from __future__ import annotations

import base64
import json
import math
import re
import shlex
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import nn

from resnetv2 import PreActBlock, PreActResNet
from resnetv2.cli.command import main
from resnetv2.cli.study import _settings
from resnetv2.cli.study import study as study_command
from resnetv2.data.batches import Batches, ImageData, Split
from resnetv2.errors import InputError
from resnetv2.studies import STUDIES, architecture, block, depth, gradients, identity
from resnetv2.studies.architecture import POST, PRE
from resnetv2.studies.depth import stack
from resnetv2.studies.gradients import layer_gradients
from resnetv2.studies.harness import (
    Capture,
    Comparison,
    History,
    Result,
    Spread,
    StudyOptions,
    Table,
    compare,
    gradient_norm,
    study,
    train_variant,
)
from resnetv2.studies.identity import block_norms, residual_norms
from resnetv2.studies.page import render
from resnetv2.studies.tracing import trace
from resnetv2.studies.variants import (
    FULL_PREACTIVATION,
    ORIGINAL,
    ResidualNetwork,
    post_activation_block,
)
from resnetv2.studies.visualizer import ResNetV2Visualizer
from resnetv2.training.fields import fields_of
from resnetv2.training.metrics import EpochMetrics

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def aten(monkeypatch):
    """Fused nets of whole studies are too much for Triton's interpreter."""
    monkeypatch.setenv("RESNETV2_BACKEND", "aten")


@pytest.fixture(scope="module")
def data() -> ImageData:
    """Four classes of 8x8 images that differ in brightness."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(96) % 4
    images = 40 * labels[:, None, None, None] + torch.randint(
        0, 60, (96, 8, 8, 1), generator=generator
    )
    images = images.to(torch.uint8)
    train, test = Split(images[:64], labels[:64]), Split(images[64:], labels[64:])
    return ImageData("toy", train, test, tuple("abcd"), crop_padding=1, flip=False)


TOY = StudyOptions(epochs=2, batch_size=16, seeds=2, lr=0.05, device="cpu", progress=False)


def tiny_net(**options) -> ResidualNetwork:
    return ResidualNetwork([1, 1], [4, 8], num_classes=4, in_channels=1, **options)


def history(name: str, seed: int, accuracies: list[float], diverged: int | None = None) -> History:
    epochs = [
        EpochMetrics(i, 0.1, 1 / i, a, 2 / i, a, 1.0, 64.0) for i, a in enumerate(accuracies, 1)
    ]
    if diverged is not None:
        epochs[-1] = replace(epochs[-1], train_loss=math.nan)
    return History(name, seed, 10, epochs, [3.0] * len(epochs), diverged)


def test_every_study_has_its_name_question_and_function():
    for name, each in STUDIES.items():
        assert each.name == name
        assert "?" in each.question
        each.options()
        for preset in each.presets:
            each.options(preset)


def test_several_depths_for_a_study_of_one():
    assert depth.options(depth=(20, 50)).depths == (20, 50)
    with pytest.raises(InputError, match="identity takes one depth, got 20, 50"):
        identity.options(depth=(20, 50))


def test_a_study_must_name_real_options():
    with pytest.raises(ValueError, match="no such options: colour"):
        study("x", title="X", question="?", defaults={"colour": 1})


def test_limits_take_the_first_of_each_class_evenly(data):
    limited = replace(TOY, data=data, train_images=8, test_images=5).load()
    assert limited.train.labels.bincount().tolist() == [2, 2, 2, 2]
    assert sorted(limited.test.labels.bincount().tolist()) == [1, 1, 1, 2]
    assert torch.equal(limited.train.images, data.train.images[:8])


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [0.05] * 6),
        ("step", [0.05, 0.05, 0.005, 0.005, 0.0005, 0.0005]),
        ("paper", [0.05, 0.05, 0.05, 0.005, 0.005, 0.0005]),
    ],
)
def test_schedules(schedule, rates):
    options = replace(TOY, schedule=schedule, step_epochs=1, epochs=3)
    assert [options.rate(step, 2) for step in range(6)] == pytest.approx(rates)


def test_training_learns_repeats_and_records(data):
    options = replace(TOY, epochs=4)
    first, again, other = (train_variant(tiny_net, data, options, seed) for seed in (0, 0, 1))
    assert first.curve("train_loss") == again.curve("train_loss")
    assert first.curve("gradient_norm") == again.curve("gradient_norm")
    assert first.curve("train_loss") != other.curve("train_loss")
    assert first.final("train_loss") < first.curve("train_loss")[0]
    assert len(first.epochs) == 4
    assert first.parameters == sum(p.numel() for p in tiny_net().parameters())


def test_gradient_norm_of_the_first_step_is_autograds(data):
    options = replace(TOY, epochs=1, batch_size=64)  # one step
    trained = train_variant(tiny_net, data, options, seed=3)
    torch.manual_seed(3)
    net = tiny_net()
    images, labels = next(Batches(data, 64, 3).training())
    loss = F.cross_entropy(net(images), labels)
    found = torch.autograd.grad(loss, list(net.parameters()))
    expected = math.sqrt(sum(float(g.double().square().sum()) for g in found))
    assert trained.gradient_norms[0] == pytest.approx(expected, rel=1e-4)
    assert trained.epochs[0].train_loss == pytest.approx(loss.item(), rel=1e-5)


def test_divergence_is_recorded(data):
    class Explodes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return torch.exp(1e4 * x.flatten(1)[:, :4].abs()) * self.weight

    run = train_variant(Explodes, data, replace(TOY, epochs=3))
    assert run.diverged == 1
    assert len(run.epochs) == 1
    assert not math.isfinite(run.final("train_loss"))
    table = Comparison({"explodes": [run]}).table("T")
    assert table.column("diverged") == [1]


def test_compare_trains_every_variant_with_every_seed(data):
    variants = {"v2": tiny_net, "v1": lambda: tiny_net(ordering=ORIGINAL)}
    found = compare(variants, data, TOY, {"v1": replace(TOY, epochs=1)})
    assert [[run.seed for run in runs] for runs in found.histories.values()] == [[0, 1], [0, 1]]
    assert [len(run.epochs) for run in found.histories["v1"]] == [1, 1]
    assert found.histories["v2"][1].curve("train_loss") == pytest.approx(
        train_variant(tiny_net, data, TOY, 1).curve("train_loss"), rel=1e-6
    )
    json.dumps(found.series())


def test_a_comparisons_figures_and_words():
    both = Comparison(
        {
            "a": [history("a", 0, [0.5, 0.8]), history("a", 1, [0.95, 0.9])],
            "b": [history("b", 0, [0.5, 0.7]), history("b", 1, [0.5, 0.6], diverged=2)],
        },
        target=0.75,
    )
    assert both.spread("a") == Spread((0.8, 0.9))
    assert both.spread("a").mean == pytest.approx(0.85)
    assert both.spread("a").std == pytest.approx(0.1 / math.sqrt(2))
    assert both.difference("a", "b").values == pytest.approx((0.1, 0.3))
    assert both.epochs_to_target("a") == "1.5"
    assert both.epochs_to_target("b") == "not reached"
    better = both.sentence("a", "b")
    assert "20.00 points above" in better
    assert "in every one of them" in better
    assert "b diverged in 1 of 2 runs" in better
    assert "20.00 points below" in both.sentence("b", "a")
    # Within the spread, against the sign of a seed, or of one seed, no order.
    mixed = Comparison({"a": both.histories["a"], "b": [history("b", s, [0.84]) for s in (0, 1)]})
    assert mixed.sentence("a", "b").startswith("No order can be read over 2 seeds: a (85.00 ±")
    near = Comparison({"a": both.histories["a"], "b": [history("b", s, [0.79]) for s in (0, 1)]})
    assert near.sentence("b", "a").startswith("No order can be read over 2 seeds")
    alone = Comparison({name: runs[:1] for name, runs in mixed.histories.items()})
    assert alone.sentence("a", "b") == (
        "No order can be read over 1 seed: a (80.00 %) ends -4.00 points from b (84.00 %)."
    )
    same = Comparison({"a": both.histories["a"], "b": both.histories["a"]})
    assert "end at the same test accuracy over 2 seeds" in same.sentence("a", "b")


def test_capture_by_hooks_is_autograds(data):
    torch.manual_seed(0)
    net = tiny_net()
    images, labels = next(Batches(data, 16, 0).training())
    with Capture({"unit": net.units[1]}) as captured:
        F.cross_entropy(net(images), labels).backward()
    x = net.units[0](net.stem(images)).detach()
    y = net.units[1](x).detach().requires_grad_()
    F.cross_entropy(net.fc(net.head(y).mean((2, 3))), labels).backward()
    assert captured.shape["unit"] == (16, 8, 4, 4)
    assert captured.mean["unit"] == pytest.approx(y.mean().item(), abs=1e-5)
    assert captured.std["unit"] == pytest.approx(y.std(correction=0).item(), rel=1e-5)
    assert captured.gradient["unit"] == pytest.approx(float(y.grad.norm()), rel=1e-4)
    assert not net.units[1]._forward_hooks


def test_architecture_is_read_from_the_blocks():
    post, pre = trace(post_activation_block(4, 4), 4), trace(PreActBlock(4, 4), 4)
    kinds = [node.kind for node in post.nodes if node.inputs]
    assert kinds == ["conv", "norm", "act", "conv", "norm", "add", "act"]
    kinds = [node.kind for node in pre.nodes if node.inputs]
    assert kinds == ["norm", "act", "conv", "norm", "act", "conv", "add"]
    assert [node.kind for node in post.after_addition()] == ["act"]
    assert pre.after_addition() == []
    assert [node.kind for node in pre.shortest_path()] == ["input", "add"]
    strided = trace(PreActBlock(4, 8, 2), 4)
    way = [node.label for node in strided.shortest_path()]
    assert way == ["x", "BN", "ReLU", "1x1 conv, 8, stride 2", "+"]
    assert strided.nodes[-1].shape == (8, 16, 16)
    other = trace(PreActBlock(4, 4, act="gelu"), 4)  # what is drawn follows the module
    assert [node.label for node in other.nodes if node.kind == "act"] == ["GELU", "GELU"]


def test_architecture_study():
    result = architecture(width=4)
    same = result.table("Operations, same shape")
    assert sum(same.column("parameters")) == 2 * (2 * 9 * 16 + 2 * 8)
    assert "the shortcut's way from input to output passes ReLU" in result.conclusions[0]
    assert "nothing follows the addition" in result.conclusions[1]
    texts = [
        text.get_text() for axes in result.figures["blocks-same-shape"].axes for text in axes.texts
    ]
    assert texts.count("3x3 conv, 4") == 4
    assert texts.count("BN") == 4


def test_trace_leaves_the_block_as_it_was():
    module = PreActBlock(4, 4)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trace(module, 4)
    assert module.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_block_by_hand_is_the_block(data):
    result = block(data=data, width=4, batch_size=16)
    assert result.table("By hand").rows == [["output", 0.0], ["gradient at the input", 0.0]]
    steps = result.table("Steps")
    names = ["x", "bn1", "relu1", "conv1", "bn2", "relu2", "conv2", "out"]
    assert steps.column("step") == names
    mean, std, zeros, norm = (
        dict(zip(names, steps.column(c))) for c in ("mean", "std", "zeros %", "gradient norm")
    )
    assert mean["bn1"] == pytest.approx(0, abs=1e-6)
    assert std["bn1"] == pytest.approx(1, abs=1e-3)
    assert 20 < zeros["relu1"] < 80
    assert zeros["bn1"] < 1
    assert norm["out"] == pytest.approx(1, rel=1e-5)
    assert norm["conv2"] == pytest.approx(1, rel=1e-5)
    # dx = g + dF: the triangle inequality between the study's three norms.
    through = result.series["gradient_through_F"]
    assert abs(through - 1) <= norm["x"] <= through + 1
    assert steps.column("shape")[0] == "16x4x8x8"


def test_depth_study(data):
    result = depth(data=data, depth=(8, 20, 60), width=4, batch_size=4)
    stacks = result.table("Stacks")
    assert stacks.column("layers") == [8, 20, 60]
    assert stacks.column("blocks") == [4, 10, 30]
    per_block, rest = 2 * (9 * 16 + 8), 9 * 4 + 8 + 4 * 4 + 4
    assert stacks.column("parameters") == [n * per_block + rest for n in (4, 10, 30)]
    cifar = result.table("CIFAR nets")
    assert cifar.column("layers") == [8, 20]
    net = PreActResNet.from_depth(20, num_classes=4, in_channels=1)
    assert cifar.column("parameters")[1] == sum(p.numel() for p in net.parameters())
    eager, segment = (stacks.column(f"peak MB, {mode}")[-1] for mode in ("eager", "segment"))
    assert segment < eager / 2
    assert f"{eager / segment:.1f} times less" in result.conclusions[-1]

    torch.manual_seed(0)
    net = stack(60, 4, data, "eager")
    images, labels = next(Batches(data, 4, 0).training())
    x = images.clone().requires_grad_()
    F.cross_entropy(net(x), labels).backward()
    assert stacks.column("gradient norm at the input")[-1] == pytest.approx(
        float(x.grad.norm()), rel=1e-3
    )
    assert stacks.column("gradient norm of the parameters")[-1] == pytest.approx(
        float(gradient_norm(net)), rel=1e-3
    )
    assert stacks.column("vanishes") == [
        norm < 1e-3 for norm in stacks.column("gradient norm at the input")
    ]


def test_a_depth_that_does_not_fit_eagerly_has_no_peak(data, monkeypatch):
    def full(model, images, labels):
        if model.backend == "eager":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measured(model, images, labels)

    module = sys.modules["resnetv2.studies.depth"]  # its name in the package is the study's
    measured = module._step
    monkeypatch.setattr(module, "_step", full)
    result = depth(data=data, depth=(6, 14), width=4, batch_size=4)
    stacks = result.table("Stacks")
    assert stacks.column("peak MB, eager") == [None, None]
    assert stacks.column("eager / segment") == [None, None]
    segment = stacks.column("peak MB, segment")[-1]
    expected = f"does not fit this GPU eagerly; in segments it peaks at {segment:.1f} MB."
    assert result.conclusions[-1].endswith(expected)


def test_depth_must_fit_blocks():
    with pytest.raises(InputError, match=r"depth must be even .* got 21"):
        depth(depth=21)


def test_residual_norms_of_known_blocks():
    x = torch.randn(5, 4, 6, 6)
    pre, post = PreActBlock(4, 4), post_activation_block(4, 4)
    nn.init.zeros_(pre.conv2.weight)
    nn.init.zeros_(post.bn2.weight)
    assert residual_norms(pre, x)[0] == [0.0] * 5
    # With F = 0 the original block is relu(x): what changes are the negative values.
    changes, sizes, zeros = residual_norms(post, x)
    assert changes == pytest.approx(F.relu(-x).flatten(1).norm(dim=1).tolist(), rel=1e-5)
    assert sizes == pytest.approx(x.flatten(1).norm(dim=1).tolist())
    assert zeros == int((x <= 0).sum())


def test_block_norms_of_a_net(data):
    net = ResidualNetwork([2], [4], num_classes=4, in_channels=1)
    images, _ = next(Batches(data, 16, 0).training())
    found = block_norms(net, images)
    x = net.stem(images)
    for unit, (size, change) in zip(net.units, found):
        out = unit(x)
        assert size == pytest.approx(float(x.flatten(1).norm(dim=1).mean()), rel=1e-5)
        assert change == pytest.approx(float((out - x).flatten(1).norm(dim=1).mean()), rel=1e-4)
        x = out


def test_identity_study(data):
    result = identity(data=data, depth=4, width=4, epochs=2, samples=10, batch_size=16)
    alone = result.table("One untrained block")
    assert alone.column("block") == [POST, PRE]
    assert alone.column("inputs") == [10, 10]
    for name, mean, low, high in zip(
        *(alone.column(c) for c in ("block", "mean |out - in|", "min", "max"))
    ):
        values = result.series["change"][name]
        assert mean == pytest.approx(sum(values) / 10)
        assert [low, high] == [min(values), max(values)]
    zeros = dict(zip(alone.column("block"), alone.column("zeros in out %")))
    assert zeros[PRE] < 1 < zeros[POST]
    assert len(result.tables) == 3
    trained, untrained = (
        result.series["blocks"][f"{PRE}, {when}"]["residual"] for when in ("trained", "untrained")
    )
    assert trained != untrained
    for name, curves in result.series["blocks"].items():
        for size, change, ratio in zip(*(curves[k] for k in ("identity", "residual", "ratio"))):
            assert ratio == pytest.approx(change / size), name


def test_gradients_study(data):
    result = gradients(data=data, depth=(4, 12), width=4, batch_size=16, seeds=2)
    table = result.table("Gradient norms")
    assert table.column("layers") == [4, 4, 12, 12]
    curves = result.series["at_outputs"]["12 layers"]
    assert {name: len(curve) for name, curve in curves.items()} == {POST: 7, PRE: 7}
    assert len(result.series["of_weights"]["12 layers"][PRE]) == 13
    assert table.column("gradient after the stem")[3] == curves[PRE][0]
    assert table.column("least seed")[3] <= table.column("first / last")[3]

    torch.manual_seed(0)
    net = ResidualNetwork([2], [4], ordering=FULL_PREACTIVATION, num_classes=4, in_channels=1)
    images, labels = next(Batches(data, 16, 0).training())
    found, weights = layer_gradients(net, images, labels)
    streams = [net.stem(images)]
    for unit in net.units:
        streams.append(unit(streams[-1]))
    loss = F.cross_entropy(net.fc(net.head(streams[-1]).mean((2, 3))), labels)
    expected = [float(g.norm()) for g in torch.autograd.grad(loss, streams)]
    assert found == pytest.approx(expected, rel=1e-4)
    assert len(weights) == 5


def test_results_as_json_and_text(tmp_path):
    table = Table("T", ["name", "x", "y"], [["a", 1234567, math.nan], ["b", None, 0.00012345]])
    result = Result([table], ["One & two."], series={"curve": [1.0, math.inf]})
    (path,) = result.save(tmp_path / "new")
    record = json.loads(path.read_text())
    assert record["tables"][0]["rows"] == [["a", 1234567, None], ["b", None, 0.00012345]]
    assert record["series"]["curve"] == [1.0, None]
    lines = str(table).splitlines()
    assert lines[3].split() == ["a", "1,234,567", "nan"]
    assert lines[4].split() == ["b", "-", "1.23e-04"]
    with pytest.raises(ValueError, match="3 columns, a row of 2"):
        Table("T", ["name", "x", "y"], [["a", 1]])
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to"):
        result.save(tmp_path / "file")


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.alts = []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.alts += [found["alt"]] if tag == "img" else []
        self.targets += [found[key] for key in ("src", "href") if key in found]
        self.ids += [found["id"]] if "id" in found else []

    def handle_data(self, data):
        self.text += data


def test_page_holds_everything_and_needs_nothing(data):
    results = [architecture(width=4), gradients(data=data, depth=4, width=4, seeds=1)]
    results[0].conclusions.append("a < b & <script>")
    page = Links()
    page.feed(render(results))
    assert page.ids == ["architecture", "gradients"]
    assert [t for t in page.targets if t.startswith("#")] == ["#architecture", "#gradients"]
    outside = [t for t in page.targets if not t.startswith(("#", "data:"))]
    assert outside == ["https://arxiv.org/abs/1603.05027"]
    pictures = [t for t in page.targets if t.startswith("data:image/png;base64,")]
    assert len(pictures) == sum(len(result.figures) for result in results) == 4
    for picture in pictures:
        assert base64.b64decode(picture.partition(",")[2]).startswith(b"\x89PNG")
    for result in results:
        for sentence in result.conclusions:
            assert sentence in page.text
        for table in result.tables:
            assert all(cell in page.text for row in table.cells() for cell in row)


def test_page_says_what_its_pictures_show(data):
    """A sentence, not a file's name; titles and curves for who cannot see them."""
    results = [architecture(width=4), gradients(data=data, depth=4, width=4, seeds=1)]
    page = Links()
    page.feed(render(results))
    assert page.alts[0] == (
        "From the input down to the output, the shortcut on the right: post-activation (ResNet V1) "
        "and pre-activation (ResNet V2). post-activation (ResNet V1). pre-activation (ResNet V2)."
    )
    assert page.alts[2] == (
        "Gradient norm at its output against block, a panel for each depth. 4 layers. Shown: "
        "post-activation (ResNet V1), pre-activation (ResNet V2)."
    )
    for result in results:
        for figure in result.figures.values():
            assert figure.caption.endswith(".")
            assert figure.get_suptitle() or all(axes.get_title() for axes in figure.axes)


def test_no_line_joins_what_has_no_order():
    values = {"a": {"x": [1.0, 2.0], "y": [3.0]}, "b": {"x": [2.0], "y": [1.0]}}
    (axes,) = ResNetV2Visualizer().plot_groups(values, "test accuracy (%)").axes
    assert {line.get_linestyle() for line in axes.get_lines()} == {"None"}


def test_logarithmic_axes_have_plain_numbers():
    picture = ResNetV2Visualizer().plot_lines({"a": ([1, 2], [0.6, 4.1])}, "n", "MB", log="y")
    picture.draw_without_rendering()
    labels = [label.get_text() for label in picture.axes[0].get_yticklabels()]
    assert {"1", "2"} < set(labels)
    assert not any("10^" in label or "times" in label for label in labels)


def test_curves_and_bars_draw_the_histories():
    runs = {"a": [history("a", 0, [0.5, 0.8]), history("a", 1, [0.7, 0.6])]}
    picture = ResNetV2Visualizer().plot_curves(runs, "test_accuracy")
    (line,) = picture.axes[0].get_lines()
    assert line.get_ydata() == pytest.approx([60, 70])
    bars = ResNetV2Visualizer().plot_bars(Comparison(runs))
    assert bars.axes[0].patches[0].get_width() == pytest.approx(70)
    assert picture._repr_png_().startswith(b"\x89PNG")


def test_ten_curves_are_told_apart():
    runs = {f"v{i}": [history(f"v{i}", 0, [0.1 * i, 0.5])] for i in range(10)}
    lines = ResNetV2Visualizer().plot_curves(runs, "test_accuracy").axes[0].get_lines()
    looks = {(line.get_color(), line.get_marker()) for line in lines}
    assert len(looks) == len({line.get_color() for line in lines}) == 10


def run(*arguments: str):
    return CliRunner().invoke(main, ["study", "--no-progress", *arguments])


def test_a_folder_that_cannot_be_made_is_refused_at_once(tmp_path, monkeypatch):
    def ran(*_, **__):
        pytest.fail("the study ran")

    monkeypatch.setattr("resnetv2.studies.harness.Study.__call__", ran)
    (tmp_path / "file").write_text("")
    result = run("architecture", "--out", str(tmp_path / "file" / "results"))
    assert result.exit_code == 2, result.output


def test_command_prints_and_writes(tmp_path):
    result = run("architecture", "--width", "8", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "architecture" / "results.json").read_text())
    assert record["settings"]["width"] == 8
    for sentence in record["conclusions"]:
        assert sentence in result.stdout
    assert not (tmp_path / "index.html").exists()


def test_several_names_write_a_page(tmp_path):
    result = run(
        "architecture", "block", "--width", "4", "--batch-size", "8", "--out", str(tmp_path)
    )
    assert result.exit_code == 0, result.output
    page = (tmp_path / "index.html").read_text()
    assert re.findall(r'<section id="([\w-]+)"', page) == ["architecture", "block"]


def test_help_and_list_name_every_study():
    described = CliRunner().invoke(main, ["study", "--help"]).output
    listed = CliRunner().invoke(main, ["study", "--list"]).output
    for name, each in STUDIES.items():
        assert re.search(rf"\b{name}\b", described)
        assert f"{name}\n    {each.question}" in listed


@pytest.mark.parametrize("name", STUDIES)
def test_the_printed_command_has_all_options(name: str) -> None:
    """Parsed again, it gives the options that the study ran with, of every preset too."""
    each = STUDIES[name]
    changed = {
        "epochs": 3, "lr": 0.05, "augment": False, "dtype": "bf16", "train_images": 50,
        "schedule": "step", "seeds": 1,
    }  # fmt: skip
    given = {option: value for option, value in changed.items() if option in each.defaults}
    for preset in (None, *each.presets):
        options = each.options(preset, **given)
        words = shlex.split(each.command(options))
        assert words[:3] == ["resnetv2", "study", name]
        parsed = study_command.make_context("study", words[2:]).params
        assert parsed["names"] == (name,)
        assert parsed["threads"] == torch.get_num_threads()
        heard = {*fields_of(StudyOptions)}
        values = {key: x for key, x in parsed.items() if key in heard and x is not None}
        assert replace(each.options(**_settings(each, None, values, False)), root="data") == (
            replace(options, root="data")
        )


def test_long_tables_are_folded_and_numbers_are_set_from_the_right() -> None:
    columns = ["variant", "accuracy", "epochs"]
    rows = [["1x1 conv", "97.2 ± 0.3", "not reached"], ["dropout", "9.1 ± 2", "3 (1 of 2 runs)"]]
    short, long = Table("Short", columns, rows), Table("Long", columns, rows * 11)
    settings = {"device": "cpu", "threads": 1, "versions": {"torch": "2"}}
    page = render([Result([short, long], [], settings=settings)])
    assert page.count('<th class="text">') == page.count('<th class="text">variant</th>') == 2
    assert "<summary>22 rows</summary>" in page
    assert "<summary>2 rows</summary>" not in page
    assert page.count("<details>") == page.count("</details>") == 2
