"""Losses."""

from __future__ import annotations

import torch
from torch import Tensor

from torchbp import functional as F


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """:class:`torch.nn.CrossEntropyLoss` with its backward written out."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Logits ``(N, C, *)``; target: classes ``(N, *)`` or probabilities ``(N, C, *)``."""
        return F.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class MSELoss(torch.nn.MSELoss):
    """:class:`torch.nn.MSELoss` with its backward written out."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Two tensors of one shape."""
        return F.mse_loss(input, target, reduction=self.reduction)


class BCEWithLogitsLoss(torch.nn.BCEWithLogitsLoss):
    """:class:`torch.nn.BCEWithLogitsLoss` with its backward written out."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Logits and targets of one shape."""
        return F.binary_cross_entropy_with_logits(
            input,
            target,
            self.weight,
            pos_weight=self.pos_weight,
            reduction=self.reduction,
        )
