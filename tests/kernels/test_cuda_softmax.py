"""The CUDA source of softmax_backward, run on the CPU, against the CPU kernel."""

from __future__ import annotations

import pytest
import simt
import torch
from simt import close, dtypes, unwritten

from torchbp import kernels

softmax = simt.family("softmax")
SHAPES = [(7, 300), (5, 3), (1, 1), (31, 33), (257, 31), (1, 20_001), (1025, 1)]


@dtypes
@pytest.mark.parametrize("logarithm", [False, True], ids=["softmax", "log_softmax"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward(softmax, shape, logarithm, dtype):
    g, x = torch.randn(2, *shape).to(dtype)
    y = x.log_softmax(-1) if logarithm else x.softmax(-1)
    grad = unwritten(y)
    softmax.backward(dtype, logarithm, g, y, grad, *shape)
    scale = g.float().sum(-1).abs().max().item() if logarithm else 1.0
    close(grad, kernels.softmax_backward(g, y, logarithm), scale=max(1.0, scale))
