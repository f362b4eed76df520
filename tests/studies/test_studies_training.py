"""The studies that train: their units against formulas, and what they conclude from histories."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import nn

from resnetv2 import PreActBlock, PreActResNet
from resnetv2.cli.command import main
from resnetv2.data.batches import ImageData, Split
from resnetv2.errors import InputError
from resnetv2.studies import STUDIES, training
from resnetv2.studies import variants as v
from resnetv2.studies.bn_position import first_gradients
from resnetv2.studies.comparing import against, best, near_chance
from resnetv2.studies.harness import Comparison, History, StudyOptions
from resnetv2.studies.hybrid import dose, mixes
from resnetv2.studies.norms import group_norm, layer_norm
from resnetv2.studies.ordering import order_of_table_2
from resnetv2.studies.recipe import ALL, NOTHING, PLAIN, V1, V2, effects, label, regimes
from resnetv2.studies.shortcuts import JOINS, agreement
from resnetv2.studies.versions import duration, epochs_table, losses, speed
from resnetv2.training.metrics import EpochMetrics

pytestmark = pytest.mark.usefixtures("one_thread")


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(ordering: v.Ordering, join=lambda channels: v.Join(), **options) -> v.ResidualUnit:
    torch.manual_seed(1)
    module = v.ResidualUnit(6, 6, ordering=ordering, join=join, **options).double()
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            nn.init.uniform_(child.weight, 0.5, 1.5)
            nn.init.uniform_(child.bias, -0.5, 0.5)
    return module


# Figure 4, written out; bn and conv are a unit's own children.
FORMULAS = {
    "original": lambda u, x: F.relu(x + u.bn2(u.conv2(F.relu(u.bn1(u.conv1(x)))))),
    "BN after addition": lambda u, x: F.relu(u.bn2(x + u.conv2(F.relu(u.bn1(u.conv1(x)))))),
    "ReLU before addition": lambda u, x: x + F.relu(u.bn2(u.conv2(F.relu(u.bn1(u.conv1(x)))))),
    "ReLU-only pre-activation": (
        lambda u, x: x + u.bn2(u.conv2(F.relu(u.bn1(u.conv1(F.relu(x))))))
    ),
    "full pre-activation": lambda u, x: x + u.conv2(F.relu(u.bn2(u.conv1(F.relu(u.bn1(x)))))),
    "ReLU-BN-conv": lambda u, x: x + u.conv2(u.bn2(F.relu(u.conv1(u.bn1(F.relu(x)))))),
    "BN-conv, no ReLU": lambda u, x: x + u.conv2(u.bn2(u.conv1(u.bn1(x)))),
    "no BN": lambda u, x: x + u.conv2(F.relu(u.conv1(F.relu(x)))),
    "BN after conv": lambda u, x: x + u.bn2(u.conv2(F.relu(u.bn1(u.conv1(F.relu(x)))))),
    "BN before conv": lambda u, x: x + u.conv2(F.relu(u.bn2(u.conv1(F.relu(u.bn1(x)))))),
}
ORDERINGS = {each.name: each for each in vars(v).values() if isinstance(each, v.Ordering)}


@pytest.mark.parametrize("name", ORDERINGS)
def test_unit_computes_its_formula(name):
    u, x = unit(ORDERINGS[name]), images(2, 6, 5, 5)
    torch.testing.assert_close(u(x), FORMULAS[name](u, x), rtol=1e-12, atol=1e-12)


def test_full_preactivation_is_the_library_block():
    for stride, channels in ((1, 6), (2, 12)):
        block = PreActBlock(6, channels, stride, backend="eager").double()
        plain = v.ResidualUnit(6, channels, stride, ordering=v.FULL_PREACTIVATION).double()
        plain.load_state_dict(block.state_dict())
        x = images(2, 6, 7, 7)
        torch.testing.assert_close(plain(x), block(x), rtol=0, atol=0)


def test_full_preactivation_network_is_the_library_network():
    layers, widths = v.layout(20, 8)
    ours = PreActResNet("basic", layers, widths=widths, stem_width=8, backend="eager").double()
    plain = v.ResidualNetwork(layers, widths).double()
    with torch.no_grad():
        for theirs, mine in zip(_in_order(ours), _in_order(plain), strict=True):
            mine.copy_(theirs)
    x = images(2, 3, 8, 8)
    torch.testing.assert_close(plain(x), ours(x), rtol=1e-12, atol=1e-12)


def _in_order(net: nn.Module) -> list[torch.Tensor]:
    """Parameters of stem, units, head and classifier; a unit's by name, for its order of children
    is its own."""
    if isinstance(net, PreActResNet):
        parts = [net.conv1, *(block for stage in net.stages for block in stage), net.bn, net.fc]
    else:
        parts = [net.stem, *net.units, net.head, net.fc]
    return [p for part in parts for _, p in sorted(part.named_parameters())]


SHORTCUT_FORMULAS = {
    "identity": lambda join, x, f: x + f,
    "scaled: 0.5 x + F": lambda join, x, f: 0.5 * x + f,
    "scaled: 0.5 x + 0.5 F": lambda join, x, f: 0.5 * (x + f),
    "exclusive gating, bias 0": lambda join, x, f: (
        x + torch.sigmoid(F.conv2d(x, join.gate.weight, join.gate.bias)) * (f - x)
    ),
    "shortcut-only gating, bias 0": lambda join, x, f: (
        x + f - x * torch.sigmoid(F.conv2d(x, join.gate.weight, join.gate.bias))
    ),
    "1x1 convolution": lambda join, x, f: F.conv2d(x, join.conv.weight) + f,
    "dropout 0.5": lambda join, x, f: 0.5 * x + f,
}
for bias in ("exclusive", "shortcut-only"):
    SHORTCUT_FORMULAS[f"{bias} gating, bias -6"] = SHORTCUT_FORMULAS[f"{bias} gating, bias 0"]


@pytest.mark.parametrize("name", JOINS)
def test_shortcut_computes_its_formula(name):
    torch.manual_seed(0)
    join = JOINS[name](6).double().eval()
    x, f = images(2, 6, 4, 4), images(2, 6, 4, 4, seed=1)
    torch.testing.assert_close(
        join(x, f), SHORTCUT_FORMULAS[name](join, x, f), rtol=1e-12, atol=1e-12
    )


def test_dropout_drops_half_of_the_shortcut_and_scales_nothing_up():
    torch.manual_seed(0)
    x = torch.ones(1, 8, 64, 64)
    out = v.DropoutShortcut(0.5)(x, torch.zeros_like(x))
    assert set(out.unique().tolist()) == {0.0, 1.0}
    # 32,768 draws: five standard deviations are 0.014.
    assert out.mean() == pytest.approx(0.5, abs=0.014)


def test_gates_begin_at_their_bias():
    net = v.ResidualNetwork([2], [6], join=lambda channels: v.ExclusiveGating(channels, -6.0))
    for module in net.modules():
        if isinstance(module, v.ExclusiveGating):
            assert torch.all(module.gate.bias == -6.0)
            g = module.g(torch.zeros(1, 6, 2, 2))
            torch.testing.assert_close(g, torch.full_like(g, 1 / (1 + torch.e**6)))


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_constant_scaling_shrinks_the_gradient_by_its_power(scale):
    """Equation (8): the shortcut's part of the gradient over L units is scale ** L."""
    length = 12
    net = nn.Sequential(
        *(
            unit(v.FULL_PREACTIVATION, join=lambda channels: v.ConstantScaling(scale))
            for _ in range(length)
        )
    )
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.weight)  # F = 0: what is left is the shortcut
    x = images(1, 6, 4, 4).requires_grad_()
    g = images(1, 6, 4, 4, seed=1)
    net(x).backward(g)
    torch.testing.assert_close(x.grad, scale**length * g)


