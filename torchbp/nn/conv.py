"""Convolutions."""

from __future__ import annotations

import torch
from torch import Tensor

from torchbp import functional as F


class Conv2d(torch.nn.Conv2d):
    """:class:`torch.nn.Conv2d` with its backward written out."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            pad = self._reversed_padding_repeated_twice
            input = torch.nn.functional.pad(input, pad, mode=self.padding_mode)
            padding = (0, 0)
        return F.conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups)
