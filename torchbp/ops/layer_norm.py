"""Normalisation of every sample over its last dimensions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchbp import kernels
from torchbp.kernels.reference_common import sums_dtype
from torchbp.ops.base import Op, midpoint, wide
from torchbp.ops.norm import (
    Moments,
    affine_jvp,
    as_parameter,
    as_sums,
    can_normalise,
    has_backward,
    of_dtype,
    secant,
    shares,
    sum_over,
    tangent,
)
from torchbp.ops.registry import Maker, Sample, register, sample
from torchbp.ops.relevance import Rule, Shares, passes
from torchbp.ops.sample_factors import Factors, Rows


def _over(x: Tensor, shape: Sequence[int]) -> tuple[int, ...]:
    """The dimensions that are normalised."""
    return tuple(range(x.dim() - len(shape), x.dim()))


def _others(x: Tensor, shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(range(x.dim() - len(shape)))


# Results from this size on, in bytes, take longer to be faulted in, page by page, than to be
# computed; the kernel asks for huge pages.
_LARGE = 8 << 20
# RMS norm from this many elements on is computed in one pass, where torch makes several.
_ONE_PASS = 1024


class LayerNorm(Op):
    """``y = x̂ w + b`` with mean and variance over the last ``len(normalized_shape)`` dimensions.

    Backward: ``∂b = Σ g``, ``∂w = Σ g x̂`` (over the other dimensions), and g w goes through ``x̂``
    (Ba et al. 2016). Secant: ``x̂ w`` by midpoints, then through ``x̂``; see
    :class:`torchbp.ops.norm.Moments`. LRP: the standard deviation counts as a constant
    (:func:`torchbp.ops.norm.shares`).

    The output is torch's to the bit, but from 8 MiB on, on the CPU: there a kernel that is several
    times as fast rounds a few elements the other way.
    """

    autocast = {"cuda": "fp32"}

    @staticmethod
    def forward(
        x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        if (
            x.numel() * x.element_size() >= _LARGE
            and x.is_cpu
            and can_normalise(x, shape, weight, bias)
        ):
            y, _, mean, rstd = kernels.add_norm(
                x, None, None, 0.0, weight, bias, len(shape), True, eps
            )
            return y, mean, rstd
        return torch.native_layer_norm(x, shape, weight, bias, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, ctx.shape, weight, bias, ctx.eps = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.save_for_forward(x, weight, bias, mean, rstd)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * 5
        x, weight, bias, mean, rstd = ctx.saved_tensors
        needs_x, _, needs_weight, needs_bias, _ = ctx.needs_input_grad
        if has_backward(grad_output, x):
            w = as_parameter(weight, x)
            of_x, of_weight, of_bias = kernels.layer_norm_backward(
                grad_output, x, as_sums(mean, x), as_sums(rstd, x), w, len(ctx.shape)
            )
            return (
                of_x if needs_x else None,
                None,
                of_dtype(of_weight, weight) if needs_weight else None,
                of_dtype(of_bias, bias) if needs_bias else None,
                None,
            )
        over, others = _over(x, ctx.shape), _others(x, ctx.shape)
        xhat, rstd = _normalised(x, mean, rstd, over, ctx.eps)
        g = wide(grad_output)
        through = g if weight is None else g * wide(weight)
        return (
            tangent(through, xhat, rstd, over).to(x.dtype) if needs_x else None,
            None,
            sum_over(g * xhat, others, weight) if needs_weight else None,
            sum_over(g, others, bias) if needs_bias else None,
            None,
        )

    @staticmethod
    def jvp(
        ctx: Any, tx: Tensor | None, _: Any, tw: Tensor | None, tb: Tensor | None, __: Any
    ) -> tuple[Tensor | None, None, None]:
        x, weight, _bias, _mean, _rstd = ctx.saved_tensors
        moments = Moments(wide(x), _over(x, ctx.shape), ctx.eps)
        xhat, t = moments.normalised, None
        if tx is not None:
            t = tangent(wide(tx), xhat, moments.rstd, moments.dims)
        return affine_jvp(x, t, xhat, weight, tw, tb), None, None

    @staticmethod
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        (x, shape, weight, bias, eps), (x0, _, weight0, _, _) = args, args0
        over, others = _over(x, shape), _others(x, shape)
        now, ref = Moments(x, over, eps), Moments(x0, over, eps)
        xhat = midpoint(now.normalised, ref.normalised)
        through = multiplier if weight is None else multiplier * midpoint(weight, weight0)
        return (
            secant(through, now, ref),
            None,
            None if weight is None else sum_over(multiplier * xhat, others, weight),
            None if bias is None else sum_over(multiplier, others, bias),
            None,
        )

    @classmethod
    def sample_factors(cls, grad_output: Tensor, args: tuple[Any, ...], output: Any) -> Factors:
        x, shape, weight, bias, eps = args
        xhat = cls.forward(x, shape, None, None, eps)[0]
        of_weight = None if weight is None else Rows(grad_output * xhat, shape, weight)
        of_bias = None if bias is None else Rows(grad_output, shape, bias)
        return None, None, of_weight, of_bias, None

    @classmethod
    def relevance(cls, relevance: Tensor, rule: Rule, args: tuple[Any, ...], output: Any) -> Shares:
        x, shape, weight, _bias, eps = args
        over = _over(x, shape)
        rstd = Moments(x, over, eps).rstd
        scale = rstd if weight is None else rstd * weight
        return shares(relevance, x, output[0], scale, over, rule), *(None,) * 4


def _normalised(
    x: Tensor, mean: Tensor, rstd: Tensor, over: tuple[int, ...], eps: float
) -> tuple[Tensor, Tensor]:
    """``x̂`` and ``r``: from the saved statistics, or anew where backward is differentiated."""
    x = wide(x)
    if torch.is_grad_enabled():  # the saved ones are constants to autograd
        moments = Moments(x, over, eps)
        return moments.normalised, moments.rstd
    rstd = wide(rstd)
    return (x - wide(mean)) * rstd, rstd


def _layer_samples(make: Maker) -> Iterator[Sample]:
    yield sample(make(3, 5), (5,), make(5), make(5))
    yield sample(make(2, 3, 4), (3, 4), make(3, 4), make(3, 4), eps=1e-3)
    yield sample(make(2, 3, 4), (4,))
    yield sample(make(2, 4), (4,), make(4))
    yield sample(make(0, 4), (4,), make(4), make(4))


@register(F.layer_norm, replaces=[torch.layer_norm], modules=[nn.LayerNorm], samples=_layer_samples)
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise the last dimensions, as :func:`torch.nn.functional.layer_norm`.

    Args:
        input: ``(*, *normalized_shape)``.
        normalized_shape: sizes of the dimensions to normalise over.
        weight: scale of that shape, or ``None``.
        bias: shift of that shape, or ``None``.
        eps: added to the variance.

    Returns:
        Shape of ``input``.

    Raises:
        RuntimeError: if the shapes do not fit.
    """
    return LayerNorm.call(input, tuple(normalized_shape), weight, bias, eps)[0]


