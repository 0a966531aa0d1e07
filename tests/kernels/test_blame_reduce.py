"""blame_reduce: against the reference and against sums in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torchbp import kernels
from torchbp.kernels import reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Shape, unit_dim. The large ones are cut into several tiles, row blocks and chunks.
SHAPES = [
    ((0, 4), -1), ((4, 0), 1), ((0, 3, 4), 1), ((3, 4, 0), 1), ((3, 0, 4), -1),
    ((1, 1), 1), ((1, 1, 1), -1), ((31, 33), 1), ((257, 31), -1), ((70, 1025), 1), ((700, 257), -1),
    ((3, 5, 1), 1), ((3, 5, 1), 2), ((3, 1, 5), 1), ((3, 1, 5), -1), ((2, 130, 33), -1),
    ((5, 33, 31), 1), ((2, 3, 70, 70), 1), ((2, 7, 7, 520), -1), ((1, 2, 4200), 1),
    ((1, 4200, 2), -1), ((2, 3, 4, 5, 6), 1), ((2, 3, 4, 5, 6), -1),
]  # fmt: skip
cases = pytest.mark.parametrize("shape, unit_dim", SHAPES, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def make(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(len(shape))
    return torch.randn(shape).relu().to(dtype), torch.randn(shape).to(dtype)


def exact(a: Tensor, delta: Tensor, unit_dim: int, gradient: bool) -> tuple[Tensor, Tensor]:
    """The definition, in float64, by einsum."""
    letters = "nabcdef"[: a.dim()]
    unit = letters[unit_dim]
    a, delta = a.double(), delta.double()
    first = torch.ones_like(a) if gradient else a
    per_unit = [torch.einsum(f"{letters}->{unit}", t) for t in ((a == 0).double(), a**2, delta**2)]
    return (
        torch.einsum(f"{letters},{letters}->n{unit}", first, delta),
        torch.stack(per_unit),
    )


def assert_same(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], wide: bool) -> None:
    dtype = torch.float64 if wide else torch.float32
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == dtype and ours.is_contiguous()
        scale = max(1.0, theirs.abs().max().item()) if theirs.numel() else 1.0
        tolerance = 1e-14 if wide else 2e-6
        torch.testing.assert_close(
            ours.double(), theirs.double(), rtol=tolerance, atol=tolerance * scale
        )


@cases
@dtypes
def test_equals_reference_and_definition(shape, unit_dim, dtype):
    a, delta = make(shape, dtype)
    wide = dtype == torch.float64
    for gradient in (False, True):
        got = kernels.blame_reduce(a, delta, unit_dim, gradient)
        assert_same(got, exact(a, delta, unit_dim, gradient), wide)
        assert_same(got, reference.blame_reduce(a, delta, unit_dim, gradient), wide)


@cases
@dtypes
def test_into_memory_that_is_there(shape, unit_dim, dtype):
    a, delta = make(shape, dtype)
    expected = kernels.blame_reduce(a, delta, unit_dim)
    results = [torch.full_like(t, torch.nan) for t in expected]
    kernels.blame_reduce_into(a, delta, unit_dim, False, *results)
    assert all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))


LAYOUTS = {
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "rows of a wider tensor": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "every second": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "permuted": lambda t: t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "samples expanded": lambda t: t[:1].expand(t.shape),
    "positions expanded": lambda t: t[:, :, :1, :1].expand(t.shape),
    "one value": lambda t: t[:1, :1, :1, :1].expand(t.shape),
    "contiguous": lambda t: t,
}


@pytest.mark.parametrize("activation_layout", LAYOUTS)
@pytest.mark.parametrize("error_layout", LAYOUTS)
@pytest.mark.parametrize("unit_dim", [1, -1])
def test_any_pair_of_layouts(activation_layout, error_layout, unit_dim):
    a, delta = make((5, 6, 3, 4))
    a, delta = LAYOUTS[activation_layout](a), LAYOUTS[error_layout](delta)
    got = kernels.blame_reduce(a, delta, unit_dim)
    assert_same(got, exact(a, delta, unit_dim, False), wide=False)


def test_two_dim_layouts():
    a, delta = make((40, 50))
    for error in (delta, delta[:, :1].expand(40, 50), delta[:1, :1].expand(40, 50)):
        for left in (slice(None), slice(3, 20)):
            pair = a[:, left], error[:, left]
            assert_same(kernels.blame_reduce(*pair), exact(*pair, -1, False), wide=False)
            pair = a[left].t(), error[left].t()
            assert_same(kernels.blame_reduce(*pair), exact(*pair, -1, False), wide=False)


def test_gradient_ignores_the_activation_and_nan_stays_in_its_unit():
    a, delta = make((6, 40))
    a[2, 7] = float("nan")
    contribution, stats = kernels.blame_reduce(a, delta)
    assert contribution.isnan().nonzero().tolist() == [[2, 7]]
    assert stats.isnan().nonzero().tolist() == [[1, 7]]
    assert torch.equal(kernels.blame_reduce(a, delta, gradient=True)[0], delta)


def test_sums_of_many_terms_keep_their_digits():
    a = torch.full((2, 1_000_003), 0.1)
    contribution, stats = kernels.blame_reduce(a[:, None], a[:, None], 1)
    exact_sum = 1_000_003 * float(a[0, 0].double() ** 2)
    assert contribution[0, 0].item() == pytest.approx(exact_sum, rel=2e-6)
    contribution, stats = kernels.blame_reduce(a.t().contiguous(), a.t().contiguous(), -1)
    assert stats[1, 0].item() == pytest.approx(exact_sum, rel=2e-6)


@pytest.mark.parametrize(
    "shape, unit_dim", [((3000, 700), -1), ((9, 64, 900), 1), ((9, 400, 257), -1)], ids=str
)
def test_does_not_depend_on_threads(shape, unit_dim):
    a, delta = make(shape)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(kernels.blame_reduce(a, delta, unit_dim))
    finally:
        torch.set_num_threads(threads)
    assert_same(results[0], exact(a, delta, unit_dim, False), wide=False)
    if kernels.HAS_EXT:
        for other in results[1:]:
            assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))
