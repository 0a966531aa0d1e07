"""Normalisation."""

from __future__ import annotations

import torch
from torch import Tensor

from torchbp import functional as F


def _batch_norm(module: torch.nn.BatchNorm1d | torch.nn.BatchNorm2d, input: Tensor) -> Tensor:
    """Which statistics to use and how to update them, as torch.nn decides it."""
    module._check_input_dim(input)
    momentum = 0.0 if module.momentum is None else module.momentum
    tracks = module.training and module.track_running_stats
    if tracks and module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
        if module.momentum is None:  # a plain average over all batches
            momentum = 1.0 / float(module.num_batches_tracked)
    use_batch = module.training or (module.running_mean is None and module.running_var is None)
    keeps = not module.training or module.track_running_stats
    return F.batch_norm(
        input,
        module.running_mean if keeps else None,
        module.running_var if keeps else None,
        module.weight,
        module.bias,
        use_batch,
        momentum,
        module.eps,
    )


class BatchNorm1d(torch.nn.BatchNorm1d):
    """:class:`torch.nn.BatchNorm1d` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """``(N, C)`` or ``(N, C, L)``."""
        return _batch_norm(self, input)


class BatchNorm2d(torch.nn.BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """``(N, C, H, W)``."""
        return _batch_norm(self, input)


class LayerNorm(torch.nn.LayerNorm):
    """:class:`torch.nn.LayerNorm` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """``(*, *normalized_shape)``."""
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
