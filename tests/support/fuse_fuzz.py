"""Random models of random styles, and one step of each, fused and not: ``python -m
tests.support.fuse_fuzz FIRST LAST`` runs the seeds of a range."""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.support.fuse_checks import fuse_if_any
from tests.support.fuse_models import (
    Basic,
    Bottleneck,
    Dropping,
    EndsWith,
    FunctionalDropping,
    FunctionalLeaky,
    IdentityFromPreact,
    NormAct,
    NormThenAct,
    OfNormActs,
    OfTuples,
    OneSidedConvs,
    PaddedBoth,
    PostActivation,
    RawSequence,
    Residual,
    SqueezeExcite,
    StrideOnConv2,
    ThrownAwayNorm,
    Wide,
    WithAct,
    branch,
    conv1,
)
from tests.support.fuse_models.grouped import (
    AllByHand,
    Conditioned,
    Embedded,
    GroupNormAct,
    GroupNormed,
    MaybeEmbedded,
    ScaledConv2d,
    group_norm,
)
from tests.support.mutations import MUTATIONS, B
from tests.support.yardstick import DEVICE, images, randomise, step

MODES = ("recompute", "invert_h1", "invert", "segment")
# Relative to the norm of float64's result, beside four times eager's own error: of outputs and
# buffers, of gradients. In bf16 a ReLU's sign that flips near 0 outweighs all rounding.
FLOOR = {torch.float64: (1e-8, 1e-8), torch.float32: (1e-3, 1e-3), torch.bfloat16: (0.1, 0.5)}

# Made for so many channels, as many come out; and to others.
Same = Callable[[int], nn.Module]
Other = Callable[[int, int, int], nn.Module]
SAME: tuple[Same, ...] = (
    lambda c: Basic(c, c),
    lambda c: Basic(c, c, bias=True),
    lambda c: Basic(c, c, norm=lambda n: nn.BatchNorm2d(n, affine=False, momentum=None)),
    lambda c: Wide(c, c, 1),
    lambda c: Dropping(c, 0.0),
    lambda c: FunctionalDropping(c, 0.0),
    FunctionalLeaky,
    IdentityFromPreact,
    lambda c: IdentityFromPreact(c, True),
    lambda c: OfNormActs(NormAct, c, random.randint(2, 5), c),
    lambda c: OfNormActs(NormThenAct, c, random.randint(2, 5), c),
    lambda c: OfTuples(c, c),
    OneSidedConvs,
    lambda c: PaddedBoth(c, random.random() < 0.5),
    lambda c: PostActivation(c, c),
    lambda c: Residual(branch(c, random.randint(1, 3))),
    lambda c: ThrownAwayNorm(c, c),
    lambda c: EndsWith(c, c, 1, SqueezeExcite(c)),
    lambda c: GroupNormed(c, random.choice((nn.Conv2d, ScaledConv2d)), random.choice(NORMS)),
    lambda c: GroupNormed(c, norm=random.choice(NORMS)),
    AllByHand,
    lambda c: Basic(c, c, norm=random.choice((group_norm, nn.InstanceNorm2d))),
    lambda c: Conditioned(Embedded(c, c, 3, random.choice(("add", "scale"))), features=3, images=4),
    lambda c: Conditioned(MaybeEmbedded(c, c, 3), features=3, images=4),
    lambda c: MaybeEmbedded(c, c, 3),
    B,
)
NORMS = ("gg", "gb", "bg", "bb")
OTHER: tuple[Other, ...] = (
    lambda c, k, s: Basic(c, k, s),
    lambda c, k, s: Wide(c, k, s, activate_first=random.random() < 0.5),
    lambda c, k, s: OfTuples(c, k, s),
    lambda c, k, s: EndsWith(c, k, s, None, conv1(c, k, s), random.choice(("raw", "preact"))),
    lambda c, k, s: Basic(c, k, s, norm=group_norm),
    lambda c, k, s: OfNormActs(GroupNormAct, c, 2, k),
    lambda c, k, s: Conditioned(Embedded(c, k, 3), features=3, images=4),
    lambda c, k, s: StrideOnConv2(c, k) if s == 2 else Basic(c, k, 1),
)
QUARTERS: tuple[Other, ...] = (
    lambda c, w, s: Bottleneck(c, w, s),
    lambda c, w, s: RawSequence(c, w, s),
)
ACTS = (nn.ReLU, nn.SiLU, nn.GELU, lambda: nn.LeakyReLU(0.2), nn.Tanh)


class Case(NamedTuple):
    """A model and how it is run."""

    model: nn.Module
    x: Tensor
    memory: str
    dtype: torch.dtype
    autocast: bool


