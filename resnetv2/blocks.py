"""Pre-activation blocks as drop-in modules (He et al. 2016, Figure 4(e) and equation (3)).

Each block computes x_{l+1} = shortcut + F(x), F a sequence of norm -> act -> conv. The children are
ordinary ``nn.BatchNorm2d``, or group norms, and ``nn.Conv2d`` under the usual names and are read
afresh at every call; ``forward_children`` says in plain PyTorch what ``forward`` computes by fused
kernels, and runs wherever those cannot honour what was asked (hooks, other child types, vmap, ...).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .core.checks import (
    UnfitError,
    check_input,
    hooked,
    must_run_eagerly,
    refuse_empty_rank,
    why_not,
)
from .core.modules import ChainUnit, UnitModules, activation
from .core.reading import read
from .core.run import run_blocks, run_chain
from .core.spec import Shortcut
from .names import AUTO, EAGER

BACKENDS = (AUTO, "triton", "aten", EAGER)


def norm_layer(norm: str | Callable[[int], nn.Module]) -> Callable[[int], nn.Module]:
    """What makes a norm of so many channels: "batch", "group:G", "instance", "layer" or a callable.

    "layer" is over channels and pixels of each image, "instance" over the pixels of each channel of
    it (with a weight and bias for each channel): G = 1 and G = C groups (Wu and He 2018).

    Raises:
        ValueError: another name, or a number of groups that is none. The callable: channels that
            are no multiple of the groups.
    """
    if callable(norm):
        return norm
    if norm == "batch":
        return nn.BatchNorm2d
    if norm == "layer":
        return functools.partial(_group_norm, 1)
    if norm == "instance":
        return lambda channels: nn.GroupNorm(channels, channels)
    kind, _, number = norm.partition(":")
    if kind != "group" or not (number.isascii() and number.isdigit() and int(number)):
        raise ValueError(
            'norm must be "batch", "group:32" (so many groups), "instance", "layer" or a callable '
            f"from channels to module, got {norm!r}"
        )
    return functools.partial(_group_norm, int(number))


def _group_norm(groups: int, channels: int) -> nn.GroupNorm:
    if channels % groups:
        raise ValueError(f"norm must divide {channels} channels, got {groups} groups")
    return nn.GroupNorm(groups, channels)


class PreActUnit(ChainUnit, nn.Module):
    """The part that both blocks share: reading the children, running fused or child by child.

    Subclasses create ``bn1``, ``conv1``, ... , ``act`` and ``shortcut`` and name the repetitions
    in ``depth`` (k).
    """

    depth: int
    expansion: int = 1
    # nn.Module's own attributes are typed as tensors or modules of any kind.
    act: Any
    bn1: Any
    conv1: Any

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        *,
        shortcut: str,
        identity: str,
        backend: str,
    ) -> None:
        super().__init__()
        for name, value in (
            ("in_channels", in_channels),
            ("out_channels", out_channels),
            ("stride", stride),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name, reads in (("shortcut", shortcut), ("identity", identity)):
            if reads not in ("preact", "raw"):
                raise ValueError(f'{name} must be "preact" or "raw", got {reads!r}')
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.stride = stride
        self.shortcut_reads = shortcut
        self.identity_reads = identity
        self.backend = backend
        self.memory = "recompute"

    def _add_shortcut(self, bias: bool) -> None:
        """The last child: a 1x1 projection where the shape changes, empty otherwise."""
        self.shortcut = nn.Sequential()
        if self.stride != 1 or self.in_channels != self.out_channels:
            projection = nn.Conv2d(
                self.in_channels, self.out_channels, 1, stride=self.stride, bias=bias
            )
            self.shortcut.append(projection)

    def unit_modules(self) -> UnitModules | str:
        """The children in the order of the computation, or why they must run one by one."""
        projection: Any = None
        if hooked(self.shortcut):
            return "a hook on the shortcut"
        if self.has_projection():
            projection = self.shortcut
            if type(projection) is nn.Sequential:
                if len(projection) > 1:
                    return f"a shortcut of {len(projection)} modules"
                projection = projection[0]
        numbers = range(1, self.depth + 1)
        unit = UnitModules(
            tuple(getattr(self, f"bn{i}") for i in numbers),
            tuple(getattr(self, f"conv{i}") for i in numbers),
            self.act,
            Shortcut.of(projection is not None, self.reads_preact()),
            projection,
        )
        return why_not(unit) or unit

    def chain_unit(self) -> UnitModules | str:
        """``unit``, or why the block must be called: it is unfused or a subclass's forward."""
        if self.backend == EAGER:
            return 'backend is "eager"'
        if type(self).forward is not PreActUnit.forward:
            return f"{type(self).__name__} has a forward of its own"
        return self.unit_modules()

    def forward(self, x: Tensor) -> Tensor:
        """x (N, in_channels, H, W) to (N, out_channels, ceil(H/stride), ceil(W/stride)).

        The dtype is that of eager PyTorch: x's, or under autocast that of the addition. The memory
        format is x's. x is not modified.

        Raises:
            ValueError: wrong rank, channels, dtype or device; one value per channel in training.
        """
        reading = read(self, "inside")
        if isinstance(reading, str):
            return self.forward_children(x)
        refuse_empty_rank(reading.unit, x)
        if self.backend == EAGER or must_run_eagerly(x):
            check_input(x, reading.unit.convs[0])
            return self.forward_children(x)
        try:
            return run_chain([reading], x, backend=self.backend, memory=self.memory)
        except UnfitError:
            return self.forward_children(x)

    def forward_children(self, x: Tensor) -> Tensor:
        """The same function, child by child: He et al. 2016, Figure 4(e)."""
        z = self.act(self.bn1(x))
        shortcut = z if self.reads_preact() else x
        h = self.conv1(z)
        for i in range(2, self.depth + 1):
            h = getattr(self, f"conv{i}")(self.act(getattr(self, f"bn{i}")(h)))
        return h + self.shortcut(shortcut)

    def has_projection(self) -> bool:
        """Whether the shortcut is anything but the identity, whatever was put in its place."""
        shortcut = self.shortcut
        empty = isinstance(shortcut, nn.Sequential) and not len(shortcut)
        return not (empty or isinstance(shortcut, nn.Identity))

    def reads_preact(self) -> bool:
        """Whether the shortcut reads act(bn1(x)) rather than x."""
        reads = self.shortcut_reads if self.has_projection() else self.identity_reads
        return reads == "preact"

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, stride={self.stride}, "
            f"shortcut={self.shortcut_reads!r}"
        )


