"""Dropout that keeps mean and variance, for self-normalising networks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchbp.ops.base import Op
from torchbp.ops.dropout import Dropout, _channel_noise, _keeps_all, _noise
from torchbp.ops.elementwise import in_place
from torchbp.ops.registry import Maker, Sample, register, sample
from torchbp.ops.relevance import passes


class AlphaDropout(Op):
    """``y = x ⊙ noise + shift`` (Klambauer et al., 2017).

    Where x is dropped, the noise is 0 and the shift the value SELU saturates at, scaled; elsewhere
    both restore mean and variance. They are drawn outside and count as constants.
    Backward and secant: ``∂x = g ⊙ noise``.
    """

    relevance = classmethod(passes)

    @staticmethod
    def forward(x: Tensor, noise: Tensor, shift: Tensor) -> Tensor:
        return (x * noise).add_(shift)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, noise, _ = inputs
        ctx.save_for_backward(noise)
        ctx.save_for_forward(noise)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (noise,) = ctx.saved_tensors
        return grad_output * noise, None, None

    @staticmethod
    def jvp(ctx: Any, tx: Tensor | None, *_: Any) -> Tensor | None:
        (noise,) = ctx.saved_tensors
        return None if tx is None else tx * noise

    @staticmethod
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        noise, noise0 = args[1], args0[1]
        return multiplier * ((noise + noise0) / 2), None, None


# Minus the value that SELU saturates at.
_SATURATION = 1.7580993408473766


def _alpha(x: Tensor, p: float, training: bool, inplace: bool, channels: bool) -> Tensor:
    if _keeps_all(x, p, training):
        return x
    if p == 1:
        result = Dropout.call(x, _noise(x, p))
    else:
        kept = _channel_noise(x, p) if channels else _element_noise(x, p)
        scale = 1 / math.sqrt((_SATURATION**2 * p + 1) * (1 - p))
        shift = (kept - 1).mul_(_SATURATION * scale).add_(_SATURATION * scale * p)
        result = AlphaDropout.call(x, kept.mul_(scale), shift)
    return in_place(x, result) if inplace else result


def _element_noise(x: Tensor, p: float) -> Tensor:
    return torch.empty_like(x, requires_grad=False).bernoulli_(1 - p)


def _alpha_samples(make: Maker) -> Iterator[Sample]:
    yield sample(make(3, 4), training=True)
    yield sample(make(2, 3, 2), 0.2, True)
    yield sample(make(3, 4), 1.0, True)


@register(F.alpha_dropout, modules=[nn.AlphaDropout], samples=_alpha_samples)
def alpha_dropout(
    input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False
) -> Tensor:
    """Dropout that keeps mean and variance of what SELU gives.

    As :func:`torch.nn.functional.alpha_dropout` with the same seed.

    Args:
        input: any shape.
        p: probability of an element to be dropped.
        training: without it, ``input`` is returned as it is.
        inplace: write the result into ``input``.

    Returns:
        The shape of ``input``.

    Raises:
        ValueError: ``p`` is not between 0 and 1.
    """
    return _alpha(input, p, training, inplace, channels=False)


@register(F.feature_alpha_dropout, modules=[nn.FeatureAlphaDropout], samples=_alpha_samples)
def feature_alpha_dropout(
    input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False
) -> Tensor:
    """:func:`alpha_dropout` of whole channels.

    As :func:`torch.nn.functional.feature_alpha_dropout` with the same seed.

    Args:
        input: ``(N, C, *)``.
        p: probability of a channel to be dropped.
        training: without it, ``input`` is returned as it is.
        inplace: write the result into ``input``.

    Returns:
        The shape of ``input``.

    Raises:
        ValueError: ``p`` is not between 0 and 1.
        RuntimeError: ``input`` has fewer than 2 dimensions.
    """
    return _alpha(input, p, training, inplace, channels=True)
