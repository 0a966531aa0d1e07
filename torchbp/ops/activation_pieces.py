"""Activation functions made of pieces, with kinks or jumps between them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchbp.ops.activation import plain
from torchbp.ops.elementwise import Elementwise
from torchbp.ops.registry import Maker, Sample, register, sample


class ReLU(Elementwise):
    """``y = max(x, 0)``; ``∂x = g`` where ``y > 0``, else 0 (at the kink as well)."""

    fused = "relu"

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.relu(x)

    @staticmethod
    def overwrite(x: Tensor) -> Tensor:
        return torch.relu_(x)

    @staticmethod
    def keep(x: Tensor, y: Tensor) -> Tensor:
        return y

    @staticmethod
    def tangent(v: Tensor, kept: Tensor) -> Tensor:
        return v.masked_fill(kept <= 0, 0)  # not v * (y > 0): an infinite v stays out

    @staticmethod
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        (x,), (x0,) = args, args0
        # The quotient loses no digits: 0 or 1 on one side of the kink, of two sums across it.
        slope = torch.where(x == x0, x > 0, (output - output0) / (x - x0))
        return (multiplier * slope,)


class LeakyReLU(Elementwise):
    """``y = x`` where ``x > 0``, else ``slope * x``; ``∂x = g`` or ``slope * g``."""

    fused = "leaky_relu"

    @staticmethod
    def forward(x: Tensor, negative_slope: float) -> Tensor:
        return F.leaky_relu(x, negative_slope)

    @staticmethod
    def overwrite(x: Tensor, negative_slope: float) -> Tensor:
        return F.leaky_relu_(x, negative_slope)

    @staticmethod
    def keep(x: Tensor, y: Tensor, negative_slope: float) -> Tensor:
        return y if negative_slope >= 0 else x  # y tells the sign of x unless the slope flips it

    @staticmethod
    def tangent(v: Tensor, kept: Tensor, negative_slope: float) -> Tensor:
        return torch.where(kept > 0, v, v * negative_slope)

    @staticmethod
    def branch(x: Tensor, negative_slope: float) -> Tensor:
        return x > 0


class Threshold(Elementwise):
    """``y = x`` where ``x > threshold``, else ``value``; ``∂x = g`` or 0."""

    fused = "threshold"

    @staticmethod
    def forward(x: Tensor, threshold: float, value: float) -> Tensor:
        return F.threshold(x, threshold, value)

    @staticmethod
    def overwrite(x: Tensor, threshold: float, value: float) -> Tensor:
        return torch.threshold_(x, threshold, value)

    @staticmethod
    def tangent(v: Tensor, kept: Tensor, threshold: float, value: float) -> Tensor:
        return v.masked_fill(kept <= threshold, 0)

    @staticmethod
    def branch(x: Tensor, threshold: float, value: float) -> Tensor:
        return x > threshold


class Hardtanh(Elementwise):
    """``y = min(max(x, low), high)``; ``∂x = g`` where ``low < x < high``, else 0."""

    fused = "hardtanh"

    @staticmethod
    def forward(x: Tensor, low: float, high: float) -> Tensor:
        return F.hardtanh(x, low, high)

    @staticmethod
    def overwrite(x: Tensor, low: float, high: float) -> Tensor:
        return F.hardtanh_(x, low, high)

    @staticmethod
    def keep(x: Tensor, y: Tensor, low: float, high: float) -> Tensor:
        # y tells as much, unless a half dtype rounds a bound: bfloat16's 0.1 is more than 0.1.
        exact = low % 1 == high % 1 == 0 and -256 <= low <= high <= 256
        return y if exact else x

    @staticmethod
    def tangent(v: Tensor, kept: Tensor, low: float, high: float) -> Tensor:
        return v.masked_fill((kept <= low) | (kept >= high), 0)

    @staticmethod
    def branch(x: Tensor, low: float, high: float) -> Tensor:
        return _piece(x, low, high)


class Hardsigmoid(Elementwise):
    """``y = min(max(x + 3, 0), 6) / 6``; ``∂x = g / 6`` where ``-3 < x < 3``, else 0."""

    fused = "hardsigmoid"

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return F.hardsigmoid(x)

    @staticmethod
    def overwrite(x: Tensor) -> Tensor:
        return F.hardsigmoid(x, inplace=True)

    @staticmethod
    def tangent(v: Tensor, kept: Tensor) -> Tensor:
        return (v / 6).masked_fill((kept <= -3) | (kept >= 3), 0)

    @staticmethod
    def branch(x: Tensor) -> Tensor:
        return _piece(x, -3, 3)


class Hardswish(Elementwise):
    """``y = x min(max(x + 3, 0), 6) / 6`` (Howard et al., 2019).

    ``∂x = g (x / 3 + 1 / 2)`` where ``-3 < x < 3``; 0 below, ``g`` above.
    """

    fused = "hardswish"

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return F.hardswish(x)

    @staticmethod
    def overwrite(x: Tensor) -> Tensor:
        return F.hardswish(x, inplace=True)

    @staticmethod
    def tangent(v: Tensor, kept: Tensor) -> Tensor:
        inner = torch.where(kept < 3, v * (kept / 3 + 0.5), v)
        return inner.masked_fill(kept <= -3, 0)

    @staticmethod
    def branch(x: Tensor) -> Tensor:
        return _piece(x, -3, 3)


class Hardshrink(Elementwise):
    """``y = x`` where ``|x| > λ``, else 0; ``∂x = g`` or 0."""

    fused = "hardshrink"

    @staticmethod
    def forward(x: Tensor, lambd: float) -> Tensor:
        return F.hardshrink(x, lambd)

    @staticmethod
    def keep(x: Tensor, y: Tensor, lambd: float) -> Tensor:
        return y if lambd >= 0 else x  # forward compares with λ as the dtype of x rounds it

    @staticmethod
    def tangent(v: Tensor, kept: Tensor, lambd: float) -> Tensor:
        return v.masked_fill((kept >= -lambd) & (kept <= lambd), 0)

    @staticmethod
    def branch(x: Tensor, lambd: float) -> Tensor:
        return _piece(x, -lambd, lambd)


class Softshrink(Elementwise):
    """``y = x - λ`` where ``x > λ``, ``x + λ`` where ``x < -λ``, else 0; ``∂x = g`` or 0."""

    fused = "softshrink"

    @staticmethod
    def forward(x: Tensor, lambd: float) -> Tensor:
        return F.softshrink(x, lambd)

    @staticmethod
    def keep(x: Tensor, y: Tensor, lambd: float) -> Tensor:
        return y

    @staticmethod
    def tangent(v: Tensor, kept: Tensor, lambd: float) -> Tensor:
        return v.masked_fill(kept == 0, 0)

    @staticmethod
    def branch(x: Tensor, lambd: float) -> Tensor:
        return _piece(x, -lambd, lambd)


def _piece(x: Tensor, low: float, high: float) -> Tensor:
    """0 up to ``low``, 1 above it, 2 from ``high`` on."""
    return (x > low).to(torch.int8) + (x >= high)


@register(
    F.relu,
    replaces=[torch.relu, Tensor.relu],
    inplace=[torch.relu_, Tensor.relu_],
    modules=[nn.ReLU],
    samples=plain,
)
def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """``max(input, 0)``, as :func:`torch.nn.functional.relu`.

    Args:
        input: any shape.
        inplace: write the result into ``input``.

    Returns:
        The shape of ``input``.
    """
    return ReLU.call_(input) if inplace else ReLU.call(input)


def _leaky_relu_samples(make: Maker) -> Iterator[Sample]:
    yield from plain(make)
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
    function = LeakyReLU.call_ if inplace else LeakyReLU.call
    return function(input, negative_slope)


def _threshold_samples(make: Maker) -> Iterator[Sample]:
    yield sample(make(3, 4), 0.1, 20.0)
    yield sample(make(2, 3, 2), threshold=-0.5, value=-0.5)
    yield sample(make(0, 4), 0.0, 1.0)


def _hardtanh_samples(make: Maker) -> Iterator[Sample]:
    yield from plain(make)
    yield sample(make(3, 4), -0.3, 0.6)


def _shrink_samples(make: Maker) -> Iterator[Sample]:
    yield from plain(make)
    yield sample(make(3, 4), lambd=0.9)


@register(
    F.threshold,
    replaces=[torch.threshold],
    inplace=[torch.threshold_],
    modules=[nn.Threshold],
    samples=_threshold_samples,
)
def threshold(input: Tensor, threshold: float, value: float, inplace: bool = False) -> Tensor:
    """``input`` where above ``threshold``, else ``value``.

    As :func:`torch.nn.functional.threshold`.

    Args:
        input: any shape.
        threshold: where the identity ends.
        value: what stands at and below it.
        inplace: write the result into ``input``.

    Returns:
        The shape of ``input``.
    """
    function = Threshold.call_ if inplace else Threshold.call
    return function(input, threshold, value)


@register(F.hardtanh, inplace=[F.hardtanh_], modules=[nn.Hardtanh], samples=_hardtanh_samples)
def hardtanh(
    input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Tensor:
    """``min(max(input, min_val), max_val)``, as :func:`torch.nn.functional.hardtanh`.

    Args:
        input: any shape.
        min_val: least value of the result.
        max_val: greatest value of the result.
        inplace: write the result into ``input``.

    Returns:
        The shape of ``input``.

    Raises:
        ValueError: ``min_val`` is greater than ``max_val``.
    """
    function = Hardtanh.call_ if inplace else Hardtanh.call
    return function(input, min_val, max_val)


@register(F.relu6, modules=[nn.ReLU6], samples=plain)
def relu6(input: Tensor, inplace: bool = False) -> Tensor:
    """``min(max(input, 0), 6)``, as :func:`torch.nn.functional.relu6`.

    Args:
        input: any shape.
        inplace: write the result into ``input``.

    Returns:
        The shape of ``input``.
    """
    return Hardtanh.call_(input, 0.0, 6.0) if inplace else Hardtanh.call(input, 0.0, 6.0)


@register(F.hardsigmoid, modules=[nn.Hardsigmoid], samples=plain)
def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """``relu6(input + 3) / 6``, as :func:`torch.nn.functional.hardsigmoid`.

    Args:
        input: any shape.
        inplace: write the result into ``input``.

    Returns:
        The shape of ``input``.
    """
    return Hardsigmoid.call_(input) if inplace else Hardsigmoid.call(input)


@register(F.hardswish, modules=[nn.Hardswish], samples=plain)
def hardswish(input: Tensor, inplace: bool = False) -> Tensor:
    """``input relu6(input + 3) / 6``, as :func:`torch.nn.functional.hardswish`.

    Args:
        input: any shape.
        inplace: write the result into ``input``.

    Returns:
        The shape of ``input``.
    """
    return Hardswish.call_(input) if inplace else Hardswish.call(input)


@register(
    F.hardshrink, replaces=[Tensor.hardshrink], modules=[nn.Hardshrink], samples=_shrink_samples
)
def hardshrink(input: Tensor, lambd: float = 0.5) -> Tensor:
    """``input`` where ``|input| > lambd``, else 0, as :func:`torch.nn.functional.hardshrink`.

    Args:
        input: any shape.
        lambd: half the width of what is set to 0.

    Returns:
        The shape of ``input``.
    """
    return Hardshrink.call(input, lambd)


@register(F.softshrink, modules=[nn.Softshrink], samples=_shrink_samples)
def softshrink(input: Tensor, lambd: float = 0.5) -> Tensor:
    """``input`` moved towards 0 by ``lambd``, as :func:`torch.nn.functional.softshrink`.

    Args:
        input: any shape.
        lambd: how far; not negative.

    Returns:
        The shape of ``input``.
    """
    return Softshrink.call(input, lambd)
