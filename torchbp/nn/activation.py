"""Activations and softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from torchbp import functional as F


class ReLU(torch.nn.ReLU):
    """:class:`torch.nn.ReLU` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise; any shape."""
        return F.relu(input, self.inplace)


class LeakyReLU(torch.nn.LeakyReLU):
    """:class:`torch.nn.LeakyReLU` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise; any shape."""
        return F.leaky_relu(input, self.negative_slope, self.inplace)


class GELU(torch.nn.GELU):
    """:class:`torch.nn.GELU` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise; any shape."""
        return F.gelu(input, approximate=self.approximate)


class SiLU(torch.nn.SiLU):
    """:class:`torch.nn.SiLU` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise; any shape."""
        return F.silu(input, self.inplace)


class Tanh(torch.nn.Tanh):
    """:class:`torch.nn.Tanh` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise; any shape."""
        return F.tanh(input)


class Sigmoid(torch.nn.Sigmoid):
    """:class:`torch.nn.Sigmoid` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise; any shape."""
        return F.sigmoid(input)


class Softplus(torch.nn.Softplus):
    """:class:`torch.nn.Softplus` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise; any shape."""
        return F.softplus(input, self.beta, self.threshold)


class Softmax(torch.nn.Softmax):
    """:class:`torch.nn.Softmax` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape; sums to one along ``dim``."""
        return F.softmax(input, self.dim, _stacklevel=5)


class LogSoftmax(torch.nn.LogSoftmax):
    """:class:`torch.nn.LogSoftmax` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape; the exponentials sum to one along ``dim``."""
        return F.log_softmax(input, self.dim, _stacklevel=5)
