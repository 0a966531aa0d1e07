"""Pooling."""

from __future__ import annotations

import torch
from torch import Tensor

from torchbp import functional as F


class MaxPool2d(torch.nn.MaxPool2d):
    """:class:`torch.nn.MaxPool2d` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """``([N,] C, H, W)`` to ``([N,] C, H_out, W_out)``."""
        return F.max_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
            self.return_indices,
        )


class AvgPool2d(torch.nn.AvgPool2d):
    """:class:`torch.nn.AvgPool2d` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """``([N,] C, H, W)`` to ``([N,] C, H_out, W_out)``."""
        return F.avg_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


class AdaptiveAvgPool2d(torch.nn.AdaptiveAvgPool2d):
    """:class:`torch.nn.AdaptiveAvgPool2d` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """``([N,] C, H, W)`` to ``([N,] C, *output_size)``."""
        return F.adaptive_avg_pool2d(input, self.output_size)
