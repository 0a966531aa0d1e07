"""The CUDA source of bias_act, run on the CPU, element by element against the CPU kernel."""

from __future__ import annotations

import pytest
import simt
import torch
from simt import close, dtypes, unwritten

from torchbp import kernels
from torchbp.kernels import reference

bias_act = simt.family("bias_act")
SLOPE = 0.2
SHAPES = [(37, 43), (1, 1), (31, 33), (257, 3), (1, 1025), (1025, 1)]
activations = pytest.mark.parametrize("act", reference.ACTIVATIONS)


@dtypes
@activations
def test_forward_and_backward(bias_act, dtype, act):
    index = list(reference.ACTIVATIONS).index(act)
    for rows, channels in SHAPES:
        g, x = torch.randn(2, rows, channels).to(dtype)
        b = torch.randn(channels).to(dtype)
        for bias in (b, None):
            y = unwritten(x)
            bias_act.forward(dtype, index, x, bias, y, x.numel(), channels, SLOPE)
            close(y, kernels.bias_act(x, bias, act, SLOPE))
        grad = unwritten(x)
        bias_act.backward(dtype, index, g, x, grad, x.numel(), SLOPE)
        close(grad, kernels.bias_act_backward(g, x, None, act, SLOPE)[0])


@dtypes
@activations
def test_backward_with_bias(bias_act, dtype, act):
    index = list(reference.ACTIVATIONS).index(act)
    for rows, channels in SHAPES:
        g, x = torch.randn(2, rows, channels).to(dtype)
        b = torch.randn(channels).to(dtype)
        grad, grad_bias = unwritten(x), unwritten(b)
        bias_act.backward_bias(dtype, index, g, x, b, grad, grad_bias, rows, channels, 16, SLOPE)
        expected, expected_bias = kernels.bias_act_backward(g, x, b, act, SLOPE)
        close(grad, expected)
        close(grad_bias, expected_bias, scale=rows**0.5)


@dtypes
def test_not_a_number_and_infinity(bias_act, dtype):
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e4, -1e4])
    x, g = values.to(dtype).view(1, 7), torch.ones(1, 7, dtype=dtype)
    for index, act in enumerate(reference.ACTIVATIONS):
        y, grad = unwritten(x), unwritten(x)
        bias_act.forward(dtype, index, x, None, y, 7, 1, SLOPE)
        bias_act.backward(dtype, index, g, x, grad, 7, SLOPE)
        for got, want in (
            (y, kernels.bias_act(x, None, act, SLOPE)),
            (grad, kernels.bias_act_backward(g, x, None, act, SLOPE)[0]),
        ):
            torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-2, atol=1e-6)
