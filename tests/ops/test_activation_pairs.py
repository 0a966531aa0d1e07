from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import torchbp.functional as B
from torchbp.ops.activation_pairs import PReLU, RReLU
from torchbp.ops.gated import GLU
from torchbp.ops.relevance import Rule


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("x", [normal(40, 5), normal(6, 7).t(), normal(4, 6)[:, ::2]], ids=str)
def test_rrelu_draws_as_torch_does(x, training, inplace):
    results = []
    for home in (F, B):
        torch.manual_seed(4)
        given = x.clone(memory_format=torch.contiguous_format) if inplace else x
        y = home.rrelu(given, 0.1, 0.9, training, inplace)
        assert (y is given) == inplace
        results.append((y, torch.get_rng_state()))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_rrelu_differentiates_what_it_drew():
    x = normal(7, 6).t().requires_grad_()
    y = B.rrelu(x, 0.2, 0.8, training=True)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, y.detach() / x.detach())
    with pytest.raises(RuntimeError):
        B.rrelu(x, 0.9, 0.1, training=True)


def test_rrelu_secant_blames_the_draw_only_between_equal_signs():
    x, x0 = torch.tensor([[2.0, -1.0, 3.0, -2.0], [1.0, -3.0, -1.0, 4.0]], dtype=torch.float64)
    slope = torch.tensor([1.0, 0.2, 1.0, 0.4], dtype=torch.float64)
    slope0 = torch.tensor([1.0, 0.6, 0.3, 1.0], dtype=torch.float64)
    one = torch.ones(4, dtype=torch.float64)
    m_x, m_slope = RReLU.secant(one, (x, slope), (x0, slope0), x * slope, x0 * slope0)
    torch.testing.assert_close(m_x * (x - x0) + m_slope * (slope - slope0), x * slope - x0 * slope0)
    assert m_slope[2:].count_nonzero() == 0
    assert m_x[1] == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("x", "weight"),
    [(normal(5), normal(2)), (normal(2, 3), normal(2)), (normal(2, 3), normal(1, 3))],
    ids=str,
)
def test_prelu_refuses_what_torch_refuses(x, weight):
    for home in (F, B):
        with pytest.raises(RuntimeError):
            home.prelu(x, weight)


def test_prelu_keeps_infinite_errors_from_the_weight():
    x, weight = torch.tensor([1.0, -2.0]), torch.tensor([0.5], requires_grad=True)
    y = B.prelu(x, weight)
    (grad,) = torch.autograd.grad(y, weight, torch.tensor([torch.inf, 1.0]))
    assert grad.item() == -2.0


def test_prelu_secant_by_hand():
    x, x0, w, w0 = torch.tensor([[2.0, -1.0], [-2.0, -3.0], [0.5, 0.5], [0.1, 0.1]])
    w, w0 = w[:1], w0[:1]
    pairs = (x, w), (x0, w0)
    m_x, m_w = PReLU.secant(torch.ones(2), *pairs, F.prelu(x, w), F.prelu(x0, w0))
    # rise 1/2 over the gap of 4; below zero the mean slope 0.3
    torch.testing.assert_close(m_x, torch.tensor([0.5 + 0.3 * 0.5, 0.3]))
    torch.testing.assert_close(m_w, torch.tensor([-1.0 - 2.0]))


def test_the_gate_of_glu_gets_no_relevance():
    x, relevance = normal(3, 4), normal(3, 2)
    shares = GLU.relevance(relevance, Rule(), (x, -1), F.glu(x))
    assert torch.equal(shares[0], torch.cat([relevance, torch.zeros(3, 2)], 1))


@pytest.mark.parametrize("x", [torch.tensor(1.0), torch.ones(3)], ids=str)
def test_glu_refuses_what_torch_refuses(x):
    for home in (F, B):
        with pytest.raises(RuntimeError):
            home.glu(x)
