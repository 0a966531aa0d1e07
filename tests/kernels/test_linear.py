"""The gradients of a linear layer in one call, against products in float64."""

from __future__ import annotations

import pytest
import torch

from torchbp import kernels

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float64"])

# rows, inputs, outputs: tiles, vectors and panels that are full, short, and more than one.
SIZES = [
    (1, 1, 1),
    (31, 33, 257),
    (257, 31, 33),
    (33, 257, 1),
    (1, 600, 31),
    (32, 32, 32),
    (14, 64, 28),
    (300, 520, 270),
    (600, 16, 17),
    (2, 1100, 3),
]


def arguments(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(rows + inputs + outputs)
    shapes = (rows, outputs), (rows, inputs), (outputs, inputs)
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


@dtypes
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_products(size, dtype):
    g, x, w = arguments(*size, dtype)
    exact = [t.double() for t in (g, x, w)]
    expected = exact[0] @ exact[2], exact[0].t() @ exact[1], exact[0].sum(0)
    for got, want in zip(kernels.linear_backward(g, x, w), expected, strict=True):
        assert got.dtype == dtype and got.is_contiguous()
        scale = max(size) ** 0.5 * 4
        torch.testing.assert_close(
            got.double(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale
        )


@dtypes
def test_strided_arguments_are_read_as_they_mean(dtype):
    g, x, w = arguments(40, 50, 60, dtype)
    expected = kernels.linear_backward(g, x, w)
    strided = [t.t().contiguous().t() for t in (g, x, w)]
    for got, want in zip(kernels.linear_backward(*strided), expected, strict=True):
        assert torch.equal(got, want)
    spread = g[:, :1].expand(40, 60)
    for got, want in zip(
        kernels.linear_backward(spread, x, w),
        kernels.linear_backward(spread.contiguous(), x, w),
        strict=True,
    ):
        assert torch.equal(got, want)


@dtypes
@pytest.mark.parametrize("size", SIZES[-3:], ids=str)
def test_bitwise_equal_for_any_number_of_threads(size, dtype):
    g, x, w = arguments(*size, dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(kernels.linear_backward(g, x, w))
    finally:
        torch.set_num_threads(before)
    if not kernels.HAS_EXT:
        pytest.skip("the reference leaves the order of sums to PyTorch")
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("size", [(0, 3, 4), (3, 0, 4), (3, 4, 0)], ids=str)
def test_nothing_sums_to_zero(size):
    g, x, w = arguments(*size, torch.float32)
    for got, want in zip(
        kernels.linear_backward(g, x, w), (g @ w, g.t() @ x, g.sum(0)), strict=True
    ):
        assert torch.equal(got, want)


def test_only_what_is_asked_for():
    g, x, w = arguments(3, 4, 5, torch.float32)
    for wanted in ((True, False, False), (False, True, False), (False, False, True)):
        grads = kernels.linear_backward(g, x, w, *wanted)
        assert [len(t) > 0 for t in grads] == list(wanted)


def test_nan_and_infinity_stay_in_their_rows():
    g, x, w = arguments(40, 50, 60, torch.float32)
    g[3, 7], g[5, 8] = float("nan"), float("inf")
    of_x, of_weight, of_bias = kernels.linear_backward(g, x, w)
    assert of_x[3].isnan().all() and not of_x[5].isfinite().any()
    assert of_x.isfinite().all(1).sum() == 38
    assert of_weight[7].isnan().all() and of_weight.isfinite().all(1).sum() == 58
    assert of_bias[7].isnan() and of_bias[8].isinf() and of_bias.isfinite().sum() == 58


BAD = {
    "x: expected float32 or float64": lambda g, x, w: (g.half(), x.half(), w.half()),
    "grad_output: expected the dtype of x": lambda g, x, w: (g.double(), x, w),
    "weight: expected the dtype of x": lambda g, x, w: (g, x, w.double()),
    "x: expected 2 dims, got 3": lambda g, x, w: (g, x[None], w),
    "weight: expected 4 columns": lambda g, x, w: (g, x, w[:, 1:]),
    "grad_output: expected 3 x 5": lambda g, x, w: (g[1:], x, w),
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("kind", ["kernel", "reference"])
def test_bad_arguments_are_named(message, kind):
    kernel = kernels.KERNELS["linear_backward"]
    call = kernel.op if kind == "kernel" else kernel.reference
    with pytest.raises(RuntimeError, match=message):
        call(*BAD[message](*arguments(3, 4, 5, torch.float32)), True, True, True)


def test_opcheck():
    op = kernels.KERNELS["linear_backward"].op
    for wanted in ((True, True, True), (False, True, False)):
        torch.library.opcheck(op, (*arguments(6, 5, 4, torch.float32), *wanted))
