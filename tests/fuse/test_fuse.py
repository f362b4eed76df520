"""``fuse`` on minimal models of the dataflows in the wild, against the same models unfused.

Promise: outputs, dx, every parameter's gradient, the running statistics and the parameters after a
step of SGD are at most twice as far from float64 as the unfused model's; what is not a
pre-activation block is left alone, to the bit.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from resnetv2 import explain, fuse, unfuse
from tests.support.fuse_checks import (
    chain_calls,
    check_fused,
    fused_copy,
    fused_units,
    training_step,
)
from tests.support.fuse_models import (
    FAMILIES,
    NEGATIVES,
    AddsIntoX,
    Basic,
    Bottleneck,
    Checking,
    Dropping,
    FunctionalDropping,
    FunctionalLeaky,
    IdentityFromPreact,
    Listing,
    MiddleReadTwice,
    OfTuples,
    PlainNet,
    PostActivation,
    Remembering,
    Wide,
    WithAct,
    branch,
    tuple_block,
)
from tests.support.fuse_models.grouped import GroupNormed
from tests.support.yardstick import (
    DEVICE,
    assert_close_steps,
    assert_equal_steps,
    images,
    needs_triton,
    randomise,
)

pytestmark = pytest.mark.usefixtures("one_thread")

AUTOCAST = {"float32": None, "bf16-autocast": torch.bfloat16}
# A ReLU's sign that flips near 0 outweighs all rounding in bf16: it takes draws to tell how often.
DRAWS = {"float32": {"draws": 1, "eager_draws": 5}, "bf16-autocast": {"draws": 9}}


def family(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise(FAMILIES[name].build()).to(DEVICE)


def negative(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise(NEGATIVES[name]()).to(DEVICE)


CASES = [
    pytest.param(name, mode, precision, id=f"{name}-{mode}-{precision}")
    for name, case in FAMILIES.items()
    for mode in case.modes
    for precision in AUTOCAST
]


@pytest.mark.parametrize(("name", "mode", "precision"), CASES)
def test_step_within_twice_eagers_error(name, mode, precision):
    check_fused(
        family(name),
        FAMILIES[name].shape,
        training=mode == "train",
        autocast=AUTOCAST[precision],
        **DRAWS[precision],
    )


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if f.units is not None])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_recognised(name, training):
    """Fused as what it is, whatever the mode it is in, and it does run fused."""
    case = FAMILIES[name]
    model = fused_copy(family(name).train(training))
    rows = explain(model).fused
    assert len(rows) == case.units, explain(model)
    for row in rows:
        assert row.fused
        assert row.reason == ""
        classes = [kind.__name__ for kind in type(model.get_submodule(row.path)).__mro__]
        assert row.class_name in classes
        for word in case.kind:
            assert word in row.kind, row.kind
    for mode in (True, False):
        assert chain_calls(model.train(mode), images(case.shape)) >= 1


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if f.units is None])
def test_what_is_not_fused_has_a_reason(name):
    model = fused_copy(family(name))
    for row in explain(model).blocks:
        assert row.fused or row.reason, row


@pytest.mark.parametrize("name", NEGATIVES)
def test_left_alone(name):
    """Nothing fused, the very same classes, and every bit as before."""
    model = negative(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        left = fuse(copy.deepcopy(model), backend="aten")
    assert fused_units(left) == 0, explain(left)
    assert [type(m) for m in left.modules()] == [type(m) for m in model.modules()]
    for training in (True, False):
        for autocast in AUTOCAST.values():
            steps = [
                training_step(
                    copy.deepcopy(m).train(training), images((3, 8, 7, 6)), autocast=autocast
                )
                for m in (left, model)
            ]
            assert_equal_steps(*steps)
    assert chain_calls(left, images((3, 8, 7, 6))) == 0


def test_the_same_state_dict_and_another_dataflow():
    """What a block computes decides, not its children's names: these load each other's weights."""
    mine, other = randomise(Basic(8, 8)).to(DEVICE), randomise(PostActivation(8, 8)).to(DEVICE)
    other.load_state_dict(mine.state_dict(), strict=True)
    both = nn.Sequential(mine, other)
    fused = fused_copy(both)
    assert [row.path for row in explain(fused).fused] == ["0"]
    x = images((3, 8, 7, 6))
    assert_close_steps(training_step(fused, x), training_step(both, x))


@needs_triton
@pytest.mark.parametrize(
    "name",
    [
        "projection-from-preact",
        "identity-from-preact",
        "one-relu-three-times",
        "silu-projection-raw",
        "norm-is-norm-and-act-projection",
        "group-norm-standardised-weights",
        "group-and-batch-norm",
        "embedding-scales-no-affine",
        "embedding-added-to-projection",
    ],
)
def test_triton(name):
    shape = (2, FAMILIES[name].shape[1], 5, 4)
    model = check_fused(family(name), shape, backend="triton")
    assert fused_units(model) == 1


@pytest.mark.parametrize("memory", ["recompute", "invert", "invert_h1", "segment"])
@pytest.mark.parametrize("block", [Basic, tuple_block], ids=["basic", "bottleneck"])
def test_memory_modes(block, memory):
    torch.manual_seed(0)
    model = randomise(PlainNet(block, (4, 3), (8, 8))).to(DEVICE)
    fused = check_fused(model, (4, 3, 8, 8), memory=memory, draws=3)
    assert fused_units(fused) == 7


@pytest.mark.parametrize("memory", ["recompute", "invert", "invert_h1", "segment"])
def test_memory_modes_of_computed_weights(memory):
    torch.manual_seed(0)
    model = randomise(nn.Sequential(*[GroupNormed(8) for _ in range(5)])).to(DEVICE)
    fused = check_fused(model, (3, 8, 6, 5), memory=memory, draws=3)
    assert chain_calls(fused, images((3, 8, 6, 5))) == 1


def test_memory_is_kept_as_asked():
    """From forward to backward a fused stage keeps a fraction of what an unfused one keeps."""
    torch.manual_seed(0)
    model = nn.Sequential(*[OfTuples(16, 16, 1, True) for _ in range(8)]).to(DEVICE)

    def kept(module: nn.Module) -> int:
        tensors: dict[int, int] = {}

        def pack(t: torch.Tensor) -> torch.Tensor:
            tensors[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = module(images((4, 16, 16, 16)).requires_grad_())
        out.sum().backward()
        return sum(size for pointer, size in tensors.items() if pointer not in weights)

    eager = kept(model)
    recompute = kept(fused_copy(model))
    invert = kept(fused_copy(model, memory="invert"))
    assert recompute < 0.6 * eager
    assert invert < 0.25 * eager


@pytest.mark.parametrize("precision", AUTOCAST)
@pytest.mark.parametrize("mean", [0.0, 1e3], ids=["mean-0", "mean-1e3"])
def test_whole_network(mean, precision):
    torch.manual_seed(0)
    model = randomise(PlainNet(tuple_block, (2, 2), (8, 12))).to(DEVICE)
    check_fused(model, (4, 3, 8, 8), mean=mean, autocast=AUTOCAST[precision], **DRAWS[precision])


@pytest.mark.parametrize(
    "name", ["identity", "projection-from-preact", "one-relu-three-times", "squeeze-excitation"]
)
def test_mean_far_above_standard_deviation(name):
    check_fused(family(name), FAMILIES[name].shape, mean=1e3, draws=3)


@pytest.mark.parametrize(
    "name",
    ["identity", "projection-from-preact-flags", "dropout-0.3", "tuples-bottleneck-strided"],
)
def test_nchw_input(name):
    """Dropout draws its mask in the order of memory, which has to be eager's."""
    check_fused(family(name), FAMILIES[name].shape, channels_last=False, draws=3)


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels-last", "nchw"])
@pytest.mark.parametrize(
    "build",
    [
        lambda: Dropping(8, 0.3),
        lambda: Dropping(8, 0.3, True),
        lambda: FunctionalDropping(8, 0.3),
        lambda: Wide(8, 8, 1, 0.3),
    ],
    ids=["module", "before-norm", "functional", "flags"],
)
def test_dropout_has_eagers_mask(build, channels_last):
    """In training the same numbers are dropped from the same state of the generator, which it
    leaves as eager does; in evaluation the block is fused."""
    torch.manual_seed(0)
    model = randomise(build()).to(DEVICE)
    fused = fused_copy(model)
    x = images((3, 8, 7, 6), channels_last=channels_last)
    states = []
    steps = []
    for module in (fused, model):
        steps.append(training_step(module, x, seed=7))
        states.append((torch.cuda if x.is_cuda else torch).get_rng_state())
    assert_close_steps(*steps)
    assert torch.equal(*states)
    fused.eval()
    model.eval()
    assert chain_calls(fused, x) == 1
    assert_close_steps(training_step(fused, x), training_step(model, x))


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name",
    [
        "identity",  # out += shortcut
        "identity-flags",  # torch.add(x, out)
        "identity-from-preact",  # x.add(out)
        "identity-from-preact-in-place",  # out.add_(x)
        "projection-from-preact",
        "projection-from-raw-sequence",
        "one-relu-three-times",
        "tuples",
    ],
)
def test_autocast_dtypes(name, x_dtype):
    """Of the output, which depends on the kind of addition, and of every gradient."""
    model = family(name)
    steps = [
        training_step(m, images(FAMILIES[name].shape, dtype=x_dtype), autocast=torch.bfloat16)
        for m in (fused_copy(model), model)
    ]
    assert {n: t.dtype for n, t in steps[0].items()} == {n: t.dtype for n, t in steps[1].items()}


