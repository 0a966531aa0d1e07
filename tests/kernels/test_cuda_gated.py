"""The CUDA source of gated, run on the CPU, against the CPU kernel."""

from __future__ import annotations

import pytest
import simt
import torch
from simt import close, dtypes, unwritten

from torchbp import kernels
from torchbp.kernels import reference

gated = simt.family("gated")
acts = pytest.mark.parametrize("act", kernels.GATES)
SHAPES = [(1, 1), (1, 31), (33, 1), (3, 257), (1, 4097), (37, 43)]


@dtypes
@acts
def test_two_tensors(gated, dtype, act):
    index = [*reference.ACTIVATIONS].index(act)
    for shape in SHAPES:
        g, a, b = torch.randn(3, *shape).to(dtype)
        count, width = a.numel(), shape[1]
        y = unwritten(a)
        gated.forward(dtype, index, a, b, 0, y, count, width, width, width)
        close(y, kernels.gated(a, b, act), 10.0)
        of_a, of_b = unwritten(a), unwritten(b)
        gated.backward(
            dtype, index, g, a, b, 0, of_a, of_b, count, width, width, width, width
        )  # fmt: skip
        for got, expected in zip((of_a, of_b), kernels.gated_backward(g, a, b, act), strict=True):
            close(got, expected, 10.0)


@dtypes
@acts
def test_halves_of_one_tensor(gated, dtype, act):
    index = [*reference.ACTIVATIONS].index(act)
    for rows, width in SHAPES:
        x, g = torch.randn(rows, 2 * width).to(dtype), torch.randn(rows, width).to(dtype)
        y, grad = unwritten(g), unwritten(x)
        steps = width, 2 * width, 2 * width
        gated.forward(dtype, index, x, x, width, y, g.numel(), *steps)
        close(y, kernels.gated(x, None, act), 10.0)
        gated.backward(
            dtype, index, g, x, x, width, grad, grad, g.numel(), *steps, 2 * width
        )  # fmt: skip
        close(grad, kernels.gated_backward(g, x, None, act)[0], 10.0)
