"""A module's forward as a torch.fx graph of its own steps, without side effects on the module.

Modules of torch.nn are leaves, and norms of any class. Values answer what a forward may ask of any
batch of images (rank, channels); everything else that it decides by, it must read from plain
attributes, which are logged.
"""

from __future__ import annotations

import contextlib
import copy
import operator
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.dropout import _DropoutNd

from ..core.checks import is_norm
from ..core.modules import act_of
from ..core.sync import NORMS
from ..kernels.operands import Act
from .unit_plan import INTERNAL, NotAUnitError, Path, child_at, is_leaf

UNTRACEABLE = "cannot be traced"

Log = dict[tuple[Path, str], None]


# Called as the functions are, so that slopes and flags are found wherever they were passed.
def _relu(input: Any, inplace: bool = False) -> Act:
    return Act("relu")


def _leaky_relu(input: Any, negative_slope: Any = 0.01, inplace: bool = False) -> Act | None:
    known = isinstance(negative_slope, (int, float)) and negative_slope >= 0
    return Act("leaky_relu", float(negative_slope)) if known else None


def _silu(input: Any, inplace: bool = False) -> Act:
    return Act("silu")


def _gelu(input: Any, approximate: str = "none") -> Act | None:
    return Act("gelu") if approximate == "none" else None


ACT_FUNCTIONS: dict[Any, Callable[..., Act | None]] = {
    F.relu: _relu,
    F.relu_: _relu,
    torch.relu: _relu,
    torch.relu_: _relu,
    F.leaky_relu: _leaky_relu,
    F.leaky_relu_: _leaky_relu,
    F.silu: _silu,
    F.gelu: _gelu,
}

ADDITIONS = (operator.add, operator.iadd, torch.add)


class _Size:
    """The shape of a ``_Value``: rank and channels are known, N, H and W only symbolically."""

    def __init__(self, value: _Value) -> None:
        self.value = value

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: Any) -> Any:
        channels = self.value.layout.channels
        if index in (1, -3) and channels is not None:
            return channels
        return fx.Proxy.__getattr__(self.value, "shape")[index]  # type: ignore[index]

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(4))

    def __eq__(self, other: object) -> bool:
        mine = self.value.layout
        if not isinstance(other, _Size) or mine.channels is None:
            raise NotAUnitError("its course depends on the size of the input")
        theirs = other.value.layout
        if theirs.channels is not None and theirs.channels != mine.channels:
            return False
        if theirs == mine:
            return True
        raise NotAUnitError("its course depends on the size of the input")

    __hash__ = None  # type: ignore[assignment]


class _Layout(NamedTuple):
    """What is known of a value's shape: channels, and the list of what changed height and width."""

    channels: int | None
    spatial: tuple[Any, ...] = ()


class _Value(fx.Proxy):
    """A proxy for (N, C, H, W) that answers what a forward may ask of any such tensor."""

    layout = _Layout(None, ("unknown",))
    is_image = False

    def dim(self) -> Any:
        return 4 if self.is_image else fx.Proxy.__getattr__(self, "dim")()

    @property
    def ndim(self) -> Any:
        return 4 if self.is_image else fx.Proxy.__getattr__(self, "ndim")

    @property
    def shape(self) -> Any:
        return _Size(self) if self.is_image else fx.Proxy.__getattr__(self, "shape")

    def size(self, *args: Any) -> Any:
        if self.is_image and not args:
            return _Size(self)
        if self.is_image and args[0] in (1, -3) and self.layout.channels is not None:
            return self.layout.channels
        return fx.Proxy.__getattr__(self, "size")(*args)

    def __iadd__(self, other: Any) -> Any:  # fx would take it for an addition out of place
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