class RMSNorm(Op):
    """``y = x r w`` with ``r = (mean(x²) + eps)^-½`` over the last dimensions.

    Backward: ``∂w = Σ g x r``, ``∂x = r (g w - x̂ mean(g w x̂))`` (Zhang & Sennrich 2019): that of
    :class:`LayerNorm` without the mean. Secant: likewise. LRP: handed on as it is, because a
    scale that counts as a constant is elementwise (Achtibat et al. 2024).

    From 1024 elements on a kernel computes forward in one pass, where torch makes several; its sums
    of squares differ from torch's in the last bits. Below, the output is torch's to the bit.
    """

    autocast = {"cuda": "fp32"}
    relevance = classmethod(passes)

    @staticmethod
    def forward(
        x: Tensor, shape: Sequence[int], weight: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor | None]:
        if x.numel() >= _ONE_PASS and can_normalise(x, shape, weight):
            dims = len(shape)
            y, _, _, rstd = kernels.add_norm(x, None, None, 0.0, weight, None, dims, False, eps)
            return y, rstd
        return torch.rms_norm(x, shape, weight, eps), None

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        x, ctx.shape, weight, ctx.eps = inputs
        _, rstd = output
        if rstd is not None:
            ctx.mark_non_differentiable(rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, rstd)
        ctx.save_for_forward(x, weight, rstd)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * 4
        x, weight, rstd = ctx.saved_tensors
        needs_x, _, needs_weight, _ = ctx.needs_input_grad
        if x.is_complex():  # the map has real coefficients: conj(f'(x)) = f'(conj(x))
            x, weight = x.conj(), None if weight is None else weight.conj()
        over = _over(x, ctx.shape)
        of_x = of_weight = None
        if has_backward(grad_output, x):
            if rstd is None:
                rstd = _root_mean_square(x, over, ctx.eps)
            of_x, of_weight, _of_bias = kernels.layer_norm_backward(
                grad_output, x, None, rstd, as_parameter(weight, x), len(over)
            )
            of_weight = of_dtype(of_weight, weight) if needs_weight else None
            return of_x if needs_x else None, None, of_weight, None
        moments = Moments(wide(x), over, ctx.eps, centre=False)
        xhat, g = moments.normalised, wide(grad_output)
        if needs_x:
            through = g if weight is None else g * wide(weight)
            of_x = tangent(through, xhat, moments.rstd, over, centre=False).to(x.dtype)
        if needs_weight:
            of_weight = sum_over(g * xhat, _others(x, ctx.shape), weight)
        return of_x, None, of_weight, None

    @staticmethod
    def jvp(
        ctx: Any, tx: Tensor | None, _: Any, tw: Tensor | None, __: Any
    ) -> tuple[Tensor | None, None]:
        x, weight, _rstd = ctx.saved_tensors
        moments = Moments(wide(x), _over(x, ctx.shape), ctx.eps, centre=False)
        xhat, t = moments.normalised, None
        if tx is not None:
            t = tangent(wide(tx), xhat, moments.rstd, moments.dims, centre=False)
        return affine_jvp(x, t, xhat, weight, tw, None), None

    @staticmethod
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        (x, shape, weight, eps), (x0, _, weight0, _) = args, args0
        now, ref = (Moments(t, _over(t, shape), eps, centre=False) for t in (x, x0))
        xhat = midpoint(now.normalised, ref.normalised)
        through = multiplier if weight is None else multiplier * midpoint(weight, weight0)
        of_weight = None
        if weight is not None:
            of_weight = sum_over(multiplier * xhat, _others(x, shape), weight)
        return secant(through, now, ref), None, of_weight, None

    @classmethod
    def sample_factors(cls, grad_output: Tensor, args: tuple[Any, ...], output: Any) -> Factors:
        x, shape, weight, eps = args
        xhat = cls.forward(x, shape, None, eps)[0]
        of_weight = None if weight is None else Rows(grad_output * xhat, shape, weight)
        return None, None, of_weight, None


