"""Activations and softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from torchbp import functional as F


class Threshold(torch.nn.Threshold):
    """:class:`torch.nn.Threshold` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise; any shape."""
        return F.threshold(input, self.threshold, self.value, self.inplace)


class ReLU(torch.nn.ReLU):
    """:class:`torch.nn.ReLU` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise; any shape."""
        return F.relu(input, self.inplace)


class RReLU(torch.nn.RReLU):
    """:class:`torch.nn.RReLU` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise; any shape. Training draws the slopes that torch does at equal seeds."""
        return F.rrelu(input, self.lower, self.upper, self.training, self.inplace)


class Hardtanh(torch.nn.Hardtanh):
    """:class:`torch.nn.Hardtanh` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise; any shape."""
        return F.hardtanh(input, self.min_val, self.max_val, self.inplace)


class ReLU6(torch.nn.ReLU6):
    """:class:`torch.nn.ReLU6` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise; any shape."""
        return F.hardtanh(input, self.min_val, self.max_val, self.inplace)


class Sigmoid(torch.nn.Sigmoid):
    """:class:`torch.nn.Sigmoid` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise; any shape."""
        return F.sigmoid(input)


class Hardsigmoid(torch.nn.Hardsigmoid):
    """:class:`torch.nn.Hardsigmoid` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise; any shape."""
        return F.hardsigmoid(input, self.inplace)


class Tanh(torch.nn.Tanh):
    """:class:`torch.nn.Tanh` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise; any shape."""
        return F.tanh(input)


class SiLU(torch.nn.SiLU):
    """:class:`torch.nn.SiLU` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise; any shape."""
        return F.silu(input, self.inplace)


class Mish(torch.nn.Mish):
    """:class:`torch.nn.Mish` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise; any shape."""
        return F.mish(input, self.inplace)


class Hardswish(torch.nn.Hardswish):
    """:class:`torch.nn.Hardswish` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise; any shape."""
        return F.hardswish(input, self.inplace)


class ELU(torch.nn.ELU):
    """:class:`torch.nn.ELU` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise; any shape."""
        return F.elu(input, self.alpha, self.inplace)


class CELU(torch.nn.CELU):
    """:class:`torch.nn.CELU` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise; any shape."""
        return F.celu(input, self.alpha, self.inplace)


class SELU(torch.nn.SELU):
    """:class:`torch.nn.SELU` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise; any shape."""
        return F.selu(input, self.inplace)


class GLU(torch.nn.GLU):
    """:class:`torch.nn.GLU` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape; halves its size along ``dim``."""
        return F.glu(input, self.dim)


class GELU(torch.nn.GELU):
    """:class:`torch.nn.GELU` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise; any shape."""
        return F.gelu(input, approximate=self.approximate)


class Hardshrink(torch.nn.Hardshrink):
    """:class:`torch.nn.Hardshrink` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise; any shape."""
        return F.hardshrink(input, self.lambd)


class LeakyReLU(torch.nn.LeakyReLU):
    """:class:`torch.nn.LeakyReLU` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise; any shape."""
        return F.leaky_relu(input, self.negative_slope, self.inplace)


class LogSigmoid(torch.nn.LogSigmoid):
    """:class:`torch.nn.LogSigmoid` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise; any shape."""
        return F.logsigmoid(input)


class Softplus(torch.nn.Softplus):
    """:class:`torch.nn.Softplus` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise; any shape."""
        return F.softplus(input, self.beta, self.threshold)


class Softshrink(torch.nn.Softshrink):
    """:class:`torch.nn.Softshrink` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise; any shape."""
        return F.softshrink(input, self.lambd)


class PReLU(torch.nn.PReLU):
    """:class:`torch.nn.PReLU` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """``(N, C, *)``, or any shape with one parameter."""
        return F.prelu(input, self.weight)


class Softsign(torch.nn.Softsign):
    """:class:`torch.nn.Softsign` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise; any shape."""
        return F.softsign(input)


class Tanhshrink(torch.nn.Tanhshrink):
    """:class:`torch.nn.Tanhshrink` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise; any shape."""
        return F.tanhshrink(input)


class Softmin(torch.nn.Softmin):
    """:class:`torch.nn.Softmin` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape; sums to one along ``dim``."""
        return F.softmin(input, self.dim, _stacklevel=5)


class Softmax(torch.nn.Softmax):
    """:class:`torch.nn.Softmax` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape; sums to one along ``dim``."""
        return F.softmax(input, self.dim, _stacklevel=5)


class Softmax2d(torch.nn.Softmax2d):
    """:class:`torch.nn.Softmax2d` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """``(N, C, H, W)`` or ``(C, H, W)``; sums to one over the channels."""
        if input.dim() not in (3, 4):
            raise ValueError(f"Softmax2d: expected a 3D or 4D input, but got {input.dim()}D")
        return F.softmax(input, -3)


class LogSoftmax(torch.nn.LogSoftmax):
    """:class:`torch.nn.LogSoftmax` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape; the exponentials sum to one along ``dim``."""
        return F.log_softmax(input, self.dim, _stacklevel=5)
