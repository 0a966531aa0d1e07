"""Losses of binary decisions: cross-entropy on probabilities and on logits, soft margins."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchbp.ops.base import midpoint
from torchbp.ops.loss import Loss, check_reduction, legacy_reduction, onto, refuse_gradient
from torchbp.ops.registry import Maker, Sample, register, sample
from torchbp.ops.softmax import log_mean

_LEAST_LOG = -100.0  # where torch cuts off the logarithms of a probability
# And p (1 - p) in the derivative; its constant is the float next to 1e-12.
_LEAST_VARIANCE = 9.999999960041972e-13


class BCE(Loss):
    """``l = -w (y log x + (1 - y) log(1 - x))``, with the logarithms cut off at -100.

    Backward: ``∂x = w (x - y) / (x (1 - x))``; ``∂y = w (log(1 - x) - log x)``.
    Secant: the products by midpoints; the mean slope of the logarithm is one over the logarithmic
    mean.
    """

    autocast = {"cpu": "fp32"}
    tensors = 3

    @staticmethod
    def forward(x: Tensor, y: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
        return F.binary_cross_entropy(x, y, weight, reduction=reduction)

    @staticmethod
    def slope(i: int, v: Tensor, x: Tensor, y: Tensor, weight: Tensor | None) -> Tensor | None:
        v = _weighted(v, weight)
        if i == 0:
            return onto(onto(x - y, "mul", v), "div", _variance(x))
        return (_log(1 - x) - _log(x)) * v if i == 1 else None

    @staticmethod
    def average(now: tuple[Any, ...], ref: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
        (x, y, weight), (x0, y0, _) = now, ref
        mid = midpoint(y, y0)
        m_x = (1 - mid) * _mean_slope_of_log(1 - x, 1 - x0) - mid * _mean_slope_of_log(x, x0)
        m_y = midpoint(_log(1 - x) - _log(x), _log(1 - x0) - _log(x0))
        m_x = torch.where(x == x0, (x - mid) / _variance(x), m_x)
        return _weighted(m_x, weight), _weighted(m_y, weight), None


def _variance(p: Tensor) -> Tensor:
    return onto(onto(1 - p, "mul", p), "clamp", _LEAST_VARIANCE)


def _log(p: Tensor) -> Tensor:
    return p.log().clamp(min=_LEAST_LOG)


def _mean_slope_of_log(p: Tensor, p0: Tensor) -> Tensor:
    return 1 / log_mean(_log(p), _log(p0)).clamp(min=torch.finfo(p.dtype).tiny)


class BCEWithLogits(Loss):
    """``l = w ((1 - y) z + (1 + (P - 1) y) softplus(-z))`` with the positive weight ``P``.

    Backward: ``∂z = w ((1 - y) - (1 + (P - 1) y) σ(-z))``;
    ``∂y = w ((P - 1) softplus(-z) - z)``.
    Secant: ``softplus`` by its divided difference, the products by midpoints. The divided
    difference is a two-class Sato-Vartia weight, accurate for all gaps.
    """

    tensors = 4

    @staticmethod
    def forward(
        z: Tensor, y: Tensor, weight: Tensor | None, pos_weight: Tensor | None, reduction: str
    ) -> Tensor:
        return F.binary_cross_entropy_with_logits(
            z, y, weight, reduction=reduction, pos_weight=pos_weight
        )

    @staticmethod
    def slope(
        i: int, v: Tensor, z: Tensor, y: Tensor, weight: Tensor | None, pos_weight: Tensor | None
    ) -> Tensor | None:
        v = _weighted(v, weight)
        if i == 0 and pos_weight is None:
            return onto(onto(z.sigmoid(), "sub", y), "mul", v)
        if i == 0:
            return ((1 - y) - _positive(y, pos_weight) * torch.sigmoid(-z)) * v
        if i == 1:
            slope = -z if pos_weight is None else (pos_weight - 1) * _softplus_of_minus(z) - z
            return slope * v
        return None

    @staticmethod
    def average(now: tuple[Any, ...], ref: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
        (z, y, weight, pos_weight), (z0, y0, *_) = now, ref
        y_mid, z_mid = midpoint(y, y0), midpoint(z, z0)
        drop = 1 - _softplus_quotient(z, z0)  # of softplus(-z), per unit of z
        m_z = (1 - y_mid) - _positive(y_mid, pos_weight) * drop
        m_y = -z_mid
        if pos_weight is not None:
            rise = midpoint(_softplus_of_minus(z), _softplus_of_minus(z0))
            m_y = m_y + (pos_weight - 1) * rise
        return _weighted(m_z, weight), _weighted(m_y, weight), None, None


def _weighted(values: Tensor, weight: Tensor | None) -> Tensor:
    return values if weight is None else values * weight


def _positive(y: Tensor, pos_weight: Tensor | None) -> Tensor | int:
    return 1 if pos_weight is None else 1 + (pos_weight - 1) * y


def _softplus_of_minus(z: Tensor) -> Tensor:
    # F.softplus is the identity beyond 20, which costs half of float64's digits there.
    return -F.logsigmoid(z)


def _softplus_quotient(z: Tensor, z0: Tensor) -> Tensor:
    """``(softplus(z) - softplus(z0)) / (z - z0)``: the Sato-Vartia weight of logits (z, 0)."""
    on = log_mean(F.logsigmoid(z), F.logsigmoid(z0))
    off = log_mean(F.logsigmoid(-z), F.logsigmoid(-z0))
    return on / (on + off)


class SoftMargin(Loss):
    """``l = log(1 + exp(-y z))``, a softplus of ``-y z``.

    Backward: ``∂z = -y σ(-y z)``. Secant: the divided difference of the softplus.
    """

    @staticmethod
    def forward(z: Tensor, y: Tensor, reduction: str) -> Tensor:
        return F.soft_margin_loss(z, y, reduction=reduction)

    @staticmethod
    def slope(i: int, v: Tensor, z: Tensor, y: Tensor) -> Tensor | None:
        return -y * torch.sigmoid(-y * z) * v if i == 0 else None

    @staticmethod
    def average(now: tuple[Any, ...], ref: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
        (z, y), (z0, _) = now, ref
        return -y * _softplus_quotient(-y * z, -y * z0), None


class MultiLabelSoftMargin(Loss):
    """``l_n = Σ_c w_c (softplus(z_nc) - y_nc z_nc) / C``.

    Backward: ``∂z = w (σ(z) - y) / C``; ``∂y = -w z / C``; ``∂w = (softplus(z) - y z) / C``.
    Secant: the divided difference of the softplus, the products by midpoints.
    """

    autocast = {"cuda": "fp32"}
    tensors, by_row = 3, True

    @staticmethod
    def forward(z: Tensor, y: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
        return F.multilabel_soft_margin_loss(z, y, weight, reduction=reduction)

    @staticmethod
    def slope(i: int, v: Tensor, z: Tensor, y: Tensor, weight: Tensor | None) -> Tensor:
        v = v / max(z.shape[-1], 1)
        if i == 2:
            return (_softplus_of_minus(-z) - y * z) * v
        return (z.sigmoid() - y if i == 0 else -z) * _weighted(v, weight)

    @staticmethod
    def average(now: tuple[Any, ...], ref: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
        (z, y, weight), (z0, y0, weight0) = now, ref
        count = max(z.shape[-1], 1)
        m_z = (_softplus_quotient(z, z0) - midpoint(y, y0)) / count
        m_y = -midpoint(z, z0) / count
        if weight is None:
            return m_z, m_y
        terms, terms0 = _softplus_of_minus(-z) - y * z, _softplus_of_minus(-z0) - y0 * z0
        w = midpoint(weight, weight0)
        return m_z * w, m_y * w, midpoint(terms, terms0) / count


def _bce_samples(make: Maker) -> Iterator[Sample]:
    def probability(*shape: int) -> Tensor:
        # Small ones: a variation of them must not exceed one either.
        return (make(*shape).detach().sigmoid() / 5).requires_grad_(make.requires_grad)

    for reduction in ("none", "sum", "mean"):
        yield sample(probability(3, 4), probability(3, 4), reduction=reduction)
        weight = make.constant(4, positive=True)
        yield sample(probability(3, 4), probability(3, 4), weight, reduction=reduction)
    yield sample(probability(2, 3), make.constant(2, 3).sigmoid().round())
    yield sample(probability(0, 4), probability(0, 4), reduction="sum")


@register(F.binary_cross_entropy, modules=[nn.BCELoss], samples=_bce_samples)
def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Binary cross-entropy, as :func:`torch.nn.functional.binary_cross_entropy`.

    Args:
        input: probabilities, any shape.
        target: probabilities, shape of ``input``.
        weight: factor of every term, broadcastable to ``input``; not differentiable.
        size_average: superseded by ``reduction``.
        reduce: superseded by ``reduction``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    Returns:
        A scalar, or the terms for ``reduction="none"``.

    Raises:
        ValueError: if ``target`` and ``input`` differ in size.
        RuntimeError: if a probability is not in [0, 1], if ``weight`` requires a gradient, and
            under autocast on CUDA, where torch takes logits only.
    """
    refuse_gradient("binary_cross_entropy", "weight", weight)
    reduction = legacy_reduction(size_average, reduce, reduction)
    if input.is_cuda and torch.is_autocast_enabled("cuda"):
        return F.binary_cross_entropy(input, target, weight, reduction=reduction)
    return BCE.call(input, target, weight, reduction)


