"""The CUDA source of the norms, run on the CPU, against the CPU kernels."""

from __future__ import annotations

import pytest
import simt
import torch
from simt import close, dtypes, unwritten

from torchbp import kernels

add_norm = simt.family("add_norm")
batch_norm = simt.family("batch_norm")
# Each with its way: alone, with a residual, with dropout too; and parameters in the dtype of sums?
ROWS = [
    ((7, 257), "dropout", False), ((5, 3), "residual", True), ((1, 1), "dropout", True),
    ((31, 33), "residual", False), ((1, 1001), "alone", True), ((3, 31), "alone", False),
]  # fmt: skip
rows = pytest.mark.parametrize(("shape", "way", "wide"), ROWS, ids=str)


def sums_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@dtypes
@pytest.mark.parametrize("centre", [True, False], ids=["layer", "rms"])
@rows
def test_forward(add_norm, shape, way, wide, centre, dtype):
    x, residual = torch.randn(2, *shape).to(dtype)
    residual = None if way == "alone" else residual
    weight, bias = torch.randn(2, shape[1]).to(sums_dtype(dtype) if wide else dtype)
    bits = kernels.dropout_bits(torch.rand(shape) > 0.3) if way == "dropout" else None
    expected = kernels.add_norm(x, residual, bits, 0.3, weight, bias, 1, centre, 1e-3)
    y, total, mean, rstd = (unwritten(t) for t in expected)
    add_norm.forward(
        dtype, wide, x, residual, bits, 0.3, weight, bias, 1e-3, y,
        None if residual is None else total, mean if centre else None, rstd, *shape,
    )  # fmt: skip
    close(y, expected[0], scale=10.0)
    close(rstd, expected[3])
    assert torch.equal(total, expected[1])
    if centre:
        close(mean, expected[2])


@dtypes
@pytest.mark.parametrize("centre", [True, False], ids=["layer", "rms"])
@rows
def test_backward(add_norm, shape, way, wide, centre, dtype):
    g, grad_sum, total = torch.randn(3, *shape).to(dtype)
    kept = sums_dtype(dtype)
    mean = torch.randn(shape[0], dtype=kept) if centre else None
    rstd = torch.rand(shape[0], dtype=kept) + 0.5
    weight = torch.randn(shape[1]).to(kept if wide else dtype)
    grad_sum = None if way == "alone" else grad_sum
    bits = kernels.dropout_bits(torch.rand(shape) > 0.3) if way == "dropout" else None
    expected = kernels.add_norm_backward(g, grad_sum, total, mean, rstd, weight, bits, 0.3, 1)
    grad, branch = unwritten(g), None if bits is None else unwritten(g)
    both = torch.full((2, shape[1]), float("nan"), dtype=kept)
    add_norm.backward(
        dtype, wide, g, grad_sum, total, bits, 0.3, mean, rstd, weight, grad, branch, both, *shape,
        4,
    )  # fmt: skip
    close(grad, expected[1], scale=10.0)
    if branch is not None:
        close(branch, expected[0], scale=10.0)
    close(both, torch.stack(expected[2:]), scale=40.0)


IMAGES = [
    ((1, 1, 1), False), ((4, 6, 1), True), ((3, 33, 5), True), ((2, 33, 3), False),
    ((2, 3, 257), False), ((5, 3, 31), True),
]  # fmt: skip


@dtypes
@pytest.mark.parametrize("statistics", ["training", "constant", "groups"])
@pytest.mark.parametrize(("shape", "inner"), IMAGES, ids=str)
def test_batch_norm(batch_norm, shape, inner, statistics, dtype):
    samples, channels, _ = shape
    groups = max(1, channels // 3) if statistics == "groups" else 0
    g, x = torch.randn(2, *shape).to(dtype)
    if inner:
        g, x = (t.mT.contiguous().mT for t in (g, x))
    kept = sums_dtype(dtype)
    size = (samples, groups) if groups else (channels,)
    mean, rstd = 0.1 * torch.randn(size, dtype=kept), torch.rand(size, dtype=kept) + 0.5
    wide = bool(channels % 2)
    weight = torch.randn(channels).to(kept if wide else dtype) if samples > 1 else None
    args = g, x, mean, rstd, weight, statistics != "constant"
    expected = kernels.batch_norm_backward(*args)
    grad = unwritten(x)
    of_weight, of_bias = (torch.full((channels,), float("nan"), dtype=kept) for _ in range(2))
    batch_norm.backward(
        dtype, wide, inner, statistics != "constant", g, x, mean, rstd, weight, grad, of_weight,
        of_bias, *shape, groups, 7 if inner else 100,
    )  # fmt: skip
    close(grad, expected[0], scale=10.0)
    close(torch.stack([of_weight, of_bias]), torch.stack(expected[1:]), scale=40.0)
