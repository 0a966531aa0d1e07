"""Look-up tables."""

from __future__ import annotations

import torch
from torch import Tensor

from torchbp import functional as F


class Embedding(torch.nn.Embedding):
    """:class:`torch.nn.Embedding` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """Indices ``(*)`` to ``(*, embedding_dim)``."""
        return F.embedding(
            input,
            self.weight,
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )


class EmbeddingBag(torch.nn.EmbeddingBag):
    """:class:`torch.nn.EmbeddingBag` with its backward written out."""

    def forward(
        self,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Indices ``(bags, n)``, or ``(n,)`` with offsets, to ``(bags, embedding_dim)``."""
        return F.embedding_bag(
            input,
            self.weight,
            offsets,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.mode,
            self.sparse,
            per_sample_weights,
            self.include_last_offset,
            self.padding_idx,
        )
