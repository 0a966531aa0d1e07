"""Losses of triplets: nearer to the positive than to the negative, by a margin."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchbp.ops import p_norm
from torchbp.ops.distance import pairwise_distance
from torchbp.ops.loss import (
    Loss,
    check_reduction,
    legacy_reduction,
    reduced,
    relu_slope,
    rises,
)
from torchbp.ops.registry import Maker, Sample, register, sample


class TripletMargin(Loss):
    """``l = max(0, m + |a - p| - |a - n|)`` with p-norms of differences to which ε is added.

    With ``swap`` the least of ``|a - n|`` and ``|p - n|`` counts (Balntas et al. 2016).
    Backward, where the maximum is positive: the derivatives of the norms that count.
    Secant: the mean slopes of the hinge, of the minimum and of the norms.
    """

    tensors, by_row, together = 3, True, True

    @staticmethod
    def forward(
        anchor: Tensor,
        positive: Tensor,
        negative: Tensor,
        margin: float,
        p: float,
        eps: float,
        swap: bool,
        reduction: str,
    ) -> Tensor:
        return F.triplet_margin_loss(
            anchor, positive, negative, margin, p, eps, swap, reduction=reduction
        )

    @staticmethod
    def slope(
        i: int | None,
        v: Tensor,
        anchor: Tensor,
        positive: Tensor,
        negative: Tensor,
        margin: float,
        p: float,
        eps: float,
        swap: bool,
    ) -> Any:
        near, far = anchor - positive + eps, anchor - negative + eps
        d_near, d_far, last = _norm(near, p), _norm(far, p), (-1,)
        least, share = d_far, torch.ones_like(d_far)
        if swap:
            third = positive - negative + eps
            d_third = _norm(third, p)
            least, share = torch.minimum(d_far, d_third), _share(d_far, d_third)
        v = v * rises(margin + d_near - least)
        g_near = p_norm.slope(v, near, d_near, p, last)
        g_far = p_norm.slope(v * share, far, d_far, p, last)
        slopes = [g_near - g_far, -g_near, g_far]
        if swap:
            g_third = p_norm.slope(v * (1 - share), third, d_third, p, last)
            slopes = [slopes[0], slopes[1] - g_third, slopes[2] + g_third]
        return slopes if i is None else slopes[i]

    @staticmethod
    def average(
        now: tuple[Any, ...],
        ref: tuple[Any, ...],
        margin: float,
        p: float,
        eps: float,
        swap: bool,
    ) -> tuple[Tensor | None, ...]:
        (a, b, c), (a0, b0, c0) = now, ref
        d_near, d_near0, m_near = _chord(a - b + eps, a0 - b0 + eps, p)
        d_far, d_far0, m_far = _chord(a - c + eps, a0 - c0 + eps, p)
        m_third = torch.zeros_like(m_far)
        if swap:
            d_third, d_third0, m_third = _chord(b - c + eps, b0 - c0 + eps, p)
            # min(f, t) = f - max(0, f - t)
            share = relu_slope(d_far - d_third, d_far0 - d_third0)
            d_far, d_far0 = torch.minimum(d_far, d_third), torch.minimum(d_far0, d_third0)
            m_far, m_third = (1 - share) * m_far, share * m_third
        on = relu_slope(margin + d_near - d_far, margin + d_near0 - d_far0)
        m_near, m_far, m_third = on * m_near, on * m_far, on * m_third
        return m_near - m_far, -m_near - m_third, m_far + m_third


def _share(first: Tensor, second: Tensor) -> Tensor:
    """What of their minimum's slope goes to the first of two numbers; equal ones share it."""
    return torch.where(first == second, 0.5, (first < second).to(first.dtype))


def _norm(u: Tensor, p: float) -> Tensor:
    return torch.linalg.vector_norm(u, p, dim=-1, keepdim=True)


def _chord(u: Tensor, u0: Tensor, p: float) -> tuple[Tensor, Tensor, Tensor]:
    """The norms of both runs, and the mean slope between them."""
    norm, norm0 = _norm(u, p), _norm(u0, p)
    return norm, norm0, p_norm.chord(u, u0, norm, norm0, p, (-1,))


