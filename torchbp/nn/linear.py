"""Fully connected and bilinear layers, residual addition."""

from __future__ import annotations

import torch
from torch import Tensor

from torchbp import functional as F


class Linear(torch.nn.Linear):
    """:class:`torch.nn.Linear` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """``(*, in_features)`` to ``(*, out_features)``."""
        return F.linear(input, self.weight, self.bias)


class NonDynamicallyQuantizableLinear(torch.nn.modules.linear.NonDynamicallyQuantizableLinear):
    """The output map of attention, which torch.nn keeps in a class of its own."""

    def forward(self, input: Tensor) -> Tensor:
        """``(*, in_features)`` to ``(*, out_features)``."""
        return F.linear(input, self.weight, self.bias)


class Bilinear(torch.nn.Bilinear):
    """:class:`torch.nn.Bilinear` with its backward written out."""

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        """``(*, in1_features)`` and ``(*, in2_features)`` to ``(*, out_features)``."""
        return F.bilinear(input1, input2, self.weight, self.bias)


class Identity(torch.nn.Identity):
    """:class:`torch.nn.Identity`: there is nothing to write out, the error passes as it is."""

    def forward(self, input: Tensor) -> Tensor:
        """The input itself."""
        return input


class Add(torch.nn.Module):
    """Residual addition as a module, so that both branches of a block have a name.

    torch.nn has no such module; write ``self.add(self.block(x), x)`` for ``self.block(x) + x``.
    """

    def forward(self, block: Tensor, skip: Tensor) -> Tensor:
        """Sum of two tensors whose shapes broadcast."""
        return F.add(block, skip)
