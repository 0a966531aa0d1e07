"""Pooling."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchbp.ops.base import Op
from torchbp.ops.registry import Maker, Sample, register, sample

Size = int | tuple[int, ...]


class MaxPool2d(Op):
    """``y = max`` over each window; the second output holds the position of each maximum.

    Backward: g goes to the maximum, ``∂x[i] = Σ g`` over the windows whose maximum is i.
    Secant: a window whose maximum moves from i₀ to i splits its multiplier between both routes,
    ``λ`` to i and ``1 - λ`` to i₀ with ``λ = a / (a + b)``, ``a = x[i] - x[i₀] >= 0`` and
    ``b = x₀[i₀] - x₀[i] >= 0``: the only split in [0, 1] that gives ``y - y₀`` exactly.
    """

    @staticmethod
    def forward(
        x: Tensor, kernel_size: Size, stride: Size, padding: Size, dilation: Size, ceil_mode: bool
    ) -> tuple[Tensor, Tensor]:
        return torch.max_pool2d_with_indices(x, kernel_size, stride, padding, dilation, ceil_mode)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        indices = output[1]
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(indices)
        ctx.save_for_forward(indices)
        ctx.shape = inputs[0].shape

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * 6
        (indices,) = ctx.saved_tensors
        return _scatter(grad_output, indices, ctx.shape), *_CONSTANTS

    @staticmethod
    def jvp(ctx: Any, tx: Tensor | None, *_: Any) -> tuple[Tensor | None, None]:
        (indices,) = ctx.saved_tensors
        return None if tx is None else _pick(tx, indices), None

    @staticmethod
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        x, x0 = args[0], args0[0]
        (y, indices), (y0, indices0) = output, output0
        a, b = y - _pick(x, indices0), y0 - _pick(x0, indices)
        total = a + b
        share = torch.where(total > 0, a / total, 0.5)
        routed = _scatter(multiplier * share, indices, x.shape)
        return routed + _scatter(multiplier * (1 - share), indices0, x.shape), *_CONSTANTS


_CONSTANTS = (None,) * 5


def _pick(x: Tensor, indices: Tensor) -> Tensor:
    """The elements of each plane that ``indices`` names."""
    *leading, height, width = x.shape
    planes = x.reshape(*leading, height * width)
    positions = indices.reshape(*leading, math.prod(indices.shape[-2:]))
    return planes.gather(-1, positions).reshape(indices.shape)


def _scatter(values: Tensor, indices: Tensor, shape: torch.Size) -> Tensor:
    """The transpose of :func:`_pick`: a plane takes the sum of what is sent to each position."""
    *leading, height, width = shape
    count = math.prod(indices.shape[-2:])
    planes = values.new_zeros((*leading, height * width))
    positions, values = indices.reshape(*leading, count), values.reshape(*leading, count)
    return planes.scatter_add(-1, positions, values).reshape(shape)


class _Average(Op):
    """``y = A_h x A_wᵀ``: averaging over rectangles is linear and separable.

    Backward and secant: ``∂x = A_hᵀ g A_w``; where the windows tile the plane each element simply
    receives its share of the window's g. Subclasses give ``forward`` and ``axis(ctx_settings,
    i, size, n_out)``, the windows along one axis.
    """


class AvgPool2d(Op):
    """``y = Σ x / divisor`` over each window: ``y = A_h x A_wᵀ`` with averaging matrices.

    Backward and secant (the map is linear): ``∂x = A_hᵀ g A_w``; where the windows tile the plane,
    every element receives its equal share of g.
    """
