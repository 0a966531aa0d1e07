"""Elementary functions, as they are called inside a user's own forward."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from torchbp.ops.arithmetic import Pow, tensor_beside
from torchbp.ops.elementwise import Elementwise
from torchbp.ops.reduce import Maximum, least
from torchbp.ops.registry import Maker, Sample, register, sample


class Exp(Elementwise):
    """``y = exp x``; ``∂x = g y``."""

    autocast = {"cuda": "fp32"}

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.exp(x)

    @staticmethod
    def keep(x: Tensor, y: Tensor) -> Tensor:
        return y

    @staticmethod
    def tangent(v: Tensor, kept: Tensor) -> Tensor:
        return v * kept


class Log(Elementwise):
    """``y = log x``; ``∂x = g / x``."""

    autocast = {"cuda": "fp32"}

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.log(x)

    @staticmethod
    def tangent(v: Tensor, kept: Tensor) -> Tensor:
        return v / kept


class Sqrt(Elementwise):
    """``y = √x``; ``∂x = g / 2y``."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.sqrt(x)

    @staticmethod
    def keep(x: Tensor, y: Tensor) -> Tensor:
        return y

    @staticmethod
    def tangent(v: Tensor, kept: Tensor) -> Tensor:
        return v / (2 * kept)


class Rsqrt(Elementwise):
    """``y = 1 / √x``; ``∂x = -g y³ / 2``."""

    autocast = {"cuda": "fp32"}

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.rsqrt(x)

    @staticmethod
    def keep(x: Tensor, y: Tensor) -> Tensor:
        return y

    @staticmethod
    def tangent(v: Tensor, kept: Tensor) -> Tensor:
        return -0.5 * v * kept**3


class Reciprocal(Elementwise):
    """``y = 1 / x``; ``∂x = -g y²``."""

    autocast = {"cuda": "fp32"}

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.reciprocal(x)

    @staticmethod
    def keep(x: Tensor, y: Tensor) -> Tensor:
        return y

    @staticmethod
    def tangent(v: Tensor, kept: Tensor) -> Tensor:
        return -v * kept * kept


class Power(Elementwise):
    """``y = x ^ p`` with a constant p; ``∂x = g p x ^ (p-1)``, and 0 for p = 0."""

    autocast = {"cuda": "fp32"}

    @staticmethod
    def forward(x: Tensor, exponent: float) -> Tensor:
        return torch.pow(x, exponent)

    @staticmethod
    def tangent(v: Tensor, kept: Tensor, exponent: float) -> Tensor:
        return torch.zeros_like(v) if exponent == 0 else v * (exponent * kept ** (exponent - 1))


class Abs(Elementwise):
    """``y = |x|``; ``∂x = g sign(x)``, for complex x ``g x / |x|``."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.abs(x)

    @staticmethod
    def tangent(v: Tensor, kept: Tensor) -> Tensor:
        # Not holomorphic: the sign is conjugated for a tangent, not for an error, which is real.
        result = v * kept.sgn().conj()
        return result.real if v.is_complex() else result

    @staticmethod
    def branch(x: Tensor) -> Tensor:
        return x > 0


class Sin(Elementwise):
    """``y = sin x``; ``∂x = g cos x``."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.sin(x)

    @staticmethod
    def tangent(v: Tensor, kept: Tensor) -> Tensor:
        return v * kept.cos()


