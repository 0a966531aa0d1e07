"""The exponential linear units."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchbp.ops.activation import plain
from torchbp.ops.elementwise import Elementwise
from torchbp.ops.registry import Maker, Sample, register, sample


class ELU(Elementwise):
    """``y = x`` where ``x > 0``, else ``α (exp(x) - 1)`` (Clevert et al., 2015).

    ``∂x = g`` or ``g α exp(x)``.
    """

    fused = "elu"

    @staticmethod
    def forward(x: Tensor, alpha: float) -> Tensor:
        return F.elu(x, alpha)

    @staticmethod
    def overwrite(x: Tensor, alpha: float) -> Tensor:
        return F.elu_(x, alpha)

    @staticmethod
    def tangent(v: Tensor, kept: Tensor, alpha: float) -> Tensor:
        return torch.where(kept > 0, v, v * (alpha * torch.exp(kept.clamp(max=0))))

    @staticmethod
    def branch(x: Tensor, alpha: float) -> Tensor:
        return x > 0


class CELU(Elementwise):
    """``y = x`` where ``x > 0``, else ``α (exp(x/α) - 1)`` (Barron, 2017).

    ``∂x = g`` or ``g exp(x/α)``.
    """

    fused = "celu"

    @staticmethod
    def forward(x: Tensor, alpha: float) -> Tensor:
        return F.celu(x, alpha)

    @staticmethod
    def overwrite(x: Tensor, alpha: float) -> Tensor:
        return torch.celu_(x, alpha)

    @staticmethod
    def tangent(v: Tensor, kept: Tensor, alpha: float) -> Tensor:
        return v * torch.exp(kept.clamp(max=0) / alpha)

    @staticmethod
    def branch(x: Tensor, alpha: float) -> Tensor:
        return x > 0


# As Klambauer et al. derive them, so that mean 0 and variance 1 stay from layer to layer.
_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772, 1.0507009873554805


class SELU(Elementwise):
    """``y = s x`` where ``x > 0``, else ``s α (exp(x) - 1)`` (Klambauer et al., 2017).

    ``∂x = g s`` or ``g s α exp(x)``.
    """

    fused = "selu"

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return F.selu(x)

    @staticmethod
    def overwrite(x: Tensor) -> Tensor:
        return torch.selu_(x)

    @staticmethod
    def tangent(v: Tensor, kept: Tensor) -> Tensor:
        below = _SELU_SCALE * _SELU_ALPHA * torch.exp(kept.clamp(max=0))
        return v * torch.where(kept > 0, _SELU_SCALE, below)

    @staticmethod
    def branch(x: Tensor) -> Tensor:
        return x > 0


def _elu_samples(make: Maker) -> Iterator[Sample]:
    yield from plain(make)
    yield sample(make(3, 4), alpha=1.7)


@register(F.elu, inplace=[F.elu_], modules=[nn.ELU], samples=_elu_samples)
def elu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """``input`` where positive, else ``alpha (exp(input) - 1)``.

    As :func:`torch.nn.functional.elu`.

    Args:
        input: any shape.
        alpha: minus the limit far below zero.
        inplace: write the result into ``input``.

    Returns:
        The shape of ``input``.
    """
    return ELU.call_(input, alpha) if inplace else ELU.call(input, alpha)


@register(
    F.celu, replaces=[torch.celu], inplace=[torch.celu_], modules=[nn.CELU], samples=_elu_samples
)
def celu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """``input`` where positive, else ``alpha (exp(input / alpha) - 1)``.

    As :func:`torch.nn.functional.celu`.

    Args:
        input: any shape.
        alpha: minus the limit far below zero; not 0.
        inplace: write the result into ``input``.

    Returns:
        The shape of ``input``.
    """
    return CELU.call_(input, alpha) if inplace else CELU.call(input, alpha)


@register(F.selu, replaces=[torch.selu], inplace=[torch.selu_], modules=[nn.SELU], samples=plain)
def selu(input: Tensor, inplace: bool = False) -> Tensor:
    """The self-normalising unit of Klambauer et al. (2017), as :func:`torch.nn.functional.selu`.

    Args:
        input: any shape.
        inplace: write the result into ``input``.

    Returns:
        The shape of ``input``.
    """
    return SELU.call_(input) if inplace else SELU.call(input)
