"""Losses of a difference: absolute and squared error and what lies between."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchbp.ops.base import Op, midpoint, sum_to, wide
from torchbp.ops.loss import (
    FROM_THE_HEAD,
    Loss,
    check_reduction,
    legacy_reduction,
    mean_slope,
    onto,
    warn_of_broadcast,
)
from torchbp.ops.registry import Maker, Sample, register, sample


class DifferenceLoss(Loss):
    """``l = f(x - y)``: ``∂x = f'(x - y) = -∂y``, and likewise for the mean slopes.

    A subclass gives ``of_difference(v, e, *settings) = v f'(e)`` and
    ``mean_of_difference(e, e0, *settings)``, the mean slope of f.
    """

    @staticmethod
    def of_difference(v: Tensor, e: Tensor, *settings: Any) -> Tensor:
        """``v f'(e)``; e may be overwritten by :func:`onto`."""
        raise NotImplementedError

    @staticmethod
    def mean_of_difference(e: Tensor, e0: Tensor, *settings: Any) -> Tensor:
        """``(f(e) - f(e0)) / (e - e0)``."""
        raise NotImplementedError

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Turn functions of the difference into functions of the two tensors."""
        methods = {
            "slope": _slope(cls.of_difference),
            "average": _average(cls.mean_of_difference),
        }
        for name, method in methods.items():
            setattr(cls, name, staticmethod(method))
        super().__init_subclass__(**kwargs)


def _slope(of_difference: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def slope(i: int, v: Tensor, x: Tensor, y: Tensor, *settings: Any) -> Tensor:
        return of_difference(-v if i else v, x - y, *settings)

    return slope


def _average(mean_of_difference: Callable[..., Tensor]) -> Callable[..., Any]:
    def average(now: tuple[Any, ...], ref: tuple[Any, ...], *settings: Any) -> Any:
        m = mean_of_difference(now[0] - now[1], ref[0] - ref[1], *settings)
        return m, -m

    return average


class L1(DifferenceLoss):
    """``l = |e|``.  ``f' = sign(e)``."""

    @staticmethod
    def forward(x: Tensor, y: Tensor, reduction: str) -> Tensor:
        x, y = torch.broadcast_tensors(x, y)  # spares the second warning of unequal sizes
        return F.l1_loss(x, y, reduction=reduction)

    @staticmethod
    def of_difference(v: Tensor, e: Tensor) -> Tensor:
        return onto(onto(e, "sgn"), "mul", v)

    @staticmethod
    def mean_of_difference(e: Tensor, e0: Tensor) -> Tensor:
        return mean_slope(torch.abs, torch.sgn, e, e0, e.sgn() == e0.sgn())


class MSE(DifferenceLoss):
    """``l = e²``.  ``f' = 2 e``; the mean slope is ``e + e0``."""

    @staticmethod
    def forward(x: Tensor, y: Tensor, reduction: str) -> Tensor:
        x, y = torch.broadcast_tensors(x, y)
        return F.mse_loss(x, y, reduction=reduction)

    @staticmethod
    def of_difference(v: Tensor, e: Tensor) -> Tensor:
        return onto(e, "mul", 2 * v)

    @staticmethod
    def mean_of_difference(e: Tensor, e0: Tensor) -> Tensor:
        return e + e0


class Huber(DifferenceLoss):
    """``l = e² / 2`` where ``|e| < δ``, else ``δ (|e| - δ / 2)`` (Huber 1964).

    ``f' = min(max(e, -δ), δ)``.
    """

    @staticmethod
    def forward(x: Tensor, y: Tensor, delta: float, reduction: str) -> Tensor:
        x, y = torch.broadcast_tensors(x, y)
        return F.huber_loss(x, y, reduction=reduction, delta=delta)

    @staticmethod
    def of_difference(v: Tensor, e: Tensor, delta: float) -> Tensor:
        return onto(onto(e, "clamp", -delta, delta), "mul", v)

    @staticmethod
    def mean_of_difference(e: Tensor, e0: Tensor, delta: float) -> Tensor:
        def value(e: Tensor) -> Tensor:
            inside = e.clamp(-delta, delta)
            return inside * (e - inside / 2)

        def piece(e: Tensor) -> Tensor:
            return (e / delta).trunc().clamp(-1, 1)

        return mean_slope(value, lambda e: e.clamp(-delta, delta), e, e0, piece(e) == piece(e0))


