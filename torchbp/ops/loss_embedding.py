"""The loss of angles between pairs of embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchbp.ops.base import midpoint
from torchbp.ops.loss import Loss, legacy_reduction, relu_slope, rises
from torchbp.ops.registry import Maker, Sample, register, sample

# What torch adds to the squared lengths: the float next to 1e-12.
_LEAST_SQUARE = 9.999999960041972e-13


class CosineEmbedding(Loss):
    """``l = 1 - c`` where ``y = 1``, ``max(0, c - m)`` where ``y = -1``, else nothing.

    ``c = a r1 r2`` with ``a = <x1, x2>`` and ``r = (|x|² + ε)^{-1/2}``.
    Backward: ``∂c/∂x1 = x2 r1 r2 - c x1 r1²``, times -1 where ``y = 1``, times ``[c > m]`` where
    ``y = -1``.
    Secant: the products by midpoints, ``Δr = -r r0 Δ(|x|²) / (1 / r + 1 / r0)``, the mean slope of
    the hinge.
    """

    tensors, shaping, by_row = 3, 2, True

    @staticmethod
    def forward(x1: Tensor, x2: Tensor, y: Tensor, margin: float, reduction: str) -> Tensor:
        return F.cosine_embedding_loss(x1, x2, y, margin, reduction=reduction)

    @staticmethod
    def slope(i: int, v: Tensor, x1: Tensor, x2: Tensor, y: Tensor, margin: float) -> Tensor:
        r1, r2 = _inverse_length(x1), _inverse_length(x2)
        c = (x1 * x2).sum(-1, keepdim=True) * r1 * r2
        v = v * _sign(y, rises(c - margin).to(c.dtype))
        own, other, r = (x2, x1, r2) if i else (x1, x2, r1)
        return other * (v * r1 * r2) - own * (v * c * r.square())

    @staticmethod
    def average(
        now: tuple[Any, ...], ref: tuple[Any, ...], margin: float
    ) -> tuple[Tensor | None, ...]:
        (x1, x2, y), (x01, x02, _) = now, ref
        lengths = [(_inverse_length(x), _inverse_length(x0)) for x, x0 in ((x1, x01), (x2, x02))]
        (r1, r01), (r2, r02) = lengths
        a, a0 = (x1 * x2).sum(-1, keepdim=True), (x01 * x02).sum(-1, keepdim=True)
        on = _sign(y, relu_slope(a * r1 * r2 - margin, a0 * r01 * r02 - margin))
        of_a, of_r = midpoint(r1 * r2, r01 * r02), midpoint(a, a0)
        drop1, drop2 = (r * r0 / (1 / r + 1 / r0) for r, r0 in lengths)
        m1 = midpoint(x2, x02) * of_a - (x1 + x01) * (of_r * midpoint(r2, r02) * drop1)
        m2 = midpoint(x1, x01) * of_a - (x2 + x02) * (of_r * midpoint(r1, r01) * drop2)
        return m1 * on, m2 * on, None


def _inverse_length(x: Tensor) -> Tensor:
    return (x.square().sum(-1, keepdim=True) + _LEAST_SQUARE).rsqrt()


def _sign(y: Tensor, hinge: Tensor) -> Tensor:
    """Slope of the loss in the cosine, given that of the hinge."""
    y = y.unsqueeze(-1)
    return torch.where(y == 1, -1, torch.where(y == -1, hinge, 0)).to(hinge.dtype)


def _cosine_samples(make: Maker) -> Iterator[Sample]:
    target = torch.tensor([1, -1, -1, 0], device=make.device)
    for reduction in ("none", "sum", "mean"):
        yield sample(make(4, 3), make(4, 3), target, reduction=reduction)
    yield sample(make(4, 3), make(4, 3), target, -0.4)
    yield sample(make(3), make(3), target[0])
    yield sample(make(1, 3), make(1, 3), target)
    yield sample(make(0, 3), make(0, 3), target[:0], reduction="sum")


@register(
    F.cosine_embedding_loss,
    replaces=[torch.cosine_embedding_loss],
    modules=[nn.CosineEmbeddingLoss],
    samples=_cosine_samples,
)
def cosine_embedding_loss(
    input1: Tensor,
    input2: Tensor,
    target: Tensor,
    margin: float = 0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Angles between pairs, as :func:`torch.nn.functional.cosine_embedding_loss`.

    Args:
        input1: ``(N, D)``, ``(1, D)`` or ``(D,)``.
        input2: shape of ``input1``.
        target: ``(N,)`` or ``()``: 1 (alike) or -1 (not alike).
        margin: cosine below which a pair that is not alike costs nothing.
        size_average: superseded by ``reduction``.
        reduce: superseded by ``reduction``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    Returns:
        A scalar, or the losses of the pairs for ``reduction="none"``.

    Raises:
        RuntimeError: if the shapes do not fit.
    """
    reduction = legacy_reduction(size_average, reduce, reduction)
    if input1.dim() == 2 and target.dim() == 1 and len(input1) == len(input2) == 1:
        # One pair with many targets, as torch allows it.
        input1, input2 = (x.expand(len(target), -1) for x in (input1, input2))
    return CosineEmbedding.call(input1, input2, target, margin, reduction)
