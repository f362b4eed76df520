"""Synchronised batch normalisation: processes compute what one computes on the global batch.

Promise: two and four gloo processes give one process's gradients, to 1e-5 in float32 and within
twice the error of norms written with PyTorch's differentiable all_reduce (its own SyncBatchNorm
refuses CPUs); after ten steps they are no further from float64 than those; with one collective per
norm and direction, and the same bits on all ranks.
"""

from __future__ import annotations

import copy
import io
import pickle
import statistics
from collections.abc import Callable, Iterable

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from resnetv2 import BottleneckPreActBlock, PreActBlock, explain, fuse
from resnetv2.core.sync import SyncBatchNorm, convert_sync_batchnorm
from resnetv2.kernels import reference
from resnetv2.kernels.inspect.yardstick import allowed
from resnetv2.kernels.operands import MEAN, SCALE, SHIFT, VAR
from resnetv2.kernels.ranks import gather_moments, gather_sums
from resnetv2.names import MEMORY_MODES
from tests.support.compilers import renamed
from tests.support.fuse_models import PlainNet
from tests.support.kernel_checks import in_turn
from tests.support.sync_ranks import (
    DRAWN,
    DRAWS,
    STEPS,
    TRAINING,
    VARIANTS,
    Case,
    Record,
    batch_of,
    foreign_model,
    model_of,
    share,
    tiny_batch,
    tiny_chain,
    train,
    worker,
)
from tests.support.yardstick import (
    DEVICE,
    assert_equal_steps,
    eager_twin,
    images,
    needs_triton,
    randomise,
    record_terms,
    step,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo"
    ),
]

EPS = torch.finfo(torch.float32).eps
STUDENT_OF_FOUR = 3.18  # 97.5 % quantile of Student's t for four draws
conversions = pytest.mark.parametrize(
    "convert",
    [nn.SyncBatchNorm.convert_sync_batchnorm, convert_sync_batchnorm],
    ids=["torchs", "ours"],
)
modes = pytest.mark.parametrize("memory", MEMORY_MODES)
pairs_and_all = pytest.mark.parametrize("group", ["pair", "all"], ids=["two-ranks", "four-ranks"])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[Record]:
    """What four processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, (str(folder),), nprocs=4)
    return [torch.load(folder / f"{rank}.pt") for rank in range(4)]


def exact(case: Case) -> Record:
    """One process in float64 on the global batch, child by child."""
    return train(eager_twin(model_of(case), torch.float64), case._replace(autocast=None))


def single(case: Case) -> Record:
    """One process on the global batch, in the case's precision."""
    return train(model_of(case), case)


@pytest.fixture(scope="module")
def truth() -> list[Record]:
    """The steps of each draw in float64."""
    return [exact(DRAWN[f"naive {seed}"]) for seed in range(DRAWS)]


@pytest.fixture(scope="module")
def terms() -> list[dict[str, float]]:
    """The norms of what each draw's first step adds up (``record_terms``)."""
    found = []
    for seed in range(DRAWS):
        case = DRAWN[f"naive {seed}"]._replace(steps=1, autocast=None)
        model = eager_twin(model_of(case), torch.float64)
        added = record_terms(model)
        train(model, case)
        found.append({name.replace("buffer", "first"): value for name, value in added.items()})
    return found


def names(record: Record, kind: str) -> list[str]:
    return [n for n in record if n.startswith(kind) and record[n].is_floating_point()]


def error(found: Record, expected: Record, kinds: Iterable[str], scale: float = 1.0) -> float:
    """Relative distance over all tensors of some kinds together ("grad", "first", "last")."""
    chosen = [name for kind in kinds for name in names(expected, kind)]
    assert chosen
    differences = [scale * found[n].double() - expected[n].double() for n in chosen]
    size = sum(float(expected[n].double().square().sum()) for n in chosen)
    return (sum(float(d.square().sum()) for d in differences) / size) ** 0.5


# --- the same as one process ----------------------------------------------------------------------


@pairs_and_all
@modes
def test_first_gradient_is_that_of_one_process(ranks, truth, group, memory):
    case = TRAINING[memory]._replace(steps=1)
    found = ranks[0][group][memory]
    assert error(found, single(case), ["grad"]) < 1e-5
    assert error(found, single(case), ["first"]) < 1e-6
    assert error(found, truth[0], ["grad"]) < 1e-5