class _Tracer(fx.Tracer):
    """Traces with the modules of torch.nn as leaves, but for containers; norms of any class too."""

    proxy_buffer_attributes = True

    def __init__(self, channels: int | None) -> None:
        super().__init__()
        self.channels = channels
        self.switches = _switches()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # The root too can be of a leaf's class (a norm's own forward is traced like a block's).
        return m is not self.root and is_leaf(m)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _switches() != self.switches:
            raise NotAUnitError("its forward switches gradients or autocast")
        return super().create_node(*args, **kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        value = _Value(node, self)
        layout = self._layout(node)
        if layout is not None:
            value.is_image, value.layout = True, layout
        node.meta["layout"] = layout
        return value

    def _layout(self, node: fx.Node) -> _Layout | None:
        if node.op == "placeholder":
            return _Layout(self.channels)
        source = node.args[0] if node.args else None
        before = source.meta.get("layout") if isinstance(source, fx.Node) else None
        if before is None:
            return None
        if node.op == "call_module":
            module = self.root.get_submodule(str(node.target))
            if isinstance(module, nn.Conv2d):
                kept = not isinstance(module.padding, str) and all(
                    s == 1 and 2 * p == d * (k - 1)
                    for s, p, d, k in zip(
                        module.stride, module.padding, module.dilation, module.kernel_size
                    )
                )
                change = () if kept else (str(node.target),)
                return _Layout(module.out_channels, before.spatial + change)
            known = isinstance(module, (*NORMS, nn.Identity, _DropoutNd))
            return before if known or act_of(module) is not None else None
        known = node.target in ACT_FUNCTIONS or node.target in ADDITIONS
        return before if known or node.target in ("relu", "relu_", "add", "add_") else None


def trace(module: nn.Module, training: bool, channels: int | None) -> tuple[fx.Graph, Log]:
    """The graph of a copy's forward on one tensor, and the plain attributes read.

    ``module`` is used up: a forward may leave proxies in it.
    """
    log: Log = {}
    for name, child in list(module.named_modules()):
        child.training = training
        unhook(child)
        path = tuple(name.split(".")) if name else ()
        if child is module or not is_leaf(child):
            child.__class__ = _recording(type(child), path, log)
    root = type(module)
    inner = root.forward

    def forward(self: nn.Module, input: Any) -> Any:
        return inner(self, input)

    root.forward = forward  # type: ignore[method-assign]  # one argument, the others' defaults

    before = _contents(module)
    as_tensor = torch.as_tensor
    states = _random_states()
    try:
        # No torch function to a tracer, but of no effect on a tensor.
        torch.as_tensor = lambda data, *a, **k: (  # type: ignore[assignment]
            data if type(data) is _Value and not a and not k else as_tensor(data, *a, **k)
        )
        with torch.enable_grad(), _autocast_on():
            graph = _Tracer(channels).trace(module)
        if _random_states() != states:
            raise NotAUnitError("draws random numbers")
        if _contents(module) != before:
            raise NotAUnitError("its forward changes attributes")
    except NotAUnitError:
        raise
    except Exception as error:  # a forward may raise anything when it is given a proxy
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise NotAUnitError(f"{UNTRACEABLE}: {line}") from error
    finally:
        torch.as_tensor = as_tensor
        torch.set_rng_state(torch.tensor(states[0], dtype=torch.uint8))
        random.setstate(states[1])
        np.random.set_state(states[2])  # noqa: NPY002
    return graph, log


def _recording(kind: type[nn.Module], path: Path, log: Log) -> type[nn.Module]:
    """A subclass that notes in ``log`` which plain attributes are read."""

    class Recording(kind):  # type: ignore[misc, valid-type]
        def __getattribute__(self, name: str) -> Any:
            value = super().__getattribute__(name)
            if name in INTERNAL or name.startswith("__"):
                return value
            own = name in super().__getattribute__("__dict__")
            if own or not (callable(value) or isinstance(getattr(kind, name, None), property)):
                log[path, name] = None
            return value

    Recording.__name__ = Recording.__qualname__ = kind.__name__
    Recording.__module__ = kind.__module__
    return Recording


AUTOCAST_DEVICES = ("cpu", "cuda")


@contextlib.contextmanager
def _autocast_on() -> Iterator[None]:
    """A forward that switches autocast off shows only where it is on (the trial, which is run
    without, shows one that switches it on). No tensor is computed with meanwhile.
    """
    before = [torch.is_autocast_enabled(device) for device in AUTOCAST_DEVICES]
    try:
        for device in AUTOCAST_DEVICES:
            torch.set_autocast_enabled(device, True)
        yield
    finally:
        for device, enabled in zip(AUTOCAST_DEVICES, before, strict=True):
            torch.set_autocast_enabled(device, enabled)


def _switches() -> tuple[bool, ...]:
    """What a graph does not show and a forward may change: gradients and autocast."""
    autocast = (torch.is_autocast_enabled(device) for device in AUTOCAST_DEVICES)
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


def _random_states() -> tuple[Any, Any, Any]:
    """Of torch, Python and NumPy, comparable."""
    legacy: Any = np.random.get_state()  # noqa: NPY002
    name, keys, *rest = legacy
    state = (name, tuple(keys.tolist()), *rest)
    return tuple(torch.get_rng_state().tolist()), random.getstate(), state


def _contents(module: nn.Module) -> list[Any]:
    """By identity, what all modules' attributes and the containers among them hold."""

    def items(value: Any) -> Any:
        if isinstance(value, (list, tuple, set)):
            return [id(item) for item in value]
        if isinstance(value, dict):
            return [(key, id(item)) for key, item in value.items()]
        return None

    return [
        [(key, id(value), items(value)) for key, value in vars(child).items()]
        for child in module.modules()
    ]


def guards_of(module: nn.Module, log: Log) -> Iterator[tuple[Path, str, Any]]:
    """What the attributes in ``log`` are in ``module`` itself."""
    for path, name in log:
        value = getattr(child_at(module, path), name, None)
        # Children are read afresh and checked themselves; a list of them is held by identity.
        if not isinstance(value, (nn.Module, Tensor)):
            yield path, name, value


def meta_copy(module: nn.Module) -> nn.Module:
    """A deep copy with tensors on the meta device: nothing large is copied, nothing can change."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        meta = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(meta, requires_grad=parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    keep_groups(module, memo)
    return copy.deepcopy(module, memo)


def keep_groups(module: nn.Module, memo: dict[int, Any]) -> None:
    """Let a deep copy hold the process groups of a module's norms, which cannot be copied."""
    for child in module.modules():
        group = vars(child).get("process_group")
        if group is not None:
            memo[id(group)] = group


def make_local(module: nn.Module) -> None:
    """Take the synchronisation off a copy's norms: other ranks take no part in a trial, and
    PyTorch's own norm refuses CPUs where there are any."""
    for child in module.modules():
        if isinstance(child, NORMS) and is_norm(child):
            child.__class__ = nn.BatchNorm2d


def unhook(module: nn.Module) -> None:
    """Take away what is hooked on a copy: it must not run for a trace or trial."""
    module.__dict__.pop("forward", None)
    for hooks in (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    ):
        hooks.clear()
