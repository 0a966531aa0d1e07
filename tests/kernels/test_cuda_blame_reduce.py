"""The CUDA source of blame_reduce, run on the CPU, against the CPU kernel."""

from __future__ import annotations

import pytest
import simt
import torch
from simt import close, dtypes, unwritten

from torchbp import kernels

blame_reduce = simt.family("blame_reduce")
# units_inner; samples, positions, units
CASES = [
    *((True, s) for s in [(1, 1, 1), (19, 1, 34), (257, 1, 33), (5, 11, 34), (2, 1, 1025)]),
    *((False, s) for s in [(5, 11, 31), (9, 70, 3), (33, 31, 1), (1, 4097, 1)]),
]


@pytest.mark.parametrize("units_inner, shape", CASES, ids=str)
@pytest.mark.parametrize("gradient", [True, False], ids=["gradient", "product"])
@dtypes
def test_reduce(blame_reduce, shape, units_inner, gradient, dtype):
    samples, _, units = shape
    a, delta = torch.randn(shape).relu().to(dtype), torch.randn(shape).to(dtype)
    if not units_inner:
        a, delta = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (a, delta))
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    contribution = unwritten(a, samples, units, dtype=sums)
    stats = unwritten(a, 3, units, dtype=sums)
    strides = [*a.stride(), *delta.stride()]
    blame_reduce.reduce(
        dtype, gradient, units_inner, a, delta, contribution, stats, strides, *shape, 4
    )
    expected = kernels.blame_reduce(a, delta, -1, gradient)
    close(contribution, expected[0], scale=10.0)
    close(stats, expected[1], scale=10.0)


def test_every_stride_of_its_own(blame_reduce):
    a, delta = torch.randn(6, 7, 70)[:, :, ::2], torch.randn(1, 7, 35).expand(6, 7, 35)
    contribution, stats = unwritten(a, 6, 35), unwritten(a, 3, 35)
    strides = [*a.stride(), *delta.stride()]
    blame_reduce.reduce(a.dtype, False, True, a, delta, contribution, stats, strides, 6, 7, 35, 4)
    expected = kernels.blame_reduce(a, delta, -1)
    close(contribution, expected[0], scale=10.0)
    close(stats, expected[1], scale=10.0)