class TripletHinge(Loss):
    """``l = max(0, m + d_p - d_n)`` of distances, with ``min(d_n, d_s)`` for ``d_n`` if swapped.

    Backward, where the maximum is positive: ``∂d_p = 1``, and -1 for the distance that counts.
    Secant: the mean slopes of the hinge and of the minimum.
    """

    autocast = {}
    tensors = 3

    @staticmethod
    def forward(
        near: Tensor, far: Tensor, third: Tensor | None, margin: float, reduction: str
    ) -> Tensor:
        return reduced((margin + near - _least(far, third)).clamp_min(0), reduction)

    @staticmethod
    def slope(
        i: int, v: Tensor, near: Tensor, far: Tensor, third: Tensor | None, margin: float
    ) -> Tensor:
        v = v * rises(margin + near - _least(far, third))
        if i == 0 or third is None:
            return -v if i else v
        share = _share(far, third)
        return -v * (share if i == 1 else 1 - share)

    @staticmethod
    def average(
        now: tuple[Any, ...], ref: tuple[Any, ...], margin: float
    ) -> tuple[Tensor | None, ...]:
        (near, far, third), (near0, far0, third0) = now, ref
        on = relu_slope(margin + near - _least(far, third), margin + near0 - _least(far0, third0))
        if third is None:
            return on, -on, None
        of_third = relu_slope(far - third, far0 - third0)
        return on, -on * (1 - of_third), -on * of_third


def _least(far: Tensor, third: Tensor | None) -> Tensor:
    return far if third is None else torch.minimum(far, third)


def _triplet_samples(make: Maker) -> Iterator[Sample]:
    for reduction in ("none", "sum", "mean"):
        yield sample(make(4, 3), make(4, 3), make(4, 3), reduction=reduction)
        yield sample(make(4, 3), make(4, 3), make(4, 3), swap=True, reduction=reduction)
    for p in (1.0, 3.0, torch.inf):
        yield sample(make(4, 3), make(4, 3), make(4, 3), margin=2.0, p=p, swap=True)
    yield sample(make(3), make(3), make(3))
    yield sample(make(0, 3), make(0, 3), make(0, 3), reduction="sum")


@register(
    F.triplet_margin_loss,
    replaces=[torch.triplet_margin_loss],
    modules=[nn.TripletMarginLoss],
    samples=_triplet_samples,
)
def triplet_margin_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float = 1.0,
    p: float = 2,
    eps: float = 1e-6,
    swap: bool = False,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Nearer to the positive than to the negative, as F.triplet_margin_loss.

    Args:
        anchor: ``(N, D)`` or ``(D,)``.
        positive: shape of ``anchor``.
        negative: shape of ``anchor``.
        margin: by how much; positive.
        p: which norm.
        eps: added to the differences.
        swap: let the distance between positive and negative count where it is the smaller one.
        size_average: superseded by ``reduction``.
        reduce: superseded by ``reduction``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    Returns:
        A scalar, or the losses of the triplets for ``reduction="none"``.

    Raises:
        ValueError: if ``margin`` is not positive.
        RuntimeError: if the numbers of dimensions differ.
    """
    reduction = legacy_reduction(size_average, reduce, reduction)
    return TripletMargin.call(anchor, positive, negative, margin, p, eps, swap, reduction)


def _with_distance_samples(make: Maker) -> Iterator[Sample]:
    for reduction in ("none", "sum", "mean"):
        yield sample(make(4, 3), make(4, 3), make(4, 3), reduction=reduction)
        yield sample(make(4, 3), make(4, 3), make(4, 3), swap=True, reduction=reduction)
    yield sample(
        make(4, 3), make(4, 3), make(4, 3), distance_function=_squared_distance, margin=0.5
    )
    yield sample(make(0, 3), make(0, 3), make(0, 3), reduction="sum")


def _squared_distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().sum(-1)


@register(
    F.triplet_margin_with_distance_loss,
    modules=[nn.TripletMarginWithDistanceLoss],
    samples=_with_distance_samples,
)
def triplet_margin_with_distance_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    distance_function: Callable[[Tensor, Tensor], Tensor] | None = None,
    margin: float = 1.0,
    swap: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Nearer to the positive than to the negative, as F.triplet_margin_with_distance_loss.

    Args:
        anchor: ``(N, *)``.
        positive: same number of dimensions.
        negative: same number of dimensions.
        distance_function: takes two of them and returns their distances; the Euclidean one unless
            given.
        margin: by how much; positive.
        swap: let the distance between positive and negative count where it is the smaller one.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    Returns:
        A scalar, or the losses of the triplets for ``reduction="none"``.

    Raises:
        ValueError: if ``margin`` is not positive, or for an unknown reduction.
        RuntimeError: if the numbers of dimensions differ.
    """
    check_reduction("triplet_margin_with_distance_loss", reduction)
    if margin <= 0:
        raise ValueError(
            f"triplet_margin_with_distance_loss: margin must be positive, got {margin}"
        )
    if not anchor.dim() == positive.dim() == negative.dim():
        raise RuntimeError(
            "triplet_margin_with_distance_loss: anchor, positive and negative must have the same "
            f"number of dimensions, got {anchor.dim()}, {positive.dim()} and {negative.dim()}"
        )
    distance = distance_function or pairwise_distance
    third = distance(positive, negative) if swap else None
    near, far = distance(anchor, positive), distance(anchor, negative)
    return TripletHinge.call(near, far, third, margin, reduction)