@modes
def test_each_gradient_within_twice_the_naive_error(ranks, truth, terms, memory):
    """Over several draws of weights and images, the root of the mean square of the errors."""
    for name in [*names(truth[0], "grad"), *names(truth[0], "first")]:
        mean_square = {}
        for norms in (memory, "naive"):
            draws = [ranks[2]["draws"][f"{norms} {seed}"][name] for seed in range(DRAWS)]
            squares = [float((a.double() - b[name]).square().sum()) for a, b in zip(draws, truth)]
            mean_square[norms] = (sum(squares) / DRAWS) ** 0.5
        size = (sum(float(b[name].square().sum()) for b in truth) / DRAWS) ** 0.5
        added = (sum(draw.get(name, 0.0) ** 2 for draw in terms) / DRAWS) ** 0.5
        bound = allowed(mean_square["naive"], size, torch.float32, added)
        assert mean_square[memory] <= bound, f"{name}: {mean_square}, size {size:.2e}"


@pytest.fixture(scope="module")
def naive_errors(ranks, truth) -> list[float]:
    """How far the naive norms are from float64 after ten steps, in each draw and on four ranks."""
    draws = [(ranks[2]["draws"][f"naive {seed}"], truth[seed]) for seed in range(DRAWS)]
    draws.append((ranks[0]["all"]["naive"], truth[0]))
    return [error(found, expected, ["last"]) for found, expected in draws]


@modes
def test_no_further_off_than_naive_norms_after_ten_steps(ranks, naive_errors, truth, memory):
    """Weights and buffers over the draws: not further by more than chance (Student, 97.5 %).

    Both are off by about one rounding, 1.2e-7.
    """
    draws = [ranks[2]["draws"][f"{memory} {seed}"] for seed in range(DRAWS)]
    errors = [error(found, expected, ["last"]) for found, expected in zip(draws, truth)]
    errors.append(error(ranks[0]["all"][memory], truth[0], ["last"]))
    further = [mine - theirs for mine, theirs in zip(errors, naive_errors, strict=True)]
    chance = STUDENT_OF_FOUR * statistics.stdev(further) / len(further) ** 0.5
    assert statistics.fmean(further) <= chance, f"{errors}, naive {naive_errors}"
    assert max(errors) <= 2 * max(naive_errors)


@pairs_and_all
def test_same_bits_on_all_ranks(ranks, group):
    for name in TRAINING:
        for rank in range(1, 2 if group == "pair" else 4):
            assert_equal_steps(ranks[rank][group][name], ranks[0][group][name])


def test_same_bits_in_two_runs(ranks):
    for name in TRAINING:
        assert_equal_steps(ranks[0]["pair"][name], ranks[2]["draws"][f"{name} 0"])


def test_group_of_some_ranks(ranks):
    """Ranks 0 and 2, and 1 and 3, of four: the bits of two processes of their own."""
    for rank in range(4):
        assert_equal_steps(ranks[rank]["group"]["recompute"], ranks[0]["pair"]["recompute"])


def test_rank_outside_of_a_norms_group_is_alone(ranks):
    assert [rank["outside"] for rank in ranks] == [False, True, False, True]


# --- what differs from the usual ------------------------------------------------------------------

EXACT_VARIANTS = [name for name in VARIANTS if not name.startswith(("local", "bf16"))]


@pytest.mark.parametrize("name", EXACT_VARIANTS)
def test_variant_is_that_of_one_process(ranks, name):
    """Also the buffers after a step: cumulative averages, and none at all."""
    case = VARIANTS[name]
    found = ranks[0]["variants"][name]
    # A sum over the batch, which DistributedDataParallel averages over ranks.
    scale = 2.0 if case.sizes else 1.0
    assert error(found, single(case), ["grad"], scale) < 1e-5
    assert error(found, exact(case), ["grad"], scale) < 1e-5
    if case.track:
        assert error(found, exact(case), ["first"]) < 1e-6
    other = ranks[1]["variants"][name]
    assert_equal_steps(found, other)