class SmoothL1(DifferenceLoss):
    """``l = e² / 2β`` where ``|e| < β``, else ``|e| - β / 2`` (Girshick 2015).

    Huber's loss with ``δ = β``, over β.
    """

    @staticmethod
    def forward(x: Tensor, y: Tensor, beta: float, reduction: str) -> Tensor:
        x, y = torch.broadcast_tensors(x, y)
        return F.smooth_l1_loss(x, y, reduction=reduction, beta=beta)

    @staticmethod
    def of_difference(v: Tensor, e: Tensor, beta: float) -> Tensor:
        return onto(onto(e, "clamp", -beta, beta), "mul", v / beta)

    @staticmethod
    def mean_of_difference(e: Tensor, e0: Tensor, beta: float) -> Tensor:
        return Huber.mean_of_difference(e, e0, beta) / beta


class Weighted(Op):
    """``l_i w_i``, their sum, or their mean ``Σ l w / Σ w``.

    Backward: ``∂l = w``; ``∂w = l``, less the mean for the mean, all over ``Σ w``.
    Secant: the products ``l w`` and ``Σ l w · (1 / Σ w)`` by midpoints, ``Δ(1/D) = -ΔD / (D D0)``.
    """

    no_relevance = FROM_THE_HEAD

    @staticmethod
    def forward(terms: Tensor, weight: Tensor, reduction: str) -> Tensor:
        weighted = terms * weight
        if reduction == "none":
            return weighted
        return weighted.sum() / weight.sum() if reduction == "mean" else weighted.sum()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        terms, weight, ctx.reduction = inputs
        ctx.save_for_backward(terms, weight)
        ctx.save_for_forward(terms, weight)
        ctx.dtype = output.dtype

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        terms, weight = ctx.saved_tensors
        needs_terms, needs_weight, _ = ctx.needs_input_grad
        t, w, v = wide(terms), wide(weight), wide(grad_output)
        mean: Tensor | None = None
        if ctx.reduction == "mean":
            total = w.sum()
            mean, v = (t * w).sum() / total, v / total
        grad_weight = None
        if needs_weight:
            grad_weight = sum_to(t * v, weight.shape)
            grad_weight = grad_weight if mean is None else grad_weight - mean * v
            grad_weight = grad_weight.to(weight.dtype)
        grad_terms = (w * v).expand(terms.shape).to(terms.dtype) if needs_terms else None
        return grad_terms, grad_weight, None

    @staticmethod
    def jvp(ctx: Any, tt: Tensor, tw: Tensor, _: Any) -> Tensor:
        terms, weight = map(wide, ctx.saved_tensors)
        tangent = tt * weight + terms * tw
        if ctx.reduction == "none":
            return tangent.to(ctx.dtype)
        tangent = tangent.sum()
        if ctx.reduction == "mean":
            total = weight.sum()
            tangent = (tangent - (terms * weight).sum() / total * tw.sum()) / total
        return tangent.to(ctx.dtype)

    @staticmethod
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        (terms, weight, reduction), (terms0, weight0, _) = args, args0
        t, t0, w, w0 = map(wide, (terms, terms0, weight, weight0))
        m, m_total = wide(multiplier), None
        if reduction == "mean":
            total, total0 = w.sum(), w0.sum()
            m_total = -m * midpoint((t * w).sum(), (t0 * w0).sum()) / (total * total0)
            m = m * midpoint(1 / total, 1 / total0)
        m_terms = (m * midpoint(w, w0)).expand(terms.shape)
        m_weight = sum_to(m * midpoint(t, t0), weight.shape)
        m_weight = m_weight if m_total is None else m_weight + m_total
        return m_terms.to(terms.dtype), m_weight.to(weight.dtype), None


def _weighted(function: str, op: type[Loss], x: Tensor, y: Tensor, w: Tensor, *rest: Any) -> Tensor:
    *settings, reduction = rest
    if w.size() != x.size():
        raise ValueError(
            f"{function}: weight must have the shape of input, {tuple(x.shape)}, "
            f"got {tuple(w.shape)}"
        )
    check_reduction(function, reduction)
    return Weighted.call(op.call(x, y, *settings, "none"), w, reduction)


