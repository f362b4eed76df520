"""The steps of a chain out of ``reference``, on ATen's operators (``dispatch``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ranks, reference
from .operands import Act, Dgrad, Geometry, Grad, Norm, Partials, running_stats, stats_dtype
from .ranks import Gather, Ranks
from .reference import cast

Convolved = tuple[Sequence[int], Geometry]  # a convolution by its weight's shape (K, C, R, S)


class ConvGrads(NamedTuple):
    """What the backward of one norm -> act -> conv gives; None where it was not asked for.

    grad:    gradient of the norm's input, waiting for its coefficients or written (``Grad``).
    dweight, dbias: the convolution's. dgamma, dbeta: (C,), the norm's.
    """

    grad: Grad | None
    dweight: Tensor | None
    dbias: Tensor | None
    dgamma: Tensor | None
    dbeta: Tensor | None


# What ranks' moments are taken for: their mean and variance are exchanged, and then merged.
OF_RANKS = Norm(None, None, 0.0)

# The attribute of a norm's statistics that holds its output until a convolution reads it.
_NORMALISED = "_normalised"


class AtenEngine:
    """The steps of a chain on ATen's kernels: any device, any float dtype."""

    name = "aten"
    # Whether moments that ranks merge come with the convolution that writes their tensor.
    _rank_moments_from_conv = False

    # Whether statistics of a group norm come with the convolution that writes its input.
    _group_moments_from_conv = False

    def gives_moments(self, training: bool, synced: bool, groups: int = 0) -> bool:
        """Whether what writes a norm's input is to give its moments as well."""
        if groups:
            return self._group_moments_from_conv
        return training and (not synced or self._rank_moments_from_conv)

    def projection_adds(self, other: Convolved, projection: Convolved) -> bool:
        """Whether a projection adds the result of the convolution beside it, in either direction,
        and not that the projection's: a fused kernel adds on the way, behind ATen's a pass does."""
        return False

    def moments(self, x: Tensor, norm: Norm | None = None) -> Any:
        """Moments of x, in whatever form ``norm_stats`` of the same engine takes.

        x itself where ATen's norm takes them and normalises in one call, as eager's does.
        norm: what they will be taken for, where that is known.
        """
        if x.device.type != "cuda" and x.dtype == stats_dtype(x.dtype):
            return (x,)
        return reference.batch_moments(x)

    def rank_moments(self, x: Tensor) -> Any:
        """The same for ``synced_stats``: of the norm ``OF_RANKS``."""
        return reference.rank_moments(x)

    def norm_stats(
        self, moments: Any, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        """(5, C) statistics of a batch out of its moments (``operands.running_stats``)."""
        if len(moments) == 2:
            mean, var = moments
            return running_stats(mean, var, weight, bias, eps)
        (x,) = moments
        stats, normalised = reference.normalise(x, weight, bias, eps)
        # For the convolution that comes next, which takes it away.
        stats.__dict__[_NORMALISED] = normalised
        return stats

    def group_stats(self, x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        """Of a group norm: mean and rstd, (2, N, G), and its ``stats``, (5, N, C)."""
        found = reference.moments(x, norm)
        assert isinstance(found, tuple)
        assert not isinstance(found, Partials)
        return found

    def group_affine(self, kept: Tensor, norm: Norm, channels: int) -> Tensor:
        """The latter from the former."""
        return reference.group_affine(kept, norm, channels)

    def _merged_stats(
        self, partials: Partials, counts: Tensor,
        weight: Tensor | None, bias: Tensor | None, eps: float,
    ) -> Tensor:  # fmt: skip
        return reference.norm_stats(partials, weight, bias, eps, counts)

    def synced_stats(
        self,
        moments: Any,
        rows: int,
        gather: Gather,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        """``norm_stats`` over the rows of all ranks, and their number (1,).

        moments: ``rank_moments`` of this rank's ``rows`` rows.
        """
        local = self.norm_stats(moments, *OF_RANKS[:3])
        partials, counts = ranks.gather_moments(local, rows, gather)
        stats = self._merged_stats(partials, counts, weight, bias, eps)
        return stats, counts.sum().view(1)

    def conv_forward(
        self,
        h: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        *,
        with_moments: bool = False,
        norm: Norm | None = None,
        **options: Any,
    ) -> tuple[Tensor, Any]:
        """``reference.conv_forward``, with the moments as ``self.moments`` gives them."""
        stats: Tensor | None = options.get("stats")
        if stats is not None:
            normalised = stats.__dict__.pop(_NORMALISED, None)
            if normalised is not None:
                h = cast(reference.activate_(normalised, options["act"]), options["dtype"])
                options["stats"] = None
        out, _ = reference.conv_forward(h, weight, bias, geometry, **options)
        return out, self.moments(out) if with_moments else None

    def conv_backward(
        self,
        g: Tensor,
        h: Tensor,
        weight: Tensor,
        geometry: Geometry,
        *,
        dtype: torch.dtype,
        stats: Tensor | None,
        act: Act,
        need_input: bool,
        need_weight: bool,
        need_bias: bool,
    ) -> ConvGrads:
        """Backward of a shortcut's convolution, which reads h or act(a*h + b).

        g: (N, K, P, Q). The gradient that comes back is that of what the convolution reads, before
        any norm's backward.
        """
        z = reference.norm_act(h, stats, act, dtype) if need_weight else h
        dz, dweight, dbias = reference.convolution_backward(
            g.to(dtype), z, weight, geometry, (need_input, need_weight, need_bias)
        )
        return ConvGrads(None if dz is None else Grad(dz), dweight, dbias, None, None)

    def written(self, grad: Grad, dtype: torch.dtype) -> Tensor:
        """A gradient in ``dtype`` that waits for nothing."""
        return reference.input_grad(grad, None, dtype)

    def norm_conv_backward(
        self,
        grad: Grad,
        h: Tensor,
        stats: Tensor,
        act: Act,
        weight: Tensor,
        geometry: Geometry,
        *,
        training: bool,
        norm: Norm,
        dtype: torch.dtype,
        need_input: bool,
        need_weight: bool,
        need_bias: bool,
        add: Tensor | Dgrad | None = None,
        identity: Tensor | None = None,
        final: bool = False,
        sync: Ranks | None = None,
    ) -> ConvGrads:
        """Backward of conv(act(norm(h))) for one gradient of its output
        (kernels/README.md, "Backward").

        Args:
            grad: gradient of the convolution's output, (N, K, P, Q).
            h: (N, C, H, W), the norm's input; stats: (5, C), its statistics, or (5, N, C).
            training: whether ``stats`` depend on h. norm: the norm itself.
            add: a further gradient of act(norm(h)), (N, C, H, W); where ``projection_adds``, as
                the projection's whose it is.
            identity: added to h's gradient untouched (the identity path), where ``final``.
            final: the gradient of h is returned written, in h's dtype.
            sync: the other ranks, over whose rows ``stats`` were taken too. dgamma and dbeta stay
                this rank's own sums, as every other parameter's gradient.
        """
        assert not isinstance(add, Dgrad)
        g = reference.input_grad(grad, None, dtype)
        u = reference.affine(h, stats)
        # act(u) may take u's place where act' can be read off its result.
        in_place = act.kind in ("relu", "identity") or not need_input
        z = cast(reference.activate_(u if in_place else u.clone(), act), dtype)
        dz, dweight, dbias = reference.convolution_backward(
            g, z, weight, geometry, (need_input, need_weight, need_bias)
        )
        del g, z, grad
        if dz is None:
            return ConvGrads(None, dweight, dbias, None, None)
        if add is not None:
            dz = dz.to(torch.promote_types(dz.dtype, add.dtype)).add_(add)
        q = reference.activation_grad(cast(dz, u.dtype), u, act, in_place=True)
        del dz
        del u
        identity = identity if final else None
        if norm.groups:
            sums = reference.group_norm_grad(q, h, stats, norm)
            g = reference.input_grad(Grad(q, h, sums.coef), identity, q.dtype)
            dgamma, dbeta = sums.dweight, sums.dbias
        elif sync is None:
            gamma = norm.weight
            g, dgamma, dbeta = reference.norm_backward(q, h, stats, gamma, training, identity)
        else:
            dbeta, dgamma = reference.rank_gradient_sums(q, h, stats)
            both = ranks.gather_sums(dbeta, dgamma, sync.gather).data.sum(0)
            g = reference.norm_backward_of(q, h, stats, both, sync.total, identity)
        g = cast(g, h.dtype if final else dtype)
        return ConvGrads(Grad(g), dweight, dbias, dgamma, dbeta)
