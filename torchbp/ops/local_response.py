"""Normalisation by the activity of neighbouring channels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from torchbp.ops.base import Op, midpoint, wide
from torchbp.ops.pointwise import Power
from torchbp.ops.registry import Maker, Sample, register, sample
from torchbp.ops.relevance import passes


class LocalResponseNorm(Op):
    """``y = x d^-β``, ``d = k + α mean(x²)`` over a window of channels (Krizhevsky et al. 2012).

    With ``A`` the mean over the window, zeros beyond the ends:

    Backward: ``∂x = g d^-β - 2αβ x Aᵀ(g x d^(-β-1))``; jvp: the same with ``A`` and ``Aᵀ`` swapped.
    Secant: of the product by midpoints, of the power by its own, ``x² - x₀² = (x + x₀)(x - x₀)``.
    LRP: handed on as it is, ``d`` counts as a constant (as normalisers do in Achtibat et al. 2024).
    """

    autocast = {"cpu": "fp32", "cuda": "fp32"}
    relevance = classmethod(passes)

    @staticmethod
    def forward(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
        output = F.local_response_norm(x, size, alpha, beta, k)
        return output.clone() if output is x else output  # torch hands an empty input back

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, *ctx.settings = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        size, alpha, beta, k = ctx.settings
        full, g = wide(x), wide(grad_output)
        d = _denominator(full, size, alpha, k)
        direct = g * d**-beta
        across = _window_mean(direct * full / d, size, transposed=True)
        grad = direct - 2 * alpha * beta * full * across
        return grad.to(x.dtype), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tx: Tensor | None, *_: Any) -> Tensor | None:
        (x,) = ctx.saved_tensors
        if tx is None:
            return None
        size, alpha, beta, k = ctx.settings
        full, t = wide(x), wide(tx)
        d = _denominator(full, size, alpha, k)
        power = d**-beta
        across = _window_mean(full * t, size)
        return (t * power - 2 * alpha * beta * (full * power / d) * across).to(x.dtype)

    @staticmethod
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        (x, size, alpha, beta, k), x0 = args, args0[0]
        d, d0 = (_denominator(t, size, alpha, k) for t in (x, x0))
        power, power0 = d**-beta, d0**-beta
        of_power = multiplier * midpoint(x, x0)
        of_d, _ = Power.secant(of_power, (d, -beta), (d0, -beta), power, power0)
        assert of_d is not None
        of_square = alpha * _window_mean(of_d, size, transposed=True)
        of_x = multiplier * midpoint(power, power0) + of_square * (x + x0)
        return of_x, None, None, None, None


class LocalResponseNorm1d(LocalResponseNorm):
    """Of ``(N, C, L)``: the pooling that torch uses there is on no list of the CPU's autocast."""

    autocast = {"cuda": "fp32"}


def _window_mean(t: Tensor, size: int, transposed: bool = False) -> Tensor:
    """The mean over ``size`` neighbouring channels, or the transpose of that map."""
    if t.numel() == 0:
        return t
    before, after = size // 2, (size - 1) // 2
    pad = (after, before) if transposed else (before, after)
    samples, channels = t.shape[:2]
    flat = F.pad(t.reshape(samples, 1, channels, t[0, 0].numel()), (0, 0, *pad))
    return F.avg_pool2d(flat, (size, 1), stride=1).reshape(t.shape)


def _denominator(x: Tensor, size: int, alpha: float, k: float) -> Tensor:
    return _window_mean(x * x, size) * alpha + k


def _samples(make: Maker) -> Iterator[Sample]:
    yield sample(make(2, 5, 3), 3, alpha=0.5)
    yield sample(make(2, 4, 2, 2), 2, alpha=0.5, beta=1.5, k=2.0)
    yield sample(make(1, 3, 1, 2, 2), 5, alpha=1.0)
    yield sample(make(0, 3, 2), 2)


@register(F.local_response_norm, modules=[nn.LocalResponseNorm], samples=_samples)
def local_response_norm(
    input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Tensor:
    """Divide by the activity of a channel's neighbours, as torch's ``local_response_norm``.

    Args:
        input: ``(N, C, *)``, at least 3 dims.
        size: how many channels the window has.
        alpha: weight of the mean of squares.
        beta: exponent of the denominator.
        k: added to the mean of squares.

    Returns:
        Shape of ``input``.

    Raises:
        ValueError: if ``input`` has fewer than 3 dims.
    """
    op = LocalResponseNorm1d if input.dim() == 3 else LocalResponseNorm
    return op.call(input, size, alpha, beta, k)
