"""Dropout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchbp.ops.base import Op
from torchbp.ops.elementwise import in_place
from torchbp.ops.registry import Maker, Sample, register, sample


class Dropout(Op):
    """``y = x ⊙ noise`` (Srivastava et al., 2014) with ``noise`` 0 or ``1 / (1 - p)``.

    The noise is drawn outside and counts as a constant, so that two runs can share it.
    Backward and secant: ``∂x = g ⊙ noise``.
    """

    @staticmethod
    def forward(x: Tensor, noise: Tensor) -> Tensor:
        return x * noise

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, noise = inputs
        ctx.save_for_backward(noise)
        ctx.save_for_forward(noise)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (noise,) = ctx.saved_tensors
        return grad_output * noise, None

    @staticmethod
    def jvp(ctx: Any, tx: Tensor | None, _: Any) -> Tensor | None:
        (noise,) = ctx.saved_tensors
        return None if tx is None else tx * noise

    @staticmethod
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        noise, noise0 = args[1], args0[1]
        return multiplier * ((noise + noise0) / 2), None


def _noise(x: Tensor, p: float) -> Tensor:
    """Factors that consume the generator exactly as torch's dropout does."""
    if p == 1:
        return torch.zeros((), dtype=x.dtype, device=x.device)
    if x.is_cuda:
        _, kept = torch.native_dropout(x.detach(), p, True)
        return kept.to(x.dtype) / (1 - p)
    return torch.empty_like(x, requires_grad=False).bernoulli_(1 - p).div_(1 - p)


def _samples(make: Maker) -> Iterator[Sample]:
    yield sample(make(3, 4))
    yield sample(make(2, 3, 2), p=0.2)
    yield sample(make(3, 4), p=0.0)
    yield sample(make(3, 4), p=1.0)
    yield sample(make(3, 4), training=False)
    yield sample(make(0, 4))


@register(F.dropout, modules=[nn.Dropout], samples=_samples)
def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Zero elements at random, as :func:`torch.nn.functional.dropout` with the same seed.

    Args:
        input: any shape.
        p: probability of an element to be zeroed.
        training: without it, ``input`` is returned as it is.
        inplace: write the result into ``input``.

    Returns:
        The shape of ``input``.

    Raises:
        ValueError: ``p`` is not between 0 and 1.
    """
    if p < 0.0 or p > 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    if p == 0 or not training or input.numel() == 0:
        return input
    result = Dropout.call(input, _noise(input, p))
    return in_place(input, result) if inplace else result