def test_original_and_v2_have_equally_many_parameters():
    for depth in (20, 56):
        layers, widths = v.layout(depth)
        counts = {
            each.name: parameters(v.ResidualNetwork(layers, widths, ordering=each))
            for each in (
                v.ORIGINAL,
                v.BN_AFTER_ADDITION,
                v.RELU_BEFORE_ADDITION,
                v.RELU_ONLY_PREACTIVATION,
                v.FULL_PREACTIVATION,
            )
        }
        assert set(counts.values()) == {parameters(PreActResNet.from_depth(depth))}


def test_layout_counts_layers():
    assert v.layout(110) == ([18, 18, 18], [16, 32, 64])
    assert v.layout(50, 64, stages=1) == ([25], [64])
    for depth, stages, message in ((21, 3, "20 or 26"), (7, 1, "6 or 8"), (20, 2, "1 or 3")):
        with pytest.raises(InputError, match=message):
            v.layout(depth, 16, stages)


def test_norms_normalise_over_what_they_say():
    x = 3 + 5 * images(2, 8, 6, 6)
    grouped = group_norm(8).double()(x).unflatten(1, (2, 4))
    layered = layer_norm(8).double()(x)
    for values in (grouped.flatten(2), layered.flatten(1)[:, None]):
        mean, variance = values.mean(-1), values.var(-1, correction=0)
        torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-10)
        torch.testing.assert_close(variance, torch.ones_like(variance), rtol=0, atol=1e-5)


