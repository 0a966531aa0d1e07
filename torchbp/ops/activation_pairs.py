"""Activation functions of more than one tensor: PReLU and RReLU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchbp.ops.activation import plain
from torchbp.ops.activation_pieces import leaky_relu
from torchbp.ops.base import Op, add_tangents, midpoint
from torchbp.ops.elementwise import in_place
from torchbp.ops.registry import Maker, Sample, register, sample
from torchbp.ops.relevance import passes
from torchbp.ops.sample_factors import Factors, of_channels


class PReLU(Op):
    """``y = max(x, 0) + w min(x, 0)`` (He et al., 2015), one w for all or one for each channel.

    Backward: ``∂x = g`` where ``x > 0``, else ``w g``; ``∂w = Σ g min(x, 0)``.
    Secant: with ``r = Δmax(x, 0) / Δx``, ``m_x = m (r + w̄ (1 - r))`` and ``m_w = Σ m n̄``, where
    w̄ and n̄ are the midpoints of w and of ``min(x, 0)``.
    """

    autocast = {"cpu": "low", "cuda": "low"}
    relevance = classmethod(passes)

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return torch.prelu(x, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        below = x <= 0
        grad_x = grad_weight = None
        if needs_x:
            grad_x = grad_output * torch.where(below, _per_channel(weight, x), 1)
        if needs_weight:
            grad_weight = _sum_per_channel(torch.where(below, grad_output * x, 0), weight)
        return grad_x, grad_weight

    @staticmethod
    def jvp(ctx: Any, tx: Tensor | None, tw: Tensor | None) -> Tensor | None:
        x, weight = ctx.saved_tensors
        w = _per_channel(weight, x)
        return add_tangents(
            None if tx is None else torch.where(x > 0, tx, tx * w),
            None if tw is None else x.clamp(max=0) * _per_channel(tw, x),
        )

    @staticmethod
    def sample_factors(grad_output: Tensor, args: tuple[Any, ...], output: Any) -> Factors:
        x, weight = args
        # With one weight for all it broadcasts along the channels too.
        return None, of_channels(grad_output * x.clamp(max=0), weight)

    @staticmethod
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        (x, weight), (x0, weight0) = args, args0
        gap = x - x0
        rise = (x.clamp(min=0) - x0.clamp(min=0)) / gap.masked_fill(gap == 0, 1)
        rise = torch.where(gap == 0, (x > 0).to(rise.dtype), rise)
        w = _per_channel(midpoint(weight, weight0), x)
        below = (x.clamp(max=0) + x0.clamp(max=0)) / 2
        return multiplier * (rise + w * (1 - rise)), _sum_per_channel(multiplier * below, weight)


def _per_channel(weight: Tensor, x: Tensor) -> Tensor:
    """The weight shaped to go along the channels of ``x``, which are dimension 1."""
    return weight.reshape([weight.numel() if d == 1 else 1 for d in range(x.dim())])


def _sum_per_channel(terms: Tensor, weight: Tensor) -> Tensor:
    if weight.numel() == 1:
        return terms.sum().reshape(weight.shape)
    return terms.sum([d for d in range(terms.dim()) if d != 1]).reshape(weight.shape)


class RReLU(Op):
    """``y = x ⊙ slope``: the leaky ReLU with slopes that were drawn (Xu et al., 2015).

    The slopes are 1 where ``x > 0``. Backward: ``∂x = g ⊙ slope``. Secant: between equal signs the
    product rule, which gives the slopes what two different draws changed; between different signs
    only one slope was drawn, and ``m_x = m Δy / Δx``.
    """

    relevance = classmethod(passes)

    @staticmethod
    def forward(x: Tensor, slope: Tensor) -> Tensor:
        return x * slope

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, slope = inputs
        ctx.save_for_backward(slope)
        ctx.save_for_forward(slope)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return grad_output * slope, None

    @staticmethod
    def jvp(ctx: Any, tx: Tensor | None, _: Any) -> Tensor | None:
        (slope,) = ctx.saved_tensors
        return None if tx is None else tx * slope

    @staticmethod
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        (x, slope), (x0, slope0) = args, args0
        differ = (x > 0) != (x0 > 0)
        quotient = (output - output0) / (x - x0).masked_fill(~differ, 1)
        m_x = multiplier * torch.where(differ, quotient, midpoint(slope, slope0))
        return m_x, (multiplier * midpoint(x, x0)).masked_fill(differ, 0)


def _prelu_samples(make: Maker) -> Iterator[Sample]:
    yield sample(make(3, 4), make(1))
    yield sample(make(3, 4), make(4))
    yield sample(make(2, 3, 2, 2), make(3))
    yield sample(make(4), make(1))
    yield sample(make(), make(1))
    yield sample(make(0, 4), make(4))


@register(torch.prelu, replaces=[Tensor.prelu], modules=[nn.PReLU], samples=_prelu_samples)
def prelu(input: Tensor, weight: Tensor) -> Tensor:
    """``input`` where positive, else ``weight * input``, as :func:`torch.nn.functional.prelu`.

    Args:
        input: ``(N, C, *)``, or any shape with a weight of one element.
        weight: ``(C,)`` or ``(1,)``.

    Returns:
        The shape of ``input``.

    Raises:
        RuntimeError: the weight does not fit.
    """
    return PReLU.call(input, weight)


def _slopes(x: Tensor, lower: float, upper: float) -> Tensor:
    """Slopes that consume the generator as torch's rrelu does: one draw where ``x <= 0``."""
    slopes = torch.empty_like(x, requires_grad=False, memory_format=torch.contiguous_format)
    # As an operator of torch.ops it would look like an op of ours to those that watch.
    torch._C._nn.rrelu_with_noise(x.detach(), slopes, lower, upper, True)  # type: ignore[attr-defined]
    return slopes


def _rrelu_samples(make: Maker) -> Iterator[Sample]:
    yield from plain(make)
    yield sample(make(3, 4), training=True)
    yield sample(make(2, 3, 2), 0.2, 0.9, True)


@register(
    F.rrelu,
    replaces=[torch.rrelu],
    inplace=[torch.rrelu_],
    modules=[nn.RReLU],
    samples=_rrelu_samples,
)
def rrelu(
    input: Tensor,
    lower: float = 1.0 / 8,
    upper: float = 1.0 / 3,
    training: bool = False,
    inplace: bool = False,
) -> Tensor:
    """``input`` where positive, else ``input`` times a random slope.

    As :func:`torch.nn.functional.rrelu` with the same seed.

    Args:
        input: any shape.
        lower: least slope.
        upper: greatest slope.
        training: without it, the slope is the mean of both.
        inplace: write the result into ``input``.

    Returns:
        The shape of ``input``.

    Raises:
        RuntimeError: ``lower`` is greater than ``upper``, or ``input`` is not floating.
    """
    if not training:
        return leaky_relu(input, (lower + upper) / 2, inplace)
    result = RReLU.call(input, _slopes(input, lower, upper))
    return in_place(input, result) if inplace else result
