"""Changes of shape."""

from __future__ import annotations

import torch
from torch import Tensor

from torchbp import functional as F


class Flatten(torch.nn.Flatten):
    """:class:`torch.nn.Flatten` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """``(*, start_dim, ..., end_dim, *)`` to one dimension in their place."""
        return F.flatten(input, self.start_dim, self.end_dim)


class Unflatten(torch.nn.Unflatten):
    """:class:`torch.nn.Unflatten` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """Several dimensions in place of dimension ``dim``."""
        return F.unflatten(input, self.dim, self.unflattened_size)


class PixelShuffle(torch.nn.PixelShuffle):
    """:class:`torch.nn.PixelShuffle` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """``(*, C r², H, W)`` to ``(*, C, H r, W r)``."""
        return F.pixel_shuffle(input, self.upscale_factor)


class PixelUnshuffle(torch.nn.PixelUnshuffle):
    """:class:`torch.nn.PixelUnshuffle` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """``(*, C, H r, W r)`` to ``(*, C r², H, W)``."""
        return F.pixel_unshuffle(input, self.downscale_factor)


class ChannelShuffle(torch.nn.ChannelShuffle):
    """:class:`torch.nn.ChannelShuffle` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """``(N, C, *)``."""
        return F.channel_shuffle(input, self.groups)


class Fold(torch.nn.Fold):
    """:class:`torch.nn.Fold` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """``([N,] C · window size, windows)`` to ``([N,] C, H, W)``."""
        return F.fold(
            input, self.output_size, self.kernel_size, self.dilation, self.padding, self.stride
        )


class Unfold(torch.nn.Unfold):
    """:class:`torch.nn.Unfold` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """``([N,] C, H, W)`` to ``([N,] C · window size, windows)``."""
        return F.unfold(input, self.kernel_size, self.dilation, self.padding, self.stride)