# What is concluded, from crafted histories, both ways round.


def history(
    name: str,
    seed: int,
    accuracy: float,
    loss: float = 1.0,
    seconds: float = 1.0,
    before: float = 0.1,
) -> History:
    """Two epochs, of accuracy `before` and `accuracy`."""
    epochs = [
        EpochMetrics(epoch, 0.1, loss, value, loss, value, seconds, 100.0)
        for epoch, value in ((1, before), (2, accuracy))
    ]
    return History(name, seed, 10, epochs, [2.0, 1.0])


def comparison(target: float = 0.9, **runs: list[float]) -> Comparison:
    return Comparison(
        {
            name.replace("_", " "): [
                history(name, seed, value) for seed, value in enumerate(values)
            ]
            for name, values in runs.items()
        },
        target,
    )


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([0.80, 0.81, 0.79], [0.60, 0.61, 0.59], 1),
        ([0.60, 0.61, 0.59], [0.80, 0.81, 0.79], -1),
        ([0.62, 0.61, 0.59], [0.60, 0.615, 0.60], 0),  # signs differ
        ([0.90, 0.50, 0.70], [0.88, 0.48, 0.68], 0),  # signs agree, far within the spread
        ([0.90], [0.10], 0),  # one seed has no spread
        ([0.5, 0.5], [0.5, 0.5], 0),
    ],
    ids=["above", "below", "signs", "spread", "one seed", "equal"],
)
def test_standing(first, second, expected):
    assert comparison(a=first, b=second).standing("a", "b") == expected


def test_against_groups_by_what_the_spread_bears_out():
    runs = comparison(base=[0.60, 0.62], low=[0.30, 0.31], high=[0.90, 0.91], close=[0.605, 0.615])
    worse, better, close = against(runs, "base")
    assert worse.startswith("Worse than base (61.0 ± 1.4 %)")
    assert "low (-30.5 points)" in worse
    assert "high" not in worse
    assert better.startswith("Better than base")
    assert "high (+29.5 points)" in better
    assert close.startswith("Not told apart from base")
    assert "close (+0.0 points)" in close
    (alone,) = against(comparison(base=[0.6], other=[0.7]), "base")
    assert "one seed, so without a spread" in alone
    assert "other (+10.0 points)" in alone


def test_against_counts_what_diverged():
    runs = comparison(base=[0.60, 0.62], lost=[0.1, 0.1])
    runs.histories["lost"][1].diverged = 2
    assert "lost (-51.0 points, 1 of 2 diverged)" in against(runs, "base")[0]


def test_best_names_those_it_cannot_tell_apart():
    runs = comparison(a=[0.60, 0.62], b=[0.61, 0.62], c=[0.2, 0.21])
    assert best(runs) == "Highest mean test accuracy: b (61.5 ± 0.7 %); not told apart from it: a."
    assert best(comparison(a=[0.9, 0.9], b=[0.1, 0.1])).endswith(
        "(90.0 ± 0.0 %), apart from all others."
    )


