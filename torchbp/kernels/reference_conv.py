"""The weight gradient of convolutions in plain PyTorch; see `torchbp.kernels.reference`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

#: Convolution of tensors with that many dimensions: a batch, channels, and one to three others.
CONV = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


def check_conv_grad_weight(
    grad_output: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> list[int]:
    """Raise RuntimeError where an argument of `conv_grad_weight` is not as documented.

    Returns:
        The shape of the weight.
    """
    dims = x.dim() - 2
    if dims not in (1, 2, 3):
        raise RuntimeError(f"x: expected 1 to 3 dims beside samples and channels, got {dims}")
    if grad_output.dim() != x.dim() or grad_output.shape[0] != x.shape[0]:
        raise RuntimeError("grad_output: expected the dims and samples of x")
    if grad_output.dtype != x.dtype:
        raise RuntimeError(
            f"grad_output: expected the dtype of x, {x.dtype}, got {grad_output.dtype}"
        )
    if grad_output.device != x.device:
        raise RuntimeError("grad_output: expected the device of x")
    settings = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    for name, values in settings.items():
        least = 0 if name == "padding" else 1
        if len(values) != dims or any(value < least for value in values):
            raise RuntimeError(f"{name}: expected {dims} numbers from {least} on")
    if groups < 1 or x.shape[1] % groups or grad_output.shape[1] % groups:
        raise RuntimeError(f"groups: expected a divisor of both numbers of channels, got {groups}")
    return [grad_output.shape[1], x.shape[1] // groups, *kernel]


def conv_grad_weight(
    grad_output: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Reference of `torchbp.kernels.conv_grad_weight`; differentiable, and of any dtype.

    ``∂W[o, c, k] = Σ_n,p g[n, o, p] x[n, c, s p + d k - pad]`` is itself a convolution, with
    samples in the place of channels, g as the kernel, and stride and dilation exchanged.
    """
    shape = check_conv_grad_weight(grad_output, x, kernel, stride, padding, dilation, groups)
    samples, _, *size = x.shape
    outputs, per_group = shape[:2]
    if samples == 0:  # a sum of nothing, as a product so that it has a graph
        nothing = grad_output.reshape(outputs, 0) @ x.reshape(0, math.prod(shape[1:]))
        return nothing.reshape(shape)
    wanted = [
        s * (n - 1) + d * (k - 1) + 1
        for s, n, d, k in zip(stride, grad_output.shape[2:], dilation, kernel, strict=True)
    ]
    short = [max(0, w - n - 2 * p) for w, n, p in zip(wanted, size, padding, strict=True)]
    if any(short):  # zeros at the far end only, as "same" padding adds them
        x = F.pad(x, [width for extra in reversed(short) for width in (0, extra)])
        size = [n + extra for n, extra in zip(size, short, strict=True)]
    # Samples become the channels that are summed over; channels of a group become the batch.
    x = x.reshape(samples, groups, per_group, *size).transpose(0, 2)
    x = x.reshape(per_group, groups * samples, *size)
    grad = CONV[x.dim()](
        x, grad_output.transpose(0, 1), None, dilation, padding, stride, groups
    ).transpose(0, 1)
    # Where the stride leaves x over, there are taps beyond the kernel.
    return crop(grad, kernel).contiguous()


def crop(tensor: Tensor, size: Sequence[int]) -> Tensor:
    """The first ``size`` elements of the last dimensions."""
    for dim, length in enumerate(size, tensor.dim() - len(size)):
        if tensor.shape[dim] != length:
            tensor = tensor.narrow(dim, 0, length)
    return tensor
