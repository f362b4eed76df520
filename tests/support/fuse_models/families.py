"""The dataflows that are computed fused or not, always with eager's results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from tests.support.fuse_models.grouped import (
    AllByHand,
    Conditioned,
    Embedded,
    GroupNormAct,
    GroupNormed,
    LatentBlock,
    MaybeEmbedded,
    ScaledConv2d,
)
from tests.support.fuse_models.parts import (
    BatchDepth,
    DropPath,
    EndsWith,
    NormAct,
    NormThenAct,
    OfNormActs,
    OfTuples,
    SqueezeExcite,
    SurvivalScaled,
    ThrownAwayNorm,
    norm_act_sequence,
)
from tests.support.fuse_models.plain import (
    Basic,
    Bottleneck,
    Dropping,
    FunctionalDropping,
    FunctionalLeaky,
    IdentityFromPreact,
    OneSidedConvs,
    PaddedBefore,
    PaddedBoth,
    RawSequence,
    Residual,
    StrideOnConv2,
    Wide,
    WithAct,
    branch,
    conv1,
)
from tests.support.fuse_models.unusual import (
    AliasedInPlace,
    Branching,
    Checking,
    Checkpointed,
    FirstOf,
    HandmadeSwish,
    InAList,
    MiddleReadTwice,
    NoSecondActivation,
    OneConvTwice,
    OneNormTwice,
    Resizing,
    ShortcutReadsNorm,
    ThreePaths,
    TwoActivations,
)


@dataclass(frozen=True)
class Family:
    """One dataflow.

    build: makes the model. shape: of its input. units: how many blocks ``fuse`` must fuse, None
    where leaving the block alone is as right. kind: words that ``explain`` must say of them.
    modes: in which of training and evaluation it is compared.
    """

    build: Callable[[], nn.Module]
    units: int | None = 1
    kind: tuple[str, ...] = ()
    shape: tuple[int, ...] = (3, 8, 7, 6)
    modes: tuple[str, ...] = ("train", "eval")


BASIC = ("basic",)


NECK = ("bottleneck",)


IDENTITY = ("identity",)


PREACT = ("projection", "preact")


RAW = ("projection", "raw")


FAMILIES: dict[str, Family] = {
    "identity": Family(lambda: Basic(8, 8), 1, BASIC + IDENTITY),
    "projection-from-preact": Family(lambda: Basic(8, 12, 2), 1, BASIC + PREACT),
    "projection-from-preact-flags": Family(lambda: Wide(8, 12, 2), 1, BASIC + PREACT),
    "projection-from-raw-flags": Family(
        lambda: Wide(8, 12, 2, activate_first=False), 1, BASIC + RAW
    ),
    "identity-flags": Family(lambda: Wide(8, 8, 1), 1, BASIC + IDENTITY),
    "projection-from-raw-sequence": Family(lambda: RawSequence(8, 3, 1), 1, NECK + RAW),
    "stride-on-first-1x1-raw": Family(lambda: RawSequence(8, 3, 2), 1, NECK + RAW),
    "identity-empty-sequence": Family(lambda: RawSequence(8, 2), 1, NECK + IDENTITY),
    "identity-from-preact": Family(lambda: IdentityFromPreact(8), 1, (*BASIC, *IDENTITY, "preact")),
    "identity-from-preact-in-place": Family(lambda: IdentityFromPreact(8, True), 1, IDENTITY),
    "stride-on-conv2": Family(lambda: StrideOnConv2(8, 6), 1, BASIC + PREACT),
    "shortcut-3x3": Family(lambda: StrideOnConv2(8, 6, 3), 1, BASIC + PREACT),
    "one-relu-three-times": Family(lambda: Bottleneck(8, 2), 1, NECK + IDENTITY),
    "bottleneck-stride-on-3x3": Family(lambda: Bottleneck(8, 3, 2), 1, NECK + PREACT),
    "bottleneck-stride-on-1x1": Family(lambda: Bottleneck(8, 3, 1, first=2), 1, NECK + PREACT),
    "bottleneck-groups": Family(lambda: Bottleneck(8, 4, 1, groups=2), 1, NECK + PREACT),
    "basic-groups": Family(lambda: Basic(8, 8, groups=4)),
    "bias": Family(lambda: Basic(8, 8, bias=True)),
    "bias-projection": Family(lambda: Basic(8, 12, 2, bias=True), 1, PREACT),
    "leaky-relu": Family(lambda: WithAct(lambda: nn.LeakyReLU(0.1, inplace=True), 8, 8)),
    "leaky-relu-functional": Family(lambda: FunctionalLeaky(8)),
    "silu": Family(lambda: WithAct(lambda: nn.SiLU(inplace=True), 8, 8)),
    "silu-projection-raw": Family(lambda: WithAct(nn.SiLU, 6, 8), 1, RAW, (3, 6, 7, 6)),
    "gelu": Family(lambda: WithAct(nn.GELU, 8, 8)),
    "dropout-0": Family(lambda: Dropping(8, 0.0)),
    "dropout-0-functional": Family(lambda: FunctionalDropping(8, 0.0)),
    "dropout-0-flags": Family(lambda: Wide(8, 8, 1, 0.0)),
    "dropout-0.3": Family(lambda: Dropping(8, 0.3), None),
    "dropout-0.3-before-norm": Family(lambda: Dropping(8, 0.3, True), None),
    "dropout-0.3-functional": Family(lambda: FunctionalDropping(8, 0.3), None),
    "dropout-0.3-flags-projection": Family(lambda: Wide(8, 12, 2, 0.3), None),
    "one-sided-convolutions": Family(lambda: OneSidedConvs(8)),
    "asymmetric-padding": Family(lambda: PaddedBoth(8, False), None),
    "asymmetric-padding-module": Family(lambda: PaddedBoth(8, True), None),
    "asymmetric-padding-strided": Family(lambda: PaddedBefore(8, 6, False), None),
    "asymmetric-padding-strided-module": Family(lambda: PaddedBefore(8, 6, True), None),
    "norm-is-norm-and-act": Family(lambda: OfNormActs(NormAct, 8, 2, 8), 1, NECK + IDENTITY),
    "norm-is-norm-and-act-projection": Family(
        lambda: OfNormActs(NormAct, 8, 3, 12), 1, NECK + PREACT
    ),
    "norm-is-norm-and-silu": Family(
        lambda: OfNormActs(lambda c: NormAct(c, nn.SiLU(inplace=True)), 8, 3, 8)
    ),
    "norm-and-act-module": Family(lambda: OfNormActs(NormThenAct, 8, 3, 12), 1, NECK + PREACT),
    "norm-and-act-sequence": Family(lambda: OfNormActs(norm_act_sequence, 8, 3, 8), 1, NECK),
    "tuples": Family(lambda: OfTuples(8, 8), 1, BASIC + IDENTITY),
    "tuples-bottleneck-strided": Family(lambda: OfTuples(8, 12, 2, True), 1, NECK + PREACT),
    "thrown-away-norm": Family(lambda: ThrownAwayNorm(8, 8), None),
    "thrown-away-norm-not-activated": Family(lambda: ThrownAwayNorm(8, 8, 1, False), None),
    "thrown-away-norm-projection": Family(lambda: ThrownAwayNorm(8, 12, 2), None),
    "affine-false": Family(lambda: Basic(8, 12, 2, norm=lambda c: nn.BatchNorm2d(c, affine=False))),
    "momentum-none": Family(lambda: Basic(8, 8, norm=lambda c: nn.BatchNorm2d(c, momentum=None))),
    "no-running-stats": Family(
        lambda: Basic(8, 8, norm=lambda c: nn.BatchNorm2d(c, track_running_stats=False))
    ),
    "group-norm": Family(lambda: GroupNormed(8, nn.Conv2d), 1, ("group norms",)),
    "group-norm-standardised-weights": Family(
        lambda: GroupNormed(8), 1, ("group norms", "computed weights")
    ),
    "batch-norm-standardised-weights": Family(
        lambda: GroupNormed(8, norm="bb"), 1, ("identity, computed weights",)
    ),
    "group-and-batch-norm": Family(
        lambda: GroupNormed(8, ScaledConv2d, "gb"), 1, ("group and batch norms",)
    ),
    "group-norm-is-norm-and-act": Family(lambda: OfNormActs(GroupNormAct, 8, 4, 12), 1, PREACT),
    "instance-norm": Family(lambda: Basic(8, 8, norm=nn.InstanceNorm2d), 1, ("group norms",)),
    "instance-norm-affine": Family(
        lambda: Basic(8, 6, 2, norm=lambda c: nn.InstanceNorm2d(c, affine=True)), 1, PREACT
    ),
    "layer-norm": Family(lambda: Basic(8, 8, norm=lambda c: nn.GroupNorm(1, c, eps=1e-3))),
    "all-by-hand": Family(lambda: AllByHand(8), 1, ("group norms", "computed weights")),
    "all-by-hand-no-affine": Family(lambda: AllByHand(8, False), None),
    "embedding-added": Family(
        lambda: Conditioned(Embedded(8, 8, 5), Embedded(8, 12, 5), features=5), 2, ("with emb",)
    ),
    "embedding-scales": Family(
        lambda: Conditioned(Embedded(8, 8, 5, "scale"), Embedded(8, 12, 5, "scale"), features=5),
        2, ("with emb",),
    ),
    "embedding-scales-no-affine": Family(
        lambda: Conditioned(Embedded(8, 8, 5, "scale", affine=False), features=5)
    ),
    "embedding-added-to-projection": Family(
        lambda: Conditioned(Embedded(8, 12, 5, "skip"), features=5), 1, ("with emb",)
    ),
    "latent-diffusion": Family(
        lambda: Conditioned(LatentBlock(8, 12, 5), features=5), 1, ("with or without temb",)
    ),
    "embedding-optional": Family(
        lambda: Conditioned(MaybeEmbedded(8, 8, 5), features=5), 1, ("with or without emb",)
    ),
    "dilated": Family(lambda: Residual(nn.Sequential(
        nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=2, dilation=2, bias=False),
        nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 5, padding=2, groups=8, bias=False),
    ))),
    "residual-of-sequence": Family(lambda: Residual(branch(8)), 1, BASIC + IDENTITY),
    "one-repetition": Family(lambda: Residual(branch(8, 1)), 1, IDENTITY),
    "four-repetitions": Family(lambda: Residual(branch(8, 4)), 1, IDENTITY),
    "checks-of-shape": Family(lambda: Checking(8), 1, BASIC + IDENTITY),
    "module-list": Family(lambda: InAList(8), 2),
    "one-norm-twice": Family(lambda: OneNormTwice(8), None),
    "one-convolution-twice": Family(lambda: OneConvTwice(8), None),
    "in-place-relu-under-an-alias": Family(lambda: AliasedInPlace(8, 6), None),
    "shortcut-reads-norm": Family(lambda: ShortcutReadsNorm(8, 8), None),
    "shortcut-reads-norm-projection": Family(lambda: ShortcutReadsNorm(8, 6), None),
    "two-activations": Family(lambda: TwoActivations(8), None),
    "no-second-activation": Family(lambda: NoSecondActivation(8), None),
    "three-paths": Family(lambda: ThreePaths(8), None),
    "middle-read-twice": Family(lambda: FirstOf(MiddleReadTwice(8)), None),
    "squeeze-excitation": Family(lambda: EndsWith(8, 8, 1, SqueezeExcite(8)), None),
    "squeeze-excitation-projection": Family(
        lambda: EndsWith(8, 6, 2, SqueezeExcite(6), conv1(8, 6, 2), "preact"), None
    ),
    "stochastic-depth": Family(lambda: OfNormActs(NormAct, 8, 3, 8, DropPath(0.4)), None),
    "stochastic-depth-0": Family(lambda: OfNormActs(NormAct, 8, 3, 8, DropPath(0.0)), None),
    "stochastic-depth-of-a-batch": Family(lambda: BatchDepth(8, 0.5), None),
    "survival-in-evaluation": Family(lambda: SurvivalScaled(8), None),
    "average-pooled-shortcut": Family(
        lambda: EndsWith(8, 6, 2, None, nn.Sequential(nn.AvgPool2d(2, 2, ceil_mode=True), conv1(8, 6)), "preact"),  # noqa: E501
        None,
    ),
    "normed-shortcut": Family(
        lambda: EndsWith(8, 6, 2, None, nn.Sequential(conv1(8, 6, 2), nn.BatchNorm2d(6))), None
    ),
    "reflecting-convolutions": Family(
        lambda: Residual(branch(8, padding_mode="reflect")), None
    ),
    "branch-on-data": Family(lambda: Branching(8), None),
    "enlarging": Family(lambda: Resizing(8, 6), None),
    "checkpointed": Family(lambda: Checkpointed(8), None, modes=("eval",)),
    "swish-by-hand": Family(lambda: HandmadeSwish(8), None),
}  # fmt: skip