def test_uneven_ranks_differ_from_the_mean_of_their_means(ranks):
    """The test above could tell: moments weighed by ranks instead of by rows are others."""
    case = VARIANTS["uneven"]
    mean = torch.stack(
        [batch_of(case, 0)[0][share(case, rank, 2)].mean((0, 2, 3)) for rank in range(2)]
    ).mean(0)
    assert float((mean - batch_of(case, 0)[0].mean((0, 2, 3))).abs().max()) > 1e-2


def test_counters_move_once_a_step(ranks):
    for name in ("recompute", "naive"):
        record = ranks[0]["pair"][name]
        counters = [v for n, v in record.items() if n.startswith("last") and "num_batches" in n]
        assert counters
        assert all(int(counter) == STEPS for counter in counters)


def test_bf16_autocast_within_twice_one_process_error(ranks):
    case = VARIANTS["bf16"]
    truth = exact(case)
    for kinds in (["grad"], ["first"]):
        found = error(ranks[0]["variants"]["bf16"], truth, kinds)
        assert found <= 2 * error(train(eager_twin(model_of(case)), case), truth, kinds)


def test_fused_has_the_bits_of_children_one_by_one(ranks):
    found = ranks[0]["variants"]["children one by one"]
    fused = ranks[0]["pair"]["recompute"]
    for name in found:
        if not name.startswith("last"):
            assert torch.equal(found[name], fused[name]), name


def test_without_synchronisation_what_eager_gives(ranks):
    """Gradients averaged, statistics each rank's own: not those of the global batch."""
    for rank in range(2):
        found, eager = (ranks[rank]["variants"][name] for name in ("local", "local eager"))
        assert error(found, eager, ["grad", "first", "last"]) < 1e-6
    assert error(ranks[0]["variants"]["local"], exact(VARIANTS["local"]), ["grad"]) > 1e-2


def test_one_collective_per_norm_and_direction(ranks):
    """None where the backward computes activations again."""
    number = sum(isinstance(m, nn.BatchNorm2d) for m in model_of(Case()).modules())
    for rank in range(2):
        assert ranks[rank]["collectives"] == dict.fromkeys(MEMORY_MODES, (number, number))


def test_evaluation_asks_no_other_rank(ranks):
    found = ranks[2]["evaluation"]
    assert torch.equal(found["aten"], found["aten local"])
    assert torch.equal(found["eager"], found["eager local"])


def test_no_images_on_a_rank_is_an_error_not_a_hang(ranks):
    for name in ("chain", "children"):
        assert ranks[2]["empty"][name].startswith(
            "ValueError: synchronised norms need at least one image on every rank, got (0, "
        )


def test_second_derivative_is_refused(ranks):
    for rank in (2, 3):
        assert ranks[rank]["twice"]["error"].startswith("RuntimeError: ")
        assert "create_graph" in ranks[rank]["twice"]["error"]


# --- fuse -----------------------------------------------------------------------------------------


def test_foreign_model_fused_before_and_after_conversion(ranks):
    for rank in range(2):
        found = ranks[rank]["foreign"]
        for name in ("before", "after", "torch's norms"):
            assert found[f"fused {name}"] == 4
        assert found["fused unfused"] == 0
        for name in ("after", "torch's norms"):
            assert_equal_steps(found[name], found["before"])
        assert error(found["before"], found["unfused"], ["grad", "first"]) < 1e-6
    assert ranks[0]["foreign"]["report"].count("can be fused") == 3  # one line for two blocks


def test_foreign_model_gives_one_process_gradients(ranks):
    model = foreign_model().double()
    x, labels = batch_of(Case(channels_last=False), 0)
    nn.functional.cross_entropy(model(x.double()), labels).backward()
    expected = {f"grad {name}": p.grad for name, p in model.named_parameters()}
    mine = [ranks[rank]["foreign"]["after"] for rank in range(2)]
    mean = {name: (mine[0][name] + mine[1][name]) / 2 for name in expected}
    assert error(mean, expected, ["grad"]) < 1e-5


@conversions
@pytest.mark.parametrize("when", ["before", "after"])
def test_single_process_foreign_model_has_batch_norms_bits(convert, when):
    plain = fuse(randomise(PlainNet()), backend="aten")
    model = copy.deepcopy(plain) if when == "before" else randomise(PlainNet())
    model = convert(model)
    if when == "after":
        model.load_state_dict(plain.state_dict())
        assert "can be fused" in str(explain(model))
        fuse(model, backend="aten")
    assert len(explain(model).fused) == 4
    x = images((3, 3, 6, 6)).cpu()
    assert_equal_steps(step(model, x), step(plain, x))


