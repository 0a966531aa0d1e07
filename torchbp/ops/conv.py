"""Convolution."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from torchbp.ops.conv_gradients import (
    Convolving,
    Gradients,
    Size,
    grad_input,
    grad_weight,
    leading,
    sizes,
)
from torchbp.ops.registry import Maker, Sample, register, sample
from torchbp.ops.sample_factors import Factors, of_channels
from torchbp.ops.window_factors import Windows


class Convolution(Convolving):
    """``y[n, o] = b[o] + Σ_c W[o, c] ⋆ x[n, c]``, the cross-correlation ⋆ over 1 to 3 dimensions.

    Backward: ``∂x`` is the transposed convolution of g with W; ``∂W[o, c] = Σ_n g[n, o] ⋆ x[n, c]``
    is again a convolution, with samples in the place of channels, g as the kernel, and stride and
    dilation exchanged.
    """

    @staticmethod
    def transposed(
        g: Tensor, x: Tensor, weight: Tensor, settings: Sequence[Any], needs: Sequence[bool]
    ) -> Gradients:
        stride, padding, dilation, groups = settings
        kernel = weight.shape[2:]
        rest = stride, leading(padding, kernel, dilation), dilation, groups
        return (
            grad_input(g, weight, x.shape[-len(kernel) :], *rest) if needs[0] else None,
            grad_weight(g, x, kernel, *rest) if needs[1] else None,
        )

    @staticmethod
    def sample_factors(grad_output: Tensor, args: tuple[Any, ...], output: Any) -> Factors:
        x, weight, bias, stride, padding, dilation, groups = args
        first = leading(padding, weight.shape[2:], dilation)
        of_weight = Windows(grad_output, x, weight, (stride, first, dilation, groups))
        return None, of_weight, of_channels(grad_output, bias), *(None,) * 4


class Conv1d(Convolution):
    """:class:`Convolution` over one dimension."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> Tensor:
        return F.conv1d(x, weight, bias, *settings)


class Conv2d(Convolution):
    """:class:`Convolution` over two dimensions."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> Tensor:
        return F.conv2d(x, weight, bias, *settings)


class Conv3d(Convolution):
    """:class:`Convolution` over three dimensions."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> Tensor:
        return F.conv3d(x, weight, bias, *settings)


def _samples_1d(make: Maker) -> Iterator[Sample]:
    yield sample(make(2, 4, 5), make(4, 2, 2), make(4), stride=2, padding=1, groups=2)
    yield sample(make(2, 2, 6), make(4, 1, 3), groups=2, dilation=2, padding=2)
    yield sample(make(1, 2, 5), make(2, 2, 4), make(2), padding="same")
    yield sample(make(2, 5), make(3, 2, 2), padding="valid")
    yield sample(make(0, 2, 5), make(3, 2, 2), make(3))


def _samples_2d(make: Maker) -> Iterator[Sample]:
    yield sample(make(2, 2, 4, 3), make(3, 2, 3, 2), make(3), padding=1)
    yield sample(make(1, 2, 6, 5), make(2, 2, 3, 2), stride=(2, 3))
    yield sample(make(1, 4, 3, 3), make(4, 2, 2, 2), make(4), groups=2)
    yield sample(make(2, 2, 4, 3), make(4, 1, 2, 2), padding=(1, 0), groups=2)
    yield sample(make(1, 1, 6, 5), make(2, 1, 2, 3), dilation=(2, 1), stride=2, padding=1)
    yield sample(make(2, 1, 3, 4), make(2, 1, 2, 3), make(2), padding="same")
    yield sample(make(1, 1, 4, 4), make(2, 1, 2, 4), padding="same", dilation=(3, 1))
    yield sample(make(1, 1, 3, 4), make(2, 1, 2, 2), padding="valid")
    yield sample(make(2, 4, 3), make(2, 2, 3, 2), make(2), padding=1)
    yield sample(make(0, 2, 4, 3), make(3, 2, 2, 2), make(3))


def _samples_3d(make: Maker) -> Iterator[Sample]:
    yield sample(make(2, 2, 2, 3, 2), make(2, 2, 2, 1, 2), make(2), padding=(1, 0, 1))
    yield sample(make(1, 2, 3, 4, 3), make(2, 1, 2, 2, 2), stride=(1, 2, 2), groups=2)
    yield sample(make(1, 1, 4, 2, 3), make(1, 1, 2, 1, 2), make(1), dilation=(2, 1, 1))
    yield sample(make(1, 2, 2, 3), make(2, 1, 2, 2, 1), padding="same")
    yield sample(make(0, 1, 2, 2, 2), make(2, 1, 2, 1, 1), make(2))


@register(F.conv1d, modules=[nn.Conv1d], samples=_samples_1d)
def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: str | Size = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    """One-dimensional convolution, as :func:`torch.nn.functional.conv1d`.

    As :func:`conv2d`, with L in the place of H and W.
    """
    return _call(Conv1d.call, 1, input, weight, bias, stride, padding, dilation, groups)


@register(F.conv2d, modules=[nn.Conv2d], samples=_samples_2d)
def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: str | Size = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    """Two-dimensional convolution, as :func:`torch.nn.functional.conv2d`.

    Args:
        input: ``(N, in_channels, H, W)`` or ``(in_channels, H, W)``.
        weight: ``(out_channels, in_channels / groups, kH, kW)``.
        bias: ``(out_channels,)`` or ``None``.
        stride: of the window, one number or one per dimension.
        padding: zeros on both sides, one number or one per dimension; or ``"valid"``, ``"same"``.
        dilation: spacing of the kernel's taps, one number or one per dimension.
        groups: how many blocks of channels are convolved apart.

    Returns:
        ``(N, out_channels, H', W')``, without N if the input had none.
    """
    return _call(Conv2d.call, 2, input, weight, bias, stride, padding, dilation, groups)


@register(F.conv3d, modules=[nn.Conv3d], samples=_samples_3d)
def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: str | Size = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    """Three-dimensional convolution, as :func:`torch.nn.functional.conv3d`.

    As :func:`conv2d`, with D, H and W in the place of H and W.
    """
    return _call(Conv3d.call, 3, input, weight, bias, stride, padding, dilation, groups)


def _call(
    call: Callable[..., Tensor],
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Size,
    padding: str | Size,
    dilation: Size,
    groups: int,
) -> Tensor:
    if not isinstance(padding, str):
        padding = sizes(padding, dims)
    return call(input, weight, bias, sizes(stride, dims), padding, sizes(dilation, dims), groups)
