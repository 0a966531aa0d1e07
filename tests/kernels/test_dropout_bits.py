"""Bit masks of dropout: against the reference, and against the product with a tensor of factors."""

from __future__ import annotations

import pytest
import torch

from torchbp import kernels
from torchbp.kernels import KERNELS

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
COUNTS = (0, 1, 7, 8, 9, 31, 33, 257, 511, 512, 513, 100_003)


def mask(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.rand(shape, generator=generator) < 0.6).to(dtype)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool], ids=str)
@pytest.mark.parametrize("count", COUNTS)
def test_bits_stand_for_elements_in_order(count, dtype):
    kept = mask(count, dtype=dtype)
    bits = kernels.dropout_bits(kept)
    assert torch.equal(bits, KERNELS["dropout_bits"].reference(kept))
    ones = sum(int(k) << i for i, k in enumerate(kept.tolist()))
    assert bytes(bits.tolist()) == ones.to_bytes(-(-count // 8), "little")


def test_bits_of_a_transposed_mask_are_in_row_major_order():
    kept = mask(5, 7).t()
    assert torch.equal(kernels.dropout_bits(kept), kernels.dropout_bits(kept.contiguous()))
    assert torch.equal(kernels.dropout_bits(kept * -4), kernels.dropout_bits(kept))


@dtypes
@pytest.mark.parametrize("count", COUNTS)
def test_apply_equals_the_product_with_factors(count, dtype):
    x, kept = torch.randn(count).to(dtype), mask(count)
    x[::5] = torch.tensor([torch.nan, torch.inf, -0.0] * count).to(dtype)[: len(x[::5])]
    factors = kept.to(dtype) / 0.7
    scale = (torch.ones((), dtype=dtype) / 0.7).item()
    bits = kernels.dropout_bits(kept)
    for y in (kernels.dropout_apply(x, bits, scale),
              KERNELS["dropout_apply"].reference(x, bits, scale)):  # fmt: skip
        torch.testing.assert_close(y, x * factors, rtol=0, atol=0, equal_nan=True)
    finite = x[x.isfinite()]
    bits = kernels.dropout_bits(kept[x.isfinite()])
    signs = torch.signbit(kernels.dropout_apply(finite, bits, scale))
    assert torch.equal(signs, torch.signbit(finite))


def test_apply_of_any_layout_is_contiguous():
    x, kept = torch.randn(6, 5, 4).permute(2, 0, 1), mask(4, 6, 5)
    y = kernels.dropout_apply(x, kernels.dropout_bits(kept), 2.0)
    assert y.is_contiguous() and torch.equal(y, x * kept * 2)


def test_results_do_not_depend_on_threads():
    x, kept = torch.randn(300_001), mask(300_001)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            bits = kernels.dropout_bits(kept)
            results.append((bits, kernels.dropout_apply(x, bits, 2.0)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert torch.equal(results[0][0], other[0]) and torch.equal(results[0][1], other[1])


def test_opcheck():
    x, kept = torch.randn(3, 5), mask(3, 5)
    bits = kernels.dropout_bits(kept)
    torch.library.opcheck(KERNELS["dropout_bits"].op, (kept,))
    torch.library.opcheck(KERNELS["dropout_apply"].op, (x, bits, 2.0))


def test_vmap():
    x, kept = torch.randn(3, 4, 5), mask(3, 4, 5)
    bits = torch.func.vmap(kernels.dropout_bits)(kept)
    assert torch.equal(bits, torch.stack([kernels.dropout_bits(k) for k in kept]))
    apply = torch.func.vmap(lambda x, b: kernels.dropout_apply(x, b, 2.0))
    assert torch.equal(apply(x, bits), x * kept * 2)


@pytest.mark.parametrize(
    ("x", "bits", "message"),
    [
        (torch.zeros(9), torch.zeros(1, dtype=torch.uint8), "bits: expected one for each"),
        (torch.zeros(9), torch.zeros(2, 1, dtype=torch.uint8), "bits: expected one for each"),
        (torch.zeros(9), torch.zeros(2), "bits: expected uint8"),
        (torch.zeros(9, dtype=torch.int64), torch.zeros(2, dtype=torch.uint8), "x: expected float"),
    ],
)
def test_bad_arguments(x, bits, message):
    with pytest.raises(RuntimeError, match=message):
        kernels.dropout_apply(x, bits, 2.0)
    with pytest.raises(RuntimeError, match="kept: expected int32, uint8 or bool"):
        kernels.dropout_bits(x.double())
