"""Losses that ask for a margin: ranking, hinges, and the multi-class and multi-label margins."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchbp.ops.base import midpoint
from torchbp.ops.loss import (
    Loss,
    legacy_reduction,
    onto,
    reduced,
    refuse_gradient,
    relu_slope,
    rises,
)
from torchbp.ops.registry import Maker, Sample, register, sample


class MarginRanking(Loss):
    """``l = max(0, h)`` with ``h = m - y (x1 - x2)``.

    Backward, where ``h > 0``: ``∂x1 = -y = -∂x2``, ``∂y = x2 - x1``.
    Secant: the mean slope of the hinge, the product by midpoints.
    """

    tensors = 3

    @staticmethod
    def forward(x1: Tensor, x2: Tensor, y: Tensor, margin: float, reduction: str) -> Tensor:
        return F.margin_ranking_loss(x1, x2, y, margin, reduction=reduction)

    @staticmethod
    def slope(i: int, v: Tensor, x1: Tensor, x2: Tensor, y: Tensor, margin: float) -> Tensor:
        e = x1 - x2
        v = v * rises(margin - y * e)
        return -e * v if i == 2 else y * (v if i else -v)

    @staticmethod
    def average(
        now: tuple[Any, ...], ref: tuple[Any, ...], margin: float
    ) -> tuple[Tensor | None, ...]:
        (x1, x2, y), (x01, x02, y0) = now, ref
        e, e0 = x1 - x2, x01 - x02
        on = relu_slope(margin - y * e, margin - y0 * e0)
        m = on * midpoint(y, y0)
        return -m, m, -on * midpoint(e, e0)


class HingeEmbedding(Loss):
    """``l = x`` where ``y = 1``, ``max(0, m - x)`` where ``y = -1``, their sum for any other y.

    Backward: ``∂x = [y ≠ -1] - [y ≠ 1] [x < m]``. Secant: the mean slope of the hinge.
    """

    @staticmethod
    def forward(x: Tensor, y: Tensor, margin: float, reduction: str) -> Tensor:
        return F.hinge_embedding_loss(x, y, margin, reduction=reduction)

    @staticmethod
    def slope(i: int, v: Tensor, x: Tensor, y: Tensor, margin: float) -> Tensor | None:
        if i == 1:
            return None
        return ((y != -1).to(x.dtype) - ((y != 1) & rises(margin - x)).to(x.dtype)) * v

    @staticmethod
    def average(
        now: tuple[Any, ...], ref: tuple[Any, ...], margin: float
    ) -> tuple[Tensor | None, ...]:
        (x, y), (x0, _) = now, ref
        on = relu_slope(margin - x, margin - x0)
        return (y != -1).to(x.dtype) - torch.where(y != 1, on, 0), None


class MultiMargin(Loss):
    """``l_n = w_y Σ_{i ≠ y} max(0, m - x_y + x_i)^p / C`` with p one or two.

    Backward, with ``h_i`` the argument of the maximum and the own class left out:
    ``∂x_i = w_y p h_i^{p - 1} [h_i > 0] / C``; ``∂x_y`` is minus the sum of these.
    Secant: ``p h^{p - 1} [h > 0]`` gives way to its mean slope.
    """

    tensors, shaping, by_row = 3, 1, True

    @staticmethod
    def forward(
        x: Tensor, y: Tensor, weight: Tensor | None, p: int, margin: float, reduction: str
    ) -> Tensor:
        return _multi_margin(x, y, p, margin, weight, reduction=reduction)

    @staticmethod
    def slope(
        i: int, v: Tensor, x: Tensor, y: Tensor, weight: Tensor | None, p: int, margin: float
    ) -> Tensor:
        index = y.reshape(*x.shape[:-1], 1)
        least = x.gather(-1, index) - margin
        rise = (x > least).to(x.dtype) if p == 1 else 2 * (x - least).clamp(min=0)
        return _against_own(rise, index, weight, v)

    @staticmethod
    def average(
        now: tuple[Any, ...], ref: tuple[Any, ...], p: int, margin: float
    ) -> tuple[Tensor | None, ...]:
        (x, y, weight), (x0, *_) = now, ref
        index = y.reshape(*x.shape[:-1], 1)
        h, h0 = margin - x.gather(-1, index) + x, margin - x0.gather(-1, index) + x0
        rise = relu_slope(h, h0, at_zero=False)
        if p == 2:
            rise = rise * (h.clamp(min=0) + h0.clamp(min=0))
        return (_against_own(rise, index, weight, torch.ones_like(h[..., :1])),)


def _against_own(rise: Tensor, index: Tensor, weight: Tensor | None, v: Tensor) -> Tensor:
    """What every class but the own one adds, and the own one pays for all, times v."""
    v = v / max(rise.shape[-1], 1)
    rise = onto(rise, "scatter", -1, index, 0)
    slope = onto(rise, "scatter_add", -1, index, -rise.sum(-1, keepdim=True))
    return onto(slope, "mul", v if weight is None else v * weight[index])


class MultiLabelMargin(Loss):
    """``l_n = Σ_{j in Y_n} Σ_{i not in Y_n} max(0, 1 - x_j + x_i) / C``.

    ``Y_n`` are the labels before the first -1; one that is named k times counts k times.
    Backward: the number of pairs that miss the margin, by sorting; each raises ``x_i`` and lowers
    ``x_j``. Secant: the mean slope of the hinge, pair by pair.
    """

    tensors, shaping, by_row = 2, 1, True

    @staticmethod
    def forward(x: Tensor, y: Tensor, reduction: str) -> Tensor:
        if not torch.compiler.is_compiling():
            return _multilabel_margin(x, y, reduction=reduction)
        # torch's decomposition for compilers counts labels after the -1 (seen in 2.13).
        terms = (1 - x.unsqueeze(-1) + x.unsqueeze(-2)).clamp(min=0) * _pairs(_named(x, y))
        return reduced(terms.sum((-2, -1)) / x.shape[-1], reduction)

    @staticmethod
    def slope(i: int, v: Tensor, x: Tensor, y: Tensor) -> Tensor:
        named = _named(x, y)
        x = x.detach()  # only counted with
        labels, others = named > 0, named == 0
        # Others above x_j - 1, per label j; labels below x_i + 1, per other i.
        ordered = x.masked_fill(labels, -torch.inf).sort(-1).values
        missed = x.shape[-1] - torch.searchsorted(ordered, x - 1, right=True)
        ordered, order = x.masked_fill(others, torch.inf).sort(-1)
        below = torch.searchsorted(ordered, x + 1)
        weights = named.gather(-1, order).cumsum(-1)
        weights = torch.cat([torch.zeros_like(weights[..., :1]), weights], -1)
        slope = torch.where(others, weights.gather(-1, below), -named * missed)
        return slope * (v / max(x.shape[-1], 1))

    @staticmethod
    def average(now: tuple[Any, ...], ref: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
        (x, y), (x0, _) = now, ref
        h, h0 = (1 - t.unsqueeze(-1) + t.unsqueeze(-2) for t in (x, x0))
        rise = relu_slope(h, h0, at_zero=False) * _pairs(_named(x, y))
        return ((rise.sum(-2) - rise.sum(-1)) / max(x.shape[-1], 1),)


def _defined_when_empty(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function, but for empty batches: torch returns uninitialised memory as their loss."""

    @functools.wraps(function)
    def defined(input: Tensor, *args: Any, reduction: str = "mean", **kwargs: Any) -> Tensor:
        if input.numel():
            return function(input, *args, reduction=reduction, **kwargs)
        return reduced(function(input, *args, reduction="none", **kwargs), reduction)

    return defined


