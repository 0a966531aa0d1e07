"""Activation functions."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchbp.ops.elementwise import Elementwise, in_place
from torchbp.ops.registry import Maker, Sample, register, sample


class ReLU(Elementwise):
    """``y = max(x, 0)``; ``∂x = g`` where ``y > 0``, else 0 (at the kink as well)."""

    fused = "relu"

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.relu(x)

    @staticmethod
    def keep(x: Tensor, y: Tensor) -> Tensor:
        return y

    @staticmethod
    def tangent(v: Tensor, kept: Tensor) -> Tensor:
        return v.masked_fill(kept <= 0, 0)  # not v * (y > 0): an infinite v stays out

    @staticmethod
    def branch(x: Tensor) -> Tensor:
        return x > 0


class LeakyReLU(Elementwise):
    """``y = x`` where ``x > 0``, else ``slope * x``; ``∂x = g`` or ``slope * g``."""

    fused = "leaky_relu"

    @staticmethod
    def forward(x: Tensor, negative_slope: float) -> Tensor:
        return F.leaky_relu(x, negative_slope)

    @staticmethod
    def keep(x: Tensor, y: Tensor, negative_slope: float) -> Tensor:
        return y if negative_slope >= 0 else x  # y tells the sign of x unless the slope flips it

    @staticmethod
    def tangent(v: Tensor, kept: Tensor, negative_slope: float) -> Tensor:
        return torch.where(kept > 0, v, v * negative_slope)

    @staticmethod
    def branch(x: Tensor, negative_slope: float) -> Tensor:
        return x > 0


class GELU(Elementwise):
    """``y = x Φ(x)`` with the normal distribution Φ (Hendrycks and Gimpel, 2016).

    ``∂x = g (Φ(x) + x φ(x))`` with the density φ.
    """

    fused = "gelu"

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return F.gelu(x)

    @staticmethod
    def tangent(v: Tensor, kept: Tensor) -> Tensor:
        cdf = 0.5 * (1 + torch.erf(kept * math.sqrt(0.5)))
        density = torch.exp(-0.5 * kept * kept) / math.sqrt(2 * math.pi)
        return v * (cdf + kept * density)


class GELUTanh(Elementwise):
    """``y = x (1 + tanh u) / 2`` with ``u = √(2/π) (x + 0.044715 x³)``.

    Source: Hendrycks and Gimpel, 2016.

    ``∂x = g (1 + t + x (1 - t²) u') / 2`` with ``t = tanh u``.
    """

    fused = "gelu_tanh"

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")

    @staticmethod
    def tangent(v: Tensor, kept: Tensor) -> Tensor:
        scale, cubic = math.sqrt(2 / math.pi), 0.044715
        square = kept * kept
        t = torch.tanh(scale * kept * (1 + cubic * square))
        slope = scale * (1 + 3 * cubic * square)
        return v * (0.5 * (1 + t + kept * (1 - t * t) * slope))


class SiLU(Elementwise):
    """``y = x σ(x)``; ``∂x = g σ (1 + x (1 - σ))``."""

    fused = "silu"

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return F.silu(x)

    @staticmethod
    def tangent(v: Tensor, kept: Tensor) -> Tensor:
        s = torch.sigmoid(kept)
        return v * (s * (1 + kept * (1 - s)))


class Tanh(Elementwise):
    """``y = tanh x``; ``∂x = g (1 - y²)``."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.tanh(x)

    @staticmethod
    def keep(x: Tensor, y: Tensor) -> Tensor:
        return y

    @staticmethod
    def tangent(v: Tensor, kept: Tensor) -> Tensor:
        return v * (1 - kept * kept)


class Sigmoid(Elementwise):
    """``y = σ(x) = 1 / (1 + exp(-x))``; ``∂x = g y (1 - y)``."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.sigmoid(x)

    @staticmethod
    def keep(x: Tensor, y: Tensor) -> Tensor:
        return y

    @staticmethod
    def tangent(v: Tensor, kept: Tensor) -> Tensor:
        return v * ((1 - kept) * kept)


class Softplus(Elementwise):
    """``y = log(1 + exp(βx)) / β``, and ``y = x`` where ``βx`` exceeds the threshold.

    ``∂x = g σ(βx)``, and ``g`` beyond the threshold.
    """

    autocast = {"cuda": "fp32"}

    @staticmethod
    def forward(x: Tensor, beta: float, threshold: float) -> Tensor:
        return F.softplus(x, beta, threshold)

    @staticmethod
    def tangent(v: Tensor, kept: Tensor, beta: float, threshold: float) -> Tensor:
        scaled = kept * beta
        return torch.where(scaled > threshold, v, v * torch.sigmoid(scaled))

    @staticmethod
    def branch(x: Tensor, beta: float, threshold: float) -> Tensor:
        return x * beta > threshold  # f jumps there


def _plain(make: Maker) -> Iterator[Sample]:
    yield sample(make(3, 4))
    yield sample(make(0, 4))
    yield sample(make(2, 1, 3, 2))


@register(
    F.relu,
    replaces=[torch.relu, Tensor.relu],
    inplace=[torch.relu_, Tensor.relu_],
    modules=[nn.ReLU],
    samples=_plain,
)
def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """``max(input, 0)``, as :func:`torch.nn.functional.relu`.

    Args:
        input: any shape.
        inplace: write the result into ``input``.

    Returns:
        The shape of ``input``.
    """
    result = ReLU.call(input)
    return in_place(input, result) if inplace else result


def _leaky_relu_samples(make: Maker) -> Iterator[Sample]:
    yield from _plain(make)
    yield sample(make(3, 4), negative_slope=0.3)
    yield sample(make(3, 4), negative_slope=-0.3)


@register(
    F.leaky_relu,
    inplace=[F.leaky_relu_],
    modules=[nn.LeakyReLU],
    samples=_leaky_relu_samples,
)
def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """``input`` where positive, else ``negative_slope * input``.

    As :func:`torch.nn.functional.leaky_relu`.

    Args:
        input: any shape.
        negative_slope: the slope below zero.
        inplace: write the result into ``input``.

    Returns:
        The shape of ``input``.
    """
    # A negative slope keeps the input, which writing in place would spoil.
    spoiled = inplace and negative_slope < 0
    result = LeakyReLU.call(input.clone() if spoiled else input, negative_slope)
    return in_place(input, result) if inplace else result


def _gelu_samples(make: Maker) -> Iterator[Sample]:
    yield from _plain(make)
    yield sample(make(3, 4), approximate="tanh")


@register(F.gelu, modules=[nn.GELU], samples=_gelu_samples)
def gelu(input: Tensor, *, approximate: str = "none") -> Tensor:
    """``input Φ(input)``, as :func:`torch.nn.functional.gelu`.

    Args:
        input: any shape.
        approximate: ``"none"`` or ``"tanh"``.

    Returns:
        The shape of ``input``.

    Raises:
        RuntimeError: ``approximate`` is neither.
    """
    if approximate == "tanh":
        return GELUTanh.call(input)
    if approximate == "none":
        return GELU.call(input)
    raise RuntimeError(f"gelu: approximate must be 'none' or 'tanh', but got {approximate!r}")


@register(F.silu, modules=[nn.SiLU], samples=_plain)
def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """``input σ(input)``, as :func:`torch.nn.functional.silu`.

    Args:
        input: any shape.
        inplace: write the result into ``input``.

    Returns:
        The shape of ``input``.
    """
    return in_place(input, SiLU.call(input.clone())) if inplace else SiLU.call(input)


@register(
    torch.tanh,
    replaces=[Tensor.tanh, F.tanh],
    inplace=[torch.tanh_, Tensor.tanh_],
    modules=[nn.Tanh],
    samples=_plain,
)
def tanh(input: Tensor) -> Tensor:
    """Hyperbolic tangent, as :func:`torch.tanh`.

    Args:
        input: any shape.

    Returns:
        The shape of ``input``.
    """
    return Tanh.call(input)


@register(
    torch.sigmoid,
    replaces=[Tensor.sigmoid, F.sigmoid, torch.special.expit],
    inplace=[torch.sigmoid_, Tensor.sigmoid_],
    modules=[nn.Sigmoid],
    samples=_plain,
)
def sigmoid(input: Tensor) -> Tensor:
    """``1 / (1 + exp(-input))``, as :func:`torch.sigmoid`.

    Args:
        input: any shape.

    Returns:
        The shape of ``input``.
    """
    return Sigmoid.call(input)


def _softplus_samples(make: Maker) -> Iterator[Sample]:
    yield from _plain(make)
    yield sample(make(3, 4), beta=2.0, threshold=1.0)


@register(F.softplus, modules=[nn.Softplus], samples=_softplus_samples)
def softplus(input: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    """``log(1 + exp(beta * input)) / beta``, as :func:`torch.nn.functional.softplus`.

    Args:
        input: any shape.
        beta: sharpness.
        threshold: where ``beta * input`` exceeds it, the result is ``input``.

    Returns:
        The shape of ``input``.
    """
    return Softplus.call(input, beta, threshold)
