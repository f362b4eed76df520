"""The residual units that the paper compares, as plain modules, and networks made of them.

A unit is y = h(x) + F(x), x_{l+1} = f(y) (He et al. 2016, equations (1) and (2)). ``Ordering``
says in which order F and f apply a unit's children (Figure 4), a ``Join`` how h(x) and F(x) come
together (Figure 2). Nothing here is fused: every unit runs its children one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.modules import activation
from ..errors import InputError


@dataclass(frozen=True)
class Ordering:
    """The order of a unit's children, each a string of names: bn1, conv1, bn2, conv2, act.

    Attributes:
        name: as in the paper.
        branch: the residual function F.
        after: f, what follows the addition; empty for the identity.
        stem: what follows a network's first convolution: "bn", "act" or both.
        head: what precedes its pooling.

    What stands before conv1 in ``branch`` is the pre-activation. Where a unit changes the shape,
    and in a network's first unit, the shortcut reads the pre-activated x (section 4 and appendix).
    """

    name: str
    branch: str
    after: str = ""
    stem: str = ""
    head: str = ""

    @property
    def pre(self) -> list[str]:
        """The children before conv1."""
        names = self.branch.split()
        return names[: names.index("conv1")]

    @property
    def rest(self) -> list[str]:
        """conv1 and what follows it, up to the addition."""
        names = self.branch.split()
        return names[names.index("conv1") :]


# Figure 4 (a) to (e), the paper's Table 2.
ORIGINAL = Ordering("original", "conv1 bn1 act conv2 bn2", after="act", stem="bn act")
BN_AFTER_ADDITION = Ordering(
    "BN after addition", "conv1 bn1 act conv2", after="bn2 act", stem="bn act"
)
RELU_BEFORE_ADDITION = Ordering(
    "ReLU before addition", "conv1 bn1 act conv2 bn2 act", stem="bn act"
)
RELU_ONLY_PREACTIVATION = Ordering(
    "ReLU-only pre-activation", "act conv1 bn1 act conv2 bn2", stem="bn", head="act"
)
FULL_PREACTIVATION = Ordering("full pre-activation", "bn1 act conv1 bn2 act conv2", head="bn act")
# Orders of norm, activation and convolution in a pre-activation unit.
RELU_BN_CONV = Ordering("ReLU-BN-conv", "act bn1 conv1 act bn2 conv2", head="bn act")
BN_CONV = Ordering("BN-conv, no ReLU", "bn1 conv1 bn2 conv2", head="bn act")
# One identity path, one ReLU before every convolution: only the norm's place differs.
NO_BN = Ordering("no BN", "act conv1 act conv2", head="act")
BN_AFTER_CONV = Ordering("BN after conv", "act conv1 bn1 act conv2 bn2", stem="bn", head="act")
BN_BEFORE_CONV = Ordering("BN before conv", "bn1 act conv1 bn2 act conv2", head="bn act")


class Join(nn.Module):
    """How a shortcut x and a residual F(x) of one shape become y: here x + F(x), Figure 2(a)."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """x and residual (N, C, H, W) to y of that shape."""
        return x + residual


class ConstantScaling(Join):
    """y = shortcut * x + residual * F(x), Figure 2(b): over L units the shortcut carries
    shortcut ** L of the gradient (equation (8))."""

    def __init__(self, shortcut: float = 0.5, residual: float = 1.0) -> None:
        super().__init__()
        self.shortcut = shortcut
        self.residual = residual

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.shortcut * x + self.residual * residual

    def extra_repr(self) -> str:
        return f"shortcut={self.shortcut}, residual={self.residual}"


class ExclusiveGating(Join):
    """y = (1 - g) * x + g * F(x), g = sigmoid(conv1x1(x)), Figure 2(c), as in Highway Networks.

    Args:
        channels: of x.
        bias: initial bias of the gate; -6 was the paper's best of 0 to -10: 1 - g begins near 1.
    """

    def __init__(self, channels: int, bias: float = -6.0) -> None:
        super().__init__()
        self.gate = nn.Conv2d(channels, channels, 1)
        self.bias = bias

    def g(self, x: Tensor) -> Tensor:
        """The gate, in 0..1, of x's shape."""
        return torch.sigmoid(self.gate(x))

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        g = self.g(x)
        return (1 - g) * x + g * residual

    def extra_repr(self) -> str:
        return f"initial bias {self.bias}"


class ShortcutOnlyGating(ExclusiveGating):
    """y = (1 - g) * x + F(x), Figure 2(d). With a bias of 0 the shortcut begins halved."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return (1 - self.g(x)) * x + residual


class ConvolutionShortcut(Join):
    """y = conv1x1(x) + F(x), Figure 2(e)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.conv(x) + residual


