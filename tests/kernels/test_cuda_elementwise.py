"""The CUDA source of elementwise_backward, run on the CPU, against the CPU kernel."""

from __future__ import annotations

import pytest
import simt
import torch
from simt import close, dtypes, unwritten

from torchbp import kernels
from torchbp.kernels import reference

elementwise = simt.family("elementwise")
SETTINGS = (0.7, 1.9)


@dtypes
@pytest.mark.parametrize("function", reference.ELEMENTWISE)
def test_backward(elementwise, dtype, function):
    index = [*reference.ELEMENTWISE].index(function)
    for shape in [(37, 43), (1,), (31,), (33,), (257,), (4097,)]:
        g, kept = torch.randn(2, *shape).to(dtype)
        grad = unwritten(kept)
        elementwise.backward(dtype, index, g, kept, grad, kept.numel(), *SETTINGS)
        close(grad, kernels.elementwise_backward(g, kept, function, *SETTINGS))


@pytest.mark.parametrize("logarithm", [False, True], ids=["expm1", "log1p"])
def test_float32_expm1_and_log1p(elementwise, logarithm):
    """Relative accuracy over the whole range, down to subnormal numbers."""
    tiny = torch.logspace(-42, -3, 100_001, dtype=torch.float64)
    if logarithm:
        x = torch.cat([tiny, -tiny, torch.logspace(-3, 37, 100_001), tiny[tiny > 6e-8] - 1])
        x = torch.cat([x, torch.linspace(-0.999, 3, 100_001, dtype=torch.float64)])
    else:
        x = torch.cat([tiny, -tiny, torch.linspace(-110, 88, 200_001), -tiny.reciprocal()])
    x = torch.cat([x.float(), torch.tensor([0.0, float("nan")])])
    y = unwritten(x)
    elementwise.elementary_float(logarithm, x, y, x.numel())
    exact = torch.log1p(x.double()) if logarithm else torch.expm1(x.double())
    torch.testing.assert_close(y.double(), exact, rtol=3e-7, atol=1e-44, equal_nan=True)
