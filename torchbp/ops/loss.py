"""Losses: cross-entropy, squared error and binary cross-entropy on logits.

Every loss is a row loss ``l_n`` followed by a reduction. The backward passes and the secants give
the multipliers of ``l_n`` and scale them by what the reduction lets through to row ``n``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import _reduction

from torchbp.ops.base import Op, add_tangents, midpoint, sum_to
from torchbp.ops.registry import Maker, Sample, register, sample
from torchbp.ops.softmax import log_mean, sato_vartia, wide


class CrossEntropy(Op):
    """``l_n = -Σ_c T_nc log softmax(z_n)_c`` with the effective targets ``T``.

    Class indices ``y``: ``T_nc = w_c ((1 - ε) [c = y_n] + ε / C)``, zero rows where ignored; the
    mean divides by ``Σ w_{y_n}``. Probabilities ``t``: ``T = w ((1 - ε) t + ε / C)``; the mean
    divides by the number of rows. ``ε`` is the label smoothing (Szegedy et al. 2016).

    Backward: ``∂z = p ΣT - T`` with ``p = softmax(z)``; ``∂t = -(1 - ε) w log p``;
    ``∂w = -Σ_n ((1 - ε) t + ε / C) log p``.
    Secant: ``m_z = q ΣT - T`` with the Sato-Vartia distribution ``q`` in place of ``p``; where
    targets or weights differ between the runs, the products ``w · t · log p`` are split by
    midpoints, one pair after the other.
    """

    autocast = {"cpu": "fp32", "cuda": "fp32"}

    @staticmethod
    def forward(
        z: Tensor,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        reduction: str,
        smoothing: float,
    ) -> Tensor:
        return F.cross_entropy(
            z,
            target,
            weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=smoothing,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        z, target, weight, *ctx.options = inputs
        ctx.save_for_backward(z, target, weight)
        ctx.save_for_forward(z, target, weight)
        ctx.dtype = output.dtype

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        z, target, weight = ctx.saved_tensors
        ignore, reduction, smoothing = ctx.options
        scale = _row_scale(grad_output, z, target, weight, ignore, reduction)
        needs_z, needs_target, needs_weight, *_ = ctx.needs_input_grad
        grad_z = grad_target = grad_weight = None
        if needs_z:
            p = wide(z).softmax(_classes(z))
            grad_z = (_residual(p, target, weight, ignore, smoothing) * scale).to(z.dtype)
        if needs_target or needs_weight:
            error = -wide(z).log_softmax(_classes(z)) * scale
            if needs_target:
                weighted = error if weight is None else error * _per_class(weight, z)
                grad_target = (weighted * (1 - smoothing)).to(target.dtype)
            if needs_weight:
                smooth = _smooth(target, smoothing)
                grad_weight = _sum_to_classes(error * smooth).to(weight.dtype)
        return grad_z, grad_target, grad_weight, None, None, None

    @staticmethod
    def jvp(ctx: Any, tz: Tensor | None, tt: Tensor | None, tw: Tensor | None, *_: Any) -> Tensor:
        z, target, weight = ctx.saved_tensors
        ignore, reduction, smoothing = ctx.options
        dim = _classes(z)
        rows = []
        if tz is not None:
            p = wide(z).softmax(dim)
            rows.append((_residual(p, target, weight, ignore, smoothing) * tz).sum(dim))
        if target.is_floating_point() and (tt is not None or tw is not None):
            error = -wide(z).log_softmax(dim)
            if tt is not None:
                weighted = error if weight is None else error * _per_class(weight, z)
                rows.append((weighted * tt).sum(dim) * (1 - smoothing))
            if tw is not None:
                rows.append((error * _smooth(target, smoothing) * _per_class(tw, z)).sum(dim))
        row = sum(rows[1:], rows[0])
        if reduction == "mean":
            row = row.sum() / _row_count(z, target, weight, ignore)
        return (row.sum() if reduction == "sum" else row).to(ctx.dtype)

    @staticmethod
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        z, target, weight, ignore, reduction, smoothing = args
        z0, target0, weight0, *_ = args0
        dim = _classes(z)
        scale = _row_scale(multiplier, z, target, weight, ignore, reduction)
        q = sato_vartia(z, z0, dim)
        if not target.is_floating_point():
            m_z = _residual(q, target, weight, ignore, smoothing) * scale
            return m_z.to(z.dtype), None, None, None, None, None
        smooth, smooth0 = _smooth(target, smoothing), _smooth(target0, smoothing)
        error = midpoint(-wide(z).log_softmax(dim), -wide(z0).log_softmax(dim)) * scale
        m_target, m_weight, effective = error * (1 - smoothing), None, midpoint(smooth, smooth0)
        if weight is not None:
            m_target = m_target * _per_class(midpoint(weight, weight0), z)
            m_weight = _sum_to_classes(error * effective).to(weight.dtype)
            effective = midpoint(
                smooth * _per_class(weight, z), smooth0 * _per_class(weight0, z)
            )
        m_z = (q * effective.sum(dim, keepdim=True) - effective) * scale
        return m_z.to(z.dtype), m_target.to(target.dtype), m_weight, None, None, None


def _classes(z: Tensor) -> int:
    return 1 if z.dim() > 1 else 0


def _per_class(weight: Tensor, z: Tensor) -> Tensor:
    return weight.reshape(weight.shape[0], *[1] * (z.dim() - _classes(z) - 1))


def _sum_to_classes(values: Tensor) -> Tensor:
    # A list of no dimensions would sum over all of them.
    others = [d for d in range(values.dim()) if d != _classes(values)]
    return values.sum(others) if others else values


def _smooth(target: Tensor, smoothing: float) -> Tensor:
    target = wide(target)
    return target * (1 - smoothing) + smoothing / target.shape[_classes(target)]


def _rows(
    target: Tensor, weight: Tensor | None, ignore: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Per row of index targets: 1 if it is kept, a valid index, and the weight of its class."""
    kept = (target != ignore).to(dtype)
    index = torch.where(target == ignore, 0, target)
    return kept, index, kept if weight is None else weight[index] * kept