def _logits_samples(make: Maker) -> Iterator[Sample]:
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


@register(
    F.binary_cross_entropy_with_logits,
    replaces=[torch.binary_cross_entropy_with_logits],
    modules=[nn.BCEWithLogitsLoss],
    samples=_logits_samples,
)
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


def _soft_samples(make: Maker) -> Iterator[Sample]:
    for reduction in ("none", "sum", "mean"):
        yield sample(make(3, 4), make.constant(3, 4).sign(), reduction=reduction)
    yield sample(make(3, 4), make.constant(4))
    yield sample(make(0, 4), make.constant(0, 4), reduction="sum")


@register(F.soft_margin_loss, modules=[nn.SoftMarginLoss], samples=_soft_samples)
def soft_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """``log(1 + exp(-target input))``, as :func:`torch.nn.functional.soft_margin_loss`.

    Args:
        input: any shape.
        target: shape of ``input``, -1 or 1; not differentiable.
        size_average: superseded by ``reduction``.
        reduce: superseded by ``reduction``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    Returns:
        A scalar, or the terms for ``reduction="none"``.

    Raises:
        RuntimeError: if ``target`` requires a gradient, or if the shapes do not fit.
    """
    refuse_gradient("soft_margin_loss", "target", target)
    reduction = legacy_reduction(size_average, reduce, reduction)
    return SoftMargin.call(input, target, reduction)


