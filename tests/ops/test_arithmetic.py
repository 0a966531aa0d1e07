from __future__ import annotations

import pytest
import torch

import torchbp.functional as B
from torchbp.ops.arithmetic import Div, Pow

WIDE = {"rtol": 1e-12, "atol": 1e-12}


def normal(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype)


def gradients(function, *tensors):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    y = function(*leaves)
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)
    return y.detach(), torch.autograd.grad(y, leaves, weights)


def check(ours, theirs, *tensors):
    torch.testing.assert_close(gradients(ours, *tensors), gradients(theirs, *tensors), **WIDE)


@pytest.mark.filterwarnings("error")  # "discards the imaginary part"
def test_complex_numbers_are_conjugated_and_real_tensors_get_the_real_part():
    z, x = normal(3, dtype=torch.complex128), normal(3)
    for tensor in (z, x):
        check(lambda t: B.mul(t, 2 - 1j), lambda t: t * (2 - 1j), tensor)
        check(lambda t: B.div(t, 2 - 1j), lambda t: t / (2 - 1j), tensor)
        check(B.mul, torch.mul, tensor, z)
        check(B.div, torch.div, tensor, z)
        check(B.add, torch.add, tensor, z)
    check(lambda a, b: B.add(a, b, alpha=1j), lambda a, b: torch.add(a, b, alpha=1j), z, z + 1)
    check(B.abs, torch.abs, z)
    check(B.pow, torch.pow, z, z + 1)
    check(lambda t: B.logsumexp(t, 0), lambda t: torch.logsumexp(t, 0), z)


@pytest.mark.parametrize("number", [1.5, 2, 0.1, 1 - 2j])
@pytest.mark.parametrize("name", ["div", "pow"])
def test_a_number_over_a_tensor_is_not_rounded(name, number):
    ours, theirs = getattr(B, name), getattr(torch, name)
    for other in (torch.tensor([2, 3]), normal(3), normal(3, dtype=torch.float32)):
        expected = theirs(number, other)
        assert ours(number, other).dtype == expected.dtype
        assert torch.equal(ours(number, other), expected)
    check(lambda x: ours(number, x), lambda x: theirs(number, x), normal(3).abs() + 1)


def test_a_quotient_by_small_numbers_has_a_finite_secant():
    a, a0, b, b0 = (torch.tensor([v]) for v in (1e-25, 2e-25, 1e-25, 3e-25))
    of_a, of_b = Div.secant(torch.ones(1), (a, b), (a0, b0), a / b, a0 / b0)
    change = of_a * (a - a0) + of_b * (b - b0)
    torch.testing.assert_close(change, a / b - a0 / b0)


def test_powers_of_negative_numbers_and_of_zero():
    exponents = torch.tensor([2.0, 3.0, 0.0, 1.0], dtype=torch.float64)
    for base in (normal(3, 4), torch.zeros(4, dtype=torch.float64)):
        check(lambda x: B.pow(x, exponents), lambda x: torch.pow(x, exponents), base)
    check(B.pow, torch.pow, torch.zeros(4, dtype=torch.float64), exponents)
    check(lambda b: B.pow(2.5, b), lambda b: torch.pow(2.5, b), normal(3, 2))
    integers = torch.tensor([1, 2])
    assert torch.equal(B.pow(2.5, integers), torch.pow(2.5, integers))


@pytest.mark.parametrize("same", ["nothing", "base", "exponent", "all"])
def test_the_secant_of_a_power_is_exact(same):
    a, a0 = normal(3, 4).abs() + 0.1, normal(3, 4).abs() + 0.1
    b, b0 = normal(4), normal(4)
    a0, b0 = (a if same in ("base", "all") else a0), (b if same in ("exponent", "all") else b0)
    y, y0, m = a**b, a0**b0, normal(3, 4)
    of_a, of_b = Pow.secant(m, (a, b), (a0, b0), y, y0)
    change = (of_a * (a - a0)).sum() + (of_b * (b - b0)).sum()
    torch.testing.assert_close(change, (m * (y - y0)).sum(), **WIDE)


def test_a_negative_base_has_a_secant_as_long_as_the_exponent_stays():
    a, a0, b = -normal(4).abs(), normal(4), torch.tensor([1.0, 2, 3, 2], dtype=torch.float64)
    of_a, _ = Pow.secant(torch.ones_like(a), (a, b), (a0, b), a**b, a0**b)
    torch.testing.assert_close(of_a * (a - a0), a**b - a0**b, **WIDE)


def test_bounds_that_are_tensors_have_gradients_and_ties_go_where_torch_has_them():
    x, low, high = normal(3, 4), normal(4) - 0.5, normal(3, 1) + 0.5
    check(B.clamp, torch.clamp, x, low, high)
    check(lambda a, b: B.clamp(a, max=b), lambda a, b: torch.clamp(a, max=b), x, high)
    check(B.clamp_min, torch.clamp_min, x, low)
    check(B.clamp_max, torch.clamp_max, x, high)
    zeros = torch.zeros(3, dtype=torch.float64)
    check(B.clamp_min, torch.clamp_min, zeros, zeros)
    check(B.clamp_max, torch.clamp_max, zeros, zeros)
    for bounds in ((0.0, None), (None, 0.0), (0.0, 1.0), (-1.0, 0.0)):
        check(lambda a, b=bounds: B.clamp(a, *b), lambda a, b=bounds: torch.clamp(a, *b), zeros)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int64, torch.bool])
def test_least_integers_although_some_have_no_negative(dtype):
    least = 0 if dtype == torch.bool else torch.iinfo(dtype).min
    x, y = torch.tensor([0, 1, least]).to(dtype), torch.tensor([1, 0, 1]).to(dtype)
    assert torch.equal(B.amin(x), torch.amin(x))
    assert torch.equal(B.minimum(x, y), torch.minimum(x, y))
    floats = torch.tensor([0.5, 0.5, 0.5])
    assert torch.equal(B.minimum(floats, y), torch.minimum(floats, y))


def test_log_sum_exp_of_one_number():
    check(lambda x: B.logsumexp(x, 0), lambda x: torch.logsumexp(x, 0), normal())
