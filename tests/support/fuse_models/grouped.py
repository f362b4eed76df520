"""Group norms, computed weights, and blocks with a second input, as diffusion nets have."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.fuse_models.plain import Layer, conv1, conv3


def group_norm(channels: int, affine: bool = True) -> nn.GroupNorm:
    """Of two groups where the channels allow."""
    return nn.GroupNorm(1 + (channels % 2 == 0), channels, affine=affine)


class StandardisedConv2d(nn.Conv2d):
    """Weight standardisation."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        var, mean = torch.var_mean(w, dim=(1, 2, 3), keepdim=True, correction=0)
        w = (w - mean) / torch.sqrt(var + 1e-10)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class ScaledConv2d(nn.Conv2d):
    """A weight of its own gain, handed to PyTorch's own call."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.gain * self.weight, self.bias)


class GroupNormed(nn.Module):
    def __init__(self, channels: int, conv: Layer = StandardisedConv2d, norm: str = "gg") -> None:
        super().__init__()

        def layer(kind: str) -> nn.Module:
            return group_norm(channels) if kind == "g" else nn.BatchNorm2d(channels)

        self.gn1, self.gn2 = map(layer, norm)
        self.conv1 = conv(channels, channels, 3, padding=1, bias=False)
        self.conv2 = conv(channels, channels, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.relu(self.gn1(x)))
        return self.conv2(self.relu(self.gn2(out))) + x


class GroupNormAct(nn.GroupNorm):
    """Group norm and activation in one module."""

    def __init__(self, channels: int) -> None:
        super().__init__(1 + (channels % 2 == 0), channels)
        self.drop, self.act = nn.Identity(), nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        return self.act(self.drop(x))


class AllByHand(nn.Module):
    """Children hold tensors; the block calls functions with them."""

    def __init__(self, channels: int, bias: bool = True) -> None:
        super().__init__()
        self.norm1, self.norm2 = (group_norm(channels, bias) for _ in range(2))
        self.conv1, self.conv2 = (conv3(channels, channels) for _ in range(2))
        self.shift = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.gain = nn.Parameter(torch.ones(channels, 1, 1))

    def normed(self, norm: nn.GroupNorm, x: Tensor) -> Tensor:
        return F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)

    def convolved(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        weight = conv.weight - conv.weight.mean(dim=[1, 2, 3], keepdim=True)
        return F.conv2d(x, weight, padding=conv.padding)

    def forward(self, x: Tensor) -> Tensor:
        h = self.convolved(self.conv1, F.gelu(self.normed(self.norm1, x)))
        h += self.shift
        h = F.gelu(self.gain * self.normed(self.norm2, h))
        return (x + self.convolved(self.conv2, h)) * 0.5**0.5


class Embedded(nn.Module):
    """A block that an embedding moves ("add", "skip": beside it) or scales and shifts ("scale")."""

    def __init__(
        self, channels: int, out: int, features: int, how: str = "add", affine: bool = True
    ) -> None:
        super().__init__()
        self.how = how
        self.norm1 = group_norm(channels, affine)
        self.norm2 = group_norm(out, affine)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.act = nn.SiLU()
        number = 2 * out if how == "scale" else out
        self.proj = nn.Sequential(nn.SiLU(), nn.Linear(features, number))
        self.skip = conv1(channels, out) if channels != out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        parts = self.proj(emb)[:, :, None, None]
        h = self.conv1(self.act(self.norm1(x)))
        x = self.skip(x)
        if self.how == "scale":
            scale, shift = parts.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        elif self.how == "skip":
            x, h = x + parts, self.norm2(h)
        else:
            h = self.norm2(h + parts)
        return x + self.conv2(self.act(h))


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


class LatentBlock(nn.Module):
    """As in the autoencoders of latent diffusion: swish by hand, on the embedding too."""

    def __init__(self, channels: int, out: int, features: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(2, channels, eps=1e-6)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.temb_proj = nn.Linear(features, out)
        self.norm2 = nn.GroupNorm(2, out, eps=1e-6)
        self.dropout = nn.Dropout(0.0)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.nin_shortcut = conv1(channels, out)

    def forward(self, x: Tensor, temb: Tensor | None) -> Tensor:
        h = self.conv1(swish(self.norm1(x)))
        if temb is not None:
            h = h + self.temb_proj(swish(temb))[:, :, None, None]
        h = self.conv2(self.dropout(swish(self.norm2(h))))
        return self.nin_shortcut(x) + h


class MaybeEmbedded(Embedded):
    """The same, whose second input may be left out."""

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        h = self.conv1(self.act(self.norm1(x)))
        if emb is not None:
            h = h + self.proj[1](F.silu(emb))[..., None, None]
        return self.skip(x) + self.conv2(self.act(self.norm2(h)))


class Conditioned(nn.Module):
    """Blocks with a second input in a ModuleList, called with one embedding of each image."""

    def __init__(self, *blocks: nn.Module, features: int, images: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.embedding = nn.Parameter(torch.randn(images, features))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, self.embedding[: len(x)])
        return x
