"""The children and inputs that the operators accept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.operands import ACTS
from .execution import layout_of
from .modules import UnitModules, act_of, padding_of
from .norms import NORMS, batch_statistics, channels_of, groups_of
from .spec import DTYPES
from .sync import SyncBatchNorm, check_rows, group_number

# Methods that run in a module's call: put on the instance, they take the place of its class's.
SHADOWS = ("forward", "_conv_forward", "_check_input_dim", "_call_impl", "_slow_forward")


# What a chain reads of a norm or convolution; a subclass that computes one is no plain one.
CHILD_ATTRIBUTES = frozenset(
    (
        "training", "momentum", "eps", "affine", "track_running_stats", "num_features", "weight",
        "bias", "running_mean", "running_var", "num_batches_tracked", "num_groups", "num_channels",
        "in_channels", "out_channels",
        "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode",
        "_reversed_padding_repeated_twice", "__getattr__", "__getattribute__",
    )
)  # fmt: skip


def hooked(module: nn.Module) -> bool:
    """Whether anything is hooked on a module's call, so that it must really be called.

    A ``forward`` or another of ``SHADOWS`` put on the instance counts too: how adapters and
    offloading libraries hook. So does ``module.compile()``.
    """
    return bool(
        any(name in module.__dict__ for name in SHADOWS)
        or module._compiled_call_impl is not None
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def globally_hooked() -> bool:
    """Whether something is hooked on the calls of all modules."""
    m = torch.nn.modules.module
    return bool(
        m._global_forward_hooks
        or m._global_forward_pre_hooks
        or m._global_backward_hooks
        or m._global_backward_pre_hooks
    )


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module computes what ``kind`` does: of that class, or a subclass without a forward
    or attributes of its own. A parametrized child does not: it computes its parameters."""
    own = type(module)
    if own is kind:
        return True
    inner = "_conv_forward" if kind is nn.Conv2d else "_check_input_dim"
    return (
        isinstance(module, kind)
        and all(
            CHILD_ATTRIBUTES.isdisjoint(vars(base))
            for base in own.__mro__
            if base not in kind.__mro__
        )
        and own.forward is kind.forward
        and own.__call__ is kind.__call__
        and getattr(own, inner, None) is getattr(kind, inner, None)
        and not hasattr(module, "parametrizations")
    )


def is_norm(module: nn.Module) -> bool:
    """Whether a module computes what one of ``NORMS`` does, an instance norm by its input alone."""
    if isinstance(module, nn.InstanceNorm2d) and module.running_mean is not None:
        return False
    return any(is_plain(module, kind) for kind in (SyncBatchNorm, *NORMS))


def why_not(
    unit: UnitModules,
    norm_types: Sequence[type | None] = (),
    conv_types: Sequence[type | None] = (),
) -> str | None:
    """The reason why a unit's children must run one by one, or None.

    norm_types, conv_types: per norm and convolution, the projection's last, a class that is known
    to compute what its base does, or None.
    """
    if act_of(unit.act) is None:
        return f"activation {type(unit.act).__name__} is not one of {', '.join(ACTS)}"
    if isinstance(unit.act, nn.Module) and hooked(unit.act):
        return f"a hook on {type(unit.act).__name__}"
    for i, norm in enumerate(unit.norms):
        known = norm_types[i] if norm_types else None
        # A class with a forward of its own is of use only where just that class is expected.
        if type(norm) is not known if known else not is_norm(norm):
            return f"a norm is {type(norm).__name__}, not {(known or nn.BatchNorm2d).__name__}"
        if hooked(norm):
            return "a hook on a norm"
        synced = isinstance(norm, (SyncBatchNorm, nn.SyncBatchNorm))
        if synced and torch.compiler.is_compiling():
            return "torch.compile does not trace a synchronised norm's collectives"
    convs = unit.convs if unit.projection is None else (*unit.convs, unit.projection)
    for i, conv in enumerate(convs):
        known = conv_types[i] if conv_types else None
        if type(conv) is not known if known else not is_plain(conv, nn.Conv2d):
            return f"a convolution is {type(conv).__name__}, not {(known or nn.Conv2d).__name__}"
        if hooked(conv):
            return "a hook on a convolution"
        if padding_of(conv) is None or conv.padding_mode != "zeros":
            return f"padding {conv.padding!r} in mode {conv.padding_mode!r}"
    return None


# Takes a chain's readings, their tensors, input, dtype and mode instead of ``run``
# (``core.footprint``).
Follower = Callable[[Sequence[Any], Sequence[Sequence[Tensor]], Tensor, torch.dtype, str], Tensor]
_follower: ContextVar[Follower | None] = ContextVar("follower", default=None)


@contextlib.contextmanager
def following(follower: Follower) -> Iterator[None]:
    """Let chains of tensors without memory be told to ``follower``, which gives their outputs."""
    token = _follower.set(follower)
    try:
        yield
    finally:
        _follower.reset(token)


def follower_of(x: Tensor) -> Follower | None:
    """Who is told of a chain with the input x, if anybody."""
    return None if type(x) in (Tensor, nn.Parameter) else _follower.get()


def is_followed() -> bool:
    """Whether a forward runs for its chains to be told, and computes nothing."""
    return _follower.get() is not None


class UnfitError(Exception):
    """Why a chain cannot take an input that its units' own forwards may take, or refuse better."""


