"""Reductions and selections that are not linear."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from torchbp.ops.base import Op, add_tangents, sum_to
from torchbp.ops.registry import Maker, Sample, register, sample
from torchbp.ops.relevance import Rule, routes
from torchbp.ops.softmax import log_mean


class LogSumExp(Op):
    """``y = log Σ exp x`` over some dimensions.

    Backward: ``∂x = g softmax(x)``. Secant: ``g q``, q the normalised logarithmic means of both
    runs' softmax: ``Σ q (log p - log p₀) = 0`` and ``log p = x - y`` (Sato 1976, Vartia 1976).
    """

    autocast = {"cuda": "fp32"}
    no_relevance = "the literature has no rule for log-sum-exp"

    @staticmethod
    def forward(x: Tensor, dim: tuple[int, ...], keepdim: bool) -> Tensor:
        return torch.logsumexp(x, dim, keepdim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.dim, ctx.keepdim = inputs
        ctx.save_for_backward(x, output)
        ctx.save_for_forward(x, output)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, y = ctx.saved_tensors
        y, g = (_kept(t, ctx.dim, x.dim(), ctx.keepdim) for t in (y, grad_output))
        return g * _share(x, y).conj(), None, None

    @staticmethod
    def jvp(ctx: Any, tx: Tensor | None, *_: Any) -> Tensor | None:
        x, y = ctx.saved_tensors
        share = _share(x, _kept(y, ctx.dim, x.dim(), ctx.keepdim))
        return None if tx is None else (share * tx).sum(ctx.dim, ctx.keepdim)

    @staticmethod
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        (x, dim, keepdim), x0 = args, args0[0]
        y, y0, m = (_kept(t, dim, x.dim(), keepdim) for t in (output, output0, multiplier))
        mean = log_mean(x - y, x0 - y0)
        return m * mean / mean.sum(dim, keepdim=True), None, None


def _share(x: Tensor, y: Tensor) -> Tensor:
    # Where everything is -inf so is y, and nothing has a share.
    return torch.exp(x - y.masked_fill(y.isinf(), 0))


def _kept(tensor: Tensor, dim: Sequence[int], dims: int, keepdim: bool) -> Tensor:
    if not keepdim and dims:
        for d in sorted(d % dims for d in dim):
            tensor = tensor.unsqueeze(d)
    return tensor


def _logsumexp_samples(make: Maker) -> Iterator[Sample]:
    yield sample(make(3, 4), 1)
    yield sample(make(2, 3, 4), (0, -1), keepdim=True)
    yield sample(make(2, 3, 4), (0, 1))
    yield sample(make(0, 4), 1)


@register(
    torch.logsumexp,
    replaces=[Tensor.logsumexp, torch.special.logsumexp],
    samples=_logsumexp_samples,
)
def logsumexp(input: Tensor, dim: int | Sequence[int], keepdim: bool = False) -> Tensor:
    """``log Σ exp(input)``, as :func:`torch.logsumexp`.

    Args:
        input: any shape.
        dim: the dimensions summed over.
        keepdim: keep them with size one.

    Returns:
        ``input`` without (or with size one in) those dimensions.
    """
    return LogSumExp.call(input, (dim,) if isinstance(dim, int) else tuple(dim), keepdim)


class Maximum(Op):
    """``y = max(a, b)``; the greater receives the error, of equal ones a as much as ``tie`` says.

    Secant: where both runs choose the same, the difference is that one's; where the choice
    changes, the mixture ``λ a + (1 - λ) b`` with the λ that gives the difference exactly. With
    ``y - y₀`` between ``a - a₀`` and ``b - b₀`` there is one in [0, 1].
    """

    @staticmethod
    def forward(a: Tensor, b: Tensor, tie: float) -> Tensor:
        return torch.maximum(a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, b, ctx.tie = inputs
        ctx.save_for_backward(a, b)
        ctx.save_for_forward(a, b)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        return *_shared(grad_output, _wins(a, b, ctx.tie), a, b), None

    @staticmethod
    def jvp(ctx: Any, ta: Tensor | None, tb: Tensor | None, _: Any) -> Tensor | None:
        a, b = ctx.saved_tensors
        weight = _wins(a, b, ctx.tie)
        return add_tangents(
            None if ta is None else ta * weight, None if tb is None else tb * (1 - weight)
        )

    @staticmethod
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        (a, b, tie), (a0, b0, _) = args, args0
        win, win0 = _wins(a, b, tie), _wins(a0, b0, tie)
        by_a, by_b, change = a - a0, b - b0, output - output0
        gap = by_a - by_b
        mixed = (change - by_b) / gap.masked_fill(gap == 0, 1)
        weight = torch.where((win == win0) | (gap == 0), (win + win0) / 2, mixed)
        return *_shared(multiplier, weight, a, b), None

    @classmethod
    def relevance(
        cls, relevance: Tensor, rule: Rule, args: tuple[Any, ...], output: Any
    ) -> tuple[Tensor | None, ...]:
        """Winner takes all."""
        return *_shared(relevance, _wins(*args), *args[:2]), None


def _wins(a: Tensor, b: Tensor, tie: float) -> Tensor:
    """1 where a is greater, 0 where b is, ``tie`` where they are equal."""
    return (a > b).to(a.dtype) + tie * (a == b).to(a.dtype)


def _shared(g: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return sum_to(g * weight, a.shape), sum_to(g * (1 - weight), b.shape)


def _two(make: Maker) -> Iterator[Sample]:
    yield sample(make(3, 4), make(3, 4))
    yield sample(make(2, 3, 4), make(4))
    yield sample(make(0, 4), make(4))


@register(torch.maximum, replaces=[Tensor.maximum], samples=_two)
def maximum(input: Tensor, other: Tensor) -> Tensor:
    """The greater of two tensors, element by element, as :func:`torch.maximum`."""
    return Maximum.call(input, other, 0.5)


@register(torch.minimum, replaces=[Tensor.minimum], samples=_two)
def minimum(input: Tensor, other: Tensor) -> Tensor:
    """The lesser of two tensors, element by element, as :func:`torch.minimum`."""
    return least(input, other, 0.5)


def least(a: Tensor, b: Tensor, tie: float) -> Tensor:
    """The lesser of two tensors; where they are equal, a receives ``tie`` of the error."""
    if not (a.is_floating_point() and b.is_floating_point()):
        # The negatives of integers need not exist.
        dtype = torch.result_type(a, b)
        if not dtype.is_floating_point:
            return torch.minimum(a, b)
        a, b = a.to(dtype), b.to(dtype)
    return -Maximum.call(-a, -b, tie)


class Amax(Op):
    """``y = max x`` over some dimensions; equal maxima share the error.

    Secant: with the routes of both runs, ``y - y₀ = x[i] - x₀[i] + (x₀[i] - y₀)`` and likewise for
    ``j``, where i and j attain y and y₀; as in max-pooling, the mixture of ``x[i] - x₀[i]`` (at
    most too great) and ``x[j] - x₀[j]`` (at most too small) that is exact. LRP: winner takes all.
    """

    @staticmethod
    def forward(x: Tensor, dim: tuple[int, ...], keepdim: bool) -> Tensor:
        return torch.amax(x, dim, keepdim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.dim, ctx.keepdim = inputs
        ctx.save_for_backward(x, output)
        ctx.save_for_forward(x, output)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, y = ctx.saved_tensors
        y, g = (_kept(t, ctx.dim, x.dim(), ctx.keepdim) for t in (y, grad_output))
        return g * _at(x, y, ctx.dim), None, None

    @staticmethod
    def jvp(ctx: Any, tx: Tensor | None, *_: Any) -> Tensor | None:
        x, y = ctx.saved_tensors
        route = _at(x, _kept(y, ctx.dim, x.dim(), ctx.keepdim), ctx.dim)
        return None if tx is None else (route * tx).sum(ctx.dim, ctx.keepdim)

    @staticmethod
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        (x, dim, keepdim), x0 = args, args0[0]
        y, y0, m = (_kept(t, dim, x.dim(), keepdim) for t in (output, output0, multiplier))
        now, ref = _at(x, y, dim), _at(x0, y0, dim)
        by_now = ((x - x0) * now).sum(dim, keepdim=True)
        by_ref = ((x - x0) * ref).sum(dim, keepdim=True)
        gap = by_now - by_ref
        mixed = (y - y0 - by_ref) / gap.masked_fill(gap == 0, 1)
        weight = torch.where(gap == 0, 0.5, mixed)
        return m * (weight * now + (1 - weight) * ref), None, None

    relevance = classmethod(routes)


def _at(x: Tensor, y: Tensor, dim: tuple[int, ...]) -> Tensor:
    """One over the number of maxima where x is a maximum, else 0."""
    found = (x == y).to(x.dtype)
    return found / found.sum(dim, keepdim=True)


def _amax_samples(make: Maker) -> Iterator[Sample]:
    yield sample(make(3, 4), 1)
    yield sample(make(2, 3, 4), (0, 2), keepdim=True)
    yield sample(make(0, 4), 1)


@register(torch.amax, replaces=[Tensor.amax], samples=_amax_samples)
def amax(input: Tensor, dim: int | Sequence[int] = (), keepdim: bool = False) -> Tensor:
    """The maximum over dimensions, as :func:`torch.amax`.

    Args:
        input: any shape.
        dim: the dimensions; all of them by default.
        keepdim: keep them with size one.

    Returns:
        ``input`` without (or with size one in) those dimensions.
    """
    return Amax.call(input, _dims(input, dim), keepdim)


@register(torch.amin, replaces=[Tensor.amin], samples=_amax_samples)
def amin(input: Tensor, dim: int | Sequence[int] = (), keepdim: bool = False) -> Tensor:
    """The minimum over dimensions, as :func:`torch.amin`; see :func:`amax`."""
    if not input.is_floating_point():  # the negatives of integers need not exist
        return torch.amin(input, _dims(input, dim), keepdim)
    return -Amax.call(-input, _dims(input, dim), keepdim)


def _dims(input: Tensor, dim: int | Sequence[int]) -> tuple[int, ...]:
    if isinstance(dim, int):
        return (dim,)
    return tuple(dim) or tuple(range(input.dim()))
