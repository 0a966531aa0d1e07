"""Normalisation."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from torch import Tensor, distributed, nn

from torchbp import functional as F

if TYPE_CHECKING:
    from torch.nn.modules.batchnorm import _BatchNorm
    from torch.nn.modules.instancenorm import _InstanceNorm


def _batch_norm(module: _BatchNorm, input: Tensor) -> Tensor:
    """Which statistics to use and how to update them, as torch.nn decides it."""
    module._check_input_dim(input)
    momentum = 0.0 if module.momentum is None else module.momentum
    tracks = module.training and module.track_running_stats
    if tracks and module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
        if module.momentum is None:  # a plain average over all batches
            momentum = 1.0 / float(module.num_batches_tracked)
    mean, var = module.running_mean, module.running_var
    use_batch = module.training or (mean is None and var is None)
    if module.training and not module.track_running_stats:
        mean = var = None
    return F.batch_norm(
        input, mean, var, module.weight, module.bias, use_batch, momentum, module.eps
    )


class BatchNorm1d(nn.BatchNorm1d):
    """:class:`torch.nn.BatchNorm1d` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """``(N, C)`` or ``(N, C, L)``."""
        return _batch_norm(self, input)


class BatchNorm2d(nn.BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """``(N, C, H, W)``."""
        return _batch_norm(self, input)


class BatchNorm3d(nn.BatchNorm3d):
    """:class:`torch.nn.BatchNorm3d` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """``(N, C, D, H, W)``."""
        return _batch_norm(self, input)


class SyncBatchNorm(nn.SyncBatchNorm):
    """:class:`torch.nn.SyncBatchNorm`; its backward is written out outside distributed training."""

    def forward(self, input: Tensor) -> Tensor:
        """``(N, C, *)``; where processes share their statistics, torch's own forward runs."""
        if self.training and distributed.is_available() and distributed.is_initialized():
            return super().forward(input)
        self._check_input_dim(input)
        self._check_non_zero_input_channels(input)
        return _batch_norm(self, input)


class LayerNorm(nn.LayerNorm):
    """:class:`torch.nn.LayerNorm` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """``(*, *normalized_shape)``."""
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """:class:`torch.nn.RMSNorm` with its backward written out."""

    def forward(self, x: Tensor) -> Tensor:
        """``(*, *normalized_shape)``."""
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)


class GroupNorm(nn.GroupNorm):
    """:class:`torch.nn.GroupNorm` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """``(N, C, *)``."""
        return F.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


def _instance_norm(module: _InstanceNorm, input: Tensor) -> Tensor:
    """Check the channels as torch.nn does, and lend an unbatched input a batch dimension."""
    module._check_input_dim(input)
    unbatched = module._get_no_batch_dim()
    dim = input.dim() - unbatched
    if input.shape[dim] != module.num_features:
        mismatch = (
            f"expected num_features={module.num_features} channels in dim {dim} of the input, "
            f"got {input.shape[dim]}"
        )
        if module.affine:
            raise ValueError(mismatch)
        warnings.warn(f"{mismatch}; num_features is not used, because affine=False", stacklevel=3)
    output = F.instance_norm(
        input.unsqueeze(0) if input.dim() == unbatched else input,
        module.running_mean,
        module.running_var,
        module.weight,
        module.bias,
        module.training or not module.track_running_stats,
        0.0 if module.momentum is None else module.momentum,
        module.eps,
    )
    return output.squeeze(0) if input.dim() == unbatched else output


class InstanceNorm1d(nn.InstanceNorm1d):
    """:class:`torch.nn.InstanceNorm1d` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """``(N, C, L)`` or ``(C, L)``."""
        return _instance_norm(self, input)


class InstanceNorm2d(nn.InstanceNorm2d):
    """:class:`torch.nn.InstanceNorm2d` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """``(N, C, H, W)`` or ``(C, H, W)``."""
        return _instance_norm(self, input)


class InstanceNorm3d(nn.InstanceNorm3d):
    """:class:`torch.nn.InstanceNorm3d` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """``(N, C, D, H, W)`` or ``(C, D, H, W)``."""
        return _instance_norm(self, input)


class LocalResponseNorm(nn.LocalResponseNorm):
    """:class:`torch.nn.LocalResponseNorm` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """``(N, C, *)``."""
        return F.local_response_norm(input, self.size, self.alpha, self.beta, self.k)