class Cos(Elementwise):
    """``y = cos x``; ``∂x = -g sin x``."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.cos(x)

    @staticmethod
    def tangent(v: Tensor, kept: Tensor) -> Tensor:
        return -v * kept.sin()


class Erf(Elementwise):
    """``y = erf x``; ``∂x = g 2 exp(-x²) / √π``."""

    autocast = {"cuda": "fp32"}

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.erf(x)

    @staticmethod
    def tangent(v: Tensor, kept: Tensor) -> Tensor:
        return v * torch.exp(-kept * kept) * (2 / math.sqrt(math.pi))


class Expm1(Elementwise):
    """``y = exp(x) - 1``; ``∂x = g (y + 1)``."""

    autocast = {"cuda": "fp32"}

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.expm1(x)

    @staticmethod
    def keep(x: Tensor, y: Tensor) -> Tensor:
        return y

    @staticmethod
    def tangent(v: Tensor, kept: Tensor) -> Tensor:
        return v * (kept + 1)


class Log1p(Elementwise):
    """``y = log(1 + x)``; ``∂x = g / (1 + x)``."""

    autocast = {"cuda": "fp32"}

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.log1p(x)

    @staticmethod
    def tangent(v: Tensor, kept: Tensor) -> Tensor:
        return v / (1 + kept)


#: Whether an input that equals a bound gets the error: torch's clamp has changed its mind in 2.14,
#: where a number as bound then leaves it nothing, and a tensor takes half.
EDGES_PASS = torch.__version__ < "2.14"


class Clamp(Elementwise):
    """``y = min(max(x, low), high)``; ``∂x = g`` within the bounds, else 0."""

    @staticmethod
    def forward(x: Tensor, low: float | None, high: float | None) -> Tensor:
        return torch.clamp(x, low, high)

    @staticmethod
    def tangent(v: Tensor, kept: Tensor, low: float | None, high: float | None) -> Tensor:
        outside = _side(kept, low, high) != 0
        if not EDGES_PASS:
            for bound in (low, high):
                outside = outside if bound is None else outside | (kept == bound)
        return v.masked_fill(outside, 0)

    @staticmethod
    def branch(x: Tensor, low: float | None, high: float | None) -> Tensor:
        return _side(x, low, high)


def _side(x: Tensor, low: float | None, high: float | None) -> Tensor:
    """-1 below the bounds, 1 above them, 0 between."""
    below = torch.zeros_like(x, dtype=torch.int8) if low is None else (x < low).to(torch.int8)
    return -below if high is None else (x > high).to(torch.int8) - below


def _any_sign(make: Maker) -> Iterator[Sample]:
    yield sample(make(3, 4))
    yield sample(make(0, 4))


def _positive(make: Maker) -> Iterator[Sample]:
    yield sample(make.positive(3, 4))
    yield sample(make(0, 4))


@register(torch.exp, replaces=[Tensor.exp], inplace=[Tensor.exp_], samples=_any_sign)
def exp(input: Tensor) -> Tensor:
    """``exp(input)``, as :func:`torch.exp`."""
    return Exp.call(input)


@register(torch.log, replaces=[Tensor.log], inplace=[Tensor.log_], samples=_positive)
def log(input: Tensor) -> Tensor:
    """The natural logarithm, as :func:`torch.log`."""
    return Log.call(input)


@register(torch.sqrt, replaces=[Tensor.sqrt], inplace=[Tensor.sqrt_], samples=_positive)
def sqrt(input: Tensor) -> Tensor:
    """The square root, as :func:`torch.sqrt`."""
    return Sqrt.call(input)


@register(torch.rsqrt, replaces=[Tensor.rsqrt], inplace=[Tensor.rsqrt_], samples=_positive)
def rsqrt(input: Tensor) -> Tensor:
    """``1 / √input``, as :func:`torch.rsqrt`."""
    return Rsqrt.call(input)


@register(torch.reciprocal, replaces=[Tensor.reciprocal], samples=_positive)
def reciprocal(input: Tensor) -> Tensor:
    """``1 / input``, as :func:`torch.reciprocal`."""
    return Reciprocal.call(input)


def _power_samples(make: Maker) -> Iterator[Sample]:
    yield sample(make(3, 4), 2)
    yield sample(make(3, 4), 3)
    yield sample(make.positive(3, 4), -0.5)
    yield sample(make.positive(3, 4), 0)
    yield sample(make.positive(3, 4), make(4))
    yield sample(make.positive(3, 1), make(2, 1, 2))
    yield sample(make(0, 4), 2)


@register(
    torch.pow,
    replaces=[Tensor.pow, Tensor.__pow__],
    inplace=[Tensor.pow_, Tensor.__ipow__],
    samples=_power_samples,
)
def pow(input: Tensor | float, exponent: Tensor | float) -> Tensor:
    """``input ^ exponent``, as :func:`torch.pow`.

    Args:
        input: any shape; a number if ``exponent`` is a tensor.
        exponent: a number, or a tensor of a shape that broadcasts with ``input``.

    Returns:
        The power, in the broadcast shape.
    """
    if not isinstance(exponent, Tensor):
        return Power.call(input, exponent)
    return Pow.call(tensor_beside(exponent, input), exponent)


@register(torch.square, replaces=[Tensor.square], inplace=[Tensor.square_], samples=_any_sign)
def square(input: Tensor) -> Tensor:
    """``input²``, as :func:`torch.square`."""
    return Power.call(input, 2)


@register(torch.abs, replaces=[Tensor.abs, torch.absolute, Tensor.__abs__], samples=_any_sign)
def abs(input: Tensor) -> Tensor:
    """The absolute value, as :func:`torch.abs`."""
    return Abs.call(input)


@register(torch.sin, replaces=[Tensor.sin], samples=_any_sign)
def sin(input: Tensor) -> Tensor:
    """The sine, as :func:`torch.sin`."""
    return Sin.call(input)


@register(torch.cos, replaces=[Tensor.cos], samples=_any_sign)
def cos(input: Tensor) -> Tensor:
    """The cosine, as :func:`torch.cos`."""
    return Cos.call(input)


@register(torch.erf, replaces=[Tensor.erf, torch.special.erf], samples=_any_sign)
def erf(input: Tensor) -> Tensor:
    """The error function, as :func:`torch.erf`."""
    return Erf.call(input)


@register(torch.expm1, replaces=[Tensor.expm1, torch.special.expm1], samples=_any_sign)
def expm1(input: Tensor) -> Tensor:
    """``exp(input) - 1``, as :func:`torch.expm1`."""
    return Expm1.call(input)


@register(torch.log1p, replaces=[Tensor.log1p, torch.special.log1p], samples=_positive)
def log1p(input: Tensor) -> Tensor:
    """``log(1 + input)``, as :func:`torch.log1p`."""
    return Log1p.call(input)


def _clamp_samples(make: Maker) -> Iterator[Sample]:
    yield sample(make(3, 4), -0.5, 0.7)
    yield sample(make(3, 4), min=0.1)
    yield sample(make(3, 4), max=0.1)
    yield sample(make(3, 4), make(4), make(3, 1))
    yield sample(make(0, 4), 0, 1)


@register(
    torch.clamp,
    replaces=[torch.clip, Tensor.clamp, Tensor.clip],
    inplace=[Tensor.clamp_, Tensor.clip_],
    samples=_clamp_samples,
)
def clamp(input: Tensor, min: Any = None, max: Any = None) -> Tensor:
    """``input`` kept within bounds, as :func:`torch.clamp`.

    Args:
        input: any shape.
        min: the lower bound, a number or a tensor of a shape that broadcasts, or ``None``.
        max: the upper bound, likewise; a tensor only if ``min`` is none or a tensor.

    Returns:
        The broadcast shape. Where ``input`` equals a bound, the error goes where this torch's goes.
    """
    if not (isinstance(min, Tensor) or isinstance(max, Tensor)):
        return Clamp.call(input, min, max)
    tie = 1.0 if EDGES_PASS else 0.5
    if min is not None:
        input = Maximum.call(input, min, tie)
    return input if max is None else least(input, max, tie)


@register(torch.clamp_min, replaces=[Tensor.clamp_min], inplace=[Tensor.clamp_min_],
          samples=lambda make: iter([sample(make(3, 4), 0.1), sample(make(0, 4), 0)]))  # fmt: skip
def clamp_min(input: Tensor, min: Any) -> Tensor:
    """``max(input, min)``, as :func:`torch.clamp_min`; see :func:`clamp`."""
    return clamp(input, min)


@register(torch.clamp_max, replaces=[Tensor.clamp_max], inplace=[Tensor.clamp_max_],
          samples=lambda make: iter([sample(make(3, 4), 0.1), sample(make(0, 4), 0)]))  # fmt: skip
def clamp_max(input: Tensor, max: Any) -> Tensor:
    """``min(input, max)``, as :func:`torch.clamp_max`; see :func:`clamp`."""
    return clamp(input, None, max)
