"""A module's forward as a torch.fx graph of its own steps, without side effects on the module.

Modules of torch.nn are leaves, and norms of any class. Values answer what a forward may ask of any
batch of images (rank, channels); what else it decides by, ``observer`` sees.
"""

from __future__ import annotations

import contextlib
import copy
import operator
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import _disable_current_modes

from ..core.checks import SHADOWS, is_norm
from ..core.modules import act_of
from ..core.norms import BATCH_NORMS, NORMS
from ..kernels.operands import Act
from .observer import OBSERVING, Observer, is_torchs
from .reads import Reads
from .reasons import NotAUnitError
from .unit_plan import is_leaf
from .values import Layout, TracedValue

UNTRACEABLE = "cannot be traced"
SECOND = "second input"  # of a forward, as a graph's placeholder
BY_ITS_INPUT = "its course depends on values, size, dtype or requires_grad of a tensor"


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


class _Tracer(fx.Tracer):
    """Traces with the modules of torch.nn as leaves, but for containers; norms of any class too."""

    proxy_buffer_attributes = True

    def __init__(self, module: nn.Module, channels: int | None, second: bool | None) -> None:
        super().__init__()
        self.channels, self.second = channels, second
        self.switches: Any = None
        self.asked = False
        paths = {id(m): tuple(n.split(".")) if n else () for n, m in module.named_modules()}
        self.observer = Observer(paths, lambda: self.graph.nodes)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        """One tensor, and a second input if asked for; all else that the forward takes keeps its
        default."""
        given: list[Any] = [self.create_proxy("placeholder", "input", (), {})]
        if self.second is not None:
            proxy = self.create_proxy("placeholder", SECOND, (), {}) if self.second else None
            given.append(proxy)
        return (lambda root, *inputs: type(root).forward(root, *inputs)), [self.root, *given]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # The root too can be of a leaf's class (a norm's own forward is traced like a block's).
        return m is not self.root and is_leaf(m)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """A module that reads nothing of x is a leaf, whatever it is: it is called itself."""
        values: list[Any] = []
        fx.node.map_aggregate((args, kwargs), values.append)
        values = [value for value in values if type(value) is TracedValue]
        if values and not any(value.node.meta["of_x"] for value in values):
            return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)
        return super().call_module(m, forward, args, kwargs)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _switches() != self.switches:
            switching = "its forward switches gradients or autocast"
            raise NotAUnitError((*self.observer.reasons, switching)[0])
        return super().create_node(*args, **kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        value = TracedValue(node, self)
        node.meta["of_x"] = (node.op == "placeholder" and node.target != SECOND) or any(
            source.meta["of_x"] for source in node.all_input_nodes
        )
        layout = self._layout(node)
        if layout is not None:
            value.is_image, value.layout = True, layout
        node.meta["layout"] = layout
        return value

    def _layout(self, node: fx.Node) -> Layout | None:
        if node.op == "placeholder":
            return None if node.target == SECOND else Layout(self.channels)
        source = node.args[0] if node.args else None
        before = source.meta.get("layout") if isinstance(source, fx.Node) else None
        if before is None:
            return None
        if node.op == "call_module":
            module = self.root.get_submodule(str(node.target))
            if isinstance(module, nn.Conv2d):
                return self._behind((str(node.target), module), before)
            known = isinstance(module, (*NORMS, nn.Identity, _DropoutNd))
            return before if known or act_of(module) is not None else None
        if node.target is F.conv2d:
            conv = caller_of(node, self.root, nn.Conv2d)
            return None if conv is None else self._behind(conv, before)
        known = node.target in ACT_FUNCTIONS or node.target in ADDITIONS
        same = ("relu", "relu_", "add", "add_", "contiguous")
        return before if known or node.target is F.group_norm or node.target in same else None

    @staticmethod
    def _behind(named: tuple[str, nn.Conv2d], before: Layout) -> Layout:
        """What is known behind a convolution, which has a name."""
        name, conv = named
        kept = not isinstance(conv.padding, str) and all(
            s == 1 and 2 * p == d * (k - 1)
            for s, p, d, k in zip(conv.stride, conv.padding, conv.dilation, conv.kernel_size)
        )
        return Layout(conv.out_channels, before.spatial + (() if kept else (name,)))


def caller_of(node: fx.Node, root: nn.Module, kind: Any) -> tuple[str, Any] | None:
    """The innermost module of ``kind`` whose forward made a node, by its path; None without one."""
    for path, _ in reversed((node.meta.get("nn_module_stack") or {}).values()):
        module = root.get_submodule(path)
        if isinstance(module, kind):
            return path, module
    return None


def trace(
    module: nn.Module, training: bool, channels: int | None, second: bool | None = None
) -> tuple[fx.Graph, Reads]:
    """The graph of a copy's forward on one tensor, and what it read besides.

    second: whether a tensor, or None, is given as the second input; without any if None.
    ``module`` is used up: a forward may leave proxies in it.
    """
    for child in module.modules():
        child.training = training
        unhook(child)
    before = _contents(module)
    as_tensor = torch.as_tensor
    states = random_states()
    tracer = _Tracer(module, channels, second)
    try:
        # No torch function to a tracer, but of no effect on a tensor.
        torch.as_tensor = lambda data, *a, **k: (  # type: ignore[assignment]
            data if type(data) is TracedValue and not a and not k else as_tensor(data, *a, **k)
        )
        with (
            no_modes(), torch.enable_grad(), _autocast_on(), OBSERVING,
            _no_functions(tracer.observer), tracer.observer,
        ):  # fmt: skip
            tracer.switches = _switches()
            graph = tracer.trace(module)
        if not same_states(states, random_states()):
            raise NotAUnitError("draws random numbers", True)
        after = _contents(module)
        changed = [name for name in (*before, *after) if before.get(name) != after.get(name)]
        if changed:
            raise NotAUnitError(f"its forward changes {changed[0]}", True)
    except NotAUnitError:
        raise
    except fx.proxy.TraceError as error:
        raise NotAUnitError(BY_ITS_INPUT) from error
    except Exception as error:  # a forward may raise anything when it is given a proxy
        raise NotAUnitError(f"{UNTRACEABLE}: {_line_of(error)}") from error
    finally:
        torch.as_tensor = as_tensor
        restore(states)
    return graph, Reads(tracer.observer, tracer.asked)


@contextlib.contextmanager
def _no_functions(observer: Observer) -> Iterator[None]:
    """Have ``autograd.Function.apply`` of a traced value raise: from PyTorch 2.14 on its code in C
    takes what calls itself a tensor for one, and crashes."""
    function: Any = torch.autograd.Function
    before = vars(function).get("apply")

    def apply(cls: type, *args: Any, **options: Any) -> Any:
        if any(type(value) is TracedValue for value in (*args, *options.values())):
            theirs = f"{cls.__module__}." if is_torchs(cls.__module__) else ""
            reason = f"autograd.Function {theirs}{cls.__name__} may have a gradient of its own"
            observer.note(reason)
            raise NotAUnitError(reason, True)
        own = super(function, cls).apply if before is None else before.__get__(None, cls)
        return own(*args, **options)

    function.apply = classmethod(apply)
    try:
        yield
    finally:
        if before is None:
            del function.apply
        else:
            function.apply = before


def _line_of(error: Exception) -> str:
    """An error in one line, without names that only the trace knows."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    names = ("TracedValue", "_Size", "Proxy", "_Tracer", "Attribute", "fx")
    inner = any(name in line for name in names)
    return "its forward does with a tensor what takes its values" if inner else line


@contextlib.contextmanager
def no_modes() -> Iterator[None]:
    """Without default devices and other modes, which would also see what a trial computes."""
    modes = []
    try:
        while torch._C._len_torch_function_stack():
            modes.append(torch._C._pop_torch_function_stack())
        with _disable_current_modes(), torch.inference_mode(False):
            yield
    finally:
        while modes:
            torch._C._push_on_torch_function_stack(modes.pop())


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


def _switches() -> tuple[Any, ...]:
    """What a graph does not show and a forward may change: gradients and autocast."""
    enabled = (torch.is_autocast_enabled(device) for device in AUTOCAST_DEVICES)
    dtypes = (torch.get_autocast_dtype(device) for device in AUTOCAST_DEVICES)
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *enabled, *dtypes


def random_states() -> tuple[Any, Any, Any]:
    """Of torch on a CPU, Python and NumPy."""
    return torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002


def same_states(a: tuple[Any, Any, Any], b: tuple[Any, Any, Any]) -> bool:
    """Whether nothing was drawn between two."""
    numpys = all(np.array_equal(x, y) for x, y in zip(a[2], b[2]))
    return torch.equal(a[0], b[0]) and a[1] == b[1] and numpys


def restore(states: tuple[Any, Any, Any]) -> None:
    """Make random numbers go on from there."""
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])  # noqa: NPY002


def _contents(module: nn.Module) -> dict[str, Any]:
    """By identity, what all modules' attributes and the containers among them hold."""

    def items(value: Any) -> Any:
        if isinstance(value, (list, tuple, set)):
            return [id(item) for item in value]
        if isinstance(value, dict):
            return [(key, id(item)) for key, item in value.items()]
        return None

    return {
        f"{path}.{key}" if path else key: (id(value), items(value))
        for path, child in module.named_modules()
        for key, value in vars(child).items()
    }


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
        if isinstance(child, BATCH_NORMS) and is_norm(child):
            child.__class__ = nn.BatchNorm2d


def unhook(module: nn.Module) -> None:
    """Take away what is hooked on a copy: it must not run for a trace or trial."""
    for name in SHADOWS:
        module.__dict__.pop(name, None)
    for hooks in (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    ):
        hooks.clear()