def _multilabel_samples(make: Maker) -> Iterator[Sample]:
    for reduction in ("none", "sum", "mean"):
        yield sample(make(3, 4), make(3, 4), reduction=reduction)
        yield sample(make(3, 4), make.constant(3, 4), make(4), reduction=reduction)
    yield sample(make(4), make(4))
    yield sample(make(0, 4), make(0, 4), reduction="sum")


@register(
    F.multilabel_soft_margin_loss,
    modules=[nn.MultiLabelSoftMarginLoss],
    samples=_multilabel_samples,
)
def multilabel_soft_margin_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Mean binary cross-entropy of the classes of every row.

    As :func:`torch.nn.functional.multilabel_soft_margin_loss`.

    Args:
        input: logits ``(*, C)``.
        target: shape of ``input``, zero or one.
        weight: ``(C,)``, a factor of each class.
        size_average: superseded by ``reduction``.
        reduce: superseded by ``reduction``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    Returns:
        A scalar, or the row losses ``(*)`` for ``reduction="none"``.

    Raises:
        ValueError: for an unknown reduction.
    """
    if size_average is None and reduce is None:
        check_reduction("multilabel_soft_margin_loss", reduction)
    reduction = legacy_reduction(size_average, reduce, reduction)
    return MultiLabelSoftMargin.call(input, target, weight, reduction)
