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
