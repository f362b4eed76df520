"""Pre-activation residual networks: the paper's CIFAR nets, Wide ResNets and ImageNet ResNets v2.

He et al. 2016 (arXiv 1603.05027), section 4 and appendix: the first unit activates before its two
paths part, and a last BN -> act follows the last addition.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from .blocks import BottleneckPreActBlock, PreActBlock, PreActUnit, Stage, norm_layer
from .core.footprint import Footprint, footprint
from .core.memory import choose_mode, parse_bytes, planned_gpu, step_limit
from .core.meta import MetaPrograms
from .core.modules import activation
from .core.shapes import Shape
from .kernels.reference import memory_format_of
from .names import AUTO, MEMORY_MODES

BLOCKS: dict[str, type[PreActUnit]] = {"basic": PreActBlock, "bottleneck": BottleneckPreActBlock}
STEMS = ("cifar", "imagenet")

# Height and width of the images that a stem is made for.
IMAGE_SIZES = {"cifar": 32, "imagenet": 224}


def _block_class(block: str | type[PreActUnit]) -> type[PreActUnit]:
    if isinstance(block, str):
        if block not in BLOCKS:
            raise ValueError(f"block must be one of {', '.join(BLOCKS)} or a class, got {block!r}")
        return BLOCKS[block]
    return block


class PreActResNet(nn.Module):
    """A pre-activation residual network: stem, stages of units, BN -> act, pooling, classifier.

    Args:
        block: ``PreActBlock``, ``BottleneckPreActBlock``, or "basic" or "bottleneck".
        layers: units per stage.
        num_classes: of the classifier.
        widths: output channels per stage. Default: 16, 32, 64, ... ("cifar") or 64, 128, 256, ...
            ("imagenet"), times the block's expansion.
        in_channels: of the images.
        stem: "cifar": a 3x3 convolution; "imagenet": 7x7 with stride 2 and 3x3 max pooling.
        stem_width: channels after the stem; 16 or 64 by default.
        first_identity: where an identity shortcut of the very first unit reads: "preact", as the
            paper's code, or "raw", as every other unit's and as most other code bases.
        memory: what is kept for the backward: "recompute", "invert", "invert_h1", "segment", or
            "auto", the fastest that fits ``budget`` (resnetv2/README.md, "Memory modes").
        budget: bytes for parameters, gradients, momentum and activations together ("8GiB" or a
            number) for memory="auto"; on a GPU its free memory if None.
        backend: "auto", "triton", "aten", or "eager" (unfused, for comparison).
        block_options: bias, shortcut, norm, act, ... of the blocks.

    Every stage but the first begins with stride 2. Children: conv1 (the stem), stage1, stage2, ...
    (each an ``nn.Sequential`` of blocks that runs as one chain), bn, act, fc.

    Raises:
        ValueError: an unknown name, or lengths of ``layers`` and ``widths`` that differ.
    """

    def __init__(
        self,
        block: str | type[PreActUnit],
        layers: Sequence[int],
        num_classes: int = 10,
        *,
        widths: Sequence[int] | None = None,
        in_channels: int = 3,
        stem: str = "cifar",
        stem_width: int | None = None,
        first_identity: str = "preact",
        memory: str = "recompute",
        budget: str | int | None = None,
        backend: str = AUTO,
        **block_options: Any,
    ) -> None:
        super().__init__()
        block = _block_class(block)
        if stem not in STEMS:
            raise ValueError(f"stem must be one of {', '.join(STEMS)}, got {stem!r}")
        if memory not in (*MEMORY_MODES, AUTO):
            raise ValueError(
                f"memory must be one of {', '.join(MEMORY_MODES)}, auto, got {memory!r}"
            )
        if budget is not None:
            budget = parse_bytes(budget)
        for name, value in (("num_classes", num_classes), ("in_channels", in_channels)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not layers or any(n < 1 for n in layers):
            raise ValueError(f"layers must name at least one unit per stage, got {list(layers)}")
        base = 16 if stem == "cifar" else 64
        channels = base if stem_width is None else stem_width
        if widths is None:
            widths = [base * 2**i * block.expansion for i in range(len(layers))]
        if len(widths) != len(layers):
            raise ValueError(
                f"widths must name one width per stage: {len(layers)} stages, {len(widths)} widths"
            )
        self.stem = stem
        self.memory = memory
        self.budget = budget
        self.backend = backend
        if stem == "cifar":
            self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        else:
            self.conv1 = nn.Conv2d(in_channels, channels, 7, stride=2, padding=3, bias=False)
        for number, (count, width) in enumerate(zip(layers, widths), start=1):
            blocks: list[nn.Module] = []
            for i in range(count):
                first = number == 1 and i == 0
                options = {"identity": first_identity, "shortcut": "preact"} if first else {}
                blocks.append(
                    block(
                        channels,
                        width,
                        2 if number > 1 and i == 0 else 1,
                        backend=backend,
                        **{**block_options, **options},
                    )
                )
                channels = width
            mode = "recompute" if memory == AUTO else memory
            self.add_module(f"stage{number}", Stage(*blocks, backend=backend, memory=mode))
        self.num_stages = len(layers)
        self._chosen: tuple[Any, ...] | None = None
        self.bn = norm_layer(block_options.get("norm", "batch"))(channels)
        self.act = activation(block_options.get("act", "relu"))
        self.fc = nn.Linear(channels, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the paper's code: conv weights N(0, sqrt(2/(k*k*out_channels))), norms 1
        and 0, biases 0."""
        if self.conv1.weight.is_meta:
            return
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                height, width = module.kernel_size
                fan_out = height * width * module.out_channels
                nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
                if isinstance(module, nn.BatchNorm2d):
                    module.reset_running_stats()
                if module.affine:
                    nn.init.ones_(module.weight)
                    nn.init.zeros_(module.bias)
        nn.init.zeros_(self.fc.bias)

    @property
    def stages(self) -> list[Stage]:
        """The stages in order."""
        return [getattr(self, f"stage{i}") for i in range(1, self.num_stages + 1)]

    def features(self, x: Tensor) -> Tensor:
        """Images (N, in_channels, H, W) to the last activated feature map."""
        if x.dim() != 4 or x.shape[1] != self.conv1.in_channels:
            raise ValueError(
                f"expected images (N, {self.conv1.in_channels}, H, W), got {tuple(x.shape)}"
            )
        if self.memory == AUTO and torch.is_grad_enabled():
            self._choose_memory(x)
        x = self.conv1(x)
        if self.stem == "imagenet":
            x = F.max_pool2d(x, 3, stride=2, padding=1)
        for stage in self.stages:
            x = stage(x)
        return self.act(self.bn(x))

    @_disable_dynamo  # torch.compiler.disable imports the compiler at once, for two seconds
    def _choose_memory(self, x: Tensor) -> None:
        """Set the stages to the fastest mode that fits the budget for images like x, once each."""
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else self.conv1.weight.dtype
        key = (tuple(x.shape), dtype, self.budget)
        if key != self._chosen:
            if self.budget is None and device != "cuda":
                raise ValueError('memory="auto" needs a budget where there is no GPU')
            size = (x.shape[2], x.shape[3])
            limit = step_limit(x.device, self.budget)
            choice = choose_mode(self, self.steps(size, dtype, x.device), x.shape[0], limit)
            for stage in self.stages:
                stage.memory = choice.chosen.mode
            self._chosen = key

    def steps(
        self, image_size: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> Callable[[int, str], Footprint]:
        """A function of a batch size and a memory mode: what a training step holds.

        Args:
            image_size: height and width. dtype: in which convolutions multiply. device: of a step;
                the net itself may be elsewhere, also on "meta".
        """
        weight = self.conv1.weight
        shape = Shape((0, self.conv1.in_channels, *image_size), weight.dtype)
        where = torch.device("cpu") if weight.is_meta else weight.device
        gpu = planned_gpu(device) if device.type == "cuda" else None
        programs = MetaPrograms()
        half = dtype.itemsize == 2 and dtype != weight.dtype

        def step(batch_size: int, mode: str) -> Footprint:
            images = shape._replace(size=(batch_size, *shape.size[1:]))
            form = memory_format_of(weight)
            with self._in_mode(mode), torch.autocast(where.type, dtype if half else None, half):
                return footprint(
                    self, lambda: ([images.empty(where, form)], {}), gpu=gpu, programs=programs
                )

        return step

    @contextlib.contextmanager
    def _in_mode(self, mode: str) -> Iterator[None]:
        before = self.memory, [stage.memory for stage in self.stages]
        try:
            self.memory = mode
            for stage in self.stages:
                stage.memory = mode
            yield
        finally:
            self.memory = before[0]
            for stage, its in zip(self.stages, before[1]):
                stage.memory = its

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, in_channels, H, W) to logits (N, num_classes)."""
        return self.fc(self.features(x).mean((2, 3)))

    @classmethod
    def from_depth(
        cls,
        depth: int,
        block: str | type[PreActUnit] = "basic",
        num_classes: int = 10,
        **options: Any,
    ) -> PreActResNet:
        """A three-stage CIFAR net by its number of layers: 6n+2 (basic) or 9n+2 (bottleneck).

        Raises:
            ValueError: any other depth; it names the nearest valid ones.
        """
        block = _block_class(block)
        per_unit = 3 * block.depth
        units, rest = divmod(depth - 2, per_unit)
        if rest or units < 1:
            below = max(units, 1) * per_unit + 2
            near = f"{below} or {below + per_unit}" if below < depth else f"{below}"
            raise ValueError(
                f"depth must be {per_unit}n+2 for {block.__name__}, got {depth}; nearest: {near}"
            )
        return cls(block, [units] * 3, num_classes, **options)


class StandardNet(NamedTuple):
    """A net of the literature by its name: what ``--model`` takes.

    depth: layers, as its name counts them. block, stem, units: as in ``PreActResNet``, units its
    ``layers``. build: ``build(num_classes, **options)`` makes it.
    """

    depth: int
    block: str
    stem: str
    units: tuple[int, ...]
    build: Callable[..., PreActResNet]


# Filled by ``_factory``: each name stands once, where its net is made.
MODELS: dict[str, StandardNet] = {}


def standard_net(name: str) -> StandardNet:
    """The net of that name.

    Raises:
        ValueError: another name; it lists them.
    """
    if name not in MODELS:
        raise ValueError(f"there is no net {name!r}: choose from {', '.join(MODELS)}")
    return MODELS[name]


def _factory(
    name: str, depth: int, block: str, units: Sequence[int], **fixed: Any
) -> Callable[..., PreActResNet]:
    stem = fixed.get("stem", "cifar")
    classes = 1000 if stem == "imagenet" else 10

    def build(num_classes: int = classes, **options: Any) -> PreActResNet:
        return PreActResNet(block, units, num_classes, **{**fixed, **options})

    build.__name__ = build.__qualname__ = name
    kind = "ImageNet" if stem == "imagenet" else "CIFAR"
    build.__doc__ = (
        f"{kind} pre-activation net of {BLOCKS[block].__name__}, units per stage {list(units)}; "
        f"options as for ``PreActResNet``."
    )
    MODELS[name] = StandardNet(depth, block, stem, tuple(units), build)
    return build


def _imagenet(depth: int, block: str, units: Sequence[int]) -> Callable[..., PreActResNet]:
    return _factory(f"preact_resnet{depth}", depth, block, units, stem="imagenet")


def _cifar(depth: int, block: str) -> Callable[..., PreActResNet]:
    units = (depth - 2) // (3 * BLOCKS[block].depth)
    return _factory(f"preact_resnet{depth}", depth, block, [units] * 3)


def _wide(depth: int, factor: int) -> Callable[..., PreActResNet]:
    units = (depth - 4) // 6
    widths = [16 * factor, 32 * factor, 64 * factor]
    return _factory(f"wide_resnet{depth}_{factor}", depth, "basic", [units] * 3, widths=widths)


preact_resnet18 = _imagenet(18, "basic", [2, 2, 2, 2])
preact_resnet34 = _imagenet(34, "basic", [3, 4, 6, 3])
preact_resnet50 = _imagenet(50, "bottleneck", [3, 4, 6, 3])
preact_resnet101 = _imagenet(101, "bottleneck", [3, 4, 23, 3])
preact_resnet152 = _imagenet(152, "bottleneck", [3, 8, 36, 3])
preact_resnet200 = _imagenet(200, "bottleneck", [3, 24, 36, 3])

preact_resnet20 = _cifar(20, "basic")
preact_resnet56 = _cifar(56, "basic")
preact_resnet110 = _cifar(110, "basic")
preact_resnet1202 = _cifar(1202, "basic")
preact_resnet164 = _cifar(164, "bottleneck")
preact_resnet1001 = _cifar(1001, "bottleneck")

wide_resnet16_8 = _wide(16, 8)
wide_resnet28_10 = _wide(28, 10)
wide_resnet40_2 = _wide(40, 2)
