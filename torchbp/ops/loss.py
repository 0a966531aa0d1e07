"""Losses: squared error and binary cross-entropy on logits; cross-entropy has its own file.

Every loss is an elementwise (or row) loss followed by a reduction. The backward passes and the
secants give the multipliers of the former, scaled by what the reduction lets through.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchbp.ops.base import Op, midpoint, sum_to, wide
from torchbp.ops.cross_entropy import (
    CrossEntropy,
    cross_entropy,
    legacy_reduction,
    refuse_gradient,
)
from torchbp.ops.registry import Maker, Sample, register, sample
from torchbp.ops.softmax import log_mean

__all__ = [
    "MSE",
    "BCEWithLogits",
    "CrossEntropy",
    "WeightedMSE",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "mse_loss",
]


class MSE(Op):
    """``l_i = (x_i - y_i)²``, with broadcasting.

    Backward: ``∂x = 2 (x - y) = -∂y``.
    Secant: ``Δe² = (e + e0) Δe``, the derivative at the midpoint.
    """

    autocast = {"cpu": "fp32", "cuda": "fp32"}

    @staticmethod
    def forward(x: Tensor, y: Tensor, reduction: str) -> Tensor:
        x, y = torch.broadcast_tensors(x, y)  # spares the second warning of unequal sizes
        return F.mse_loss(x, y, reduction=reduction)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, y, ctx.reduction = inputs
        ctx.save_for_backward(x, y)
        ctx.save_for_forward(x, y)
        ctx.dtype = output.dtype

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, y = ctx.saved_tensors
        error = wide(x) - wide(y)
        grad = error * (2 * _per_element(grad_output, error, ctx.reduction))
        needs_x, needs_y, _ = ctx.needs_input_grad
        return (
            sum_to(grad, x.shape).to(x.dtype) if needs_x else None,
            sum_to(-grad, y.shape).to(y.dtype) if needs_y else None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, tx: Tensor, ty: Tensor, _: Any) -> Tensor:
        x, y = ctx.saved_tensors
        return _reduce(2 * (wide(x) - wide(y)) * (tx - ty), ctx.reduction).to(ctx.dtype)

    @staticmethod
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        (x, y, reduction), (x0, y0, _) = args, args0
        error = (wide(x) - wide(y)) + (wide(x0) - wide(y0))
        m = error * _per_element(multiplier, error, reduction)
        return sum_to(m, x.shape).to(x.dtype), sum_to(-m, y.shape).to(y.dtype), None


class WeightedMSE(Op):
    """``l_i = w_i (x_i - y_i)²``; the mean divides by ``Σ w``.

    Backward: ``∂x = 2 w (x - y) = -∂y``; ``∂w = (x - y)²``, less the mean loss for the mean, all
    over ``Σ w``.
    Secant: the products ``w e²`` and ``N · (1 / Σ w)`` by midpoints, ``e²`` as in :class:`MSE`,
    ``Δ(1/D) = -ΔD / (D D0)``.
    """

    @staticmethod
    def forward(x: Tensor, y: Tensor, weight: Tensor, reduction: str) -> Tensor:
        # Not F.mse_loss, which would warn again of what may broadcast.
        terms = torch.pow(x - y, 2) * weight
        if reduction == "none":
            return terms
        return terms.sum() / weight.sum() if reduction == "mean" else terms.sum()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, y, weight, ctx.reduction = inputs
        ctx.save_for_backward(x, y, weight)
        ctx.save_for_forward(x, y, weight)
        ctx.dtype = output.dtype

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, y, weight = ctx.saved_tensors
        error, w, scale = wide(x) - wide(y), wide(weight), wide(grad_output)
        total = loss = None
        if ctx.reduction == "mean":
            total = w.sum()
            loss, scale = (w * error.square()).sum() / total, scale / total
        grad = 2 * error * w * scale
        grad_weight = sum_to(error.square() * scale, weight.shape)
        if loss is not None:
            grad_weight = grad_weight - loss * scale
        return (
            sum_to(grad, x.shape).to(x.dtype),
            sum_to(-grad, y.shape).to(y.dtype),
            grad_weight.to(weight.dtype),
            None,
        )

    @staticmethod
    def jvp(ctx: Any, tx: Tensor, ty: Tensor, tw: Tensor, _: Any) -> Tensor:
        x, y, weight = ctx.saved_tensors
        error, w = wide(x) - wide(y), wide(weight)
        tangent = 2 * w * error * (tx - ty) + tw * error.square()
        if ctx.reduction == "none":
            return tangent.to(ctx.dtype)
        tangent = tangent.sum()
        if ctx.reduction == "mean":
            total = w.sum()
            tangent = (tangent - (w * error.square()).sum() / total * tw.sum()) / total
        return tangent.to(ctx.dtype)

    @staticmethod
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        (x, y, weight, reduction), (x0, y0, weight0, _) = args, args0
        error, error0 = wide(x) - wide(y), wide(x0) - wide(y0)
        w, w0, m = wide(weight), wide(weight0), wide(multiplier)
        square, square0 = error.square(), error0.square()
        m_total: Tensor | int = 0
        if reduction == "mean":
            total, total0 = w.sum(), w0.sum()
            loss_sum = midpoint((w * square).sum(), (w0 * square0).sum())
            m_total = -m * loss_sum / (total * total0)
            m = m * midpoint(1 / total, 1 / total0)
        m_x = m * midpoint(w, w0) * (error + error0)
        m_w = sum_to(m * midpoint(square, square0), weight.shape) + m_total
        return (
            sum_to(m_x, x.shape).to(x.dtype),
            sum_to(-m_x, y.shape).to(y.dtype),
            m_w.to(weight.dtype),
            None,
        )


def _per_element(multiplier: Tensor, elements: Tensor, reduction: str) -> Tensor:
    multiplier = wide(multiplier)
    return multiplier / elements.numel() if reduction == "mean" else multiplier


def _reduce(elements: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return elements
    return elements.mean() if reduction == "mean" else elements.sum()


def _mse_samples(make: Maker) -> Iterator[Sample]:
    for reduction in ("none", "sum", "mean"):
        yield sample(make(3, 4), make(3, 4), reduction=reduction)
        weight = make.constant(3, 4, positive=True)
        yield sample(make(3, 4), make(3, 4), reduction=reduction, weight=weight)
    yield sample(make(3, 4), make(3, 4), weight=make(3, 4).detach().exp().requires_grad_())
    yield sample(make(3, 1), make(4), weight=make(3, 1).detach().exp().requires_grad_())
    yield sample(make(3, 1), make(4))
    yield sample(make(0, 4), make(0, 4), reduction="sum")


@register(F.mse_loss, modules=[nn.MSELoss], samples=_mse_samples)
def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """Squared error, as :func:`torch.nn.functional.mse_loss`.

    Args:
        input: any shape.
        target: shape of ``input``; other shapes broadcast, with torch's warning.
        size_average: superseded by ``reduction``.
        reduce: superseded by ``reduction``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        weight: shape of ``input``; the mean is then the weighted one.

    Returns:
        A scalar, or the squared errors for ``reduction="none"``.

    Raises:
        ValueError: for a ``weight`` of another shape, or an unknown reduction.
    """
    reduction = legacy_reduction(size_average, reduce, reduction)
    if target.size() != input.size() and not torch.compiler.is_compiling():
        warnings.warn(
            f"mse_loss: target is {tuple(target.shape)}, input {tuple(input.shape)}; they will be "
            "broadcast against each other, which is seldom meant",
            stacklevel=2,
        )
    if weight is None:
        return MSE.call(input, target, reduction)
    if weight.size() != input.size():
        raise ValueError(
            f"mse_loss: weight must have the shape of input, {tuple(input.shape)}, "
            f"got {tuple(weight.shape)}"
        )
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"mse_loss: reduction must be none, mean or sum, got {reduction!r}")
    return WeightedMSE.call(input, target, weight, reduction)


class BCEWithLogits(Op):
    """``l = w ((1 - y) z + (1 + (P - 1) y) softplus(-z))`` with the positive weight ``P``.

    Backward: ``∂z = w ((1 - y) - (1 + (P - 1) y) σ(-z))``;
    ``∂y = w ((P - 1) softplus(-z) - z)``.
    Secant: ``softplus`` by its divided difference, the products by midpoints. The divided
    difference is a two-class Sato-Vartia weight, accurate for all gaps.
    """

    autocast = {"cpu": "fp32", "cuda": "fp32"}

    @staticmethod
    def forward(
        z: Tensor, y: Tensor, weight: Tensor | None, pos_weight: Tensor | None, reduction: str
    ) -> Tensor:
        return F.binary_cross_entropy_with_logits(
            z, y, weight, reduction=reduction, pos_weight=pos_weight
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.reduction = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.dtype = output.dtype

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        z, y, weight, pos_weight = ctx.saved_tensors
        grad = _weighted(_per_element(grad_output, z, ctx.reduction), weight)
        needs_z, needs_y, *_ = ctx.needs_input_grad
        return (
            (grad * _bce_slope(z, y, pos_weight)).to(z.dtype) if needs_z else None,
            (grad * _bce_target_slope(z, pos_weight)).to(y.dtype) if needs_y else None,
            *(None, None, None),
        )

    @staticmethod
    def jvp(ctx: Any, tz: Tensor, ty: Tensor, *_: Any) -> Tensor:
        z, y, weight, pos_weight = ctx.saved_tensors
        tangent = tz * _bce_slope(z, y, pos_weight) + ty * _bce_target_slope(z, pos_weight)
        return _reduce(_weighted(tangent, weight), ctx.reduction).to(ctx.dtype)

    @staticmethod
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        (z, y, weight, pos_weight, reduction), (z0, y0, *_) = args, args0
        m = _weighted(_per_element(multiplier, z, reduction), weight)
        y_mid, z_mid = midpoint(wide(y), wide(y0)), midpoint(wide(z), wide(z0))
        drop = 1 - _softplus_quotient(wide(z), wide(z0))  # of softplus(-z), per unit of z
        m_z = m * ((1 - y_mid) - _positive(y_mid, pos_weight) * drop)
        m_y = -z_mid
        if pos_weight is not None:
            m_y = m_y + (pos_weight - 1) * midpoint(
                _softplus_of_minus(wide(z)), _softplus_of_minus(wide(z0))
            )
        return m_z.to(z.dtype), (m * m_y).to(y.dtype), None, None, None


def _weighted(values: Tensor, weight: Tensor | None) -> Tensor:
    return values if weight is None else values * weight


def _positive(y: Tensor, pos_weight: Tensor | None) -> Tensor | int:
    return 1 if pos_weight is None else 1 + (pos_weight - 1) * y


def _bce_slope(z: Tensor, y: Tensor, pos_weight: Tensor | None) -> Tensor:
    z, y = wide(z), wide(y)
    return (1 - y) - _positive(y, pos_weight) * torch.sigmoid(-z)


def _bce_target_slope(z: Tensor, pos_weight: Tensor | None) -> Tensor:
    z = wide(z)
    return -z if pos_weight is None else (pos_weight - 1) * _softplus_of_minus(z) - z


def _softplus_of_minus(z: Tensor) -> Tensor:
    # F.softplus is the identity beyond 20, which costs half of float64's digits there.
    return -F.logsigmoid(z)


def _softplus_quotient(z: Tensor, z0: Tensor) -> Tensor:
    """``(softplus(z) - softplus(z0)) / (z - z0)``: the Sato-Vartia weight of logits (z, 0)."""
    on = log_mean(F.logsigmoid(z), F.logsigmoid(z0))
    off = log_mean(F.logsigmoid(-z), F.logsigmoid(-z0))
    return on / (on + off)


def _bce_samples(make: Maker) -> Iterator[Sample]:
    for reduction in ("none", "sum", "mean"):
        yield sample(make(3, 4), make(3, 4), reduction=reduction)
        yield sample(
            make(3, 4),
            make(3, 4),
            make.constant(4, positive=True),
            reduction=reduction,
            pos_weight=make.constant(3, 1, positive=True),
        )
    yield sample(make(2, 3), make.constant(2, 3), pos_weight=make.constant(3, positive=True))
    yield sample(make(0, 4), make(0, 4), reduction="sum")


@register(F.binary_cross_entropy_with_logits, modules=[nn.BCEWithLogitsLoss], samples=_bce_samples)
def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    """Binary cross-entropy on logits, as torch.nn.functional.binary_cross_entropy_with_logits.

    Args:
        input: logits, any shape.
        target: probabilities, shape of ``input``.
        weight: factor of every term, broadcastable to ``input``; not differentiable.
        size_average: superseded by ``reduction``.
        reduce: superseded by ``reduction``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        pos_weight: factor of the positive part, broadcastable to ``input``; not differentiable.

    Returns:
        A scalar, or the terms for ``reduction="none"``.

    Raises:
        ValueError: if ``target`` and ``input`` differ in size.
        RuntimeError: if ``weight`` or ``pos_weight`` requires a gradient.
    """
    refuse_gradient("binary_cross_entropy_with_logits", "weight", weight)
    refuse_gradient("binary_cross_entropy_with_logits", "pos_weight", pos_weight)
    reduction = legacy_reduction(size_average, reduce, reduction)
    return BCEWithLogits.call(input, target, weight, pos_weight, reduction)
