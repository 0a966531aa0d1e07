"""Distances and similarities."""

from __future__ import annotations

import torch
from torch import Tensor

from torchbp import functional as F


class CosineSimilarity(torch.nn.CosineSimilarity):
    """:class:`torch.nn.CosineSimilarity` with its backward written out."""

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        """Two shapes that broadcast to theirs without ``dim``."""
        return F.cosine_similarity(x1, x2, self.dim, self.eps)


class PairwiseDistance(torch.nn.PairwiseDistance):
    """:class:`torch.nn.PairwiseDistance` with its backward written out."""

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        """``(*, D)`` twice to ``(*)``."""
        return F.pairwise_distance(x1, x2, self.norm, self.eps, self.keepdim)
