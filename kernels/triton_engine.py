"""The steps of a chain out of the fused kernels (``dispatch``)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import choices, ranks, reference
from .aten_engine import OF_RANKS, AtenEngine, ConvGrads, Convolved
from .choices import (
    APART,
    ATEN,
    BOTH,
    DGRAD,
    FORWARD,
    FUSED,
    WGRAD,
    WRITTEN,
    Choice,
    implementation,
)
from .operands import (
    IDENTITY,
    Act,
    Activated,
    Dgrad,
    Geometry,
    Grad,
    Norm,
    NormGrads,
    Partials,
)
from .reference import cast


class _Found(NamedTuple):
    """What a convolution's two gradients give, before their coefficients are known or applied.

    grad: q, or dz with the z that makes q of it; None where only the sums were asked for. sums:
    what they give, None without need of an input's gradient. again: given the coefficients, a
    second dgrad that writes dx; else None.
    """

    grad: Grad | None
    sums: NormGrads | None
    dweight: Tensor | None
    dbias: Tensor | None
    again: Callable[..., tuple[Tensor, Any]] | None = None


def of_images(values: Tensor | None, rank: int = 3) -> bool:
    """Whether ``stats`` or coefficients, or, of rank 2, a bias are of each image.

    They never meet a fused convolution's kernel, whose tiles hold rows of several images.
    """
    return values is not None and values.dim() == rank


def runs_twice(weight: Tensor) -> bool:
    """Whether a unit's last dgrad, which gives dx, runs for its sums first and then for dx.

    A narrowing 1x1 moves fewer bytes so than by writing q and reading it back: 4K + 4C channels of
    rows instead of 2K + 6C.
    """
    k, c, *kernel_size = weight.shape
    return kernel_size == [1, 1] and k < c


class TritonEngine(AtenEngine):
    """The same steps on the fused kernels: float32, float16 and bfloat16."""

    name = "triton"
    _rank_moments_from_conv = True
    _group_moments_from_conv = True

    def __init__(self) -> None:
        from . import (
            conv_backward,
            conv_dgrad,
            conv_forward,
            conv_wgrad,
            fallback,
            groups,
            input_grad,
            launch,
            moments,
            norm_act,
            norm_backward,
            wgrad_config,
        )

        self._run = fallback.Fallbacks().run

        self._groups = groups
        self._gradients = input_grad
        self._moments = moments
        self._norm_act = norm_act
        self._norm_backward = norm_backward
        self._conv_forward = conv_forward
        self._conv_backward = conv_backward
        self._conv_dgrad = conv_dgrad
        self._conv_wgrad = conv_wgrad
        self._tiles: dict[str, Any] = dict.fromkeys(choices.OPERATIONS, launch.Config)
        self._tiles[WGRAD] = wgrad_config.WgradConfig

    def _choice(
        self, operation: str, h: Tensor, weight: Tensor, geometry: Geometry, dtype: torch.dtype
    ) -> tuple[str, Any]:
        """How a convolution of h is computed, and its kernel's tile, None where no other than that
        of the shape was measured."""
        found = choices.find(operation, h, weight.shape, geometry, dtype) or Choice(None)
        tile = None if found.tile is None else self._tiles[operation](*found.tile)
        return found.how or implementation(weight.shape, geometry), tile

    def _choices_backward(
        self, h: Tensor, stats: Tensor | None, weight: Tensor, geometry: Geometry,
        dtype: torch.dtype,
    ) -> tuple[tuple[str, Any], tuple[str, Any]]:  # fmt: skip
        """``_choice`` for dgrad and wgrad."""
        if of_images(stats):
            return (ATEN, None), (ATEN, None)
        dgrad, wgrad = (self._choice(each, h, weight, geometry, dtype) for each in (DGRAD, WGRAD))
        return dgrad, wgrad

    def projection_adds(self, other: Convolved, projection: Convolved) -> bool:
        return implementation(*other) == ATEN != implementation(*projection)

    def moments(self, x: Tensor, norm: Norm | None = None) -> Any:
        """Given the norm, its statistics already (``kernels.merging``)."""
        return self._run(
            "moments", x, (x.shape, x.dtype),
            lambda _: self._moments.moments(x, norm),
            lambda: reference.moments(x, norm),
            tiled=False,
        )  # fmt: skip

    def rank_moments(self, x: Tensor) -> Any:
        return self.moments(x, OF_RANKS)

    def group_stats(self, x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self.moments(x, norm)
        return found

    def group_affine(self, kept: Tensor, norm: Norm, channels: int) -> Tensor:
        return self._run(
            "norm statistics", kept, (kept.shape,),
            lambda _: self._groups.group_affine(kept, norm, channels),
            lambda: reference.group_affine(kept, norm, channels),
            tiled=False,
        )  # fmt: skip

    def norm_stats(
        self, moments: Any, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        if isinstance(moments, Tensor):
            return moments
        return self._merged_stats(moments, None, weight, bias, eps)

    def _merged_stats(
        self, partials: Partials, counts: Tensor | None,
        weight: Tensor | None, bias: Tensor | None, eps: float,
    ) -> Tensor:  # fmt: skip
        data = partials.data
        return self._run(
            "norm statistics", data, (data.shape,),
            lambda _: self._moments.norm_stats(partials, weight, bias, eps, counts),
            lambda: reference.norm_stats(partials, weight, bias, eps, counts),
            tiled=False,
        )  # fmt: skip

    def _operand(
        self, h: Tensor, stats: Tensor | None, act: Act, dtype: torch.dtype
    ) -> Tensor:  # fmt: skip
        """z = act(a*h + b) or h in ``dtype``: a convolution's operand, written once if at all."""
        if stats is None and h.dtype == dtype:
            return h
        return self._run(
            "norm and activation", h, (h.shape, h.dtype, dtype),
            lambda _: self._norm_act.norm_act(h, stats, act, dtype),
            lambda: reference.norm_act(h, stats, act, dtype),
            tiled=False,
        )  # fmt: skip

    def _input_grad(self, grad: Grad, identity: Tensor | None, dtype: torch.dtype) -> Tensor:
        """g = A*(q - C - B*(h - mean)) (+ identity), written."""
        return self._run(
            "norm gradient", grad.q, (grad.q.shape, grad.q.dtype, dtype),
            lambda _: self._gradients.input_grad(grad, identity, dtype),
            lambda: reference.input_grad(grad, identity, dtype),
            tiled=False,
        )  # fmt: skip

    def written(self, grad: Grad, dtype: torch.dtype) -> Tensor:
        """g in ``dtype``, written where it waits."""
        waits = grad.coef is not None or grad.z is not None or grad.q.dtype != dtype
        return self._input_grad(grad, None, dtype) if waits else grad.q

    def _operands(
        self, grad: Grad, h: Tensor, stats: Tensor, act: Act, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Both of a convolution's backward, written: ``_input_grad`` and ``_operand``."""
        return self._run(
            "operands", h, (grad.q.shape, grad.q.dtype, h.shape, h.dtype, dtype),
            lambda _: self._gradients.written_operands(grad, h, stats, act, dtype),
            lambda: (
                self._input_grad(grad, None, dtype),
                self._operand(h, stats, act, dtype),
            ),
            tiled=False,
        )  # fmt: skip

    def _norm_grad(
        self, sums: Partials, stats: Tensor, training: bool, total: Tensor | None = None
    ) -> NormGrads:
        """A, B and C, and the norm's own gradients, out of its sums."""
        return self._run(
            "norm sums", stats, (sums.data.shape,),
            lambda _: self._norm_backward.norm_grad(sums, stats, training, total),
            lambda: reference.norm_grad(sums, stats, training, total),
            tiled=False,
        )  # fmt: skip

    def _act_backward(
        self, dz: Tensor, z: Activated, training: bool, dtype: torch.dtype | None, norm: Norm
    ) -> tuple[Tensor | None, NormGrads]:
        """``reference.act_backward``, behind a convolution's dgrad by ATen."""
        h, stats, act, add = z
        return self._run(
            "activation gradient", h, (h.shape, h.dtype, dz.dtype, dtype),
            lambda _: self._norm_backward.act_backward(
                dz, h, stats, act, add, training, dtype, norm
            ),
            lambda: reference.act_backward(dz, h, stats, act, add, training, dtype, norm),
            tiled=False,
        )  # fmt: skip

    def _dgrad(
        self, grad: Grad, weight: Tensor, h: Tensor, geometry: Geometry, *,
        dtype: torch.dtype, config: Any = None, **options: Any,
    ) -> tuple[Any, Any]:  # fmt: skip
        """``reference.conv_dgrad``. config: its kernel's tile, None for that of the shape."""
        return self._run(
            "conv dgrad", h, (h.shape, weight.shape, geometry, dtype),
            lambda smaller: self._conv_dgrad.conv_dgrad(
                grad, weight, h, geometry, dtype=dtype, config=config, smaller=smaller, **options
            ),
            lambda: reference.conv_dgrad(grad, weight, h, geometry, dtype=dtype, **options),
        )  # fmt: skip

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
        """``reference.conv_forward``, computed as chosen."""
        dtype = options["dtype"]
        how, tile = self._choice(FORWARD, h, weight, geometry, dtype)
        each = of_images(options.get("stats")) or of_images(options.get("residual_stats"))
        if each or of_images(bias, 2):
            how = ATEN
        if how != FUSED and options.get("stats") is not None:
            h = self._operand(h, options["stats"], options["act"], dtype)
            options["stats"] = None

        def aten() -> tuple[Tensor, Any]:
            end = {k: v for k, v in options.items() if k not in ("dtype", "stats")}
            end.update(with_moments=with_moments, norm=norm)
            z = self._operand(h, options.get("stats"), options.get("act", IDENTITY), dtype)
            # The bias is the end's: cuDNN would add it in a pass of its own.
            out = reference.conv2d(z, cast(weight, dtype), None, geometry)
            # h may lie in both layouts, but the kernels read channels_last alone.
            out = reference.in_memory_format(out, torch.channels_last)
            return self._run(
                "end of a convolution", out, (out.shape, out.dtype, end.get("out_dtype")),
                lambda _: self._moments.conv_end(out, bias, **end),
                lambda: reference.conv_end(out, bias, **end),
                tiled=False,
            )  # fmt: skip

        if how == ATEN:
            return aten()
        later = norm if with_moments and norm is not None and norm.groups else None
        if later is not None:
            # Its tiles hold rows of several images: a pass of its own takes the moments.
            with_moments, norm = False, None
        out, found = self._run(
            "conv forward", h, (h.shape, weight.shape, geometry, dtype),
            lambda smaller: self._conv_forward.conv_forward(
                h, weight, bias, geometry,
                with_moments=with_moments, norm=norm, config=tile, smaller=smaller, **options,
            ),
            aten,
        )  # fmt: skip
        return out, found if later is None else self.group_stats(out, later)

    def _weight_grad(
        self, choice: tuple[str, Any], grad: Grad, h: Tensor, weight: Tensor, geometry: Geometry, *,
        dtype: torch.dtype, stats: Tensor | None, act: Act, with_bias: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        how, tile = choice
        if how == ATEN or (how == WRITTEN and stats is not None):
            h = self._operand(h, stats, act, dtype)
            stats = None
        if how == ATEN:
            g = self.written(grad, dtype)
            mask = (False, True, with_bias)
            _, dweight, dbias = reference.convolution_backward(g, h, weight, geometry, mask)
            assert dweight is not None
            return dweight, dbias
        options: dict[str, Any] = {
            "dtype": dtype,
            "stats": stats,
            "act": act,
            "with_bias": with_bias,
        }
        return self._run(
            "conv wgrad", h, (h.shape, weight.shape, geometry, dtype),
            lambda smaller: self._conv_wgrad.conv_wgrad(
                grad, h, weight, geometry, config=tile, smaller=smaller, **options
            ),
            lambda: reference.conv_wgrad(grad, h, weight, geometry, **options),
        )  # fmt: skip

    def conv_backward(
        self, g, h, weight, geometry, *, dtype, stats, act, need_input, need_weight, need_bias
    ):  # type: ignore[no-untyped-def]
        """``AtenEngine.conv_backward``, computed as chosen."""
        (how, tile), wgrad = self._choices_backward(h, stats, weight, geometry, dtype)
        dz = dweight = dbias = None
        if how == ATEN == wgrad[0]:
            g = self.written(Grad(g), dtype)
            z = self._operand(h, stats, act, dtype) if need_weight else h
            dz, dweight, dbias = reference.convolution_backward(
                g, z, weight, geometry, (need_input, need_weight, need_bias)
            )
            return ConvGrads(None if dz is None else Grad(dz), dweight, dbias, None, None)
        if need_weight or need_bias:
            dweight, dbias = self._weight_grad(
                wgrad, Grad(g), h, weight, geometry,
                dtype=dtype, stats=stats, act=act, with_bias=need_bias,
            )  # fmt: skip
        if need_input and how == ATEN:
            mask = (True, False, False)
            dz, _, _ = reference.convolution_backward(
                self.written(Grad(g), dtype), h, weight, geometry, mask
            )
        elif need_input:
            dz, _ = self._dgrad(Grad(g), weight, h, geometry, dtype=dtype, config=tile)
        return ConvGrads(None if dz is None else Grad(dz), dweight, dbias, None, None)

    def norm_conv_backward(
        self, grad, h, stats, act, weight, geometry, *, training, norm, dtype,
        need_input, need_weight, need_bias, add=None, identity=None, final=False, sync=None,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        """``AtenEngine.norm_conv_backward``, computed as chosen."""
        hows = self._choices_backward(h, stats, weight, geometry, dtype)
        wide, grouped = hows[0][0] == ATEN, of_images(stats)
        if isinstance(add, Dgrad) and (grouped or not wide):
            add = self._written(add, h, dtype)
        projection = add if isinstance(add, Dgrad) else None
        z = Activated(h, stats, act, None if projection else add)
        need = need_input, need_weight, need_bias
        if wide:
            found = self._wide_backward(
                hows[1], grad, z, weight, geometry, dtype, training, need, projection, norm
            )
        else:
            found = self._narrow_backward(
                hows, grad, z, weight, geometry, dtype, training, need, final and runs_twice(weight)
            )
        del grad
        grad, sums, dweight, dbias, again = found
        if sums is None:
            return ConvGrads(None, dweight, dbias, None, None)
        coef, dgamma, dbeta = sums
        if sync is not None:
            everywhere = ranks.gather_sums(dbeta, dgamma, sync.gather)
            coef, _, _ = self._norm_grad(everywhere, stats, training, sync.total)
        if again is not None:
            dx, _ = again(coef=coef, identity=identity, out_dtype=h.dtype)
            return ConvGrads(Grad(dx), dweight, dbias, dgamma, dbeta)
        grad = grad._replace(h=h if training else None, coef=coef)
        if final:
            grad = Grad(self._input_grad(grad, identity, h.dtype))
        elif grouped:
            grad = Grad(self._input_grad(grad, None, dtype))
        return ConvGrads(grad, dweight, dbias, dgamma, dbeta)

    def _written(self, projection: Dgrad, h: Tensor, dtype: torch.dtype) -> Tensor:
        """A projection's input gradient, where no kernel adds to it on the way."""
        g, weight, geometry = projection
        found = self.conv_backward(
            g, h, weight, geometry, dtype=dtype, stats=None, act=IDENTITY,
            need_input=True, need_weight=False, need_bias=False,
        )  # fmt: skip
        result: Tensor = found.grad.q
        return result

    def _wide_backward(
        self, wgrad: tuple[str, Any], grad: Grad, z: Activated, weight: Tensor, geometry: Geometry,
        dtype: torch.dtype, training: bool, need: tuple[bool, bool, bool],
        projection: Dgrad | None, norm: Norm,
    ) -> _Found:  # fmt: skip
        """By ATen's convolutions. dgrad first: the pass for its sums writes wgrad's operand too.

        wgrad: how that is computed, of written operands at any rate.
        """
        h, stats, act, _ = z
        g = self.written(grad, dtype)
        del grad
        need_input, need_weight, need_bias = need
        backward = functools.partial(reference.convolution_backward, g)
        found = sums = dweight = dbias = None
        operand: Tensor | None = None
        if need_input:
            dz, _, _ = backward(h, weight, geometry, (True, False, False))
            assert dz is not None
            dz = reference.in_memory_format(dz, torch.channels_last)
            if projection is None:
                written = dtype if need_weight else None
                operand, sums = self._act_backward(dz, z, training, written, norm)
                found = Grad(dz, z=z)
            else:
                q, sums = self._dgrad(
                    Grad(projection.g), projection.weight, h, projection.geometry,
                    dtype=dtype, stats=stats, act=act, add=dz, training=training,
                )  # fmt: skip
                found = Grad(q)
        if need_weight and operand is None:
            operand = self._operand(h, stats, act, dtype)
        if need_weight or need_bias:
            operand = h if operand is None else operand
            if need_weight and wgrad[0] != ATEN:
                dweight, dbias = self._weight_grad(
                    wgrad, Grad(g), operand, weight, geometry,
                    dtype=dtype, stats=None, act=act, with_bias=need_bias,
                )  # fmt: skip
            else:
                mask = (False, need_weight, need_bias)
                _, dweight, dbias = backward(operand, weight, geometry, mask)
        return _Found(found, sums, dweight, dbias)

    def _narrow_backward(
        self, hows: tuple[tuple[str, Any], tuple[str, Any]], grad: Grad, z: Activated,
        weight: Tensor, geometry: Geometry, dtype: torch.dtype, training: bool,
        need: tuple[bool, bool, bool], twice: bool,
    ) -> _Found:  # fmt: skip
        """By the fused kernels, wgrad perhaps by ATen's. twice: ``runs_twice``."""
        (how, tile), wgrad = hows
        # What one of them reads written, the other does as well.
        written = not how == wgrad[0] == FUSED
        h, stats, act, add = z
        need_input, _, need_bias = need
        need_weight = need[1] or need_bias
        norm: Tensor | None = stats
        operand: Tensor | None = h
        waits = grad.coef is not None or grad.q.dtype != dtype
        if grad.z is not None or (written and waits):
            if written and need_weight:
                g, operand = self._operands(grad, h, stats, act, dtype)
                grad, norm = Grad(g), None
            else:
                grad = Grad(self._input_grad(grad, None, dtype))
        options: dict[str, Any] = {
            "dtype": dtype, "stats": stats, "act": act, "add": add, "training": training
        }  # fmt: skip
        dgrad = functools.partial(self._dgrad, grad, weight, h, geometry, config=tile, **options)

        def apart() -> tuple[Tensor | None, NormGrads | None, Tensor | None, Tensor | None]:
            nonlocal operand
            dweight = dbias = q = sums = None
            if need_weight:
                assert operand is not None
                dweight, dbias = self._weight_grad(
                    wgrad, grad, operand, weight, geometry,
                    dtype=dtype, stats=norm, act=act, with_bias=need_bias,
                )  # fmt: skip
            operand = None
            if need_input:
                q, sums = dgrad(write=not twice)
            return q, sums, dweight, dbias

        both = None
        if not written and need_input and need_weight:
            how, both = self._choice(BOTH, h, weight, geometry, dtype)
            if both is None and how != APART:
                both = self._conv_backward.tile(
                    grad, weight, h, geometry, dtype=dtype, act=act, add=add
                )
        if both is None:
            q, sums, dweight, dbias = apart()
        else:
            q, sums, dweight, dbias = self._run(
                "conv backward", h, (h.shape, weight.shape, geometry, dtype),
                lambda smaller: self._conv_backward.conv_backward(
                    grad, weight, h, geometry, write=not twice, with_bias=need_bias,
                    config=both, smaller=smaller, **options,
                ),
                apart,
                instead="by a kernel for each gradient",
            )  # fmt: skip
        found = None if q is None else Grad(q)
        return _Found(found, sums, dweight, dbias, dgrad if twice else None)