class DropoutShortcut(Join):
    """y = dropout(x) + F(x), Figure 2(f): in expectation a scaling by 1 - p."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        # Not nn.Dropout, which divides by 1 - p: in the paper dropout imposes a scale with an
        # expectation of 0.5 on the shortcut (section 3.1).
        if self.training:
            return x * (torch.rand_like(x) >= self.p) + residual
        return (1 - self.p) * x + residual

    def extra_repr(self) -> str:
        return f"p={self.p}"


class ResidualUnit(nn.Module):
    """A basic unit, two 3x3 convolutions, in any order and with any shortcut.

    Args:
        in_channels, out_channels: of input and output.
        stride: of conv1 and of the projection.
        ordering: in which order the children run.
        join: from channels to a ``Join``.
        activated: whether the shortcut reads the pre-activated x though the shape stays.

    Children: bn1, conv1, bn2, conv2, act, as the ordering names them; shortcut, a 1x1
    convolution where the shape changes, otherwise empty; join.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        *,
        ordering: Ordering = FULL_PREACTIVATION,
        join: Callable[[int], Join] = lambda channels: Join(),
        activated: bool = False,
    ) -> None:
        super().__init__()
        self.ordering = ordering
        self.activated = activated
        channels = in_channels
        for name in f"{ordering.branch} {ordering.after}".split():
            if name == "conv1":
                conv = nn.Conv2d(channels, out_channels, 3, stride, padding=1, bias=False)
                self.add_module(name, conv)
                channels = out_channels
            elif name == "conv2":
                self.add_module(name, nn.Conv2d(channels, channels, 3, padding=1, bias=False))
            elif name in ("bn1", "bn2"):
                self.add_module(name, nn.BatchNorm2d(channels))
            elif name == "act":
                self.act = activation("relu")
            else:
                raise ValueError(f"a unit has no child {name!r}: bn1, conv1, bn2, conv2, act")
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut.append(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False))
        self.join = join(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, in_channels, H, W) to (N, out_channels, ceil(H/stride), ceil(W/stride))."""
        z = self._run(self.ordering.pre, x)
        h = self.shortcut(z if self.activated or len(self.shortcut) else x)
        y = self.join(h, self._run(self.ordering.rest, z))
        return self._run(self.ordering.after.split(), y)

    def _run(self, names: Sequence[str], x: Tensor) -> Tensor:
        for name in names:
            x = self.get_submodule(name)(x)
        return x

    def extra_repr(self) -> str:
        return self.ordering.name


def post_activation_block(in_channels: int, out_channels: int, stride: int = 1) -> ResidualUnit:
    """The original ResNet's basic block (He et al. 2015; Figure 4(a) of the 2016 paper)."""
    return ResidualUnit(in_channels, out_channels, stride, ordering=ORIGINAL)


class ResidualNetwork(nn.Module):
    """A CIFAR network of plain units: 3x3 stem, stages, pooling, classifier.

    Args:
        layers: units per stage. widths: channels per stage; every stage but the first begins with
            stride 2. The stem has the first stage's width.
        ordering: of all units, or one for each unit. The first decides what follows the stem, the
            last what precedes the pooling.
        join: of all units.
        num_classes, in_channels: of classifier and images.

    Weights are initialised as in the paper; a gate's bias with its own value.

    Raises:
        ValueError: widths or orderings that are not as many as stages or units.
    """

    def __init__(
        self,
        layers: Sequence[int],
        widths: Sequence[int],
        *,
        ordering: Ordering | Sequence[Ordering] = FULL_PREACTIVATION,
        join: Callable[[int], Join] = lambda channels: Join(),
        num_classes: int = 10,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if len(layers) != len(widths):
            raise ValueError(f"one width a stage: {len(layers)} stages, {len(widths)} widths")
        count = sum(layers)
        orderings = [ordering] * count if isinstance(ordering, Ordering) else list(ordering)
        if len(orderings) != count:
            raise ValueError(f"one ordering a unit: {count} units, {len(orderings)} orderings")
        channels = widths[0]
        first, last = orderings[0], orderings[-1]
        self.stem = nn.Sequential(nn.Conv2d(in_channels, channels, 3, padding=1, bias=False))
        self.stem.extend(_layers(first.stem, channels))
        self.units = nn.Sequential()
        for stage, (number, width) in enumerate(zip(layers, widths)):
            for i in range(number):
                stride = 2 if stage and not i else 1
                index = len(self.units)
                unit = ResidualUnit(
                    channels,
                    width,
                    stride,
                    ordering=orderings[index],
                    join=join,
                    activated=index == 0,
                )
                self.units.append(unit)
                channels = width
        self.head = nn.Sequential(*_layers(last.head, channels))
        self.fc = nn.Linear(channels, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, in_channels, H, W) to logits (N, num_classes)."""
        x = self.head(self.units(self.stem(x)))
        return self.fc(x.mean((2, 3)))


def _layers(names: str, channels: int) -> list[nn.Module]:
    kinds: dict[str, Callable[[], nn.Module]] = {
        "bn": lambda: nn.BatchNorm2d(channels),
        "act": lambda: activation("relu"),
    }
    return [kinds[name]() for name in names.split()]


def initialise(model: nn.Module) -> None:
    """Convolutions N(0, sqrt(2/(k*k*out_channels))), as the paper's code; gates their own bias."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            height, width = module.kernel_size
            deviation = math.sqrt(2.0 / (height * width * module.out_channels))
            nn.init.normal_(module.weight, 0.0, deviation)
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, ExclusiveGating):
            nn.init.constant_(module.gate.bias, module.bias)  # type: ignore[arg-type]


def layout(depth: int, width: int = 16, stages: int = 3) -> tuple[list[int], list[int]]:
    """Units and widths per stage of a net of ``depth`` layers.

    With three stages the paper's CIFAR net, ``depth`` = 6n+2, stem and classifier counted. With
    one stage a stack of depth/2 units of one width, the count that "25 blocks of 64" = 50 takes.

    Raises:
        InputError: any other depth; it names the nearest valid ones.
    """
    if stages not in (1, 3):
        raise InputError(f"stages must be 1 or 3, got {stages}")
    layers_a_unit, ends = (2, 0) if stages == 1 else (6, 2)
    units, rest = divmod(depth - ends, layers_a_unit)
    if rest or units < 1:
        below = max(units, 1) * layers_a_unit + ends
        near = f"{below} or {below + layers_a_unit}" if below < depth else f"{below}"
        shape = "2n" if stages == 1 else "6n+2"
        raise InputError(f"depth must be {shape} with {stages} stage(s), got {depth}; try {near}")
    return [units] * stages, [width * 2**stage for stage in range(stages)]
