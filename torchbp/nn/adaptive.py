"""Softmax over many classes, most of them rare."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.adaptive import _ASMoutput

from torchbp import functional as F


class AdaptiveLogSoftmaxWithLoss(torch.nn.AdaptiveLogSoftmaxWithLoss):
    """:class:`torch.nn.AdaptiveLogSoftmaxWithLoss` of explicit ops (Grave et al. 2017)."""

    def forward(self, input_: Tensor, target_: Tensor) -> Any:
        """``(N, in_features)`` and classes ``(N,)``, or both without N.

        Returns:
            ``output``, the log-probability of every target, and ``loss``, minus their mean.

        Raises:
            RuntimeError: if the shapes do not fit, or if a class is out of range.
        """
        _check(input_, target_, self.n_classes)
        input, target = (input_, target_) if target_.dim() else (input_[None], target_[None])
        rows: list[Tensor] = []
        columns: list[Tensor] = []
        logs: list[Tensor] = []
        for cluster, (low, high) in enumerate(pairwise([0, *self.cutoffs])):
            here = ((target >= low) & (target < high)).nonzero().flatten()
            place = target[here] - low
            if cluster == 0:
                rows, columns, logs = [here], [place], [input.new_zeros(len(here))]
                continue
            if not len(here):
                continue
            rows.append(here)
            columns.append(torch.full_like(here, self.shortlist_size + cluster - 1))
            within = F.log_softmax(self.tail[cluster - 1](input.index_select(0, here)), dim=1)
            logs.append(within.gather(1, place[:, None]).squeeze(1))
        back = torch.cat(rows).argsort()  # the clusters in turn, put in the order of the batch
        column = torch.cat(columns)[back]
        head = F.log_softmax(self.head(input), dim=1)
        output = torch.cat(logs).index_select(0, back) + head.gather(1, column[:, None]).squeeze(1)
        loss = -output.mean()
        return _ASMoutput(output if target_.dim() else output.squeeze(0), loss)


def _check(input: Tensor, target: Tensor, classes: int) -> None:
    name = "AdaptiveLogSoftmaxWithLoss"
    if target.dim() > 1 or input.dim() != target.dim() + 1:
        raise RuntimeError(
            f"{name}: expected input (N, in_features) and target (N,), or both without N, got "
            f"{tuple(input.shape)} and {tuple(target.shape)}"
        )
    if target.dim() and len(input) != len(target):
        raise RuntimeError(f"{name}: {len(input)} rows of input, {len(target)} targets")
    if ((target < 0) | (target >= classes)).any():
        raise RuntimeError(
            f"{name}: targets must be in [0, {classes - 1}], got {target.min().item()} to "
            f"{target.max().item()}"
        )
