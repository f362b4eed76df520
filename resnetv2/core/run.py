"""From modules to chains: reads blocks' children afresh, runs the operator, updates the buffers.

A module that can be a unit offers ``chain_unit() -> Recipe | str``: its children in the order of
the computation, or the reason why its children must run one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..kernels.dispatch import resolve_backend
from ..kernels.operands import ACTS, Act, Geometry
from .operators import chain_forward
from .spec import DTYPES, Conv, Norm, Unit, encode_header, encode_unit
from .sync import SyncBatchNorm, check_rows, group_number

AUTO = "auto"
EAGER = "eager"


class ChainUnit:
    """A module that can be a unit of a chain."""

    def chain_unit(self) -> Recipe | str:
        """The module's children as a unit, or why the module must be called."""
        raise NotImplementedError


Pad = tuple[int, int, int, int]  # left, right, top, bottom
NO_PAD: Pad = (0, 0, 0, 0)


class Recipe(NamedTuple):
    """One unit's children: norms[i] -> act -> convs[i], a projection or None, and what it reads.

    act: the activation's module, or its record where it is a function. pads: zeros that the model
    adds itself before each convolution, as in ``torch.nn.functional.pad``, and last before the
    projection; empty for none at all.
    """

    norms: tuple[nn.BatchNorm2d | nn.SyncBatchNorm, ...]
    convs: tuple[nn.Conv2d, ...]
    act: nn.Module | Act
    shortcut: int
    projection: nn.Conv2d | None = None
    add_in_place: bool = False
    pads: tuple[Pad, ...] = ()


def activation(act: str | nn.Module) -> nn.Module:
    """The module for an activation's name: relu, leaky_relu, silu, gelu or identity.

    Raises:
        ValueError: an unknown name. A module is returned as it is.
    """
    if isinstance(act, nn.Module):
        return act
    modules: dict[str, Callable[[], nn.Module]] = {
        "relu": nn.ReLU,
        "leaky_relu": lambda: nn.LeakyReLU(0.1),
        "silu": nn.SiLU,
        "gelu": nn.GELU,
        "identity": nn.Identity,
    }
    if act not in modules:
        raise ValueError(f"act must be one of {', '.join(ACTS)} or a module, got {act!r}")
    return modules[act]()


_ACTS: dict[type, Act] = {
    nn.ReLU: Act("relu"),
    nn.SiLU: Act("silu"),
    nn.GELU: Act("gelu"),
    nn.Identity: Act("identity"),
}


def act_of(module: nn.Module | Act) -> Act | None:
    """The kernels' record of an activation module, or None for one they do not know."""
    if isinstance(module, Act):
        return module
    if type(module) is nn.LeakyReLU:
        return (
            Act("leaky_relu", float(module.negative_slope)) if module.negative_slope >= 0 else None
        )
    if type(module) is nn.GELU and module.approximate != "none":
        return None
    return _ACTS.get(type(module))


