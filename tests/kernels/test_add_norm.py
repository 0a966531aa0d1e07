"""The norms' forward kernels, residual and dropout included, and `add_norm_backward`."""

from __future__ import annotations

import importlib
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchbp import kernels

module = importlib.import_module("torchbp.kernels.add_norm")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 2**-7, torch.float16: 2**-9}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
centres = pytest.mark.parametrize("centre", [True, False], ids=["layer", "rms"])
SHAPES = [
    ((1, 1), 1), ((3, 5), 1), ((31, 33), 1), ((130, 257), 1), ((71, 2, 33), 2), ((2, 9001), 1),
    ((0, 4), 1), ((4, 0), 1), ((6,), 1),
]  # fmt: skip
WAYS = ["alone", "residual", "dropout"]


def sums_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def near(got: Tensor, expected: Tensor, tolerance: float) -> None:
    assert got.dtype == expected.dtype and got.shape == expected.shape
    assert got.is_contiguous()
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(
        got, expected, rtol=0, atol=tolerance * scale, equal_nan=True, check_stride=False
    )


def arguments(shape: tuple[int, ...], dims: int, dtype: torch.dtype, way: str, affine: int):
    x, residual = torch.randn(2, *shape).to(dtype)
    inner = shape[len(shape) - dims :]
    # None, in the dtype of x, or in that of sums.
    make = [lambda: None, lambda: torch.randn(inner).to(dtype),
            lambda: torch.randn(inner, dtype=sums_dtype(dtype))][affine]  # fmt: skip
    bits = kernels.dropout_bits(torch.rand(shape) > 0.3) if way == "dropout" else None
    return x, None if way == "alone" else residual, bits, 0.3, make(), make()


@dtypes
@centres
@pytest.mark.parametrize("way", WAYS)
def test_equals_reference(way, centre, dtype):
    torch.manual_seed(0)
    for (shape, dims), affine in product(SHAPES, range(3)):
        given = *arguments(shape, dims, dtype, way, affine), dims, centre, 1e-3
        got, expected = kernels.add_norm(*given), module._reference(*given)
        for ours, theirs in zip(got, expected, strict=True):
            near(ours, theirs, TOLERANCE[dtype])
        assert torch.equal(got[1], expected[1])

        x, residual, bits, p, weight, _ = given[:6]
        total = x if residual is None else got[1]
        mean = got[2] if centre else None
        back = (
            torch.randn_like(x), residual, total, mean, got[3], weight, bits, p, dims,
        )  # fmt: skip
        for ours, theirs in zip(
            kernels.add_norm_backward(*back), module._reference_backward(*back), strict=True
        ):
            near(ours, theirs, TOLERANCE[dtype])


@centres
def test_equals_torch(centre):
    """Dropout, sum and norm as torch composes them, differentiated by autograd, in float64."""
    torch.manual_seed(0)
    shape, p = (7, 3, 33), 0.4
    x, residual, g, g_sum = torch.randn(4, *shape, dtype=torch.float64)
    weight, bias = torch.randn(2, 33, dtype=torch.float64)
    kept = torch.rand(shape) > p
    leaves = [t.requires_grad_() for t in (x, residual, weight, bias)]
    total = x * kept / (1 - p) + residual
    if centre:
        y = F.layer_norm(total, (33,), weight, bias, 1e-5)
    else:
        y = F.rms_norm(total, (33,), weight, 1e-5) + bias
    expected = torch.autograd.grad((y, total), leaves, (g, g_sum))
    bits = kernels.dropout_bits(kept)
    x, residual, weight, bias = (t.detach() for t in leaves)
    got = kernels.add_norm(x, residual, bits, p, weight, bias, 1, centre, 1e-5)
    torch.testing.assert_close(got[0], y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got[1], total, rtol=0, atol=1e-15)
    mean = got[2] if centre else None
    grads = kernels.add_norm_backward(g, g_sum, got[1], mean, got[3], weight, bits, p, 1)
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@dtypes
def test_the_sum_is_torchs_to_the_bit(dtype):
    """Dropout's noise and both roundings; NaN and infinity where torch has them, too."""
    x, residual = torch.randn(2, 5, 67).to(dtype)
    x[0, :40], x[1, :40] = float("inf"), float("nan")
    torch.manual_seed(3)
    expected = F.dropout(x, 0.3) + residual
    torch.manual_seed(3)
    bits = kernels.dropout_bits(torch.empty_like(x).bernoulli_(0.7).bool())
    got = kernels.add_norm(x, residual, bits, 0.3, None, None, 1, True, 1e-5)[1]
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    nothing = kernels.dropout_bits(torch.zeros_like(x, dtype=torch.bool))
    everything_dropped = kernels.add_norm(
        residual, residual, nothing, 1.0, None, None, 1, True, 1e-5
    )
    assert torch.equal(everything_dropped[1], residual)


