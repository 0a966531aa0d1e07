"""Operations that only rearrange."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from torchbp.ops.base import Op
from torchbp.ops.registry import Maker, Sample, register, sample


class Flatten(Op):
    """Dimensions ``start`` to ``end`` become one; backward and secant restore them.

    The result is a copy: torch forbids writing into a view that a custom function returned, and a
    flattened tensor followed by an in-place activation is common.
    """

    @staticmethod
    def forward(x: Tensor, start: int, end: int) -> Tensor:
        return torch.flatten(x, start, end).clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.shape, ctx.output_shape = inputs[0].shape, output.shape

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return grad_output.reshape(ctx.shape), None, None

    @staticmethod
    def jvp(ctx: Any, tx: Tensor | None, *_: Any) -> Tensor | None:
        return None if tx is None else tx.reshape(ctx.output_shape).clone()

    @staticmethod
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        return multiplier.reshape(args[0].shape), None, None


def _samples(make: Maker) -> Iterator[Sample]:
    yield sample(make(2, 3, 2))
    yield sample(make(2, 3, 2, 2), 1)
    yield sample(make(2, 3, 2, 2), start_dim=1, end_dim=-2)
    yield sample(make(3, 4), 1)
    yield sample(make())
    yield sample(make(0, 3, 2), 1)


@register(torch.flatten, replaces=[Tensor.flatten], modules=[nn.Flatten], samples=_samples)
def flatten(input: Tensor, start_dim: int = 0, end_dim: int = -1) -> Tensor:
    """Make one dimension of several, as :func:`torch.flatten`, but always as a copy.

    Args:
        input: any shape.
        start_dim: the first dimension to join.
        end_dim: the last dimension to join.

    Returns:
        ``input`` with dimensions ``start_dim`` to ``end_dim`` in one.
    """
    return Flatten.call(input, start_dim, end_dim)