def _residual(
    p: Tensor, target: Tensor, weight: Tensor | None, ignore: int, smoothing: float
) -> Tensor:
    """``p ΣT - T`` without forming ``T`` for index targets."""
    dim = _classes(p)
    if target.is_floating_point():
        smooth = _smooth(target, smoothing)
        effective = smooth if weight is None else smooth * _per_class(weight, p)
        return p * effective.sum(dim, keepdim=True) - effective
    kept, index, row_weight = _rows(target, weight, ignore, p.dtype)
    hit = row_weight * (1 - smoothing)
    total = hit
    if smoothing:
        share = smoothing / p.shape[dim]
        total = hit + kept * share * (p.shape[dim] if weight is None else weight.sum())
    residual = p * total.unsqueeze(dim)
    if smoothing:
        spread = kept.unsqueeze(dim) * share
        residual = residual - (spread if weight is None else spread * _per_class(weight, p))
    return residual.scatter_add(dim, index.unsqueeze(dim), -hit.unsqueeze(dim))


def _row_count(z: Tensor, target: Tensor, weight: Tensor | None, ignore: int) -> Tensor | int:
    """What the mean divides by."""
    if target.is_floating_point():
        return math.prod(z.shape[:1] + z.shape[2:]) if z.dim() > 1 else 1
    dtype = torch.promote_types(z.dtype, torch.float32)
    total = _rows(target, weight, ignore, dtype)[2].sum()
    # Nothing kept: the loss is nan, yet torch's gradients are zero, not nan.
    return torch.where(total == 0, 1, total)


def _row_scale(
    multiplier: Tensor,
    z: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore: int,
    reduction: str,
) -> Tensor:
    """The multiplier of every row loss, ready to broadcast against ``z``."""
    multiplier = wide(multiplier)
    if reduction == "none":
        return multiplier.unsqueeze(_classes(z))
    if reduction == "mean":
        return multiplier / _row_count(z, target, weight, ignore)
    return multiplier


def _cross_entropy_samples(make: Maker) -> Iterator[Sample]:
    yield sample(make(4, 3), make.integers(3, 4))
    yield sample(make(3), make.integers(3), label_smoothing=0.2)
    ignoring = torch.tensor([[1, 0], [2, 1]], device=make.device)
    weight = make.constant(3, positive=True)
    for reduction in ("none", "sum", "mean"):
        yield sample(
            make(2, 3, 2),
            ignoring,
            weight,
            ignore_index=1,
            reduction=reduction,
            label_smoothing=0.1,
        )
    yield sample(make(2, 3, 2), make(2, 3, 2), make(3), label_smoothing=0.1)
    yield sample(make(2, 3), make(2, 3), reduction="none")
    yield sample(make(3), make(3), make.constant(3, positive=True), reduction="sum")
    yield sample(make(0, 3), make.integers(3, 0), reduction="sum")


