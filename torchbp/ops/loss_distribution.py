"""Losses of distributions: Kullback-Leibler, the likelihoods of counts and of Gaussians."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchbp.ops.base import midpoint
from torchbp.ops.loss import Loss, check_reduction, legacy_reduction, mean_slope, reduced
from torchbp.ops.registry import Maker, Sample, register, sample
from torchbp.ops.softmax import log_mean


class KLDiv(Loss):
    """``l = y (log y - x)``, or ``exp(y) (y - x)`` for logarithmic targets.

    Backward: ``∂x = -y``, ``∂y = log y + 1 - x``; with ``t = exp(y)``: ``∂x = -t``,
    ``∂y = t (y - x + 1)``.
    Secant: the products by midpoints, exp and log by the logarithmic mean.
    """

    @staticmethod
    def forward(x: Tensor, y: Tensor, log_target: bool, reduction: str) -> Tensor:
        return torch.kl_div(x, y, nn._reduction.get_enum(reduction), log_target=log_target)

    @staticmethod
    def slope(i: int, v: Tensor, x: Tensor, y: Tensor, log_target: bool) -> Tensor:
        if log_target:
            return y.exp() * (-v if i == 0 else (y - x + 1) * v)
        return -y * v if i == 0 else (_safe_log(y) + 1 - x) * v

    @staticmethod
    def average(
        now: tuple[Any, ...], ref: tuple[Any, ...], log_target: bool
    ) -> tuple[Tensor | None, ...]:
        (x, y), (x0, y0) = now, ref
        if log_target:
            t, gap = midpoint(y.exp(), y0.exp()), midpoint(y - x, y0 - x0)
            return -t, gap * log_mean(y, y0) + t
        log_y, log_y0 = _safe_log(y), _safe_log(y0)
        rise = midpoint(y, y0) / log_mean(log_y, log_y0)  # of log y, times y
        return -midpoint(y, y0), midpoint(log_y - x, log_y0 - x0) + rise


def _safe_log(p: Tensor) -> Tensor:
    # 0 log 0 is zero whatever finite number stands for the logarithm.
    return p.masked_fill(p == 0, torch.finfo(p.dtype).tiny).log()


class PoissonNLL(Loss):
    """``l = exp(x) - y x``, or ``x - y log(x + ε)`` for plain input.

    ``full`` adds Stirling's ``y log y - y + log(2 π y) / 2`` where ``y > 1``.
    Backward: ``∂x = exp(x) - y`` or ``1 - y / (x + ε)``; ``∂y = -x`` or ``-log(x + ε)``, and
    ``log y + 1 / 2y`` with ``full``.
    Secant: the products by midpoints, exp and log by the logarithmic mean.
    """

    @staticmethod
    def forward(
        x: Tensor, y: Tensor, log_input: bool, full: bool, eps: float, reduction: str
    ) -> Tensor:
        return torch.poisson_nll_loss(x, y, log_input, full, eps, nn._reduction.get_enum(reduction))

    @staticmethod
    def slope(
        i: int, v: Tensor, x: Tensor, y: Tensor, log_input: bool, full: bool, eps: float
    ) -> Tensor:
        if i == 0:
            return (x.exp() - y if log_input else 1 - y / (x + eps)) * v
        slope = -x if log_input else -torch.log(x + eps)
        return (slope + _stirling_slope(y) if full else slope) * v

    @staticmethod
    def average(
        now: tuple[Any, ...], ref: tuple[Any, ...], log_input: bool, full: bool, eps: float
    ) -> tuple[Tensor | None, ...]:
        (x, y), (x0, y0) = now, ref
        if log_input:
            m_x, m_y = log_mean(x, x0) - midpoint(y, y0), -midpoint(x, x0)
        else:
            log_x, log_x0 = torch.log(x + eps), torch.log(x0 + eps)
            m_x = 1 - midpoint(y, y0) / log_mean(log_x, log_x0)
            m_y = -midpoint(log_x, log_x0)
        if full:
            same = (y > 1) == (y0 > 1)
            m_y = m_y + mean_slope(_stirling, _stirling_slope, y, y0, same)
        return m_x, m_y


def _stirling(y: Tensor) -> Tensor:
    many = y.clamp(min=1)
    value = many * many.log() - many + 0.5 * torch.log(2 * math.pi * many)
    return torch.where(y > 1, value, 0)


def _stirling_slope(y: Tensor) -> Tensor:
    many = y.clamp(min=1)
    return torch.where(y > 1, many.log() + 0.5 / many, 0)


class GaussianNLL(Loss):
    """``l = (log v + (x - y)² / v) / 2`` with ``v = max(var, ε)``; ``full`` adds ``log(2 π) / 2``.

    Backward: ``∂x = (x - y) / v = -∂y``; ``∂var = (1 / v - (x - y)² / v²) / 2``, below ε too: torch
    cuts the variance off behind the back of autograd (Nix and Weigend 1994 give the loss).
    Secant: the product by midpoints, log by the logarithmic mean, ``Δ(1/v) = -Δv / (v v0)``; the
    multiplier of a variance that stays below ε is zero.
    """

    autocast = {"cuda": "fp32"}
    tensors = 3

    @staticmethod
    def forward(
        x: Tensor, y: Tensor, var: Tensor, full: bool, eps: float, reduction: str
    ) -> Tensor:
        v = var.clamp(min=eps)
        loss = 0.5 * (torch.log(v) + (x - y) ** 2 / v)
        return reduced(loss + 0.5 * math.log(2 * math.pi) if full else loss, reduction)

    @staticmethod
    def slope(
        i: int, v: Tensor, x: Tensor, y: Tensor, var: Tensor, full: bool, eps: float
    ) -> Tensor:
        # The addend is a constant: v counts as var itself when this is differentiated again.
        inverse = (var + (var.clamp(min=eps) - var).detach()).reciprocal()
        scaled = (x - y) * inverse
        if i == 2:
            return (inverse - scaled.square()) * (0.5 * v)
        return scaled * (-v if i else v)

    @staticmethod
    def average(
        now: tuple[Any, ...], ref: tuple[Any, ...], full: bool, eps: float
    ) -> tuple[Tensor | None, ...]:
        (x, y, var), (x0, y0, var0) = now, ref
        v, v0, e, e0 = var.clamp(min=eps), var0.clamp(min=eps), x - y, x0 - y0
        m_x = midpoint(1 / v, 1 / v0) * (e + e0) / 2
        m_v = (1 / log_mean(v.log(), v0.log()) - midpoint(e**2, e0**2) / (v * v0)) / 2
        return m_x, -m_x, m_v * mean_slope(lambda t: t.clamp(min=eps), _one, var, var0)


def _one(t: Tensor) -> Tensor:
    return torch.ones_like(t)


def _kl_samples(make: Maker) -> Iterator[Sample]:
    def positive(*shape: int) -> Tensor:
        return make(*shape).detach().exp().requires_grad_(make.requires_grad)

    for reduction in ("none", "sum", "mean", "batchmean"):
        yield sample(make(3, 4), positive(3, 4), reduction=reduction)
        yield sample(make(3, 4), make(3, 4), reduction=reduction, log_target=True)
    yield sample(make(3, 1), positive(4), reduction="sum")
    yield sample(make(3, 4), make(4), reduction="batchmean", log_target=True)
    yield sample(make(), positive(), reduction="batchmean")
    yield sample(make(0, 4), positive(0, 4), reduction="sum")


@register(F.kl_div, replaces=[torch.kl_div], modules=[nn.KLDivLoss], samples=_kl_samples)
def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Tensor:
    """Kullback-Leibler divergence, as :func:`torch.nn.functional.kl_div`.

    Args:
        input: log-probabilities, any shape.
        target: probabilities, shape of ``input``; their logarithms with ``log_target``.
        size_average: superseded by ``reduction``.
        reduce: superseded by ``reduction``.
        reduction: ``"none"``, ``"mean"`` (over all elements), ``"batchmean"`` (the sum over the
            size of the first dimension) or ``"sum"``.
        log_target: whether ``target`` holds logarithms.

    Returns:
        A scalar, or the terms for ``reduction="none"``.

    Raises:
        ValueError: for an unknown reduction.
    """
    flags = size_average is not None or reduce is not None
    if reduction == "mean" and not flags and not torch.compiler.is_compiling():
        warnings.warn(
            "kl_div: reduction='mean' divides by the number of elements; the mean of the "
            "divergences is 'batchmean', which divides by the number of distributions",
            stacklevel=2,
        )
    reduction = legacy_reduction(size_average, reduce, reduction)
    if reduction != "batchmean":
        return KLDiv.call(input, target, log_target, reduction)
    total: Tensor = KLDiv.call(input, target, log_target, "sum")
    return total / input.shape[0] if input.dim() else total


def _poisson_samples(make: Maker) -> Iterator[Sample]:
    def positive(*shape: int) -> Tensor:
        return (2 * make(*shape).detach().abs() + 0.1).requires_grad_(make.requires_grad)

    for reduction in ("none", "sum", "mean"):
        yield sample(make(3, 4), make(3, 4), reduction=reduction)
        yield sample(make(3, 4), positive(3, 4), full=True, reduction=reduction)
        yield sample(positive(3, 4), positive(3, 4), log_input=False, reduction=reduction)
    yield sample(positive(3, 1), positive(4), log_input=False, full=True, eps=0.1)
    yield sample(make(0, 4), make(0, 4), reduction="sum")


@register(
    F.poisson_nll_loss,
    replaces=[torch.poisson_nll_loss],
    modules=[nn.PoissonNLLLoss],
    samples=_poisson_samples,
)
def poisson_nll_loss(
    input: Tensor,
    target: Tensor,
    log_input: bool = True,
    full: bool = False,
    size_average: bool | None = None,
    eps: float = 1e-8,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Negative log-likelihood of counts, as :func:`torch.nn.functional.poisson_nll_loss`.

    Args:
        input: rates, any shape; their logarithms with ``log_input``.
        target: counts, shape of ``input``.
        log_input: whether ``input`` holds logarithms.
        full: add Stirling's approximation of the term that depends on the target alone.
        size_average: superseded by ``reduction``.
        eps: added to a rate before its logarithm is taken.
        reduce: superseded by ``reduction``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    Returns:
        A scalar, or the terms for ``reduction="none"``.

    Raises:
        ValueError: for an unknown reduction.
    """
    if size_average is None and reduce is None:
        check_reduction("poisson_nll_loss", reduction)
    reduction = legacy_reduction(size_average, reduce, reduction)
    return PoissonNLL.call(input, target, log_input, full, eps, reduction)


