"""Smooth activation functions."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchbp.ops.arithmetic import div
from torchbp.ops.elementwise import Elementwise
from torchbp.ops.linear import add
from torchbp.ops.pointwise import abs as absolute
from torchbp.ops.registry import Maker, Sample, register, sample


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
    def overwrite(x: Tensor) -> Tensor:
        return F.silu(x, inplace=True)

    @staticmethod
    def tangent(v: Tensor, kept: Tensor) -> Tensor:
        s = torch.sigmoid(kept)
        return v * (s * (1 + kept * (1 - s)))


class Tanh(Elementwise):
    """``y = tanh x``; ``∂x = g (1 - y²)``."""

    fused = "tanh"

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

    fused = "sigmoid"

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
    fused = "softplus"

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


class LogSigmoid(Elementwise):
    """``y = log σ(x)``; ``∂x = g σ(-x)``."""

    fused = "log_sigmoid"

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return F.logsigmoid(x)

    @staticmethod
    def tangent(v: Tensor, kept: Tensor) -> Tensor:
        return v * torch.sigmoid(-kept)


class Mish(Elementwise):
    """``y = x tanh(log(1 + exp(x)))`` (Misra, 2019).

    ``∂x = g (t + x σ(x) (1 - t²))`` with ``t = tanh(log(1 + exp(x)))``.
    """

    fused = "mish"

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return F.mish(x)

    @staticmethod
    def overwrite(x: Tensor) -> Tensor:
        return F.mish(x, inplace=True)

    @staticmethod
    def tangent(v: Tensor, kept: Tensor) -> Tensor:
        t = torch.tanh(F.softplus(kept))
        return v * (t + kept * torch.sigmoid(kept) * (1 - t * t))


class Softsign(Elementwise):
    """``y = x / (1 + |x|)``; ``∂x = g / (1 + |x|)²``."""

    fused = "softsign"

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return F.softsign(x)

    @staticmethod
    def tangent(v: Tensor, kept: Tensor) -> Tensor:
        return v / (1 + kept.abs()).square()


class Tanhshrink(Elementwise):
    """``y = x - tanh x``; ``∂x = g tanh² x``."""

    fused = "tanhshrink"

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return F.tanhshrink(x)

    @staticmethod
    def tangent(v: Tensor, kept: Tensor) -> Tensor:
        return v * torch.tanh(kept).square()


def plain(make: Maker) -> Iterator[Sample]:
    """Samples of an activation without settings."""
    yield sample(make(3, 4))
    yield sample(make(0, 4))
    yield sample(make(2, 1, 3, 2))


def _gelu_samples(make: Maker) -> Iterator[Sample]:
    yield from plain(make)
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


@register(F.silu, modules=[nn.SiLU], samples=plain)
def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """``input σ(input)``, as :func:`torch.nn.functional.silu`.

    Args:
        input: any shape.
        inplace: write the result into ``input``.

    Returns:
        The shape of ``input``.
    """
    return SiLU.call_(input) if inplace else SiLU.call(input)


@register(
    torch.tanh,
    replaces=[Tensor.tanh, F.tanh],
    inplace=[torch.tanh_, Tensor.tanh_],
    modules=[nn.Tanh],
    samples=plain,
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
    samples=plain,
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
    yield from plain(make)
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


@register(F.logsigmoid, modules=[nn.LogSigmoid], samples=plain)
def logsigmoid(input: Tensor) -> Tensor:
    """``log σ(input)``, as :func:`torch.nn.functional.logsigmoid`.

    Args:
        input: any shape.

    Returns:
        The shape of ``input``.
    """
    return LogSigmoid.call(input)


@register(F.mish, modules=[nn.Mish], samples=plain)
def mish(input: Tensor, inplace: bool = False) -> Tensor:
    """``input tanh(log(1 + exp(input)))``, as :func:`torch.nn.functional.mish`.

    Args:
        input: any shape.
        inplace: write the result into ``input``.

    Returns:
        The shape of ``input``.
    """
    return Mish.call_(input) if inplace else Mish.call(input)


@register(F.softsign, modules=[nn.Softsign], samples=plain)
def softsign(input: Tensor) -> Tensor:
    """``input / (1 + |input|)``, as :func:`torch.nn.functional.softsign`.

    Args:
        input: any shape.

    Returns:
        The shape of ``input``.
    """
    if input.is_complex():  # not holomorphic, hence by way of the parts that know what to do
        size = absolute(input)
        return div(input, add(size, torch.ones_like(size)))
    return Softsign.call(input)


@register(F.tanhshrink, modules=[nn.Tanhshrink], samples=plain)
def tanhshrink(input: Tensor) -> Tensor:
    """``input - tanh(input)``, as :func:`torch.nn.functional.tanhshrink`.

    Args:
        input: any shape.

    Returns:
        The shape of ``input``.
    """
    return Tanhshrink.call(input)
