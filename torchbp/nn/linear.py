"""Fully connected layers and residual addition."""

from __future__ import annotations

import torch
from torch import Tensor

from torchbp import functional as F


class Linear(torch.nn.Linear):
    """:class:`torch.nn.Linear` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """``(*, in_features)`` to ``(*, out_features)``."""
        return F.linear(input, self.weight, self.bias)


class Add(torch.nn.Module):
    """Residual addition as a module, so that both branches of a block have a name.

    torch.nn has no such module; write ``self.add(self.block(x), x)`` for ``self.block(x) + x``.
    """

    def forward(self, block: Tensor, skip: Tensor) -> Tensor:
        """Sum of two tensors whose shapes broadcast."""
        return F.add(block, skip)
