"""The one forward and the one backward of a chain of pre-activation units.

He et al. 2016, equation (3): x_{l+1} = x_l + F(x_l). With h_0 = x, a unit computes
z_i = act(norm_i(h_{i-1})), h_i = conv_i(z_i) for i = 1..k, and adds its shortcut to h_k.
Blocks, models and ``fuse`` all run these functions; a memory mode only says which h_i are kept
(``Spec.kept_of``), and what is missing is computed again from what is there.

Everything here is below autograd: plain tensors in and out. ``execution`` runs it by programs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.aten_engine import OF_RANKS, AtenEngine
from ..kernels.operands import Dgrad, Grad, Norm, running_stats
from ..kernels.ranks import Ranks
from ..kernels.reference import image_sums
from .spec import HAND_TO_RANKS, Conv, Shortcut, Spec, Unit, UnitParams
from .sync import gather_over

Kept = dict[tuple[int, int], Tensor]


class Chain:
    """A chain's record, tensors and engine, bound for one forward or backward.

    Args:
        spec: the record. params: its tensors, flat, where ``spec.positions`` says.
        engine: the implementation. stats: each norm's (5, C) statistics, or a group norm's (2, N,
            G) mean and rstd, where they are known already (a backward); computed and appended
            otherwise.
        totals: with ``stats``, the rows (1,) of each norm that is synchronised over ranks.
    """

    def __init__(
        self,
        spec: Spec,
        params: Sequence[Tensor],
        engine: AtenEngine,
        stats: list[Tensor] | None = None,
        totals: list[Tensor] | None = None,
    ) -> None:
        self.spec = spec
        self.params = params
        self.engine = engine
        self.known_stats = stats is not None
        self.stats: list[Tensor] = [] if stats is None else stats
        self.totals: list[Tensor] = [] if totals is None else totals
        # Group norms' statistics as convolutions read them, of the unit at hand.
        self._per_image: dict[int, Tensor] = {}

    def _param(self, position: int) -> Tensor | None:
        return None if position < 0 else self.params[position]

    def _stats(self, unit: Unit, at: UnitParams, i: int, h: Tensor, partials: Any) -> Tensor:
        """Statistics of norm i: those known, the running ones, or those of the batch h."""
        if self.known_stats:
            return self._at(unit, at, i)
        norm = unit.norms[i]
        weight, bias, _, _ = known = self._norm(unit, at, i)
        if norm.groups:
            kept, stats = self.engine.group_stats(h, known) if partials is None else partials
            self.stats.append(kept)
            return stats  # type: ignore[no-any-return]
        if norm.training:
            if norm.sync:
                partials = self.engine.rank_moments(h) if partials is None else partials
                rows, gather = h.numel() // h.shape[1], gather_over(norm.sync)
                stats, total = self.engine.synced_stats(
                    partials, rows, gather, weight, bias, norm.eps
                )
                self.totals.append(total)
            else:
                if partials is None:
                    partials = self.engine.moments(h, known)
                stats = self.engine.norm_stats(partials, weight, bias, norm.eps)
        else:
            mean, var = self.params[at.running_mean[i]], self.params[at.running_var[i]]
            wide = torch.promote_types(mean.dtype, h.dtype)
            stats = running_stats(mean.to(wide), var.to(wide), weight, bias, norm.eps)
        self.stats.append(stats)
        return stats

    def _norm(self, unit: Unit, at: UnitParams, i: int) -> Norm:
        norm = unit.norms[i]
        weight, bias = self._param(at.norm_weight[i]), self._param(at.norm_bias[i])
        return Norm(weight, bias, norm.eps, norm.groups)

    def _conv(
        self,
        number: int,
        i: int,
        h: Tensor,
        stats: Tensor,
        residual: Tensor | None = None,
        residual_stats: Tensor | None = None,
        subtract: bool = False,
        with_moments: bool = False,
        norm: Norm | None = None,
    ) -> tuple[Tensor, Any]:
        """h_{i+1} = conv(act(norm(h_i))) [+ residual] of unit ``number``."""
        unit, at = self.spec.units[number], self.spec.positions[number]
        return self.engine.conv_forward(
            h,
            self.params[at.conv_weight[i]],
            self._param(at.conv_bias[i]),
            unit.convs[i].geometry,
            dtype=self.spec.dtype,
            stats=stats,
            act=unit.act,
            residual=residual,
            residual_stats=residual_stats,
            subtract=subtract,
            out_dtype=self._out_dtype(unit, residual),
            with_moments=with_moments,
            norm=norm,
        )

    def _shortcut(
        self, number: int, x: Tensor, stats: Tensor, residual: Tensor | None = None, **end: Any
    ) -> tuple[Tensor, Any]:
        """What unit ``number`` adds to h_k, but for an identity's own norm and activation.

        residual: h_k, where the projection adds it. end: further options of its convolution.
        """
        unit, at = self.spec.units[number], self.spec.positions[number]
        if unit.projection is None:
            return x, None
        return self.engine.conv_forward(
            x,
            self.params[at.projection_weight],
            self._param(at.projection_bias),
            unit.projection.geometry,
            dtype=self.spec.dtype,
            stats=stats if unit.shortcut == Shortcut.PROJECTION_PREACT else None,
            act=unit.act,
            residual=residual,
            out_dtype=self._out_dtype(unit, residual),
            **end,
        )

    def _out_dtype(self, unit: Unit, residual: Tensor | None) -> torch.dtype:
        """Of a convolution's result: the stream's behind the addition of ``residual``."""
        if residual is None:
            return self.spec.dtype
        if self.spec.wide:
            return torch.float32
        return stream_dtype(False, unit.add_in_place, residual.dtype, self.spec.dtype)

    def _projection_adds(self, number: int, i: int) -> bool:
        """Whether unit ``number``'s projection adds what convolution i gives."""
        unit, at = self.spec.units[number], self.spec.positions[number]
        if unit.projection is None:
            return False
        return self.engine.projection_adds(
            (self.params[at.conv_weight[i]].shape, unit.convs[i].geometry),
            (self.params[at.projection_weight].shape, unit.projection.geometry),
        )

    def forward(
        self,
        x: Tensor,
        start: int,
        stop: int,
        keys: Sequence[tuple[int, int]],
        need_out: bool = True,
        partials: Any = None,
    ) -> tuple[Tensor | None, Kept, Any]:
        """Run units [start, stop) on x: the output, the h_i of ``keys``, and the output's moments.

        need_out=False leaves out the last convolution of the last unit, whose output is at hand.
        partials: moments of x, where what wrote it knows them. Those of the output are None where
        no norm that follows wants them.
        """
        spec = self.spec
        wanted = frozenset(keys)
        kept: Kept = {}
        out: Tensor | None = x
        for number in range(start, stop):
            unit, at = spec.units[number], spec.positions[number]
            h = x
            first_stats: Tensor | None = None
            for i in range(len(unit.convs)):
                if (number, i) in wanted:
                    kept[number, i] = h
                stats = self._stats(unit, at, i, h, partials)
                if first_stats is None:
                    first_stats = stats
                last = i == len(unit.convs) - 1
                if last and number == stop - 1 and not need_out:
                    return None, kept, None
                with_moments, norm = self._moments_after(number, i)
                end: dict[str, Any] = {"with_moments": with_moments, "norm": norm}
                if last and not unit.convs[i].bias and self._projection_adds(number, i):
                    inner, _ = self._conv(number, i, h, stats)
                    h, partials = self._shortcut(number, x, first_stats, inner, **end)
                    continue
                if last:
                    end["residual"], _ = self._shortcut(number, x, first_stats)
                    if unit.shortcut == Shortcut.IDENTITY_PREACT:
                        end["residual_stats"] = first_stats
                h, partials = self._conv(number, i, h, stats, **end)
            out = x = h
            self._per_image.clear()
        return out, kept, partials

    def _moments_after(self, number: int, i: int) -> tuple[bool, Norm | None]:
        """Whether the norm after convolution i of a unit wants the moments of what is written.

        And that norm, unless it is another part's.
        """
        if self.known_stats:
            return False, None
        if i + 1 < len(self.spec.units[number].convs):
            i += 1
        elif number + 1 < len(self.spec.units):
            number, i = number + 1, 0
        else:
            hands_on = self.spec.part.hands_on
            return self.engine.gives_moments(hands_on > 0, hands_on == HAND_TO_RANKS), None
        unit, at = self.spec.units[number], self.spec.positions[number]
        norm = unit.norms[i]
        return (
            self.engine.gives_moments(norm.training, norm.sync > 0, norm.groups),
            OF_RANKS if norm.sync else self._norm(unit, at, i),
        )

    def backward(
        self,
        g: Tensor,
        x: Tensor | None,
        out: Tensor | None,
        kept: Kept,
        grads: list[Tensor | None],
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradient of x for the gradient g of the chain's output, and x; fills ``grads`` per param.

        x: the chain's input, or None where it is to be walked back to. out: its output, which the
        modes that walk need. kept: what ``forward`` kept; emptied as it is used, so that one unit's
        intermediates are alive at a time.
        """
        spec = self.spec
        if spec.memory != "segment":
            return self._walk([g], x, out, 0, len(spec.units), kept, grads)
        starts = list(range(0, len(spec.units), spec.segment))
        held = [g]
        del g
        for start in reversed(starts):
            stop = min(start + spec.segment, len(spec.units))
            segment_x = kept.pop((start, 0)) if start else x
            assert segment_x is not None
            _, inner, _ = self.forward(
                segment_x, start, stop, spec.kept_of(start, stop, "invert"), need_out=False
            )
            grad, _ = self._walk(held, segment_x, out, start, stop, inner, grads)
            if grad is None:
                return None, x
            out = segment_x
            held = [grad]
            del grad
        return held.pop(), x

    def _walk(
        self,
        held: list[Tensor],
        x: Tensor | None,
        out: Tensor | None,
        start: int,
        stop: int,
        kept: Kept,
        grads: list[Tensor | None],
    ) -> tuple[Tensor | None, Tensor | None]:
        """Backward through units [start, stop), the stream being walked back where not kept.

        held: the gradient of the output, taken out of its list, so that no caller keeps it alive.
        Returns the gradient of x, and x.
        """
        grad: Tensor | None = held.pop()
        for number in reversed(range(start, stop)):
            assert grad is not None
            last = len(self.spec.units[number].convs) - 1
            h = x if number == start else kept.pop((number, 0), None)
            if h is None:
                assert out is not None
                h = self._previous(number, kept[number, last], out)
            hs = [h]
            out = h
            for i in range(last):
                h = kept.pop((number, i + 1), None)
                if h is None:
                    h, _ = self._conv(number, i, hs[i], self._at_unit(number, i))
                hs.append(h)
            del h
            grad = self._unit_backward(number, grad, hs, grads)
            del hs
            if grad is None:
                break
        return grad, out

    def _ranks(self, unit: Unit, i: int) -> Ranks | None:
        """What norm i's backward, the next one of a chain from its end, exchanges with others."""
        number = unit.norms[i].sync
        return Ranks(gather_over(number), self.totals.pop()) if number else None

    def _at_unit(self, number: int, i: int) -> Tensor:
        return self._at(self.spec.units[number], self.spec.positions[number], i)

    def _at(self, unit: Unit, at: UnitParams, i: int) -> Tensor:
        """Known statistics of norm i; a group norm's are expanded, once in each unit's backward."""
        place = at.first_stats + i
        if not unit.norms[i].groups:
            return self.stats[place]
        if place not in self._per_image:
            channels = self.params[at.conv_weight[i]].shape[1] * unit.convs[i].geometry.groups
            self._per_image[place] = self.engine.group_affine(
                self.stats[place], self._norm(unit, at, i), channels
            )
        return self._per_image[place]

    def _bias_grad(self, g: Tensor, conv: Conv, position: int, grads: list[Tensor | None]) -> bool:
        """Whether a convolution's backward is to give its bias's gradient.

        Not of one of each image, (N, K), which none sums: it is stored here, from the output's.
        """
        if not conv.bias or not self.spec.needs[position]:
            return False
        bias = self.params[position]
        if bias.dim() == 1:
            return True
        _store(grads, position, image_sums(g, bias))
        return False

    def _previous(self, number: int, h_last: Tensor, out: Tensor) -> Tensor:
        """x_l = x_{l+1} - F_last(h_{k-1}): one step back along the identity path.

        F_last is computed by the kernel and from the inputs that computed it in the forward, so
        its bits are the same and the only error is that of one addition and one subtraction.
        """
        i = len(self.spec.units[number].convs) - 1
        stats = self._at_unit(number, i)
        return self._conv(number, i, h_last, stats, residual=out, subtract=True)[0]

    def walk_back(self, x: Tensor, out: Tensor, kept: Kept) -> Tensor | None:
        """The chain's input x as a backward would walk to it from its output ``out``, or, in
        segments, from the end of the first; None where its first unit is not walked."""
        spec = self.spec
        stop = len(spec.units)
        if spec.memory == "segment":
            stop = min(spec.segment, stop)
            out = kept.get((stop, 0), out)
            keys = spec.kept_of(0, stop, "invert")
            _, kept, _ = self.forward(x, 0, stop, keys, need_out=False)
        walked: Tensor | None = out
        for number in reversed(range(stop)):
            h_last = kept.get((number, len(spec.units[number].convs) - 1))
            if number and (number, 0) in kept:
                walked = kept[number, 0]
            elif walked is None or h_last is None or not spec.units[number].walkable:
                return None
            else:
                walked = self._previous(number, h_last, walked)
        return walked

    def _unit_backward(
        self, number: int, g: Tensor, hs: list[Tensor], grads: list[Tensor | None]
    ) -> Tensor | None:
        """Backward of one unit: the shortcut's, then repetition k..1."""
        spec, engine = self.spec, self.engine
        unit, at = spec.units[number], spec.positions[number]
        x = hs[0]
        identity: Tensor | None = g
        add: Tensor | Dgrad | None = None
        # The first norm's parameters come before the unit's other ones, so this also says whether
        # the gradient of z_1, which a shortcut may share, is wanted.
        if unit.shortcut == Shortcut.IDENTITY_PREACT:
            add, identity = g, None
        elif unit.projection is not None:
            preact = unit.shortcut.reads_preact
            weight, geometry = self.params[at.projection_weight], unit.projection.geometry
            need_input = spec.needs_before(at.conv_weight[0])
            later = need_input and preact and self._projection_adds(number, 0)
            need_bias = self._bias_grad(g, unit.projection, at.projection_bias, grads)
            result = engine.conv_backward(
                g,
                x,
                weight,
                geometry,
                dtype=spec.dtype,
                stats=self._at_unit(number, 0) if preact else None,
                act=unit.act,
                need_input=need_input and not later,
                need_weight=spec.needs[at.projection_weight],
                need_bias=need_bias,
            )
            _store(grads, at.projection_weight, result.dweight)
            _store(grads, at.projection_bias, result.dbias)
            dz = None if result.grad is None else result.grad.q
            add, identity = (dz, None) if preact else (None, dz)
            if later:
                add = Dgrad(g, weight, geometry)
        grad = Grad(g)
        for i in reversed(range(len(unit.convs))):
            position = at.conv_bias[i]
            if unit.convs[i].bias and self.params[position].dim() == 2:
                grad = Grad(engine.written(grad, spec.dtype))
            need_bias = self._bias_grad(grad.q, unit.convs[i], position, grads)
            result = engine.norm_conv_backward(
                grad,
                hs[i],
                self._at_unit(number, i),
                unit.act,
                self.params[at.conv_weight[i]],
                unit.convs[i].geometry,
                training=unit.norms[i].training,
                norm=self._norm(unit, at, i),
                dtype=spec.dtype,
                need_input=spec.needs_before(at.conv_weight[i]),
                need_weight=spec.needs[at.conv_weight[i]],
                need_bias=need_bias,
                add=add if i == 0 else None,
                identity=identity if i == 0 else None,
                final=i == 0,
                sync=self._ranks(unit, i),
            )
            _store(grads, at.conv_weight[i], result.dweight)
            _store(grads, at.conv_bias[i], result.dbias)
            _store(grads, at.norm_weight[i], result.dgamma, spec, self.params)
            _store(grads, at.norm_bias[i], result.dbeta, spec, self.params)
            if result.grad is None:
                return None
            grad = result.grad
        self._per_image.clear()
        return grad.q


def _store(
    grads: list[Tensor | None],
    position: int,
    value: Tensor | None,
    spec: Spec | None = None,
    params: Sequence[Tensor] | None = None,
) -> None:
    """Put a gradient where it belongs; a norm's may be rows of one tensor and are then copied."""
    if position < 0 or value is None:
        return
    if spec is not None and params is not None:
        if not spec.needs[position]:
            return
        param = params[position]
        if value._is_view() or value.dtype != param.dtype:
            value = torch.empty_like(param).copy_(value)
    grads[position] = value


def stream_dtypes(spec: Spec, dtype: torch.dtype) -> list[torch.dtype]:
    """Dtype of each unit's input and of the chain's output in eager, for an input of ``dtype``."""
    dtypes = [dtype]
    for unit in spec.units:
        projects = unit.projection is not None
        dtypes.append(stream_dtype(projects, unit.add_in_place, dtypes[-1], spec.dtype))
    return dtypes


def stream_dtype(
    projects: bool, add_in_place: bool, x: torch.dtype, multiply: torch.dtype
) -> torch.dtype:
    """Dtype of a unit's output in eager, for its input's and that in which it multiplies."""
    if add_in_place:
        return multiply
    return torch.promote_types(multiply if projects else x, multiply)