def hooked(module: nn.Module) -> bool:
    """Whether anything is hooked on a module's call, so that it must really be called.

    A ``forward`` put on the instance counts too: how adapters and offloading libraries hook. So
    does ``module.compile()``.
    """
    return bool(
        "forward" in module.__dict__
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
    of its own. A parametrized child does not: it computes its parameters."""
    own = type(module)
    if own is kind:
        return True
    inner = "_conv_forward" if kind is nn.Conv2d else "_check_input_dim"
    return (
        isinstance(module, kind)
        and own.forward is kind.forward
        and own.__call__ is kind.__call__
        and getattr(own, inner) is getattr(kind, inner)
        and not hasattr(module, "parametrizations")
    )


def is_norm(module: nn.Module) -> bool:
    """Whether a module computes what BatchNorm2d or SyncBatchNorm does."""
    return any(is_plain(module, kind) for kind in (nn.BatchNorm2d, SyncBatchNorm, nn.SyncBatchNorm))


def why_not(recipe: Recipe, norm_types: Sequence[type | None] = ()) -> str | None:
    """The reason why a recipe's children must run one by one, or None.

    norm_types: per norm a class that is known to compute BatchNorm2d's function, or None.
    """
    if act_of(recipe.act) is None:
        return f"activation {type(recipe.act).__name__} is not one of {', '.join(ACTS)}"
    if isinstance(recipe.act, nn.Module) and hooked(recipe.act):
        return f"a hook on {type(recipe.act).__name__}"
    for i, norm in enumerate(recipe.norms):
        known = norm_types[i] if norm_types else None
        # A class with a forward of its own is of use only where just that class is expected.
        if type(norm) is not known if known else not is_norm(norm):
            return f"a norm is {type(norm).__name__}, not {(known or nn.BatchNorm2d).__name__}"
        if hooked(norm):
            return "a hook on a norm"
        synced = isinstance(norm, (SyncBatchNorm, nn.SyncBatchNorm))
        if synced and torch.compiler.is_compiling():
            return "torch.compile does not trace a synchronised norm's collectives"
    convs = recipe.convs if recipe.projection is None else (*recipe.convs, recipe.projection)
    for conv in convs:
        if not is_plain(conv, nn.Conv2d):
            return f"a convolution is {type(conv).__name__}, not Conv2d"
        if hooked(conv):
            return "a hook on a convolution"
        if _padding(conv) is None or conv.padding_mode != "zeros":
            return f"padding {conv.padding!r} in mode {conv.padding_mode!r}"
    return None


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
        type(x) not in (Tensor, nn.Parameter)
        or x.layout != torch.strided
        or globally_hooked()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def accepts(recipe: Recipe, x: Any) -> bool:
    """Whether a chain that begins with ``recipe`` can take x; if not, the module itself is called,
    which may raise."""
    refuse_empty_rank(recipe, x)
    return (
        isinstance(x, Tensor)
        and not must_run_eagerly(x)
        and x.dim() == 4
        and x.shape[1] == recipe.norms[0].num_features
    )


def refuse_empty_rank(recipe: Recipe, x: Any) -> None:
    """Raise ValueError for an empty input of synchronised norms: children that ran it one by one
    would exchange something else than the other ranks' chains."""
    if isinstance(x, Tensor) and x.numel() == 0 and any(map(group_number, recipe.norms)):
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


def _batch_statistics(norm: nn.BatchNorm2d | nn.SyncBatchNorm) -> bool:
    # As in torch.nn.BatchNorm2d.forward.
    return norm.training or (norm.running_mean is None and norm.running_var is None)


def _geometry(recipe: Recipe, i: int) -> Geometry:
    """Of convolution i of a recipe, or of its projection where i = -1."""
    conv = recipe.projection if i < 0 else recipe.convs[i]
    assert conv is not None
    padding = _padding(conv)
    assert padding is not None  # why_not refuses the others
    extra = (0, 0)
    if recipe.pads:
        left, right, top, bottom = recipe.pads[i]
        padding = (padding[0] + top, padding[1] + left)
        extra = (bottom - top, right - left)
    stride, dilation = conv.stride, conv.dilation
    return Geometry(stride, padding, dilation, conv.groups, extra)  # type: ignore[arg-type]


def _padding(conv: nn.Conv2d) -> tuple[int, int] | None:
    """Padding of height and width, or None where the two sides differ ("same", even kernels)."""
    if conv.padding == "valid":
        return (0, 0)
    if conv.padding == "same":
        totals = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size)]
        return None if totals[0] % 2 or totals[1] % 2 else (totals[0] // 2, totals[1] // 2)
    return conv.padding  # type: ignore[return-value]  # Conv2d keeps pairs


def _conv(recipe: Recipe, i: int) -> Conv:
    conv = recipe.projection if i < 0 else recipe.convs[i]
    return Conv(_geometry(recipe, i), conv is not None and conv.bias is not None)


def _encode(
    recipe: Recipe, layout: list[int], constants: list[float], params: list[Tensor]
) -> None:
    norms = []
    for norm, conv in zip(recipe.norms, recipe.convs):
        training = _batch_statistics(norm)
        weight, bias = norm.weight is not None, norm.bias is not None
        norms.append(Norm(training, weight, bias, norm.eps, group_number(norm)))
        for tensor in (norm.weight, norm.bias):
            if tensor is not None:
                params.append(tensor)
        if not training:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            params += [norm.running_mean, norm.running_var]
        params.append(conv.weight)
        if conv.bias is not None:
            params.append(conv.bias)
    projection = recipe.projection
    if projection is not None:
        params.append(projection.weight)
        if projection.bias is not None:
            params.append(projection.bias)
    act = act_of(recipe.act)
    assert act is not None
    encode_unit(
        layout,
        constants,
        Unit(
            tuple(norms),
            tuple(_conv(recipe, i) for i in range(len(recipe.convs))),
            act,
            recipe.shortcut,
            None if projection is None else _conv(recipe, -1),
            recipe.add_in_place,
        ),
    )


def run_chain(
    recipes: Sequence[Recipe],
    x: Tensor,
    *,
    backend: str = AUTO,
    memory: str = "recompute",
    segment: int = 0,
) -> Tensor:
    """Run consecutive units as one chain: x (N, C, H, W) to the last unit's output.

    Running statistics and ``num_batches_tracked`` move as in eager. x is not modified; the result
    has x's memory format.

    Raises:
        ValueError: what ``check_input`` refuses, or one value per channel in training.
    """
    check_input(x, recipes[0].convs[0])
    rows = _rows(recipes, x)
    params, layout, constants = describe(
        recipes,
        compute_dtype(recipes[0], x.device.type),
        need_x=x.requires_grad,
        backend=backend,
        memory=memory,
        segment=segment,
    )
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    like_nchw = x.is_contiguous() and not (channels_last and x.stride(1) == 1)
    # ATen computes in either layout, with other roundings: eager's, where nothing is converted.
    as_it_is = like_nchw and resolve_backend(backend, x.device) == "aten"
    if not (channels_last or (as_it_is and all(map(_nchw, _weights(recipes))))):
        x = x.contiguous(memory_format=torch.channels_last)
    result = chain_forward(x, params, layout, constants)
    out = result[0]
    update_buffers([norm for recipe in recipes for norm in recipe.norms], result[1], rows)
    return out.contiguous() if like_nchw else out


def _weights(recipes: Sequence[Recipe]) -> Iterator[Tensor]:
    for recipe in recipes:
        yield from (conv.weight for conv in recipe.convs)
        if recipe.projection is not None:
            yield recipe.projection.weight


def _nchw(weight: Tensor) -> bool:
    """Whether a weight is such that ATen convolves an NCHW input in NCHW."""
    return weight.is_contiguous() and (weight.stride(3) == 1 or weight.stride(1) != 1)


def run_blocks(
    blocks: Iterable[nn.Module],
    x: Any,
    *,
    backend: str = AUTO,
    memory: str = "recompute",
    segment: int = 0,
) -> Any:
    """x through modules in order: consecutive units as one chain, all others by a call each.

    A unit with a hook on its own call is called too, and so is one whose input a chain cannot take
    (``accepts``).
    """
    recipes: list[Recipe] = []
    for block in blocks:
        if isinstance(block, ChainUnit) and backend != EAGER and not hooked(block):
            recipe = block.chain_unit()
            if isinstance(recipe, Recipe) and (recipes or accepts(recipe, x)):
                recipes.append(recipe)
                continue
        if recipes:
            x = run_chain(recipes, x, backend=backend, memory=memory, segment=segment)
            recipes = []
        x = block(x)
    if recipes:
        x = run_chain(recipes, x, backend=backend, memory=memory, segment=segment)
    return x


def compute_dtype(recipe: Recipe, device: str) -> torch.dtype:
    """The dtype in which convolutions multiply: autocast's, or the weights' own."""
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return recipe.convs[0].weight.dtype


def describe(
    recipes: Sequence[Recipe],
    dtype: torch.dtype,
    *,
    need_x: bool,
    backend: str,
    memory: str,
    segment: int,
) -> tuple[list[Tensor], list[int], list[float]]:
    """The operator's ``params``, ``layout`` and ``constants`` (see ``spec``) for a chain.

    dtype: ``compute_dtype``. need_x: whether the input's gradient is wanted. segment: units of a
    segment, 0 for the length that keeps least.
    """
    if memory == "segment" and segment < 1:
        segment = segment_length(recipes)
    params: list[Tensor] = []
    body: list[int] = []
    constants: list[float] = []
    for recipe in recipes:
        _encode(recipe, body, constants, params)
    needs = [need_x, *(p.requires_grad for p in params)]
    keep = torch.is_grad_enabled() and any(needs)
    # A half-precision stream drifts when it is walked back (design 3): it is float32 then.
    wide = memory != "recompute" and dtype in (torch.float16, torch.bfloat16)
    layout = encode_header(dtype, backend, memory, segment, wide, keep, len(recipes))
    layout += body
    layout += [int(n) for n in needs]
    return params, layout, constants


def segment_length(recipes: Sequence[Recipe]) -> int:
    """Units s of a segment that make n/s kept inputs and s inner h_{k-1} take least together."""
    last = recipes[-1].convs[-1]
    return max(1, round(math.sqrt(len(recipes) * last.out_channels / last.in_channels)))


def _rows(recipes: Sequence[Recipe], x: Tensor) -> list[int]:
    """N*H*W at each norm of the chain; raises as eager does where one has nothing to average.

    Also where the channels of neighbours differ, which kernels would not notice.
    """
    rows = []
    size = (x.shape[2], x.shape[3])
    channels = x.shape[1]
    for recipe in recipes:
        projection = recipe.projection
        if projection is not None and projection.in_channels != channels:
            raise ValueError(
                f"expected a projection of {channels} channels, got {projection.in_channels}"
            )
        for i, (norm, conv) in enumerate(zip(recipe.norms, recipe.convs)):
            if norm.num_features != channels or conv.in_channels != channels:
                raise ValueError(
                    f"expected a norm and a convolution of {channels} channels, got "
                    f"{norm.num_features} and {conv.in_channels}"
                )
            channels = conv.out_channels
            rows.append(x.shape[0] * size[0] * size[1])
            if rows[-1] == 1 and _batch_statistics(norm) and not group_number(norm):
                raise ValueError(
                    "expected more than 1 value per channel when training, got input size "
                    f"{(x.shape[0], norm.num_features, *size)}"
                )
            geometry = _geometry(recipe, i)
            size = geometry.output_size(size, conv.kernel_size)  # type: ignore[arg-type]
    return rows


def update_buffers(
    norms: Sequence[nn.BatchNorm2d | nn.SyncBatchNorm], stats: Tensor, rows_at: Sequence[int | None]
) -> None:
    """Move running statistics as torch.nn.BatchNorm2d does, a whole chain at a time.

    stats: flat, as ``ops.chain_forward`` returns them. rows_at: of this process, per norm.
    """
    # By momentum, number of rows and time; the rows by their place in ``levels``, since as a key
    # they would fix a dynamic batch size under torch.compile.
    moved: dict[tuple[float, int, int], list[list[Tensor]]] = {}
    levels: list[int | None] = []
    counters: dict[int, list[Tensor]] = {}
    cumulative: list[tuple[Any, Tensor, Tensor, int | None]] = []
    # A norm that a chain runs several times moves once after the other.
    times: dict[int, int] = {}
    sizes: list[int] = []
    for norm in norms:
        sizes += [norm.num_features, norm.num_features, 3 * norm.num_features]
    synced = [i for i, norm in enumerate(norms) if group_number(norm)]
    parts = list(stats.detach().split([*sizes, *([len(synced)] if synced else [])]))
    if synced:
        # How many rows all ranks have is on the device: the unbiased variance is taken there.
        totals = parts.pop()
        unbiased = torch._foreach_mul(
            [parts[3 * i + 1] for i in synced], list((totals / (totals - 1)).unbind())
        )
        for i, var in zip(synced, unbiased):
            parts[3 * i + 1] = var
        rows_at = [None if i in synced else rows for i, rows in enumerate(rows_at)]
    for norm, rows, mean, var in zip(norms, rows_at, parts[::3], parts[1::3]):
        if not (norm.training and norm.track_running_stats) or norm.running_mean is None:
            continue
        assert norm.running_var is not None
        if norm.momentum is None:
            cumulative.append((norm, mean, var, rows))
            continue
        time = times[id(norm)] = times.get(id(norm), -1) + 1
        if norm.num_batches_tracked is not None:
            counters.setdefault(time, []).append(norm.num_batches_tracked)
        if not levels or rows != levels[-1]:
            levels.append(rows)
        key = (norm.momentum, len(levels) - 1, time)
        groups = moved.setdefault(key, [[], [], [], []])
        for group, tensor in zip(groups, (norm.running_mean, mean, norm.running_var, var)):
            group.append(tensor)
    with torch.no_grad():
        for tracked in counters.values():
            torch._foreach_add_(tracked, 1)
        for (momentum, level, _), (means, batch_means, variances, batch_vars) in moved.items():
            rows = levels[level]
            if rows is None:
                # Of no other process' bits, and one rounding less.
                for running, batch in ((means, batch_means), (variances, batch_vars)):
                    batch = [b.to(r.dtype) for b, r in zip(batch, running)]
                    torch._foreach_lerp_(running, batch, momentum)
                continue
            unbiased_momentum = momentum * rows / (rows - 1)
            torch._foreach_mul_(means, 1.0 - momentum)
            torch._foreach_add_(means, batch_means, alpha=momentum)
            torch._foreach_mul_(variances, 1.0 - momentum)
            torch._foreach_add_(variances, batch_vars, alpha=unbiased_momentum)
        for norm, mean, var, rows in cumulative:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            if norm.num_batches_tracked is None:
                continue
            norm.num_batches_tracked.add_(1)
            weight = 1.0 / norm.num_batches_tracked.to(mean.dtype)
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), weight)
            var = var if rows is None else var * (rows / (rows - 1))
            norm.running_var.lerp_(var.to(norm.running_var.dtype), weight)