def draw(seed: int) -> Case:
    """The case of a seed; leaves global random numbers as they are to be for building it."""
    random.seed(seed)
    torch.manual_seed(seed)
    channels = first = random.choice((1, 2, 4, 6, 8))
    blocks: list[nn.Module] = []
    for _ in range(random.randint(1, 6)):
        kind = random.random()
        stride = random.choice((1, 1, 2))
        if blocks and kind < 0.1:
            again = [b for b in blocks if getattr(b, "same", False)]
            blocks += again[-1:]
        elif kind < 0.6:
            block = random.choice(SAME)(channels)
            block.same = True
            blocks.append(block)
        elif kind < 0.7:
            blocks.append(WithAct(random.choice(ACTS), channels, channels))
        elif kind < 0.9:
            out = random.choice((1, 3, 4, 8))
            blocks.append(random.choice(OTHER)(channels, out, stride))
            channels = out
        else:
            width = random.choice((2, 3))  # an inner width of 1 lies in either layout
            blocks.append(random.choice(QUARTERS)(channels, width, stride))
            channels = 4 * width
        changed = blocks and blocks[-1]
        if isinstance(changed, nn.Module) and random.random() < 0.1:
            blocks.append(random.choice((nn.ReLU(), nn.Identity())))
    model: nn.Module = nn.Sequential(*blocks)
    if random.random() < 0.3 and len(blocks) > 2:
        model = nn.Sequential(nn.Sequential(*blocks[:2]), *blocks[2:])
    if random.random() < 0.15:
        channels = first = 6
        names = [name for name, m in MUTATIONS.items() if isinstance(m.build, type)]
        model = nn.Sequential(MUTATIONS[random.choice(names)].build(), B(), B())
    dtype = random.choice((torch.float32, torch.float64, torch.bfloat16))
    autocast = dtype == torch.bfloat16 and random.random() < 0.7
    model = randomise(model, seed).to(DEVICE).train(random.random() < 0.7)
    if random.random() < 0.3:
        model = model.to(memory_format=torch.channels_last)
    shape = (random.randint(2, 4), first, random.randint(7, 9), random.randint(7, 9))
    x = images(shape, seed, torch.float32, random.random() < 0.5)
    if dtype == torch.float64 or (dtype == torch.bfloat16 and not autocast):
        model, x = model.to(dtype), x.to(dtype)
    cut = random.random()
    if cut < 0.1:
        x = x[..., 1:]
    elif cut < 0.2:
        x = x.transpose(2, 3)
    return Case(model, x, random.choice(MODES), dtype, autocast)


def _run(model: nn.Module, x: Tensor, autocast: bool, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    random.seed(seed)
    try:
        result: dict[str, Any] = step(
            model, x, autocast=torch.bfloat16 if autocast else None, seed=seed
        )
    except (ValueError, RuntimeError, TypeError, AttributeError) as error:
        return {"raised": str(error)}
    return result


def check(seed: int) -> str:
    """What differs in the case of a seed; empty for nothing."""
    case = draw(seed)
    # Some blocks cannot be copied: each is drawn anew.
    fused = fuse_if_any(draw(seed).model, memory=case.memory)
    exact = draw(seed).model.double()
    mine = _run(fused, case.x, case.autocast, seed)
    eager = _run(case.model, case.x, case.autocast, seed)
    truth = _run(exact, case.x.double(), False, seed)
    if "raised" in eager or "raised" in mine or "raised" in truth:
        same = ("raised" in eager) == ("raised" in mine)
        return "" if same else f"raised: {mine.get('raised')!r}, eager: {eager.get('raised')!r}"
    if mine.keys() != eager.keys():
        return f"other results: {mine.keys() ^ eager.keys()}"
    grads = [v for name, v in truth.items() if name.startswith(("grad", "dx"))]
    largest = max(float(g.double().norm()) for g in grads)
    for name, value in mine.items():
        if value.dtype != eager[name].dtype or value.shape != eager[name].shape:
            return f"{name} is {value.dtype}, {value.shape}"
        if name == "out" and not _mixed(case):
            # Of dimensions of size 1 strides say nothing.
            strides = [
                [s for s, size in zip(out.stride(), out.shape) if size > 1]
                for out in (value, eager[name])
            ]
            if strides[0] != strides[1]:
                return f"out has strides {strides[0]}, eager {strides[1]}"
        exactly = truth[name].double()
        mine_off = float((value.double() - exactly).norm())
        eager_off = float((eager[name].double() - exactly).norm())
        is_grad = name.startswith(("grad", "dx"))
        scale = largest if is_grad else float(exactly.norm())
        if not mine_off <= 4 * eager_off + FLOOR[case.dtype][is_grad] * scale + 1e-12:
            return f"{name} is off by {mine_off:.1e}, eager by {eager_off:.1e}, of {scale:.1e}"
    return ""


def _mixed(case: Case) -> bool:
    """Whether input and weights lie in different layouts, where eager's result depends on which
    operand of an addition comes first."""
    weights = [p for p in case.model.parameters() if p.dim() == 4]
    last = any(not p.is_contiguous() for p in weights)
    return last != (case.x.stride(1) == 1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = 0
    for number in range(int(sys.argv[1]), int(sys.argv[2])):
        try:
            difference = check(number)
        except Exception as error:
            difference = f"crash: {type(error).__name__}: {error}"
        if difference:
            found += 1
            print(number, difference, flush=True)
    print(f"{found} of {int(sys.argv[2]) - int(sys.argv[1])}")
