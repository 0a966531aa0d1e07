"""Convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchbp import functional as F


class Conv1d(torch.nn.Conv1d):
    """:class:`torch.nn.Conv1d` with its backward written out."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _convolved(self, F.conv1d, input, weight, bias)


class Conv2d(torch.nn.Conv2d):
    """:class:`torch.nn.Conv2d` with its backward written out."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _convolved(self, F.conv2d, input, weight, bias)


class Conv3d(torch.nn.Conv3d):
    """:class:`torch.nn.Conv3d` with its backward written out."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _convolved(self, F.conv3d, input, weight, bias)


class ConvTranspose1d(torch.nn.ConvTranspose1d):
    """:class:`torch.nn.ConvTranspose1d` with its backward written out."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """``([N,] in_channels, L)`` to ``([N,] out_channels, L')``, L' as asked for."""
        return _transposed(self, F.conv_transpose1d, input, output_size)


class ConvTranspose2d(torch.nn.ConvTranspose2d):
    """:class:`torch.nn.ConvTranspose2d` with its backward written out."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """``([N,] in_channels, H, W)`` to ``([N,] out_channels, H', W')``, sizes as asked for."""
        return _transposed(self, F.conv_transpose2d, input, output_size)


class ConvTranspose3d(torch.nn.ConvTranspose3d):
    """:class:`torch.nn.ConvTranspose3d` with its backward written out."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """``([N,] in_channels, D, H, W)`` to ``([N,] out_channels, D', H', W')``, as asked for."""
        return _transposed(self, F.conv_transpose3d, input, output_size)


def _convolved(
    layer: Any, conv: Callable[..., Tensor], input: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    padding = layer.padding
    if layer.padding_mode != "zeros":
        widths = layer._reversed_padding_repeated_twice
        input, padding = F.pad(input, widths, layer.padding_mode), 0
    return conv(input, weight, bias, layer.stride, padding, layer.dilation, layer.groups)


def _transposed(
    layer: Any, conv: Callable[..., Tensor], input: Tensor, output_size: list[int] | None
) -> Tensor:
    if layer.padding_mode != "zeros":
        kind = type(layer).__name__
        raise ValueError(f"{kind}: only zeros can be padded, got {layer.padding_mode!r}")
    step, cut, spacing = layer.stride, layer.padding, layer.dilation
    dims = layer.weight.dim() - 2
    more = layer._output_padding(input, output_size, step, cut, layer.kernel_size, dims, spacing)
    return conv(input, layer.weight, layer.bias, step, cut, more, layer.groups, spacing)