class OwnForward(SyncBatchNorm):
    """A norm that computes more than its class says."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_norm_with_a_forward_of_its_own_is_not_fused():
    model = PlainNet()
    for block in model.layers[0]:
        block.bn1 = OwnForward(4)
    rows = {row.path: row.reason for row in explain(model).blocks}
    assert rows["layers.0.0"] == "OwnForward (bn1) is no part of a pre-activation unit"
    fused = fuse(model, backend="aten")
    assert [row.path for row in explain(fused).fused] == ["layers.1.0", "layers.1.1"]


# --- one process ----------------------------------------------------------------------------------


def converted_blocks(convert) -> list[tuple[nn.Module, nn.Module]]:
    """(plain, converted) pairs."""
    kinds = PreActBlock, BottleneckPreActBlock
    plain = [randomise(kind(4, 8, 2, backend="aten")) for kind in kinds]
    return [(block, convert(copy.deepcopy(block))) for block in plain]


@conversions
def test_single_process_has_batch_norms_bits(convert):
    x = images((3, 4, 6, 6)).cpu()
    for plain, block in converted_blocks(convert):
        assert not any(type(m) is nn.BatchNorm2d for m in block.modules())
        assert explain(nn.Sequential(block)).fused
        assert_equal_steps(step(block, x), step(plain, x))


def test_group_of_one_rank_has_batch_norms_bits(tmp_path):
    x = images((3, 4, 6, 6)).cpu()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/one", rank=0, world_size=1)
    try:
        for plain, block in converted_blocks(convert_sync_batchnorm):
            assert_equal_steps(step(block, x), step(plain, x))
        norm = randomise(nn.BatchNorm2d(4))
        assert_equal_steps(step(convert_sync_batchnorm(copy.deepcopy(norm)), x), step(norm, x))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"affine": False}])
def test_lone_norm(options):
    norm = nn.BatchNorm2d(4, **options)
    parameters, buffers = list(norm.parameters()), list(norm.buffers())
    state = copy.deepcopy(norm.state_dict())
    converted = convert_sync_batchnorm(norm)
    assert type(converted) is SyncBatchNorm
    assert converted.process_group is None
    assert all(a is b for a, b in zip(converted.parameters(), parameters, strict=True))
    assert all(a is b for a, b in zip(converted.buffers(), buffers, strict=True))
    assert list(converted.state_dict()) == list(state)
    plain = nn.BatchNorm2d(4, **options)
    x = images((2, 4, 3, 3)).cpu()
    assert_equal_steps(step(converted, x), step(plain, x))


def test_conversion_reaches_every_norm_and_keeps_the_state_dict():
    model = model_of(Case())
    number = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    # Shared by two names, and converted by PyTorch already.
    model.again = model.stage1[0].bn1
    model.stage2[0] = nn.SyncBatchNorm.convert_sync_batchnorm(model.stage2[0])
    called = []
    model.bn.register_forward_hook(lambda *_: called.append(1))
    before = {name: (id(v), v.clone()) for name, v in model.state_dict(keep_vars=True).items()}
    assert convert_sync_batchnorm(model) is model
    norms = [m for m in model.modules() if "BatchNorm" in type(m).__name__]
    assert len(norms) == number
    assert all(type(norm) is SyncBatchNorm for norm in norms)
    assert model.again is model.stage1[0].bn1
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(id(after[n]) == i and torch.equal(after[n], v) for n, (i, v) in before.items())
    model(batch_of(Case(), 0)[0])
    assert called == [1]


def test_conversion_refuses_what_it_would_lose():
    class Activated(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).relu()

    model = nn.Sequential(nn.BatchNorm2d(4), Activated(4))
    with pytest.raises(TypeError, match="Activated, which computes more"):
        convert_sync_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm2d
    parametrized = nn.utils.parametrizations.weight_norm(nn.BatchNorm2d(4), dim=None)
    with pytest.raises(TypeError, match="ParametrizedBatchNorm2d"):
        convert_sync_batchnorm(parametrized)


def test_copies_pickles_and_files():
    model = convert_sync_batchnorm(randomise(model_of(Case())))
    x = batch_of(Case(), 0)[0]
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = model_of(Case(seed=1))
    loaded.load_state_dict(torch.load(file))
    copies = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded)
    expected = step(model, x)
    for twin in copies:
        assert_equal_steps(step(twin, x), expected)


def test_copy_keeps_the_process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/one", rank=0, world_size=1)
    try:
        group = dist.new_group([0])
        model = convert_sync_batchnorm(randomise(PlainNet()), group)
        twin = copy.deepcopy(model)
        assert twin.bn.process_group is group
        assert twin.bn.weight is not model.bn.weight
        # Recognition copies blocks too, also those whose norms are PyTorch's.
        theirs = nn.SyncBatchNorm.convert_sync_batchnorm(PlainNet(), group)
        for each in (twin, theirs):
            assert len(explain(fuse(each, backend="aten")).fused) == 4
    finally:
        dist.destroy_process_group()


@pytest.mark.usefixtures("fresh_compiler")
def test_torch_compile_runs_children_one_by_one():
    block = convert_sync_batchnorm(randomise(PreActBlock(4, 8, 2, backend="aten")))
    x = images((3, 4, 6, 6)).cpu()
    plain = step(copy.deepcopy(block), x)
    found = renamed(step(torch.compile(block, backend="aot_eager"), x))
    assert error(found, plain, ["out", "dx", "grad", "buffer"]) < 1e-6


# --- kernels --------------------------------------------------------------------------------------

# Rows of each rank; the first has far more, or one alone.
ROWS = {"far more on one": (513, 1, 40), "one each": (1, 1), "odd": (7, 33), "many": (5,) * 37}


def moments_of_ranks(rows: tuple[int, ...], channels: int) -> tuple[list[Tensor], Tensor]:
    """Each rank's (1, C, rows, 1) in float64, of mean 1e3 and standard deviation 1, and all."""
    parts = [images((1, channels, n, 1), i, torch.float64, mean=1e3) for i, n in enumerate(rows)]
    return parts, torch.cat(parts, 2)


