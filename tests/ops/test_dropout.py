from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import torchbp.functional as B

INPUTS = [
    torch.randn(5, 7), torch.randn(5, 7).bfloat16(), torch.randn(4, 6)[:, ::2], torch.tensor(1.0),
    torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last), torch.randn(0, 3),
]  # fmt: skip


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("x", INPUTS, ids=lambda x: f"{tuple(x.shape)}-{x.dtype}")
def test_draws_as_torch_does(x, p, inplace):
    results = []
    for home in (F, B):
        torch.manual_seed(4)
        given = x.clone()
        y = home.dropout(given, p, True, inplace)
        assert (y is given) == (inplace or p == 0 or x.numel() == 0)
        results.append((y, torch.get_rng_state()))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][0].stride() == results[1][0].stride()
    assert torch.equal(results[0][1], results[1][1])


def test_the_gradient_meets_the_same_noise():
    x = torch.ones(200, dtype=torch.float64, requires_grad=True)
    y = B.dropout(x, 0.25)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, y.detach())
    assert {*grad.tolist()} == {0.0, 1 / 0.75}


@pytest.mark.parametrize("p", [-0.1, 1.5])
def test_probabilities_are_checked(p):
    with pytest.raises(ValueError, match=f"between 0 and 1, but got {p}"):
        B.dropout(torch.ones(2), p)
