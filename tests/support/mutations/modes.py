"""Mutations that are wrong at once, or in the other mode."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.support.mutations.base import CHANNELS, B, Mutation, assign


class ModeOfAChild(B):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(F.dropout(self.inner(x), 0.5, self.bn1.training))


class ModeByAProperty(B):
    @property
    def drops(self) -> bool:
        return self.bn2.training

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        if self.drops:
            h = F.dropout(h, 0.5)
        return x + self.outer(h)


class AlwaysDrops(B):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(F.dropout(self.inner(x), 0.5))


class LambdaOverSelf(B):
    def setup(self) -> None:
        self.slope = 0.1
        self.act = lambda h: F.leaky_relu(h, self.slope)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.act(self.bn2(self.conv1(self.act(self.bn1(x))))))


class MethodOfSelf(LambdaOverSelf):
    def setup(self) -> None:
        self.slope = 0.1
        self.act = self.leaky

    def leaky(self, h: Tensor) -> Tensor:
        return F.leaky_relu(h, self.slope)


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x) if isinstance(x, Tensor) and type(x) is Tensor else x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return -g


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return F.relu(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class ReversedGradient(B):
    def forward(self, x: Tensor) -> Tensor:
        return x + Reversal.apply(self.outer(self.inner(x)))


class ReversedShortcut(B):
    def forward(self, x: Tensor) -> Tensor:
        return Reversal.apply(x) + self.outer(self.inner(x))


class GradientOfItsOwn(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(StraightThrough.apply(self.bn1(x)))
        return x + self.conv2(StraightThrough.apply(self.bn2(h)))


class Detached(B):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(self.inner(x.detach()))


class HookedGradient(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        if h.requires_grad:
            h.register_hook(lambda g: 2 * g)
        return x + self.outer(h)


class HelperWithoutGradient(B):
    @torch.no_grad()
    def frozen(self, x: Tensor) -> Tensor:
        return self.inner(x)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(self.frozen(x))


class SwitchesGradients(B):
    def forward(self, x: Tensor) -> Tensor:
        before = torch.is_grad_enabled()
        torch.set_grad_enabled(False)
        h = self.inner(x)
        torch.set_grad_enabled(before)
        return x + self.outer(h)


class OwnAutocast(B):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return x + self.outer(self.inner(x))


class NoAutocast(B):
    @torch.autocast("cpu", enabled=False)
    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(self.inner(x.float()))


class AsksForGradients(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if torch.is_grad_enabled() else x


class AsksForAutocast(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x if torch.is_autocast_enabled("cpu") else x + h


class AsksForTheDefaultDtype(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if torch.get_default_dtype() == torch.float32 else x


class AsksForABackend(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if torch.backends.mkldnn.enabled else x


class Checkpointing(B):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(checkpoint(self.inner, x, use_reentrant=False))


class ScaledWeight(B):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(x))
        return x + self.outer(F.conv2d(h, 0.5 * self.conv1.weight, padding=1))


class LayerScale(B):
    def setup(self) -> None:
        self.gamma = nn.Parameter(torch.full((CHANNELS, 1, 1), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.outer(self.inner(x))


class DtypeOfTheInput(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        if isinstance(x, torch.Tensor) and x.dtype == torch.float32:
            return x + 2 * h
        return x + h


class TypeOfTheInput(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + 2 * h if type(x) is Tensor and x.dtype == torch.float32 else x + h


class GradientOfTheInput(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + 2 * h if x.requires_grad else x + h


class HeightOfTheInput(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if x.shape[-1] > 7 else x


class DtypeOfAParameter(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if next(self.parameters()).dtype == torch.float32 else x + 2 * h


class GradientOfAParameter(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if self.conv1.weight.requires_grad else x


class ValueOfAParameter(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if self.bn1._parameters["weight"].shape[0] < 7 else x + 2 * h


class InPlaceSum(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        h[:, :1] = 0
        return x + h


class Squeezed(B):
    def setup(self) -> None:
        self.gate = nn.Conv2d(CHANNELS, CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h * self.gate(h.mean((2, 3), keepdim=True)).sigmoid()


MUTATIONS: dict[str, Mutation] = {
    "mode-of-a-child": Mutation(ModeOfAChild, None, None, "dropout"),
    "mode-by-a-property": Mutation(ModeByAProperty, None, None, "dropout"),
    "always-drops": Mutation(AlwaysDrops, None, False, "dropout"),
    "lambda-over-self": Mutation(LambdaOverSelf, assign("slope", 0.5), False, "lambda"),
    "method-of-self": Mutation(MethodOfSelf, assign("slope", 0.5), True, "slope"),
    "gradient-reversed": Mutation(ReversedGradient, None, False, "autograd.Function|Reversal"),
    "gradient-reversed-shortcut": Mutation(ReversedShortcut, None, False, "autograd.Function"),
    "gradient-straight-through": Mutation(GradientOfItsOwn, None, False, "autograd.Function"),
    "gradient-detached": Mutation(Detached, None, False, "detach"),
    "gradient-hooked": Mutation(HookedGradient, None, False),
    "no-grad-helper": Mutation(HelperWithoutGradient, None, False, "grad"),
    "set-grad-enabled": Mutation(SwitchesGradients, None, False, "grad"),
    "autocast-of-its-own": Mutation(OwnAutocast, None, False, "autocast"),
    "autocast-off-by-decorator": Mutation(NoAutocast, None, False, "float|autocast"),
    "asks-for-gradients": Mutation(AsksForGradients, None, False, "is_grad_enabled"),
    "asks-for-autocast": Mutation(AsksForAutocast, None, False, "is_autocast_enabled"),
    "asks-for-default-dtype": Mutation(AsksForTheDefaultDtype, None, False, "get_default_dtype"),
    "asks-for-a-backend": Mutation(AsksForABackend, None, False, "backends|enabled|mkldnn"),
    "checkpointed": Mutation(Checkpointing, None, False, "checkpoint"),
    "scaled-weight": Mutation(ScaledWeight, None, True),
    "layer-scale": Mutation(LayerScale, None, False, "gamma|mul|\\*|product"),
    "dtype-of-the-input": Mutation(DtypeOfTheInput, None, False, "dtype"),
    "type-of-the-input": Mutation(TypeOfTheInput, None, False, "type"),
    "gradient-of-the-input": Mutation(GradientOfTheInput, None, False, "requires_grad|input"),
    "height-of-the-input": Mutation(HeightOfTheInput, None, False, "size|shape"),
    "dtype-of-a-parameter": Mutation(DtypeOfAParameter, None, False, "parameters"),
    "gradient-of-a-parameter": Mutation(GradientOfAParameter, None, False, "requires_grad|weight"),
    "value-of-a-parameter": Mutation(ValueOfAParameter, None, False, "_parameters"),
    "squeeze-excitation": Mutation(Squeezed, None, False, "mean|sigmoid|product|mul"),
    "writes-an-item": Mutation(InPlaceSum, None, False),
}  # fmt: skip