def test_no_order_where_none_can_be_read():
    close = best(comparison(a=[0.60, 0.62], b=[0.61, 0.62]))
    assert close.startswith("No order can be read in test accuracy: b has the highest mean")
    assert best(comparison(a=[0.6], b=[0.7])).startswith("No order can be read from one seed each")
    guessing = comparison(a=[0.11, 0.10], b=[0.13, 0.12])
    assert near_chance(guessing, 10) == (
        "No order can be read: every net is near chance, the best at 12.5 %, where guessing among "
        "10 classes gives 10.0 %. More epochs may tell."
    )
    assert near_chance(comparison(a=[0.11, 0.10], b=[0.23, 0.12]), 10) is None
    assert near_chance(guessing, 100) is None


def both(first: float, second: float) -> Comparison:
    """The original ResNet and V2, two seeds each, losses as given."""
    losses_of = {V1: first, V2: second}
    return Comparison(
        {
            name: [history(name, seed, 0.95, loss + 0.01 * seed) for seed in range(2)]
            for name, loss in losses_of.items()
        }
    )


def test_versions_says_which_loss_is_lower_both_ways():
    assert losses(both(2.0, 1.0)).startswith("ResNet V2 ends with a lower training loss (1.005")
    assert losses(both(1.0, 2.0)).startswith("ResNet V2 ends with a higher training loss (2.005")
    assert losses(both(1.0, 1.005)).startswith("Not told apart by 2 seeds: the training losses")
    lost = both(1.0, 2.0)
    lost.histories[V1][0].diverged = 1
    assert losses(lost) == (
        "The training loss stopped being finite: original ResNet in 1 of 2 runs."
    )


def test_versions_speed_time_and_epochs():
    runs = Comparison(
        {
            V1: [history(V1, 0, 0.5, seconds=2.0)],
            V2: [history(V2, 0, 0.95, seconds=3.0, before=0.92)],
        }
    )
    assert speed(runs) == (
        "Epochs to 90 % test accuracy: original ResNet not reached, ResNet V2 1."
    )
    assert speed(replace(runs, target=0.99)) == "Neither reaches 99 % test accuracy."
    assert duration(runs).startswith("Times are not compared: ")
    thrice = {
        name: [history(name, seed, 0.5, seconds=seconds) for seed in range(3)]
        for name, seconds in ((V1, 2.0), (V2, 3.0))
    }
    assert duration(Comparison(thrice)) == (
        "An epoch of ResNet V2 takes 1.50 times that of the original ResNet (median 3 s)."
    )
    table = epochs_table(runs)
    assert table.column("ResNet V2: test accuracy %") == pytest.approx([92.0, 95.0])
    assert table.column("original ResNet: gradient norm") == [2.0, 1.0]


def test_ordering_counts_the_papers_pairs():
    errors = {name: [1 - error / 100] * 2 for name, error in TABLE_2_BY_ERROR.items()}
    as_paper = Comparison(
        {n: [history(n, s, a) for s, a in enumerate(e)] for n, e in errors.items()}
    )
    assert "10 pairs of Table 2's orders, 10 stand" in order_of_table_2(as_paper)
    turned = Comparison(
        {n: [history(n, s, 1 - a) for s, a in enumerate(e)] for n, e in errors.items()}
    )
    assert "10 pairs of Table 2's orders, 0 stand" in order_of_table_2(turned)


TABLE_2_BY_ERROR = {
    "full pre-activation": 6.37,
    "original": 6.61,
    "ReLU-only pre-activation": 6.71,
    "ReLU before addition": 7.84,
    "BN after addition": 8.17,
}


def test_shortcuts_count_what_is_worse_both_ways():
    runs = comparison(identity=[0.6, 0.61], gate=[0.2, 0.21], scaled=[0.8, 0.81], same=[0.61, 0.6])
    assert agreement(runs) == (
        "Worse than the identity by more than the spread over seeds: 1 of 3 here, all 3 in the "
        "paper; better: scaled."
    )


