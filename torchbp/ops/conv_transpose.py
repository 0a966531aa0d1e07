"""Transposed convolution."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from torchbp.kernels.reference_conv import CONV, crop
from torchbp.ops.conv_gradients import Convolving, Gradients, Size, grad_weight, sizes
from torchbp.ops.registry import Maker, Sample, register, sample
from torchbp.ops.sample_factors import Factors, of_channels
from torchbp.ops.window_factors import Windows


class TransposedConvolution(Convolving):
    """``y = b + Aᵀ x`` where A is the convolution with the same weight, over 1 to 3 dimensions.

    Backward: ``∂x`` is the convolution of g with W; ``∂W`` is the weight gradient of that
    convolution, with g as its input and x as the error of its output.
    """

    @staticmethod
    def transposed(
        g: Tensor, x: Tensor, weight: Tensor, settings: Sequence[Any], needs: Sequence[bool]
    ) -> Gradients:
        stride, padding, _, groups, dilation = settings
        kernel = weight.shape[2:]
        of_x = None
        if needs[0]:
            conv = CONV[weight.dim()]
            of_x = conv(g, weight, None, stride, padding, dilation, groups)
            # An output padding of a stride or more, which a dilation allows, makes room for
            # windows that no element of x belongs to.
            of_x = crop(of_x, x.shape[-len(kernel) :])
        of_weight = None
        if needs[1]:
            of_weight = grad_weight(x, g, kernel, stride, padding, dilation, groups)
        return of_x, of_weight

    @staticmethod
    def sample_factors(grad_output: Tensor, args: tuple[Any, ...], output: Any) -> Factors:
        x, weight, bias, stride, padding, _, groups, dilation = args
        of_weight = Windows(x, grad_output, weight, (stride, padding, dilation, groups))
        return None, of_weight, of_channels(grad_output, bias), *(None,) * 5


class ConvTranspose1d(TransposedConvolution):
    """:class:`TransposedConvolution` over one dimension."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> Tensor:
        return F.conv_transpose1d(x, weight, bias, *settings)


class ConvTranspose2d(TransposedConvolution):
    """:class:`TransposedConvolution` over two dimensions."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> Tensor:
        return F.conv_transpose2d(x, weight, bias, *settings)


class ConvTranspose3d(TransposedConvolution):
    """:class:`TransposedConvolution` over three dimensions."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> Tensor:
        return F.conv_transpose3d(x, weight, bias, *settings)


def _samples_1d(make: Maker) -> Iterator[Sample]:
    yield sample(make(2, 4, 3), make(4, 1, 3), make(2), 2, 1, 1, groups=2)
    yield sample(make(1, 2, 4), make(2, 2, 2), dilation=3, output_padding=2)
    yield sample(make(2, 4), make(2, 3, 2), make(3))
    yield sample(make(0, 2, 4), make(2, 3, 2), make(3))


def _samples_2d(make: Maker) -> Iterator[Sample]:
    yield sample(make(2, 2, 2, 3), make(2, 3, 3, 2), make(3), padding=1)
    yield sample(make(1, 2, 3, 2), make(2, 2, 3, 2), None, (2, 3), (1, 0), (1, 2))
    yield sample(make(1, 4, 2, 2), make(4, 1, 2, 3), make(2), stride=2, groups=2, dilation=(2, 1))
    yield sample(make(1, 2, 2, 2), make(2, 1, 2, 2), groups=2)
    yield sample(make(2, 3, 2), make(2, 2, 2, 2), make(2))
    yield sample(make(0, 2, 3, 2), make(2, 2, 2, 2))


def _samples_3d(make: Maker) -> Iterator[Sample]:
    yield sample(make(1, 2, 2, 1, 2), make(2, 2, 2, 2, 1), make(2), (2, 1, 1), 0, (1, 0, 0))
    yield sample(make(1, 2, 1, 2, 2), make(2, 1, 1, 2, 2), groups=2, padding=(0, 1, 1))
    yield sample(make(2, 1, 2, 1), make(2, 1, 2, 1, 2), dilation=(1, 1, 2))
    yield sample(make(0, 2, 1, 2, 2), make(2, 1, 1, 2, 1), make(1))


@register(F.conv_transpose1d, modules=[nn.ConvTranspose1d], samples=_samples_1d)
def conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
) -> Tensor:
    """Transposed convolution over one dimension, as :func:`torch.nn.functional.conv_transpose1d`.

    As :func:`conv_transpose2d`, with L in the place of H and W.
    """
    settings = stride, padding, output_padding, groups, dilation
    return _call(ConvTranspose1d.call, 1, input, weight, bias, *settings)


@register(F.conv_transpose2d, modules=[nn.ConvTranspose2d], samples=_samples_2d)
def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
) -> Tensor:
    """Transposed convolution over two dimensions, as :func:`torch.nn.functional.conv_transpose2d`.

    Args:
        input: ``(N, in_channels, H, W)`` or ``(in_channels, H, W)``.
        weight: ``(in_channels, out_channels / groups, kH, kW)``.
        bias: ``(out_channels,)`` or ``None``.
        stride: of the window in the output, one number or one per dimension.
        padding: what is cut off both sides of the output, one number or one per dimension.
        output_padding: elements more at the far end, one number or one per dimension.
        groups: how many blocks of channels are convolved apart.
        dilation: spacing of the kernel's taps, one number or one per dimension.

    Returns:
        ``(N, out_channels, H', W')``, without N if the input had none.
    """
    settings = stride, padding, output_padding, groups, dilation
    return _call(ConvTranspose2d.call, 2, input, weight, bias, *settings)


@register(F.conv_transpose3d, modules=[nn.ConvTranspose3d], samples=_samples_3d)
def conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
) -> Tensor:
    """Transposed convolution over 3 dimensions, as :func:`torch.nn.functional.conv_transpose3d`.

    As :func:`conv_transpose2d`, with D, H and W in the place of H and W.
    """
    settings = stride, padding, output_padding, groups, dilation
    return _call(ConvTranspose3d.call, 3, input, weight, bias, *settings)


def _call(
    call: Callable[..., Tensor],
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Size,
    padding: Size,
    output_padding: Size,
    groups: int,
    dilation: Size,
) -> Tensor:
    step, cut, more = (sizes(value, dims) for value in (stride, padding, output_padding))
    return call(input, weight, bias, step, cut, more, groups, sizes(dilation, dims))
