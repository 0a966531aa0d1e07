"""The p-norm: its slope and its secant, for the ops that are built on it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchbp.ops.base import vanishes


def slope(weight: Tensor, x: Tensor, norm: Tensor, p: float, dim: tuple[int, ...]) -> Tensor:
    """``weight ∂‖x‖_p / ∂x``; zero where the norm is zero, shared equally where the maximum is.

    Args:
        weight: broadcasts with ``norm``.
        x: the vectors.
        norm: their norms over ``dim``, kept with size one.
        p: any number, ``inf`` or ``-inf``.
        dim: what the norm is taken over.
    """
    if p == 0:
        return torch.zeros_like(x) * weight
    if p == 1:
        return x.sgn() * weight
    if math.isinf(p):
        return x.sgn() * _where_reached(x, norm, dim) * weight
    zero = norm == 0
    # One factor per vector first: the vectors themselves are passed over as seldom as can be.
    divisor = norm.masked_fill(zero, 1)
    factor = (weight / (divisor if p == 2 else divisor.pow(p - 1))).masked_fill(zero, 0)
    if p == 2:
        return x * factor
    powers = x * x.abs().pow(p - 2) if p > 2 else x.sgn() * x.abs().pow(p - 1)
    return (powers.masked_fill(x == 0, 0) if p < 1 else powers) * factor


def chord(
    x: Tensor, x0: Tensor, norm: Tensor, norm0: Tensor, p: float, dim: tuple[int, ...]
) -> Tensor:
    """``c`` with ``Σ c (x - x₀) = ‖x‖_p - ‖x₀‖_p``: the slope between two runs.

    ``p = 2``: ``(x + x₀) / (‖x‖ + ‖x₀‖)``. Otherwise composed of the secants of ``|·|^p`` and of
    the root; ``p = ∞``: of ``|·|`` and of the maximum, which is split between the two runs' places
    as in :class:`torchbp.ops.max_pool.MaxPool2d`.

    Args:
        x: the vectors of the actual run.
        x0: those of the reference run.
        norm: the norms of ``x`` over ``dim``, kept with size one.
        norm0: the norms of ``x0``.
        p: any number, ``inf`` or ``-inf``.
        dim: what the norm is taken over.
    """
    if p == 2:
        total = norm + norm0
        return (x + x0) / total.masked_fill(total == 0, 1)
    if p == 0:
        gap = x - x0
        change = (x != 0).to(x.dtype) - (x0 != 0).to(x.dtype)
        return change / gap.masked_fill(gap == 0, 1)
    if p == 1:
        return _power_chord(x, x0, 1)
    if math.isinf(p):
        at, at0 = _where_reached(x, norm, dim), _where_reached(x0, norm0, dim)
        a = norm - (at0 * x.abs()).sum(dim, keepdim=True)
        b = norm0 - (at * x0.abs()).sum(dim, keepdim=True)
        total = a + b
        share = torch.where(total == 0, 0.5, a / total)
        return (share * at + (1 - share) * at0) * _power_chord(x, x0, 1)
    root = _power_chord(norm.pow(p), norm0.pow(p), 1 / p)
    return _power_chord(x, x0, p) * root


def _where_reached(x: Tensor, norm: Tensor, dim: tuple[int, ...]) -> Tensor:
    """One where the maximum (or minimum) is, divided by how often it is."""
    reached = (x.abs() == norm).to(x.dtype)
    return reached / reached.sum(dim, keepdim=True).clamp(min=1)


def _power_chord(x: Tensor, x0: Tensor, p: float) -> Tensor:
    """``(|x|^p - |x₀|^p) / (x - x₀)``; where the gap is lost in digits, the slope midway."""
    gap, middle = x - x0, (x + x0) / 2
    near = vanishes(gap, torch.maximum(x.abs(), x0.abs()))
    quotient = (x.abs().pow(p) - x0.abs().pow(p)) / gap.masked_fill(near, 1)
    at_zero = near & (middle == 0)
    inner = p * middle.sgn() * middle.abs().masked_fill(at_zero, 1).pow(p - 1)
    return torch.where(near, inner, quotient)