@register(F.cross_entropy, modules=[nn.CrossEntropyLoss], samples=_cross_entropy_samples)
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy between logits and targets, as :func:`torch.nn.functional.cross_entropy`.

    Args:
        input: logits ``(C,)``, ``(N, C)`` or ``(N, C, d1, ...)``.
        target: class indices, shape of ``input`` without ``C``, or probabilities, shape of
            ``input``.
        weight: ``(C,)``, a weight of each class; differentiable with probability targets.
        size_average: superseded by ``reduction``.
        ignore_index: rows with this class index do not count.
        reduce: superseded by ``reduction``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        label_smoothing: in [0, 1].

    Returns:
        A scalar, or the row losses for ``reduction="none"``.

    Raises:
        RuntimeError: if ``weight`` requires a gradient with index targets.
    """
    if not target.is_floating_point():
        _refuse_gradient("cross_entropy", "weight", weight)
    reduction = _legacy(size_average, reduce, reduction)
    return CrossEntropy.call(input, target, weight, ignore_index, reduction, label_smoothing)


def _legacy(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    if size_average is None and reduce is None:
        return reduction
    return _reduction.legacy_get_string(size_average, reduce)


def _refuse_gradient(function: str, name: str, weight: Tensor | None) -> None:
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"{function}: argument {name!r} must not require a gradient here; detach it"
        )


class MSE(Op):
    """``l_i = (x_i - y_i)²``, with broadcasting.

    Backward: ``∂x = 2 (x - y) = -∂y``.
    Secant: ``Δe² = (e + e0) Δe``, the derivative at the midpoint.
    """

    autocast = {"cpu": "fp32", "cuda": "fp32"}

    @staticmethod
    def forward(x: Tensor, y: Tensor, reduction: str) -> Tensor:
        with warnings.catch_warnings():  # the functional warned of unequal sizes already
            warnings.simplefilter("ignore")
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
    def jvp(ctx: Any, tx: Tensor | None, ty: Tensor | None, _: Any) -> Tensor:
        x, y = ctx.saved_tensors
        error = wide(x) - wide(y)
        tangent = add_tangents(tx, None if ty is None else -ty)
        return _reduce(2 * error * tangent, ctx.reduction).to(ctx.dtype)

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
        with warnings.catch_warnings():  # the functional warned of unequal sizes already
            warnings.simplefilter("ignore")
            return F.mse_loss(x, y, reduction=reduction, weight=weight)

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
        excess = error.square()
        if ctx.reduction == "mean":
            total = w.sum()
            excess, scale = excess - (w * excess).sum() / total, scale / total
        grad = 2 * error * w * scale
        return (
            sum_to(grad, x.shape).to(x.dtype),
            sum_to(-grad, y.shape).to(y.dtype),
            sum_to(excess * scale, weight.shape).to(weight.dtype),
            None,
        )

    @staticmethod
    def jvp(ctx: Any, tx: Tensor | None, ty: Tensor | None, tw: Tensor | None, _: Any) -> Tensor:
        x, y, weight = ctx.saved_tensors
        error, w = wide(x) - wide(y), wide(weight)
        mean, total = ctx.reduction == "mean", w.sum()
        tangent = error.new_zeros(())
        if tx is not None or ty is not None:
            tangent = 2 * w * error * add_tangents(tx, None if ty is None else -ty)
        if tw is not None:
            loss = (w * error.square()).sum() / total if mean else 0
            tangent = tangent + tw * (error.square() - loss)
        tangent = tangent if ctx.reduction == "none" else tangent.sum()
        return (tangent / total if mean else tangent).to(ctx.dtype)

    @staticmethod
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        (x, y, weight, reduction), (x0, y0, weight0, _) = args, args0
        error, error0 = wide(x) - wide(y), wide(x0) - wide(y0)
        w, w0, m = wide(weight), wide(weight0), wide(multiplier)
        square, square0 = error.square(), error0.square()
        m_total = 0
        if reduction == "mean":
            total, total0 = w.sum(), w0.sum()
            loss_sum = midpoint((w * square).sum(), (w0 * square0).sum())
            m_total = -m * loss_sum / (total * total0)
            m = m * midpoint(1 / total, 1 / total0)
        m_x = m * midpoint(w, w0) * (error + error0)
        m_w = m * midpoint(square, square0) + m_total
        return (
            sum_to(m_x, x.shape).to(x.dtype),
            sum_to(-m_x, y.shape).to(y.dtype),
            sum_to(m_w, weight.shape).to(weight.dtype),
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
    """
    reduction = _legacy(size_average, reduce, reduction)
    if target.size() != input.size():
        warnings.warn(
            f"mse_loss: target is {tuple(target.shape)}, input {tuple(input.shape)}; they will be "
            "broadcast against each other, which is seldom meant",
            stacklevel=2,
        )
    if weight is None:
        return MSE.call(input, target, reduction)
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
    def jvp(ctx: Any, tz: Tensor | None, ty: Tensor | None, *_: Any) -> Tensor:
        z, y, weight, pos_weight = ctx.saved_tensors
        tangent = add_tangents(
            None if tz is None else tz * _bce_slope(z, y, pos_weight),
            None if ty is None else ty * _bce_target_slope(z, pos_weight),
        )
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
            m_y = m_y + midpoint(F.softplus(-wide(z)), F.softplus(-wide(z0))) * (pos_weight - 1)
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
    return -z if pos_weight is None else (pos_weight - 1) * F.softplus(-z) - z


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


@register(
    F.binary_cross_entropy_with_logits, modules=[nn.BCEWithLogitsLoss], samples=_bce_samples
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
    _refuse_gradient("binary_cross_entropy_with_logits", "weight", weight)
    _refuse_gradient("binary_cross_entropy_with_logits", "pos_weight", pos_weight)
    reduction = _legacy(size_average, reduce, reduction)
    return BCEWithLogits.call(input, target, weight, pos_weight, reduction)
