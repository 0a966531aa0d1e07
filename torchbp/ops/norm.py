"""What the normalisations share: ``x̂`` and its derivatives."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torchbp.kernels.reference_common import sums_dtype
from torchbp.ops.base import add_tangents, can_use_kernel, midpoint
from torchbp.ops.elementwise import _FUSED_DEVICES, can_fuse
from torchbp.ops.relevance import Rule, quotient


class Moments:
    """``x̂ = (x - mean) r`` with ``r = (variance + eps)^-½`` over ``dims``.

    Backward: ``∂x = r (g - mean(g) - x̂ mean(g x̂))`` (Ioffe & Szegedy 2015).
    Secant by composition: centre (linear), mean of squares (``c² - c₀² = (c + c₀)(c - c₀)``),
    reciprocal root (``r - r₀ = -(v - v₀) / (s s₀ (s + s₀))``, ``s = 1/r``), product (midpoints).

    Args:
        x: what is normalised.
        dims: the dimensions to normalise over.
        eps: added to the variance.
        centre: subtract the mean; without it ``variance`` is the mean of squares (Zhang & Sennrich
            2019).
    """

    def __init__(self, x: Tensor, dims: Sequence[int], eps: float, centre: bool = True) -> None:
        self.dims, self.centre = tuple(dims), centre
        self.centred = x - mean_over(x, self.dims) if centre else x
        self.rstd = torch.rsqrt(mean_over(self.centred.square(), self.dims) + eps)

    @property
    def normalised(self) -> Tensor:
        """``x̂``."""
        return self.centred * self.rstd


def mean_over(tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The mean, ``dims`` kept; over no dimension at all the tensor itself."""
    return tensor.mean(dims, keepdim=True) if dims else tensor


def tangent(
    v: Tensor, xhat: Tensor, rstd: Tensor, dims: tuple[int, ...], centre: bool = True
) -> Tensor:
    """The derivative of ``x̂``, applied to ``v``: symmetric, so backward and jvp are one."""
    through = torch.addcmul(v, xhat, mean_over(v * xhat, dims), value=-1)
    return rstd * (through - mean_over(v, dims) if centre else through)


def secant(m: Tensor, now: Moments, ref: Moments) -> Tensor:
    """Multipliers of ``x`` from multipliers of ``x̂``, between two runs."""
    dims = now.dims
    centred, rstd = midpoint(now.centred, ref.centred), midpoint(now.rstd, ref.rstd)
    s, s0 = 1 / now.rstd, 1 / ref.rstd
    product = m * centred
    of_rstd = product.sum(dims, keepdim=True) if dims else product
    of_variance = -of_rstd / (s * s0 * (s + s0))
    count = math.prod(centred.shape[d] for d in dims)
    of_centred = m * rstd + of_variance * 2 * centred / max(count, 1)
    return of_centred - mean_over(of_centred, dims) if now.centre else of_centred


def shares(
    relevance: Tensor, x: Tensor, output: Tensor, scale: Tensor, dims: tuple[int, ...], rule: Rule
) -> Tensor:
    """LRP through ``(x - mean) scale + shift`` with the scale taken for a constant.

    The scale is ``r w``: the standard deviation counts as a constant (the LN-rule of Ali et al.
    2022, the rule of Achtibat et al. 2024), and what is left is linear in ``x``.

    Args:
        relevance: of the output.
        x: the input.
        output: ``(x - mean) scale + shift``.
        scale: broadcasts with ``x``.
        dims: what the mean is taken over; empty if it is a constant, as part of the shift.
        rule: its epsilon stabilises the division by the output; ``pass`` hands on what came.

    Returns:
        The relevance of ``x``; conserved up to what the shift and epsilon take.
    """
    if rule.name == "pass":
        return relevance
    through = quotient(relevance, output, rule.epsilon) * scale
    return x * (through - mean_over(through, dims) if dims else through)


def affine_jvp(
    x: Tensor,
    t_xhat: Tensor | None,
    xhat: Tensor,
    weight: Tensor | None,
    tw: Tensor | None,
    tb: Tensor | None,
) -> Tensor | None:
    """Tangent of ``x̂ w + b``; ``weight`` and the tangents already broadcast against ``x``."""
    if t_xhat is not None and weight is not None:
        t_xhat = t_xhat * weight
    total = add_tangents(
        t_xhat, None if tw is None else xhat * tw, None if tb is None else tb.expand(x.shape)
    )
    return None if total is None else total.to(x.dtype).clone()


def sum_over(tensor: Tensor, dims: Sequence[int], like: Tensor) -> Tensor:
    """Gradient of a parameter that was broadcast over ``dims``."""
    summed = tensor.sum(tuple(dims)) if dims else tensor
    return summed.reshape(like.shape).to(like.dtype)


def all_but_channel(x: Tensor) -> tuple[int, ...]:
    """The dimensions of ``(N, C, *)`` without the channels."""
    return (0, *range(2, x.dim()))


def per_channel(tensor: Tensor, x: Tensor) -> Tensor:
    """``(C,)`` so that it broadcasts with ``(N, C, *)``."""
    return tensor.reshape(1, x.shape[1], *(1,) * (x.dim() - 2))


def can_normalise(x: Tensor, shape: Sequence[int], *others: Tensor | None) -> bool:
    """Whether the compiled forward takes ``x`` with rows of that shape, and what goes with it."""
    dims = len(shape)
    if not 0 < dims <= x.dim() or x.shape[x.dim() - dims :] != tuple(shape):
        return False
    given = [t for t in others if t is not None]
    return can_fuse(x, *given) and all(t.shape in (x.shape, tuple(shape)) for t in given)


def has_backward(grad_output: Tensor, x: Tensor) -> bool:
    """Whether the compiled backward of the norms takes these."""
    return can_use_kernel(grad_output, x, _FUSED_DEVICES)


def as_parameter(tensor: Tensor | None, x: Tensor) -> Tensor | None:
    """A parameter as the kernels take it: in the dtype of ``x``, or in that of sums."""
    return tensor if tensor is None or tensor.dtype is x.dtype else as_sums(tensor, x)


def of_dtype(grad: Tensor, parameter: Tensor) -> Tensor:
    """The gradient in the dtype of its parameter: ``.to`` takes microseconds to find it so."""
    return grad if grad.dtype is parameter.dtype else grad.to(parameter.dtype)


def as_sums(tensor: Tensor, x: Tensor) -> Tensor:
    """A parameter or statistic in the dtype that the kernels keep sums of ``x`` in."""
    dtype = sums_dtype(x)
    return tensor if tensor.dtype is dtype else tensor.to(dtype)