def test_bn_position_says_when_a_gradient_is_not_finite():
    runs = comparison(none=[0.1, 0.1], before=[0.9, 0.9])
    runs.histories["none"][1].gradient_norms[0] = float("nan")
    assert first_gradients(runs) == (
        "Gradient norm over the first epoch: none not finite, before 2 ± 0."
    )


def test_hybrid_mixes_and_where_they_lie():
    mix = mixes(5)
    assert [len(orderings) for orderings in mix.values()] == [5] * 5
    assert [o.name for o in mix["alternating"]] == (
        ["full pre-activation", "original"] * 2 + ["full pre-activation"]
    )
    clean = {"all post-activation": 0, "middle": 2, "above": 3, "all pre-activation": 5}
    runs = Comparison(
        {name: [history(name, 0, accuracy)] for name, accuracy in zip(clean, (0.5, 0.6, 0.9, 0.7))}
    )
    assert dose(runs, clean).startswith("1 of 2 mixes lie between")
    assert dose(runs, clean).endswith(": middle.")


@pytest.mark.parametrize(
    ("accuracies", "larger"),
    [
        ({(V1, NOTHING): 0.5, (V2, NOTHING): 0.52, (V1, ALL): 0.8, (V2, ALL): 0.84}, "regime"),
        (
            {(V1, NOTHING): 0.2, (V2, NOTHING): 0.7, (V1, ALL): 0.25, (V2, ALL): 0.75},
            "architecture",
        ),
    ],
    ids=["regime", "architecture"],
)
def test_recipe_weighs_both(accuracies, larger):
    accuracies = accuracies | {(PLAIN, NOTHING): 0.1, (PLAIN, ALL): 0.1}
    runs = Comparison(
        {
            label(net, name): [history(net, seed, value) for seed in range(2)]
            for (net, name), value in accuracies.items()
        }
    )
    of_regime, of_v2, weighed = effects(runs)
    assert "plain net +0.0" in of_regime
    gain = 100 * (accuracies[V2, ALL] - accuracies[V1, ALL])
    assert f"{gain:+.1f} ± 0.0 points with them" in of_v2
    assert weighed.endswith(f"the {larger} makes the larger difference here, in each of 2 seeds.")
    alone = Comparison({name: each[:1] for name, each in runs.histories.items()})
    unread = "which of them makes the larger difference cannot be read from"
    assert effects(alone)[2].endswith(f"{unread} 1 seed.")
    # Where one seed's original net gains nothing by the regime, and the other's all of it.
    for seed, value in enumerate((accuracies[V1, NOTHING], 0.99)):
        runs.histories[label(V1, ALL)][seed] = history(V1, seed, value)
    runs.histories[label(V2, ALL)] = [history(V2, 0, 0.3), history(V2, 1, 0.99)]
    assert effects(runs)[2].endswith(f"{unread} 2 seeds.")


# The studies themselves, at toy size.