def _difference_samples(make: Maker) -> Iterator[Sample]:
    for reduction in ("none", "sum", "mean"):
        yield sample(make(3, 4), make(3, 4), reduction=reduction)
        weight = make.constant(3, 4, positive=True)
        yield sample(make(3, 4), make(3, 4), reduction=reduction, weight=weight)
    yield sample(make(3, 4), make(3, 4), weight=make(3, 4).detach().exp().requires_grad_())
    yield sample(make(3, 1), make(4), weight=make(3, 1).detach().exp().requires_grad_())
    yield sample(make(3, 1), make(4))
    yield sample(make(0, 4), make(0, 4), reduction="sum")


@register(F.l1_loss, modules=[nn.L1Loss], samples=_difference_samples)
def l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """Absolute error, as :func:`torch.nn.functional.l1_loss`.

    Args:
        input: any shape.
        target: shape of ``input``; other shapes broadcast, with torch's warning.
        size_average: superseded by ``reduction``.
        reduce: superseded by ``reduction``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        weight: shape of ``input``; the mean is then the weighted one.

    Returns:
        A scalar, or the absolute errors for ``reduction="none"``.

    Raises:
        ValueError: for a ``weight`` of another shape, or an unknown reduction.
    """
    reduction = legacy_reduction(size_average, reduce, reduction)
    warn_of_broadcast("l1_loss", input, target)
    if weight is None:
        return L1.call(input, target, reduction)
    return _weighted("l1_loss", L1, input, target, weight, reduction)


@register(F.mse_loss, modules=[nn.MSELoss], samples=_difference_samples)
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
    warn_of_broadcast("mse_loss", input, target)
    if weight is None:
        return MSE.call(input, target, reduction)
    return _weighted("mse_loss", MSE, input, target, weight, reduction)


def _smooth_samples(make: Maker) -> Iterator[Sample]:
    for reduction in ("none", "sum", "mean"):
        yield sample(make(3, 4), make(3, 4), reduction=reduction)
    yield sample(make(3, 4), make(3, 4), beta=0.3)
    yield sample(make(3, 4), make(3, 4), beta=0.0)
    yield sample(make(3, 1), make(4), beta=2.0)
    yield sample(make(0, 4), make(0, 4), reduction="sum")


@register(F.smooth_l1_loss, modules=[nn.SmoothL1Loss], samples=_smooth_samples)
def smooth_l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
) -> Tensor:
    """Absolute error, squared near zero, as :func:`torch.nn.functional.smooth_l1_loss`.

    Args:
        input: any shape.
        target: shape of ``input``; other shapes broadcast, with torch's warning.
        size_average: superseded by ``reduction``.
        reduce: superseded by ``reduction``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        beta: error where the square ends; zero gives the absolute error.

    Returns:
        A scalar, or the terms for ``reduction="none"``.

    Raises:
        RuntimeError: if ``beta`` is negative.
        ValueError: for an unknown reduction.
    """
    reduction = legacy_reduction(size_average, reduce, reduction)
    warn_of_broadcast("smooth_l1_loss", input, target)
    if beta == 0:
        return L1.call(input, target, reduction)
    return SmoothL1.call(input, target, beta, reduction)


def _huber_samples(make: Maker) -> Iterator[Sample]:
    for reduction in ("none", "sum", "mean"):
        yield sample(make(3, 4), make(3, 4), reduction=reduction, delta=0.7)
        weight = make.constant(3, 4, positive=True)
        yield sample(make(3, 4), make(3, 4), reduction=reduction, weight=weight)
    yield sample(make(3, 1), make(4), delta=2.0, weight=make(3, 1))
    yield sample(make(0, 4), make(0, 4), reduction="sum")


@register(F.huber_loss, modules=[nn.HuberLoss], samples=_huber_samples)
def huber_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
) -> Tensor:
    """Squared error, linear far from zero, as :func:`torch.nn.functional.huber_loss`.

    Args:
        input: any shape.
        target: shape of ``input``; other shapes broadcast, with torch's warning.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        delta: error where the square ends.
        weight: shape of ``input``; the mean still divides by the number of terms.

    Returns:
        A scalar, or the terms for ``reduction="none"``.

    Raises:
        RuntimeError: if ``delta`` is not positive.
        ValueError: for a ``weight`` of another shape, or an unknown reduction.
    """
    reduction = legacy_reduction(None, None, reduction)
    warn_of_broadcast("huber_loss", input, target)
    if weight is None:
        return Huber.call(input, target, delta, reduction)
    if reduction != "mean":
        return _weighted("huber_loss", Huber, input, target, weight, delta, reduction)
    return _weighted("huber_loss", Huber, input, target, weight, delta, "none").mean()
