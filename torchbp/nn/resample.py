"""Upsampling."""

from __future__ import annotations

import torch
from torch import Tensor

from torchbp import functional as F


def _upsampled(module: torch.nn.Upsample, input: Tensor) -> Tensor:
    return F.interpolate(
        input,
        module.size,
        module.scale_factor,
        module.mode,
        module.align_corners,
        module.recompute_scale_factor,
    )


class Upsample(torch.nn.Upsample):
    """:class:`torch.nn.Upsample` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """``(N, C, W)``, ``(N, C, H, W)`` or ``(N, C, D, H, W)``."""
        return _upsampled(self, input)


class UpsamplingNearest2d(torch.nn.UpsamplingNearest2d):
    """:class:`torch.nn.UpsamplingNearest2d` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """``(N, C, H, W)``."""
        return _upsampled(self, input)


class UpsamplingBilinear2d(torch.nn.UpsamplingBilinear2d):
    """:class:`torch.nn.UpsamplingBilinear2d` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """``(N, C, H, W)``."""
        return _upsampled(self, input)
