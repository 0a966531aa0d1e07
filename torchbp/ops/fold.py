"""Sliding windows as columns, and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchbp.ops.linear_map import LinearMap
from torchbp.ops.registry import Maker, Sample, register, sample
from torchbp.ops.relevance import proportional, routes

Size = int | Sequence[int]


class Unfold(LinearMap):
    """Every window becomes a column; backward and secant sum the columns back into place."""

    relevance = classmethod(routes)

    @staticmethod
    def forward(x: Tensor, *settings: Any) -> Tensor:
        return F.unfold(x, *settings)

    @staticmethod
    def transposed(g: Tensor, shape: torch.Size, settings: Sequence[Any]) -> Tensor:
        return F.fold(g, shape[-2:], *settings)


class Fold(LinearMap):
    """Columns are summed into place as windows; backward and secant take the windows out again."""

    relevance = classmethod(proportional)

    @staticmethod
    def forward(x: Tensor, *settings: Any) -> Tensor:
        return F.fold(x, *settings)

    @staticmethod
    def transposed(g: Tensor, shape: torch.Size, settings: Sequence[Any]) -> Tensor:
        return F.unfold(g, *settings[1:])


def _unfold_samples(make: Maker) -> Iterator[Sample]:
    yield sample(make(2, 2, 3, 4), 2)
    yield sample(make(2, 4, 3), (2, 1), padding=(1, 0), stride=(2, 1))
    yield sample(make(1, 1, 4, 5), 2, dilation=(2, 3))
    yield sample(make(0, 2, 3, 3), 2)


def _fold_samples(make: Maker) -> Iterator[Sample]:
    yield sample(make(2, 8, 6), (3, 4), 2)
    yield sample(make(4, 9), (4, 3), (2, 1), padding=(1, 0), stride=(2, 1))
    yield sample(make(1, 4, 4), (4, 5), 2, dilation=(2, 3))
    yield sample(make(0, 8, 4), 3, 2)


@register(F.unfold, replaces=[torch._C._nn.im2col], modules=[nn.Unfold], samples=_unfold_samples)
def unfold(
    input: Tensor, kernel_size: Size, dilation: Size = 1, padding: Size = 0, stride: Size = 1
) -> Tensor:
    """Windows as columns, as :func:`torch.nn.functional.unfold`.

    Args:
        input: ``([N,] C, H, W)``.
        kernel_size: size of a window.
        dilation: step inside a window.
        padding: zeros added on each side.
        stride: step from window to window.

    Returns:
        ``([N,] C · window size, number of windows)``.
    """
    return Unfold.call(input, kernel_size, dilation, padding, stride)


@register(F.fold, replaces=[torch._C._nn.col2im], modules=[nn.Fold], samples=_fold_samples)
def fold(
    input: Tensor,
    output_size: Size,
    kernel_size: Size,
    dilation: Size = 1,
    padding: Size = 0,
    stride: Size = 1,
) -> Tensor:
    """Columns summed as windows, as :func:`torch.nn.functional.fold`.

    Args:
        input: ``([N,] C · window size, number of windows)``.
        output_size: H and W.
        kernel_size: size of a window.
        dilation: step inside a window.
        padding: zeros on each side that are left out of the result.
        stride: step from window to window.

    Returns:
        ``([N,] C, H, W)``.
    """
    return Fold.call(input, output_size, kernel_size, dilation, padding, stride)
