"""Dropout."""

from __future__ import annotations

import torch
from torch import Tensor

from torchbp import functional as F


class Dropout(torch.nn.Dropout):
    """:class:`torch.nn.Dropout` with its backward written out; noise as torch's."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape."""
        return F.dropout(input, self.p, self.training, self.inplace)


class Dropout1d(torch.nn.Dropout1d):
    """:class:`torch.nn.Dropout1d` with its backward written out; noise as torch's."""

    def forward(self, input: Tensor) -> Tensor:
        """``(N, C, L)`` or ``(C, L)``."""
        return F.dropout1d(input, self.p, self.training, self.inplace)


class Dropout2d(torch.nn.Dropout2d):
    """:class:`torch.nn.Dropout2d` with its backward written out; noise as torch's."""

    def forward(self, input: Tensor) -> Tensor:
        """``(N, C, H, W)``."""
        return F.dropout2d(input, self.p, self.training, self.inplace)


class Dropout3d(torch.nn.Dropout3d):
    """:class:`torch.nn.Dropout3d` with its backward written out; noise as torch's."""

    def forward(self, input: Tensor) -> Tensor:
        """``(N, C, D, H, W)`` or ``(C, D, H, W)``."""
        return F.dropout3d(input, self.p, self.training, self.inplace)


class AlphaDropout(torch.nn.AlphaDropout):
    """:class:`torch.nn.AlphaDropout` with its backward written out; noise as torch's."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape."""
        return F.alpha_dropout(input, self.p, self.training)


class FeatureAlphaDropout(torch.nn.FeatureAlphaDropout):
    """:class:`torch.nn.FeatureAlphaDropout` with its backward written out; noise as torch's."""

    def forward(self, input: Tensor) -> Tensor:
        """``(N, C, *)``."""
        return F.feature_alpha_dropout(input, self.p, self.training)
