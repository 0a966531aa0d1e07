"""Dropout."""

from __future__ import annotations

import torch
from torch import Tensor

from torchbp import functional as F


class Dropout(torch.nn.Dropout):
    """:class:`torch.nn.Dropout` with its backward written out; the same mask at equal seeds."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape."""
        return F.dropout(input, self.p, self.training, self.inplace)