def gatherer() -> Callable[[Tensor], Tensor]:
    """Gathers what it was called with so far, as if each call were a rank's."""
    packed: list[Tensor] = []

    def gather(values: Tensor) -> Tensor:
        packed.append(values)
        return torch.stack(packed)

    return gather


@needs_triton
@in_turn("rows, channels", ROWS, [("3-channels", 3), ("17-channels", 17)])
@pytest.mark.parametrize("engine", ["reference", "kernel"])
def test_moments_of_ranks(engine, rows, channels):
    """Merged by rows, as accurate as the float32 numbers that are merged."""
    from resnetv2.kernels import moments

    parts, whole = moments_of_ranks(rows, channels)
    weight, bias = torch.rand(2, channels).to(DEVICE) + 0.5
    stats = [reference.norm_stats(reference.moments(part), None, None, 0.0) for part in parts]
    gather = gatherer()
    for one, n in zip(stats, rows):
        partials, counts = gather_moments(one.float(), n, gather)
    assert partials.data.is_contiguous()
    merge = moments.norm_stats if engine == "kernel" else reference.norm_stats
    found = merge(partials, weight, bias, 1e-5, counts)
    # What was sent is exact to the last place of float32; M2 is of deviations from its own mean.
    expected = reference.norm_stats(reference.moments(whole), weight.double(), bias.double(), 1e-5)
    assert int(counts.sum()) == sum(rows)
    mean_error = float((found[MEAN] - expected[MEAN]).abs().max())
    assert mean_error <= 2 * EPS * 1e3
    # A mean of a tile that is off by half a place shifts that tile's share of the variance.
    slack = 4 * EPS * 1e3 * float(expected[VAR].max().sqrt())
    assert float((found[VAR] - expected[VAR]).abs().max()) <= slack
    assert torch.equal(found, merge(partials, weight, bias, 1e-5, counts))
    # Scale and shift are those of the statistics that stand beside them.
    assert torch.allclose(found[SCALE], (found[VAR] + 1e-5).rsqrt() * weight, rtol=4 * EPS)
    assert torch.allclose(found[SHIFT], bias - found[MEAN] * found[SCALE], rtol=8 * EPS)


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels-last", "NCHW"])
@pytest.mark.parametrize("shape", [(64, 5, 32, 32), (3, 5, 7, 7)], ids=["65536-rows", "147-rows"])
def test_sums_over_many_rows(shape, channels_last):
    """What a rank sends is accurate at any number of rows: ATen's own sums lose 5e-6 there."""
    x = images(shape, 0, channels_last=channels_last, mean=3.0, std=2.0).cpu()
    q = images(shape, 1, channels_last=channels_last).cpu()
    exact_moments = reference.batch_moments(x.double())
    for mine, truth in zip(reference.rank_moments(x), exact_moments):
        torch.testing.assert_close(mine.double(), truth, rtol=4 * EPS, atol=0)
    stats = reference.running_stats(*exact_moments, None, None, 1e-5)
    expected = reference.gradient_sums(q.double(), x.double(), stats).data[0]
    added = q.abs().sum((0, 2, 3)).double()
    for mine, truth in zip(reference.rank_gradient_sums(q, x, stats.float()), expected):
        assert bool(((mine - truth).abs() <= 2 * EPS * added).all())
    # Whatever layout a gradient comes in.
    other = torch.contiguous_format if channels_last else torch.channels_last
    again = reference.rank_gradient_sums(q.contiguous(memory_format=other), x, stats.float())
    for mine, truth in zip(again, expected):
        assert bool(((mine - truth).abs() <= 2 * EPS * added).all())