class PreActBlock(PreActUnit):
    """Basic pre-activation block: two times BN -> act -> 3x3 conv (He et al. 2016, Figure 4(e)).

    Args:
        in_channels, out_channels: of input and output.
        stride: of ``conv1`` and of the projection.
        bias: whether the convolutions have one.
        shortcut: where a 1x1 projection (present where the shape changes) reads: ``"preact"``,
            act(bn1(x)), as in the paper, or ``"raw"``, x.
        identity: the same for a shortcut without projection; ``"preact"`` is the paper's first
            unit, which activates before the two paths part.
        norm: ``"batch"``, ``"group:32"`` (so many groups), ``"instance"``, ``"layer"``, or a
            callable from channels to a module (``norm_layer``; of another class than PyTorch's
            norms: the children run one by one).
        act: relu, leaky_relu (0.1), silu, gelu, identity, or a module.
        backend: ``"auto"``, ``"triton"``, ``"aten"``, or ``"eager"`` for child by child.

    Children: bn1, conv1, bn2, conv2, act, shortcut. ``block.conv1(F.relu(block.bn1(x)))`` by hand
    gives what the block computes.
    """

    depth = 2

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        *,
        bias: bool = False,
        shortcut: str = "preact",
        identity: str = "raw",
        norm: str | Callable[[int], nn.Module] = "batch",
        act: str | nn.Module = "relu",
        backend: str = AUTO,
    ) -> None:
        super().__init__(
            in_channels, out_channels, stride, shortcut=shortcut, identity=identity, backend=backend
        )
        layer = norm_layer(norm)
        self.bn1 = layer(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=bias)
        self.bn2 = layer(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=bias)
        self.act = activation(act)
        self._add_shortcut(bias)


class BottleneckPreActBlock(PreActUnit):
    """Bottleneck pre-activation block: BN -> act -> conv with 1x1, 3x3 and 1x1 kernels.

    Arguments are ``PreActBlock``'s, and:
        expansion: out_channels over the inner width, which is ``out_channels // expansion``.

    The stride is the 3x3's. Children: bn1, conv1, bn2, conv2, bn3, conv3, act, shortcut.
    """

    depth = 3
    expansion = 4

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        *,
        expansion: int = 4,
        bias: bool = False,
        shortcut: str = "preact",
        identity: str = "raw",
        norm: str | Callable[[int], nn.Module] = "batch",
        act: str | nn.Module = "relu",
        backend: str = AUTO,
    ) -> None:
        super().__init__(
            in_channels, out_channels, stride, shortcut=shortcut, identity=identity, backend=backend
        )
        if expansion < 1 or out_channels % expansion:
            raise ValueError(
                f"out_channels must be a multiple of expansion, got {out_channels} and {expansion}"
            )
        self.expansion = expansion
        width = out_channels // expansion
        layer = norm_layer(norm)
        self.bn1 = layer(in_channels)
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=bias)
        self.bn2 = layer(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=bias)
        self.bn3 = layer(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=bias)
        self.act = activation(act)
        self._add_shortcut(bias)


class Stage(nn.Sequential):
    """Consecutive blocks, run as one chain: each tensor's moments come from what wrote it.

    Indexable and iterable like any ``nn.Sequential``. Blocks that cannot be units of a chain (a
    hook on the block or a child, another class) are called one by one, the others as chains
    between them.

    Args:
        blocks: the blocks in order. backend, memory: of the chains; memory as in ``PreActResNet``.
            The attribute ``segment`` is the number of units in a segment, 0 for the length that
            keeps least.
    """

    def __init__(self, *blocks: nn.Module, backend: str = AUTO, memory: str = "recompute") -> None:
        super().__init__(*blocks)
        self.backend = backend
        self.memory = memory
        self.segment = 0

    def forward(self, x: Tensor) -> Tensor:
        """x through every block; see ``PreActUnit.forward``."""
        return run_blocks(self, x, backend=self.backend, memory=self.memory, segment=self.segment)

    def __getitem__(self, idx: Any) -> Any:
        """A block, or a Stage of a slice of them that runs as this one does."""
        part = super().__getitem__(idx)
        if isinstance(idx, slice):
            for name in ("backend", "memory", "segment"):
                setattr(part, name, getattr(self, name))
        return part