def _root_mean_square(x: Tensor, over: tuple[int, ...], eps: float) -> Tensor:
    """``(mean(x²) + eps)^-½`` in one pass over ``x``."""
    dtype = sums_dtype(x)
    count = math.prod(x.shape[d] for d in over)
    norm = torch.linalg.vector_norm(x, dim=over, keepdim=True, dtype=dtype)
    return torch.rsqrt(norm.square() / max(count, 1) + eps)


def _rms_samples(make: Maker) -> Iterator[Sample]:
    yield sample(make(3, 5), (5,), make(5))
    yield sample(make(2, 3, 4), (3, 4), make(3, 4), eps=1e-3)
    yield sample(make(2, 3, 4), (4,))
    yield sample(make(0, 4), (4,), make(4))


@register(F.rms_norm, replaces=[torch.rms_norm], modules=[nn.RMSNorm], samples=_rms_samples)
def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """Divide by the root mean square, as :func:`torch.nn.functional.rms_norm`.

    Args:
        input: ``(*, *normalized_shape)``.
        normalized_shape: sizes of the dimensions to normalise over.
        weight: scale of that shape, or ``None``.
        eps: added to the mean of squares; ``None`` is the machine epsilon of the dtype that it is
            computed in, float32 for the half ones.

    Returns:
        Shape of ``input``.

    Raises:
        RuntimeError: if the shapes do not fit.
    """
    if eps is None:
        double = input.dtype in (torch.float64, torch.complex128)
        eps = torch.finfo(torch.float64 if double else torch.float32).eps
    return RMSNorm.call(input, tuple(normalized_shape), weight, eps)[0]