@pytest.fixture(scope="module")
def toy() -> ImageData:
    """Two classes told apart by their brightness."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(48) % 2
    shades = 64 + 128 * labels[:, None, None, None] + torch.zeros(48, 8, 8, 1)
    pixels = shades + 40 * torch.randn(48, 8, 8, 1, generator=generator)
    split = Split(pixels.clamp(0, 255).byte(), labels)
    return ImageData("toy", split, split, ("dark", "bright"), crop_padding=1, flip=True)


TOY = {"depth": 8, "stages": 3, "width": 4, "epochs": 2, "batch_size": 16, "lr": 0.05, "seeds": 2}
VARIANTS = {
    "versions": 2,
    "ordering": 7,
    "shortcuts": 9,
    "bn-position": 3,
    "norms": 3,
    "activations": 3,
    "hybrid": 5,
    "recipe": 15,
}


@pytest.mark.parametrize("name", VARIANTS)
def test_study_reports_its_own_runs(name, toy, tmp_path):
    result = STUDIES[name](data=toy, **TOY)
    assert len(result.series) == VARIANTS[name]
    training = result.table("Training")
    for variant, shown in zip(training.column("variant"), training.column("test accuracy %")):
        runs = result.series[variant]
        assert [run["seed"] for run in runs] == [0, 1]
        finals = torch.tensor([run["test_accuracy"][-1] for run in runs], dtype=torch.float64)
        assert shown == f"{100 * finals.mean():.2f} ± {100 * finals.std():.2f}"
        for run in runs:
            assert len(run["train_loss"]) == len(run["gradient_norm"]) == 2
            # The loss of the first epoch is of two classes: chance is log 2 = 0.69.
            assert 0 < run["train_loss"][0] < 10
    reference = result.conclusions[0]
    assert "seeds" in reference or "points" in reference
    paths = {path.name for path in result.save(tmp_path)}
    assert {"results.json", "curves.png"} < paths
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["conclusions"] == result.conclusions
    assert saved["settings"]["data"] == "toy"


def test_regimes_differ_in_one_ingredient_each(toy):
    options = StudyOptions(data=toy, batch_size=16, epochs=4, weight_decay=1e-3)
    made = regimes(options, options.load())
    facts = {
        name: (settings.warmup_steps, settings.weight_decay, data.crop_padding, data.flip)
        for name, (settings, data) in made.items()
    }
    assert facts == {
        "none of them": (0, 0.0, 0, False),
        "warm-up": (3, 0.0, 0, False),
        "augmentation": (0, 0.0, 1, True),
        "weight decay": (0, 1e-3, 0, False),
        "all three": (3, 1e-3, 1, True),
    }


def test_presets_are_the_documented_settings():
    noise = STUDIES["versions"].options("noise")
    data = noise.load()
    assert len(data.train) == 800
    assert torch.equal(data.train.images, data.test.images)  # no pattern that others could share
    assert v.layout(noise.one_depth, noise.width, noise.stages) == ([8], [64])
    assert (noise.batch_size, noise.epochs) == (64, 15)
    assert (noise.momentum, noise.weight_decay) == (0.9, 1e-4)
    assert [noise.rate(step, 12) for step in (0, 179)] == [0.01, 0.01]
    for name in ("versions", "bn-position"):
        cifar = STUDIES[name].options("cifar10")
        assert v.layout(cifar.one_depth, cifar.width, cifar.stages) == ([25], [64])
        assert (cifar.data, cifar.batch_size, cifar.epochs) == ("cifar10", 128, 30)
        rates = [cifar.rate(epoch * 390, 390) for epoch in (0, 9, 10, 20, 29)]
        assert rates == pytest.approx([0.01, 0.01, 1e-3, 1e-4, 1e-4])


def test_a_study_that_is_stopped_goes_on_behind_its_finished_nets(tmp_path, monkeypatch):
    command = ["study", "norms", "--depth", "8", "--epochs", "1", "--seeds", "1"]
    command += ["--train-images", "128", "--device", "cpu", "--out", str(tmp_path)]
    real, trained = training.train_variant, []

    def train_two(*args):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(args[4])
        return real(*args)

    monkeypatch.setattr(training, "train_variant", train_two)
    file = tmp_path / "norms" / "finished.jsonl"
    stopped = CliRunner().invoke(main, command)
    assert stopped.exit_code == 130
    assert stopped.stderr == (
        f"stopped; 2 finished nets kept in {file}: the same command goes on behind them\n"
    )
    with file.open("a") as text:
        text.write('{"key": "of a process that was k')
    # Otherwise trained nets are others.
    assert CliRunner().invoke(main, [*command, "--lr", "0.2"]).exit_code == 130
    kept = json.loads(file.read_text().partition("\n")[0])["history"]
    trained.clear()
    whole = CliRunner().invoke(main, command)
    assert whole.exit_code == 0, whole.output
    assert f"going on behind 2 nets in {file}" in whole.stderr
    assert trained == ["layer norm"]
    assert not file.exists()
    series = json.loads((tmp_path / "norms" / "results.json").read_text())["series"]
    (run,) = series["batch norm"]
    assert run["train_loss"] == [epoch["train_loss"] for epoch in kept["epochs"]]
