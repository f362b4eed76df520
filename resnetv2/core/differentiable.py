"""A chain by differentiable functions of PyTorch, for derivatives of its gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import reference
from ..kernels.operands import Act
from .execution import no_autocast
from .spec import Norm, Spec


def _activate(u: Tensor, act: Act) -> Tensor:
    if act.kind == "leaky_relu":
        return F.leaky_relu(u, act.slope)
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "relu": F.relu,
        "silu": F.silu,
        "gelu": F.gelu,
    }
    return functions[act.kind](u) if act.kind in functions else u


def differentiable_forward(spec: Spec, x: Tensor, params: Sequence[Tensor]) -> Tensor:
    """The chain's output by differentiable PyTorch functions; running statistics stay as they are.

    What double backward differentiates: slower, and it keeps what eager keeps.
    """

    def param(position: int) -> Tensor | None:
        return None if position < 0 else params[position]

    def cast(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(spec.dtype)

    for unit, at in zip(spec.units, spec.positions):
        h = x
        z: Tensor | None = None
        for i, (norm, conv) in enumerate(zip(unit.norms, unit.convs)):
            u = _normalised(h, norm, [param(p[i]) for p in at[:4]])
            z_i = _activate(u, unit.act)
            z = z_i if z is None else z
            weight = params[at.conv_weight[i]].to(spec.dtype)
            bias = cast(param(at.conv_bias[i]))
            late = bias is not None and bias.dim() == 2
            h = reference.conv2d(z_i.to(spec.dtype), weight, None if late else bias, conv.geometry)
            if bias is not None and late:
                h = h + bias[:, :, None, None]
        assert z is not None
        shortcut = z if unit.shortcut.reads_preact else x
        if unit.projection is not None:
            weight = params[at.projection_weight].to(spec.dtype)
            bias = cast(param(at.projection_bias))
            shortcut = reference.conv2d(
                shortcut.to(spec.dtype), weight, bias, unit.projection.geometry
            )
        out = h + shortcut
        x = out.to(h.dtype) if unit.add_in_place else out
    return x


def _normalised(h: Tensor, norm: Norm, tensors: list[Tensor | None]) -> Tensor:
    weight, bias, mean, var = tensors
    if norm.groups:
        u = F.group_norm(h, norm.groups, eps=norm.eps)
        scale, shift = (None if t is None else t[..., None, None].to(h.dtype) for t in tensors[:2])
        u = u if scale is None else u * scale
        return u if shift is None else u + shift
    return F.batch_norm(h, mean, var, weight, bias, norm.training, 0.0, norm.eps)


def differentiable_backward(
    spec: Spec, g: Tensor, x: Tensor, params: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The gradients as differentiable functions of g, x and params, for create_graph=True and for
    a g that stands for many."""
    wanted = [x] if spec.need_x else []
    wanted += [p for p, need in zip(params, spec.needs) if need]
    again = torch.is_grad_enabled()
    with torch.enable_grad(), no_autocast(x.device.type):
        out = differentiable_forward(spec, x, params)
        return torch.autograd.grad(out, wanted, g, create_graph=again)