def test_strided_inputs():
    x, residual = torch.randn(2, 33, 7).mT
    weight = torch.randn(66)[::2]
    got = kernels.add_norm(x, residual, None, 0.0, weight, None, 1, True, 1e-5)
    packed = (t.contiguous() for t in (x, residual))
    expected = kernels.add_norm(*packed, None, 0.0, weight.contiguous(), None, 1, True, 1e-5)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(3001, 130), (40_000, 3), (3, 40_001)], ids=str)
def test_results_do_not_depend_on_threads(shape):
    x, residual, g = torch.randn(3, *shape)
    bits = kernels.dropout_bits(torch.rand(shape) > 0.3)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        y, total, mean, rstd = kernels.add_norm(x, residual, bits, 0.3, None, None, 1, True, 1e-5)
        back = kernels.add_norm_backward(g, x, total, mean, rstd, None, bits, 0.3, 1)
        results.append((y, total, mean, rstd, *back))
    if kernels.HAS_EXT:
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))


def test_a_large_result_is_right_in_huge_pages():
    x = torch.randn(1500, 2000)
    y = kernels.add_norm(x, None, None, 0.0, None, None, 1, True, 1e-5)[0]
    near(y, F.layer_norm(x, (2000,)), 4e-6)


X, R, C = torch.randn(4, 6), torch.ones(4), torch.ones(6)
B3 = torch.zeros(3, dtype=torch.uint8)
BAD = {
    "dims": ((X, None, None, 0.0, None, None, 3, True, 1e-5), "dims: expected 1 to 2, got 3"),
    "residual": (
        (X, X[:3], None, 0.0, None, None, 1, True, 1e-5),
        "residual: expected the shape of x",
    ),
    "residual's dtype": (
        (X, X.double(), None, 0.0, None, None, 1, True, 1e-5),
        "residual: expected the dtype of x",
    ),
    "weight": ((X, None, None, 0.0, R, None, 1, True, 1e-5), "weight: expected 6 values, got 4"),
    "bias": ((X, None, None, 0.0, C, R, 1, True, 1e-5), "bias: expected 6 values, got 4"),
    "mask's size": ((X, X, B3[:2], 0.5, C, C, 1, True, 1e-5), "mask: expected 3 bytes, got 2"),
    "mask's dtype": ((X, X, R, 0.5, C, C, 1, True, 1e-5), "mask: expected uint8, got"),
    "mask alone": ((X, None, B3, 0.5, C, C, 1, True, 1e-5), "mask: expected a residual beside"),
    "integers": ((X.int(), None, None, 0.5, None, None, 1, True, 1e-5), "x: expected float32"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("call", [kernels.add_norm, module._reference], ids=["kernel", "reference"])
def test_bad_arguments_are_named(name, call):
    given, message = BAD[name]
    with pytest.raises(RuntimeError, match=message):
        call(*given)


@pytest.mark.parametrize(
    "call", [kernels.add_norm_backward, module._reference_backward], ids=["kernel", "reference"]
)
def test_bad_arguments_of_backward_are_named(call):
    good = [X, X, X, R, R, C, B3, 0.5, 1]
    for place, bad, message in (
        (0, X[:3], "grad_output: expected the shape of x"),
        (1, X[:3], "grad_sum: expected the shape of x"),
        (4, C, "rstd: expected 4 values, got 6"),
        (6, B3[:1], "mask: expected 3 bytes, got 1"),
        (8, 0, "dims: expected 1 to 2, got 0"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(*good[:place], bad, *good[place + 1 :])


def test_opcheck():
    ops = torch.ops.torchbp
    for given in (
        (X, None, None, 0.0, C, None, 1, False, 1e-5),
        (X, X, B3, 0.5, C, C, 2, True, 1e-5),
    ):
        given = (*given[:4], *(C.repeat(4) if t is C and given[6] == 2 else t for t in given[4:6]),
                 *given[6:])  # fmt: skip
        torch.library.opcheck(ops.add_norm.default, given)
    torch.library.opcheck(ops.add_norm_backward.default, (X, X, X, R, R, C, B3, 0.5, 1))
    torch.library.opcheck(ops.add_norm_backward.default, (X, None, X, None, R, None, None, 0.0, 1))


def test_vmap_calls_once_for_every_entry():
    x, residual = torch.randn(2, 3, 4, 6)
    got = torch.func.vmap(
        lambda x, r: torch.ops.torchbp.add_norm(x, r, None, 0.0, C, None, 1, True, 1e-5)
    )(x, residual)
    for i in range(3):
        expected = kernels.add_norm(x[i], residual[i], None, 0.0, C, None, 1, True, 1e-5)
        for ours, theirs in zip(got, expected, strict=True):
            assert torch.equal(ours[i], theirs)
