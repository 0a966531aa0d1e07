"""Distances and similarities of vectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchbp.ops import p_norm
from torchbp.ops.arithmetic import halves
from torchbp.ops.base import Op, midpoint, sum_to, wide
from torchbp.ops.registry import Maker, Sample, register, sample
from torchbp.ops.relevance import Rule, passes, quotient

Dims = tuple[int, ...]


class _Scaled:
    """``x / n`` with ``n = max(‖x‖_p, eps)``, and its derivatives."""

    def __init__(self, x: Tensor, p: float, dim: Dims, eps: float) -> None:
        self.x, self.p, self.dim, self.eps = x, p, dim, eps
        self.norm = torch.linalg.vector_norm(x, p, dim, keepdim=True)
        self.scale = 1 / self.norm.clamp(min=eps)

    def tangent(self, g: Tensor, along: Tensor) -> Tensor:
        """Error of x from ``g``, that of ``x / n``, and ``along = Σ g x``."""
        return g * self.scale - self._bound(along * self.scale * self.scale)

    def pushed(self, t: Tensor) -> Tensor:
        """Tangent of ``x / n`` from that of x."""
        longer = _dot(t, self._bound(torch.ones_like(self.norm)), self.dim)
        return t * self.scale - self.x * (longer * self.scale * self.scale)

    def _bound(self, weight: Tensor) -> Tensor:
        """``weight ∂n``; below eps nothing."""
        weight = weight * (self.norm >= self.eps)
        return p_norm.slope(weight, self.x, self.norm, self.p, self.dim)

    def secant(self, m: Tensor, other: _Scaled) -> Tensor:
        """Multiplier of x from that of ``x / n``.

        Of the product ``x · (1/n)``, of ``1/n``, of the bound ``max(·, eps)`` and of the norm.
        """
        of_scale = (m * midpoint(self.x, other.x)).sum(self.dim, keepdim=True)
        of_bounded = -of_scale * self.scale * other.scale
        gap = self.norm - other.norm
        bounded = self.norm.clamp(min=self.eps) - other.norm.clamp(min=self.eps)
        same = gap == 0
        share = torch.where(same, self.norm >= self.eps, bounded / gap.masked_fill(same, 1))
        chord = p_norm.chord(self.x, other.x, self.norm, other.norm, self.p, self.dim)
        return m * midpoint(self.scale, other.scale) + of_bounded * share * chord


def _dot(a: Tensor, b: Tensor, dim: Dims) -> Tensor:
    """``Σ Re(a b*)``, the scalar product also of complex vectors."""
    products = (a * b.conj()).sum(dim, keepdim=True)
    return products.real if products.is_complex() else products


class Normalize(Op):
    """``y = x / max(‖x‖_p, eps)``.

    Backward: ``∂x = g / n - ∂n Σ(g x) / n²`` with ``∂n`` the slope of the norm, zero below eps.
    Secant: composed of those of product, reciprocal, bound and norm. LRP: the norm counts as a
    constant (Ali et al. 2022), so relevance passes.
    """

    autocast = {"cuda": "fp32"}
    relevance = classmethod(passes)

    @staticmethod
    def forward(x: Tensor, p: float, dim: Any, eps: float) -> Tensor:
        return F.normalize(x, p, dim, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, *ctx.settings = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        scaled, g = _scaled(x, *ctx.settings), wide(grad_output)
        along = _dot(g, scaled.x, scaled.dim)
        return scaled.tangent(g, along).to(x.dtype), None, None, None

    @staticmethod
    def jvp(ctx: Any, tx: Tensor | None, *_: Any) -> Tensor | None:
        (x,) = ctx.saved_tensors
        return None if tx is None else _scaled(x, *ctx.settings).pushed(wide(tx)).to(x.dtype)

    @staticmethod
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        return _scaled(*args).secant(multiplier, _scaled(*args0)), None, None, None


def _scaled(x: Tensor, p: float, dim: Any, eps: float) -> _Scaled:
    return _Scaled(wide(x), p, (dim,) if isinstance(dim, int) else tuple(dim), eps)


class CosineSimilarity(Op):
    """``y = Σ x̂₁ x̂₂`` with ``x̂ = x / max(‖x‖, eps)``.

    Backward: ``∂x̂₁ = g x̂₂`` and on through the normalisation. Secant: each normalised vector
    weighted by the other's midpoint, then as :class:`Normalize`. LRP: the norms count as
    constants; halves of the epsilon rule's share for each vector (Achtibat et al. 2024).
    """

    autocast = {"cuda": "fp32"}

    @staticmethod
    def forward(x1: Tensor, x2: Tensor, dim: int, eps: float) -> Tensor:
        return torch.cosine_similarity(x1, x2, dim, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x1, x2, *ctx.settings = inputs
        ctx.save_for_backward(x1, x2, output)
        ctx.save_for_forward(x1, x2)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x1, x2, y = ctx.saved_tensors
        needs1, needs2, *_ = ctx.needs_input_grad
        a, b = _pair(x1, x2, *ctx.settings)
        g, y = (wide(t).unsqueeze(ctx.settings[0]) for t in (grad_output, y))
        # Σ (g x̂₂) x₁ = g y / scale₁, so the sums that forward took need not be taken again.
        of_x1 = a.tangent(b.x * (g * b.scale), g * y / a.scale) if needs1 else None
        of_x2 = b.tangent(a.x * (g * a.scale), g * y / b.scale) if needs2 else None
        return _reduced(of_x1, x1), _reduced(of_x2, x2), None, None

    @staticmethod
    def jvp(ctx: Any, t1: Tensor | None, t2: Tensor | None, *_: Any) -> Tensor | None:
        x1, x2 = ctx.saved_tensors
        a, b = _pair(x1, x2, *ctx.settings)
        total = torch.zeros_like(a.x)
        for t, one, other in ((t1, a, b), (t2, b, a)):
            if t is not None:
                pushed = one.pushed(wide(t).expand(one.x.shape))
                total = total + pushed * other.x * other.scale
        return total.sum(ctx.settings[0]).to(torch.result_type(x1, x2))

    @staticmethod
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        (a, b), (a0, b0) = _pair(*args), _pair(*args0)
        m = multiplier.unsqueeze(args[2])
        middle_a = midpoint(a.x * a.scale, a0.x * a0.scale)
        middle_b = midpoint(b.x * b.scale, b0.x * b0.scale)
        of_x1 = _reduced(a.secant(m * middle_b, a0), args[0])
        return of_x1, _reduced(b.secant(m * middle_a, b0), args[1]), None, None

    @classmethod
    def relevance(
        cls, relevance: Tensor, rule: Rule, args: tuple[Any, ...], output: Any
    ) -> tuple[Tensor | None, ...]:
        a, b = _pair(*args)
        share = quotient(relevance, output, rule.epsilon).unsqueeze(args[2])
        terms = share * (a.x * a.scale) * (b.x * b.scale)
        takes = halves(torch.ones(()), *args[:2])
        shares = tuple(
            None if t is None else _reduced(terms * t, x)
            for t, x in zip(takes, args[:2], strict=True)
        )
        return *shares, None, None


def _pair(x1: Tensor, x2: Tensor, dim: int, eps: float) -> tuple[_Scaled, _Scaled]:
    """Both vectors, broadcast and in their common precision."""
    dtype = torch.promote_types(wide(x1).dtype, wide(x2).dtype)
    shape = torch.broadcast_shapes(x1.shape, x2.shape)
    a, b = (_Scaled(x.to(dtype).expand(shape), 2, (dim,), eps) for x in (x1, x2))
    return a, b


def _reduced(grad: Tensor | None, like: Tensor) -> Tensor | None:
    return None if grad is None else sum_to(grad, like.shape).to(like.dtype)


class PairwiseDistance(Op):
    """``y = ‖x₁ - x₂ + eps‖_p`` over the last dimension.

    Backward: ``∂x₁ = g ∂‖d‖ = -∂x₂`` with d the difference. Secant: that of the norm.
    """

    autocast = {"cuda": "fp32"}
    no_relevance = "the literature shares a distance among coordinates, not between two points"

    @staticmethod
    def forward(x1: Tensor, x2: Tensor, p: float, eps: float, keepdim: bool) -> Tensor:
        return F.pairwise_distance(x1, x2, p, eps, keepdim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x1, x2, ctx.p, ctx.eps, ctx.keepdim = inputs
        ctx.save_for_backward(x1, x2, output)
        ctx.save_for_forward(x1, x2, output)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x1, x2, y = ctx.saved_tensors
        needs1, needs2, *_ = ctx.needs_input_grad
        if not ctx.keepdim:
            grad_output, y = grad_output.unsqueeze(-1), y.unsqueeze(-1)
        difference = (x1 - x2).add_(ctx.eps)
        grad = p_norm.slope(grad_output, difference, y, ctx.p, (-1,))
        of_x1 = _reduced(grad, x1) if needs1 else None
        return of_x1, _reduced(-grad, x2) if needs2 else None, None, None, None

    @staticmethod
    def jvp(ctx: Any, t1: Tensor | None, t2: Tensor | None, *_: Any) -> Tensor | None:
        x1, x2, y = ctx.saved_tensors
        y = y if ctx.keepdim else y.unsqueeze(-1)
        step = (0 if t1 is None else t1) - (0 if t2 is None else t2)
        slope = p_norm.slope(torch.ones_like(y), x1 - x2 + ctx.eps, y, ctx.p, (-1,))
        return (slope * step).sum(-1, keepdim=ctx.keepdim)

    @staticmethod
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        (x1, x2, p, eps, keepdim), (x10, x20, *_) = args, args0
        if not keepdim:
            multiplier, output, output0 = (t.unsqueeze(-1) for t in (multiplier, output, output0))
        chord = p_norm.chord(x1 - x2 + eps, x10 - x20 + eps, output, output0, p, (-1,))
        m = multiplier * chord
        return _reduced(m, x1), _reduced(-m, x2), None, None, None


def _normalize_samples(make: Maker) -> Iterator[Sample]:
    yield sample(make(3, 4))
    yield sample(make(2, 3, 2), p=1, dim=-1)
    yield sample(make(2, 3, 2), p=3.5, dim=(0, 2))
    yield sample(make(3, 4), p=float("inf"), dim=0)
    yield sample(make(3, 2), dim=1, eps=1.5)
    yield sample(make(0, 3))


def _cosine_samples(make: Maker) -> Iterator[Sample]:
    yield sample(make(3, 4), make(3, 4))
    yield sample(make(2, 3, 2), make(3, 1), dim=-2)
    yield sample(make(4), make(2, 4), dim=-1)
    yield sample(make(0, 3), make(0, 3))


def _pairwise_samples(make: Maker) -> Iterator[Sample]:
    yield sample(make(3, 4), make(3, 4))
    yield sample(make(2, 3, 2), make(3, 2), p=1, keepdim=True)
    yield sample(make(4), make(2, 4), p=3)
    yield sample(make(3, 4), make(1, 4), p=1.5, eps=0.1)
    yield sample(make(3, 4), make(4), p=float("inf"))
    yield sample(make(0, 3), make(0, 3))


@register(F.normalize, samples=_normalize_samples)
def normalize(
    input: Tensor,
    p: float = 2.0,
    dim: int | Sequence[int] = 1,
    eps: float = 1e-12,
    out: Tensor | None = None,
) -> Tensor:
    """Vectors of length one, as :func:`torch.nn.functional.normalize`.

    Args:
        input: any shape.
        p: which norm.
        dim: the dimensions of the vectors.
        eps: the least length that is divided by.
        out: written into instead; then there is no gradient, as in torch.

    Returns:
        The shape of ``input``.
    """
    if out is not None:
        return F.normalize(input, p, dim, eps, out)  # type: ignore[arg-type]
    return Normalize.call(input, p, dim if isinstance(dim, int) else tuple(dim), eps)


@register(F.cosine_similarity, modules=[nn.CosineSimilarity], samples=_cosine_samples)
def cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """The cosine of the angle between vectors, as :func:`torch.nn.functional.cosine_similarity`.

    Args:
        x1: any shape.
        x2: a shape that broadcasts with it.
        dim: the dimension of the vectors.
        eps: the least length that is divided by.

    Returns:
        The broadcast shape without ``dim``.
    """
    return CosineSimilarity.call(x1, x2, dim, eps)


@register(F.pairwise_distance, modules=[nn.PairwiseDistance], samples=_pairwise_samples)
def pairwise_distance(
    x1: Tensor, x2: Tensor, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False
) -> Tensor:
    """The p-norm of differences, as :func:`torch.nn.functional.pairwise_distance`.

    Args:
        x1: ``(*, D)``.
        x2: a shape that broadcasts with it.
        p: which norm.
        eps: added to the difference.
        keepdim: keep the last dimension with size one.

    Returns:
        The broadcast shape without its last dimension, or with size one in it.
    """
    return PairwiseDistance.call(x1, x2, p, eps, keepdim)