def _gaussian_samples(make: Maker) -> Iterator[Sample]:
    def variance(*shape: int) -> Tensor:
        return make(*shape).detach().exp().requires_grad_(make.requires_grad)

    for reduction in ("none", "sum", "mean"):
        yield sample(make(3, 4), make(3, 4), variance(3, 4), reduction=reduction)
        yield sample(make(3, 4), make(3, 4), variance(3), full=True, reduction=reduction)
    yield sample(make(3, 4), make(4), variance(3, 1))
    yield sample(make(3, 4), make(3, 4), 0.7)
    yield sample(make(0, 4), make(0, 4), variance(0, 4), reduction="sum")


@register(F.gaussian_nll_loss, modules=[nn.GaussianNLLLoss], samples=_gaussian_samples)
def gaussian_nll_loss(
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Tensor:
    """Negative log-likelihood of Gaussians, as :func:`torch.nn.functional.gaussian_nll_loss`.

    Args:
        input: expectations, any shape.
        target: samples, shape of ``input``, or one that broadcasts to it.
        var: variances: a number, or shape of ``input``, or that with a last dimension of one or
            none, or with any one dimension of size one.
        full: add the constant term.
        eps: least variance; smaller ones are raised to it.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    Returns:
        A scalar, or the terms for ``reduction="none"``.

    Raises:
        ValueError: if a variance is negative, if ``var`` has another shape, or for an unknown
            reduction.
    """
    if isinstance(var, float):
        var = torch.full_like(input, var, requires_grad=False)
    if _some_negative(var):
        raise ValueError("gaussian_nll_loss: var has negative entries")
    if var.shape == input.shape[:-1] and var.shape != input.shape:
        var = var.unsqueeze(-1)
    elif not _spans(var, input):
        raise ValueError(
            f"gaussian_nll_loss: var has shape {tuple(var.shape)}, which does not fit that of "
            f"input, {tuple(input.shape)}"
        )
    check_reduction("gaussian_nll_loss", reduction)
    return GaussianNLL.call(input, target, var, full, eps, reduction)


def _some_negative(var: Tensor) -> bool:
    if torch.compiler.is_compiling():  # what depends on values cannot be traced
        return False
    try:
        return bool((var < 0).any())
    except RuntimeError:  # nor asked of a batch under vmap, nor of a tensor without storage
        return False


def _spans(var: Tensor, input: Tensor) -> bool:
    """Whether var has input's shape, but for at most one dimension, where it has size one."""
    if var.dim() != input.dim():
        return False
    other = [v for v, n in zip(var.shape, input.shape, strict=True) if v != n]
    return other in ([], [1])