def stage_of(*blocks: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return randomise(nn.Sequential(*blocks)).to(DEVICE)


SHAPE = (2, 4, 5, 6)


@pytest.mark.parametrize(
    ("blocks", "chains"),
    [
        pytest.param(lambda: [Basic(4, 4) for _ in range(4)], 1, id="alike"),
        pytest.param(
            lambda: [
                Basic(4, 4), OfTuples(4, 8, 2, True), Bottleneck(8, 2), IdentityFromPreact(8)
            ],
            1,
            id="different",
        ),
        pytest.param(
            lambda: [
                Basic(4, 4), Basic(4, 4), PostActivation(4, 4), Basic(4, 4), nn.AvgPool2d(2)
            ],
            2,
            id="split-by-what-cannot-be-fused",
        ),
    ],
)  # fmt: skip
def test_fused_blocks_in_a_sequential_are_one_chain(blocks, chains):
    stage = stage_of(*blocks())
    fused = fused_copy(stage)
    assert chain_calls(fused, images(SHAPE)) == chains
    assert_close_steps(training_step(fused, images(SHAPE)), training_step(stage, images(SHAPE)))


def test_stages_of_a_network_are_chains():
    model = PlainNet(Basic, (3, 3)).to(DEVICE)
    assert chain_calls(fused_copy(model), images((2, 3, 8, 8))) in (1, 2)


def test_blocks_in_a_module_list_run_one_by_one():
    assert chain_calls(fused_copy(family("module-list")), images((3, 8, 7, 6))) == 2


class Doubling(nn.Sequential):
    """A container with a forward of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Collecting(nn.Sequential):
    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x := block(x) for block in self]


def test_sequentials_with_a_forward_of_their_own():
    doubling = nn.Sequential(Doubling(Basic(4, 4), Basic(4, 4)), nn.ReLU())
    collecting = Collecting(Basic(4, 4), Basic(4, 4))
    x = images(SHAPE)
    for stage in (doubling.to(DEVICE), collecting.to(DEVICE)):
        fused = fused_copy(stage)
        assert fused_units(fused) == 2
        found, expected = fused(x), stage(x)
        for a, b in zip([*found], [*expected]):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_sequential_stays_one():
    """Indexing, slices, iteration, len, append and deletion."""
    stage = stage_of(*[Basic(4, 4) for _ in range(4)])
    fused = fused_copy(stage)
    x = images(SHAPE)
    assert isinstance(fused, nn.Sequential)
    assert len(fused) == len([*fused]) == 4
    for part, expected in ((fused[1:3], stage[1:3]), (fused[-1], stage[-1])):
        torch.testing.assert_close(part.eval()(x), expected.eval()(x), rtol=1e-4, atol=1e-5)
    for each in (fused, stage):
        torch.manual_seed(1)
        each.append(PostActivation(4, 4).to(DEVICE))
        del each[0]
        each.eval()
    torch.testing.assert_close(fused(x), stage(x), rtol=1e-4, atol=1e-5)


def test_one_block_in_two_places():
    """Shared weights: gradients add up, statistics move once after the other."""
    block = Basic(4, 4)
    stage = stage_of(block, nn.Identity(), block)
    fused = fused_copy(stage)
    assert fused[0] is fused[2]
    assert_close_steps(training_step(fused, images(SHAPE)), training_step(stage, images(SHAPE)))


@pytest.mark.parametrize("options", [{"scale": 0.5}, {"double": True}, {}], ids=str)
def test_options_of_a_forward(options):
    block = randomise(Checking(4)).to(DEVICE)
    fused = fused_copy(block)
    x = images(SHAPE)
    expected = block(x, **options)
    torch.testing.assert_close(fused(x, **options), expected, rtol=1e-4, atol=1e-5)
    if "scale" in options:
        torch.testing.assert_close(fused(x, 0.5), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fused(x=x, **options), expected, rtol=1e-4, atol=1e-5)


def test_checks_of_a_forward_are_made():
    fused = fused_copy(Checking(4).to(DEVICE))
    with pytest.raises(ValueError, match=r"expected .*4 channels, got 3"):
        fused(images((2, 3, 5, 6)))
    with pytest.raises((AssertionError, ValueError)):
        fused(images((4, 5, 6)))


@pytest.mark.parametrize(
    ("build", "path", "value"),
    [
        pytest.param(lambda: Wide(4, 4, 1), "droprate", 0.3, id="drop-rate"),
        pytest.param(lambda: FunctionalDropping(4, 0.0), "p", 0.5, id="drop-rate-unguarded"),
        pytest.param(lambda: Dropping(4, 0.0), "branch.5.p", 0.5, id="drop-rate-of-a-module"),
        pytest.param(lambda: Wide(4, 6, 1), "activate_first", False, id="flag"),
        pytest.param(lambda: IdentityFromPreact(4), "in_place", True, id="kind-of-addition"),
        pytest.param(
            lambda: WithAct(lambda: nn.LeakyReLU(0.1, inplace=True), 4, 4),
            "act.negative_slope",
            0.5,
            id="slope",
        ),
        pytest.param(lambda: FunctionalLeaky(4), "slope", 0.5, id="slope-functional"),
    ],
)
def test_attributes_are_read_at_every_call(build, path, value):
    """A schedule that raises the drop rate, a flag that is turned over after ``fuse``."""
    torch.manual_seed(0)
    block = randomise(build()).to(DEVICE)
    fused = fused_copy(block)
    x = images(SHAPE)
    owner, _, name = path.rpartition(".")
    for each in (fused, block):
        setattr(each.get_submodule(owner), name, value)
    assert_close_steps(training_step(fused, x), training_step(block, x))
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert fused.eval()(x).dtype == block.eval()(x).dtype


def test_a_block_with_a_memory_of_its_own_keeps_it():
    """Attributes that a forward sets are set as in eager, and ``fuse`` leaves none behind."""
    block = Remembering(4).to(DEVICE)
    fused = fused_copy(block)
    assert fused.calls == 0
    assert fused.last is None
    x = images(SHAPE)
    out = fused(x)
    assert fused.calls == 1
    assert_close_steps({"h": fused.last}, {"h": block.conv1(torch.relu(block.bn1(x)))})
    assert isinstance(out, torch.Tensor)


def test_a_list_of_a_block_sees_no_trace():
    fused = fused_copy(Listing(4).to(DEVICE))
    assert fused.seen == []
    fused(images(SHAPE))
    assert [type(h) for h in fused.seen] == [torch.Tensor]


def test_a_block_that_returns_more_than_its_sum():
    block = randomise(MiddleReadTwice(4)).to(DEVICE)
    fused = fused_copy(block)
    for a, b in zip(fused(images(SHAPE)), block(images(SHAPE))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_an_addition_into_the_input_writes_to_it():
    """Without gradients ``x += F(x)`` works, and who holds x sees it."""
    block = randomise(AddsIntoX(4)).to(DEVICE)
    fused = fused_copy(block)
    results = []
    for module in (fused, block):
        x = images(SHAPE)
        with torch.no_grad():
            out = module(x)
        assert torch.equal(out, x)
        results.append(out)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_nothing_to_fuse(training):
    """Says so, once, and changes nothing."""
    model = PostActivation(4, 4).train(training)
    before = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="pre-activation") as caught:
        assert fuse(model) is model
    assert len(caught) == 1
    assert type(model) is PostActivation
    assert str(model) == str(before)
    assert vars(model).keys() == vars(before).keys()
    assert unfuse(model) is model


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(), branch(4)], ids=type)
def test_models_without_blocks(model):
    with pytest.warns(UserWarning, match="pre-activation"):
        fuse(model)
    assert len(explain(model).fused) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [({"memory": "forget"}, "memory"), ({"backend": "cuda"}, "backend")],
    ids=["memory", "backend"],
)
def test_unknown_options_are_refused(options, message):
    model = Basic(4, 4)
    with pytest.raises(ValueError, match=message):
        fuse(model, **options)
    assert type(model) is Basic