def must_run_eagerly(x: Tensor) -> bool:
    """Whether x, or what is being done with it, is beyond the operators: children then run."""
    compiling = torch.compiler.is_compiling()
    if not compiling and torch._C._is_tracing():
        return True
    if x.dtype not in DTYPES or x.numel() == 0:
        return True
    if x.dtype == torch.float64 and torch.is_autocast_enabled(x.device.type):
        return True
    if compiling:
        return False
    return (
        (type(x) not in (Tensor, nn.Parameter) and follower_of(x) is None)
        or x.is_meta
        or x.layout != torch.strided
        or globally_hooked()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def accepts(unit: UnitModules, x: Any) -> bool:
    """Whether a chain that begins with ``unit`` can take x; if not, the module itself is called,
    which may raise."""
    refuse_empty_rank(unit, x)
    return (
        isinstance(x, Tensor)
        and not must_run_eagerly(x)
        and x.dim() == 4
        and x.shape[1] == channels_of(unit.norms[0])
        and x.device == unit.convs[0].weight.device
        and layout_of(x) is not None
    )


def refuse_empty_rank(unit: UnitModules, x: Any) -> None:
    """Raise ValueError for an empty input of synchronised norms: children that ran it one by one
    would exchange something else than the other ranks' chains."""
    if isinstance(x, Tensor) and x.numel() == 0 and any(map(group_number, unit.norms)):
        check_rows(x)


def check_input(x: Tensor, conv: nn.Conv2d) -> None:
    """Raise at once for an input that a chain beginning with ``conv`` cannot take.

    Raises:
        ValueError: wrong rank, number of channels, dtype or device; says what was expected and
            what came.
    """
    if x.dim() != 4:
        raise ValueError(f"expected 4D input (N, C, H, W), got {x.dim()}D input {tuple(x.shape)}")
    if x.shape[1] != conv.in_channels:
        raise ValueError(
            f"expected input with {conv.in_channels} channels, got {x.shape[1]} channels: "
            f"{tuple(x.shape)}"
        )
    if not x.is_floating_point():
        raise ValueError(f"expected a floating-point input, got {x.dtype}")
    weight = conv.weight
    if x.device != weight.device:
        raise ValueError(
            f"expected input on the parameters' device {weight.device}, got {x.device}"
        )
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(
            f"expected input of the convolutions' dtype {weight.dtype}, got {x.dtype} "
            "(torch.autocast mixes dtypes)"
        )


def rows_of(units: Sequence[UnitModules], x: Tensor) -> list[int]:
    """N*H*W at each norm of the chain; raises as eager does where one has nothing to average.

    Also where the channels of neighbours differ, which kernels would not notice, and with
    ``UnfitError`` where a shortcut is of another shape than what it is added to.
    """
    rows = []
    size = (x.shape[2], x.shape[3])
    channels = x.shape[1]
    for unit in units:
        projection = unit.projection
        beside = (channels, size)
        if projection is not None:
            its_size = unit.geometry(-1).output_size(size, projection.kernel_size)  # type: ignore[arg-type]
            beside = (projection.out_channels, its_size)
        if projection is not None and projection.in_channels != channels:
            raise ValueError(
                f"expected a projection of {channels} channels, got {projection.in_channels}"
            )
        for i, (norm, conv) in enumerate(zip(unit.norms, unit.convs)):
            if channels_of(norm) != channels or conv.in_channels != channels:
                raise ValueError(
                    f"expected a norm and a convolution of {channels} channels, got "
                    f"{channels_of(norm)} and {conv.in_channels}"
                )
            rows.append(x.shape[0] * size[0] * size[1])
            _check_values(norm, (x.shape[0], channels, *size))
            channels = conv.out_channels
            geometry = unit.geometry(i)
            size = geometry.output_size(size, conv.kernel_size)  # type: ignore[arg-type]
        if beside != (channels, size):
            raise UnfitError("a shortcut of another shape than what it is added to")
    return rows


def _check_values(norm: nn.Module, size: tuple[int, int, int, int]) -> None:
    """Raise as eager does where a norm's input, (N, C, H, W), has nothing to average."""
    groups = groups_of(norm)
    values = size[0] * size[2] * size[3]
    if not groups:
        if values > 1 or not batch_statistics(norm) or group_number(norm):
            return
        what = "1 value per channel when training"
    elif isinstance(norm, nn.InstanceNorm2d):
        if size[2] * size[3] > 1:
            return
        what = "1 pixel per image"
    else:
        if values * size[1] // groups > 1:
            return
        what = "1 value per group"
    raise ValueError(f"expected more than {what}, got input size {size}")


def check_dtypes(units: Sequence[UnitModules], x: Tensor) -> None:
    """Raise ``UnfitError`` for parameters of a dtype that eager would refuse beside x's, or compute
    with in another one."""
    mixes = torch.is_autocast_enabled(x.device.type)
    for unit in units:
        for conv in (*unit.convs, *([] if unit.projection is None else [unit.projection])):
            for tensor in (conv.weight, conv.bias):
                if tensor is None:
                    continue
                if tensor.dtype == torch.float64 if mixes else tensor.dtype != x.dtype:
                    raise UnfitError(f"a convolution of {tensor.dtype} beside {x.dtype}")
        for norm in unit.norms:
            names = ("weight", "bias", "running_mean", "running_var")
            for tensor in [getattr(norm, name, None) for name in names]:
                if tensor is None or tensor.dtype == (torch.float32 if mixes else x.dtype):
                    continue
                # On a GPU ATen's group norm takes one dtype alone.
                takes_one = groups_of(norm) > 0 and x.is_cuda
                if x.dtype == torch.float64 or tensor.dtype != torch.float32 or takes_one:
                    raise UnfitError(f"a norm of {tensor.dtype} beside {x.dtype}")
        if mixes and x.is_cuda and groups_of(unit.norms[0]) and _adds_preact(unit):
            # CUDA's autocast has group norms give float32, and so the sum.
            raise UnfitError("an identity that reads a group norm's float32")


def _adds_preact(unit: UnitModules) -> bool:
    return unit.projection is None and unit.shortcut.reads_preact
