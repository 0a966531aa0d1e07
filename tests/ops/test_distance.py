from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import torchbp.functional as B
from torchbp.ops import p_norm
from torchbp.ops.bilinear import Bilinear

NORMS = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, math.inf, -math.inf]


@pytest.mark.parametrize("p", NORMS)
def test_slope_equals_torch(p):
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    norm = torch.linalg.vector_norm(x, p, 1, keepdim=True)
    expected = torch.autograd.grad(norm.sum(), x)[0] if p else torch.zeros_like(x)
    got = p_norm.slope(torch.ones_like(norm), x, norm, p, (1,))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("case", ["apart", "close", "equal", "to zero", "both zero", "mirrored"])
def test_chord_is_exact_and_finite(p, case):
    x = torch.randn(4, 5, dtype=torch.float64)
    x0 = {
        "apart": torch.randn_like(x),
        "close": x * (1 + 1e-7 * torch.randn_like(x)),
        "equal": x.clone(),
        "to zero": torch.zeros_like(x),
        "both zero": torch.zeros_like(x),
        "mirrored": -x,
    }[case]
    if case == "both zero":
        x = torch.zeros_like(x)
    norm, norm0 = (torch.linalg.vector_norm(t, p, 1, keepdim=True) for t in (x, x0))
    chord = p_norm.chord(x, x0, norm, norm0, p, (1,))
    assert chord.isfinite().all()
    terms = chord * (x - x0)
    residual = (terms.sum(1, keepdim=True) - (norm - norm0)).abs()
    assert (residual <= 1e-13 * (1 + terms.abs().sum(1, keepdim=True))).all()
    if case == "equal":
        slope = p_norm.slope(torch.ones_like(norm), x, norm, p, (1,))
        torch.testing.assert_close(chord, slope)


def test_vectors_of_length_zero_have_a_gradient_as_in_torch():
    x = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    for name in ("cosine_similarity", "normalize"):
        arguments = (x, y) if name == "cosine_similarity" else (x,)
        pairs = []
        for home in (F, B):
            out = getattr(home, name)(*arguments)
            pairs.append(torch.autograd.grad(out, arguments, torch.ones_like(out)))
        torch.testing.assert_close(*pairs)


def test_below_eps_the_length_is_a_constant():
    x = (torch.randn(3, 4, dtype=torch.float64) * 0.1).requires_grad_()
    y = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: B.cosine_similarity(a, b, 1, 1.0), (x, y))
    assert torch.autograd.gradcheck(lambda a: B.normalize(a, eps=1.0), (x,))


def test_equal_points_are_no_distance_apart():
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    for p in (1.0, 2.0, 3.0):
        (grad,) = torch.autograd.grad(B.pairwise_distance(x, x.detach(), p, eps=0.0).sum(), x)
        assert not grad.any()


def test_normalize_into_another_tensor():
    x, out = torch.randn(3, 4), torch.empty(3, 4)
    assert B.normalize(x, out=out) is out and torch.equal(out, F.normalize(x))


def test_a_factor_of_a_product_of_three_gets_the_mean_over_all_orders():
    x1, x10, x2, x20 = (torch.randn(1, 1, dtype=torch.float64) for _ in range(4))
    w, w0 = (torch.randn(1, 1, 1, dtype=torch.float64) for _ in range(2))
    one = torch.ones(1, 1, dtype=torch.float64)
    got = Bilinear.secant(one, (x1, x2, w, None), (x10, x20, w0, None), None, None)
    a, a0, b, b0, c, c0 = (t.item() for t in (x1, x10, x2, x20, w, w0))
    # The first to change meets the others as they were, the last as they are, else one of each.
    assert got[0].item() == pytest.approx((2 * b * c + b * c0 + b0 * c + 2 * b0 * c0) / 6)
    assert got[2].item() == pytest.approx((2 * a * b + a * b0 + a0 * b + 2 * a0 * b0) / 6)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("cosine_similarity", (torch.randn(2, 3), torch.randn(2, 4))),
        ("cosine_similarity", (torch.randn(2, 3), torch.randn(2, 3), 5)),
        ("pairwise_distance", (torch.randn(2, 3), torch.randn(2, 4))),
        ("normalize", (torch.randn(2, 3), 2.0, 4)),
        ("bilinear", (torch.randn(2, 3), torch.randn(2, 4), torch.randn(5, 3, 3))),
        ("bilinear", (torch.randn(2, 3), torch.randn(3, 4), torch.randn(5, 3, 4))),
    ],
)
def test_the_same_errors(name, arguments):
    kinds = []
    for home in (F, B):
        with pytest.raises(Exception) as caught:
            getattr(home, name)(*arguments)
        kinds.append(caught.type)
    assert kinds[0] is kinds[1]


@pytest.mark.parametrize("p", [2.0, 3.0])
def test_complex_vectors_of_length_one(p):
    x = torch.randn(3, 4, dtype=torch.complex128, requires_grad=True)
    g = torch.randn(3, 4, dtype=torch.complex128)
    ours, theirs = (torch.autograd.grad(n.normalize(x, p), x, g) for n in (B, F))
    torch.testing.assert_close(ours, theirs)


def test_a_least_length_whose_square_is_zero():
    x = torch.full((2, 3), 1e-21, requires_grad=True)
    (grad,) = torch.autograd.grad(B.normalize(x, eps=1e-20).sum(), x)
    torch.testing.assert_close(grad, torch.full((2, 3), 1e20))
