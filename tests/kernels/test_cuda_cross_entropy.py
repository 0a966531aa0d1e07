"""The CUDA source of cross_entropy, run on the CPU, against the CPU kernels."""

from __future__ import annotations

import pytest
import simt
import torch
from simt import close, dtypes, unwritten

from torchbp import kernels

cross_entropy = simt.family("cross_entropy")
IGNORED = 1
SHAPES = [(0, 4), (1, 1), (31, 3), (7, 257), (3, 1025), (1, 5001)]
SETTINGS = [("none", False, 0.0, 0.0), ("mean", True, 0.0, 0.0)]
SETTINGS += [("sum", False, 0.3, 0.0), ("mean", True, 0.3, 0.1)]


@dtypes
@pytest.mark.parametrize("settings", SETTINGS, ids=["plain", "weight", "smooth", "all"])
def test_forward_and_backward(cross_entropy, settings, dtype):
    reduction, weighted, *numbers = settings
    for shape in SHAPES if dtype == torch.float32 else SHAPES[2:4]:
        torch.manual_seed(sum(shape))
        z, target = (3 * torch.randn(shape)).to(dtype), torch.randint(shape[1], shape[:1])
        if len(target) > 2:
            target[2] = IGNORED
        weight = (torch.rand(shape[1]) + 0.5).to(dtype) if weighted else None
        arguments = target, weight, reduction, IGNORED, *numbers
        loss, both = kernels.cross_entropy(z, *arguments)
        how = reduction == "none", reduction == "mean"
        sums, ours = torch.zeros(2, dtype=torch.float64), unwritten(both)
        rest = *shape, IGNORED, *numbers, *how
        cross_entropy.rows(dtype, z, weight, target, None, sums, None, ours, *rest)
        close(ours, both, scale=10.0)
        total = unwritten(loss)
        cross_entropy.reduce(dtype, ours, sums, total, shape[0], *how)
        torch.testing.assert_close(
            total, loss, rtol=simt.TOLERANCE[dtype], atol=1e-6 * max(1, shape[0]), equal_nan=True
        )
        g = torch.randn(loss.shape, dtype=both.dtype)
        grad = unwritten(z)
        cross_entropy.rows(dtype, z, weight, target, g, sums, grad, None, *rest)
        close(grad, kernels.cross_entropy_backward(g, z, *arguments))
        again = unwritten(both)
        cross_entropy.rows(dtype, z, weight, target, g, sums, z, again, *rest)  # in place
        assert torch.equal(again, ours) and torch.equal(z, grad)


def test_infinite_logits_nan_and_a_class_that_is_not_there(cross_entropy):
    inf, nan = float("inf"), float("nan")
    z = torch.tensor([[inf, 0], [0, inf], [-inf, 1], [1, -inf], [-inf, -inf], [nan, 1], [1, nan]])
    target, g = torch.zeros(len(z), dtype=torch.long), torch.ones(len(z))
    _, both = kernels.cross_entropy(z, target, None, "none")
    sums, ours, grad = torch.zeros(2, dtype=torch.float64), unwritten(both), unwritten(z)
    rest = *z.shape, -100, 0.0, 0.0, True, False
    cross_entropy.rows(z.dtype, z, None, target, g, sums, grad, ours, *rest)
    torch.testing.assert_close(ours, both, equal_nan=True)
    expected = kernels.cross_entropy_backward(g, z, target, None, "none")
    torch.testing.assert_close(grad, expected, equal_nan=True)
    cross_entropy.rows(z.dtype, z.nan_to_num(), None, target + 2, g, sums, grad, ours, *rest)
    assert grad.isnan().all() and ours.isnan().all()