_multi_margin = _defined_when_empty(F.multi_margin_loss)
_multilabel_margin = _defined_when_empty(F.multilabel_margin_loss)


def _named(x: Tensor, y: Tensor) -> Tensor:
    """How often each class is among the labels."""
    real = (y < 0).cumsum(-1) == 0
    counts = torch.zeros_like(x)
    return counts.scatter_add(-1, y.masked_fill(~real, 0), real.to(x.dtype))


def _pairs(named: Tensor) -> Tensor:
    """How often a label (last but one dimension) is compared with a class (last dimension)."""
    return named.unsqueeze(-1) * (named == 0).unsqueeze(-2)


def _signs(make: Maker, *shape: int) -> Tensor:
    return make.constant(*shape).sign()


def _ranking_samples(make: Maker) -> Iterator[Sample]:
    for reduction in ("none", "sum", "mean"):
        yield sample(make(5), make(5), _signs(make, 5), reduction=reduction)
        yield sample(make(3, 4), make(3, 4), make(3, 4), margin=0.3, reduction=reduction)
    yield sample(make(3, 1), make(3, 4), make(1, 4), 0.5)
    yield sample(make(0, 4), make(0, 4), make(0, 4), reduction="sum")


@register(
    F.margin_ranking_loss,
    replaces=[torch.margin_ranking_loss],
    modules=[nn.MarginRankingLoss],
    samples=_ranking_samples,
)
def margin_ranking_loss(
    input1: Tensor,
    input2: Tensor,
    target: Tensor,
    margin: float = 0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """``max(0, margin - target (input1 - input2))``, as torch.nn.functional.margin_ranking_loss.

    Args:
        input1: any shape.
        input2: same number of dimensions; the sizes broadcast.
        target: likewise; 1 where ``input1`` should be the greater one, -1 where ``input2`` should.
        margin: by how much.
        size_average: superseded by ``reduction``.
        reduce: superseded by ``reduction``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    Returns:
        A scalar, or the terms for ``reduction="none"``.

    Raises:
        RuntimeError: if the numbers of dimensions differ.
    """
    reduction = legacy_reduction(size_average, reduce, reduction)
    return MarginRanking.call(input1, input2, target, margin, reduction)


def _hinge_samples(make: Maker) -> Iterator[Sample]:
    for reduction in ("none", "sum", "mean"):
        yield sample(make(3, 4), _signs(make, 3, 4), reduction=reduction)
    yield sample(make(3, 4), _signs(make, 4), 0.2)
    yield sample(make(3, 4), make.constant(3, 4))
    yield sample(make(0, 4), make.constant(0, 4), reduction="sum")


@register(
    F.hinge_embedding_loss,
    replaces=[torch.hinge_embedding_loss],
    modules=[nn.HingeEmbeddingLoss],
    samples=_hinge_samples,
)
def hinge_embedding_loss(
    input: Tensor,
    target: Tensor,
    margin: float = 1.0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Small distances for like pairs, large ones for others, as F.hinge_embedding_loss.

    Args:
        input: distances, any shape.
        target: shape of ``input``, 1 (alike) or -1 (not alike).
        margin: distance beyond which a pair that is not alike costs nothing.
        size_average: superseded by ``reduction``.
        reduce: superseded by ``reduction``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    Returns:
        A scalar, or the terms for ``reduction="none"``.
    """
    reduction = legacy_reduction(size_average, reduce, reduction)
    return HingeEmbedding.call(input, target, margin, reduction)


def _multi_samples(make: Maker) -> Iterator[Sample]:
    for reduction in ("none", "sum", "mean"):
        yield sample(make(4, 3), make.integers(3, 4), reduction=reduction)
        weight = make.constant(3, positive=True)
        yield sample(make(4, 3), make.integers(3, 4), 2, 0.7, weight, reduction=reduction)
    yield sample(make(3), make.integers(3), p=2)
    yield sample(make(0, 3), make.integers(3, 0), reduction="sum")


@register(
    _multi_margin,
    replaces=[F.multi_margin_loss],
    modules=[nn.MultiMarginLoss],
    samples=_multi_samples,
)
def multi_margin_loss(
    input: Tensor,
    target: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Multi-class hinge, as :func:`torch.nn.functional.multi_margin_loss`.

    Args:
        input: scores ``(N, C)`` or ``(C,)``.
        target: class indices ``(N,)`` or ``()``.
        p: power of the hinge, 1 or 2.
        margin: by how much the own class must exceed every other one.
        weight: ``(C,)``, a factor of each class; not differentiable.
        size_average: superseded by ``reduction``.
        reduce: superseded by ``reduction``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    Returns:
        A scalar, or the row losses for ``reduction="none"``.

    Raises:
        ValueError: if ``p`` is neither 1 nor 2, or ``weight`` has not one dimension.
        RuntimeError: if the shapes do not fit, or ``weight`` requires a gradient.
    """
    refuse_gradient("multi_margin_loss", "weight", weight)
    reduction = legacy_reduction(size_average, reduce, reduction)
    return MultiMargin.call(input, target, weight, p, margin, reduction)


def _multilabel_samples(make: Maker) -> Iterator[Sample]:
    labels = torch.tensor([[1, 3, -1, 0], [0, -1, 2, 2], [-1, 1, 2, 3]], device=make.device)
    for reduction in ("none", "sum", "mean"):
        yield sample(make(3, 4), labels, reduction=reduction)
    yield sample(make(4), torch.tensor([2, 0, 2, -1], device=make.device))
    yield sample(make(0, 4), labels[:0], reduction="sum")


@register(
    _multilabel_margin,
    replaces=[F.multilabel_margin_loss],
    modules=[nn.MultiLabelMarginLoss],
    samples=_multilabel_samples,
)
def multilabel_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Multi-label hinge, as :func:`torch.nn.functional.multilabel_margin_loss`.

    Args:
        input: scores ``(N, C)`` or ``(C,)``.
        target: shape of ``input``: the labels of each row, then -1.
        size_average: superseded by ``reduction``.
        reduce: superseded by ``reduction``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    Returns:
        A scalar, or the row losses for ``reduction="none"``.

    Raises:
        RuntimeError: if the shapes do not fit, or a label is out of range.
    """
    reduction = legacy_reduction(size_average, reduce, reduction)
    return MultiLabelMargin.call(input, target, reduction)