@needs_triton
@in_turn("rows, channels", ROWS, [("3-channels", 3), ("17-channels", 17)])
@pytest.mark.parametrize("engine", ["reference", "kernel"])
def test_gradient_coefficients_of_ranks(engine, rows, channels):
    """Coefficients and sums over all rows, against float64."""
    from resnetv2.kernels import norm_backward

    parts, whole = moments_of_ranks(rows, channels)
    weight, bias = (torch.rand(2, channels).to(DEVICE) + 0.5).double()
    stats = reference.norm_stats(reference.moments(whole), weight, bias, 1e-5)
    gradients = [images(part.shape, 50 + i, torch.float64) for i, part in enumerate(parts)]
    gather = gatherer()
    for q, part in zip(gradients, parts):
        s1, s2 = reference.gradient_sums(q, part, stats).data[0].float()
        partials = gather_sums(s1, s2, gather)
    total = torch.tensor([float(sum(rows))], device=DEVICE)
    grad = norm_backward.norm_grad if engine == "kernel" else reference.norm_grad
    found = grad(partials, stats.float(), True, total)
    q = torch.cat(gradients, 2)
    expected = reference.norm_grad(reference.gradient_sums(q, whole, stats), stats, True)
    added = float(sum(q.abs().sum((0, 2, 3)).max() for q in gradients))
    for mine, truth in zip(found[1:], expected[1:]):
        assert float((mine - truth).abs().max()) <= 8 * EPS * added
    # g = A*q + B*h + C of an h of 1e3: the terms of B and C cancel.
    for row in range(2):
        slack = 8 * EPS * added / sum(rows) * float((stats[SCALE] * stats[2]).max())
        slack += 8 * EPS * float(expected[0][row].abs().max())
        assert float((found[0][row] - expected[0][row]).abs().max()) <= slack


@needs_triton
def test_chain_on_kernels_is_that_of_one_process(ranks):
    """One image on one rank and three on the other, in the interpreter."""
    model = eager_twin(tiny_chain("aten"), torch.float64)
    x, g = (tensor.double() for tensor in tiny_batch())
    x.requires_grad_()
    out = model(x)
    out.backward(g)
    mine = [ranks[rank]["kernels"] for rank in (2, 3)]
    found = {name: torch.cat([each[name] for each in mine]) for name in ("out", "dx")}
    expected = {"out": out.detach(), "dx": x.grad}
    for name, parameter in model.named_parameters():
        expected[f"grad {name}"] = parameter.grad
        found[f"grad {name}"] = mine[0][f"grad {name}"] + mine[1][f"grad {name}"]
    for name in expected:
        assert error(found, expected, [name]) < 1e-5, name
    for name, buffer in model.named_buffers():
        for each in mine:
            torch.testing.assert_close(
                each[f"first {name}"].to(buffer.dtype), buffer, rtol=1e-6, atol=1e-7
            )
