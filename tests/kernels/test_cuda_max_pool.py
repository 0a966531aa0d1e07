"""The CUDA source of max_pool, run on the CPU, against the CPU kernel."""

from __future__ import annotations

import pytest
import simt
import torch
from simt import dtypes, unwritten
from torch import Tensor

from torchbp import kernels

max_pool = simt.family("max_pool")

# Shape, kernel, stride, padding, dilation, ceil_mode.
CASES = [
    ((2, 3, 33, 31), (2, 2), (2, 2), (0, 0), (1, 1), False),
    ((1, 2, 9, 12), (3, 3), (2, 1), (1, 1), (1, 2), True),
    ((2, 2, 5, 4, 7), (2, 3, 2), (1, 2, 3), (1, 0, 1), (2, 1, 1), False),
    ((1, 1, 257), (5,), (3,), (2,), (1,), True),
    ((1, 5, 1, 1), (1, 1), (1, 1), (0, 0), (1, 1), False),
]
LAYOUTS = {
    "contiguous": lambda t: t,
    "channels last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
}


def strides(t: Tensor) -> list[int]:
    return [*t.stride()[:2], *[0] * (5 - t.dim()), *t.stride()[2:]]


def three(values: tuple[int, ...], fill: int) -> list[int]:
    return [fill] * (3 - len(values)) + [*values]


@dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_cpu(max_pool, case, layout, dtype):
    torch.manual_seed(0)
    shape, *settings, ceil_mode = case
    x = (torch.randn(shape) * 4).round().to(dtype)  # many of equal size
    x[torch.rand(shape) < 0.1] = -float("inf")
    x[torch.rand(shape) < 0.02] = float("nan")
    x = LAYOUTS[layout](x)
    y, offsets = kernels.max_pool(x, *settings, ceil_mode)
    inner = layout == "channels last"
    fills = zip((x.shape[2:], y.shape[2:], *settings), (1, 1, 1, 1, 0, 1), strict=True)
    numbers = [*shape[:2], *(n for values, fill in fills for n in three(tuple(values), fill))]

    got, got_offsets = unwritten(y), torch.full_like(offsets, 77)
    max_pool.forward(
        dtype, inner, numbers, x, strides(x), got, got_offsets, strides(got), y.numel()
    )
    torch.testing.assert_close(got, y, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(got_offsets, offsets)

    g = LAYOUTS[layout](torch.randn_like(y.float()).to(dtype))
    expected = kernels.max_pool_backward(g, offsets, shape, *settings)
    grad = unwritten(expected)
    max_pool.backward(
        dtype, inner, numbers, g, strides(g), offsets, strides(offsets), grad, strides(grad),
        x.numel(),
    )  # fmt: skip
    assert torch.equal(grad, expected)
