"""Convolutions."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from torchbp import functional as F
from torchbp.ops.conv import Pair


class Conv2d(torch.nn.Conv2d):
    """:class:`torch.nn.Conv2d` with its backward written out."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            pad = self._reversed_padding_repeated_twice
            input = torch.nn.functional.pad(input, pad, mode=self.padding_mode)
            padding = (0, 0)
        stride, dilation = cast(Pair, self.stride), cast(Pair, self.dilation)
        return F.conv2d(input, weight, bias, stride, padding, dilation, self.groups)
