from __future__ import annotations

import pytest
import torch

import torchbp.functional as B


@pytest.mark.parametrize("dims", [(), (1,), (-2, -1), (0, 1), (2, 2)])
def test_flatten_equals_torch(dims):
    x = torch.randn(2, 3, 4, dtype=torch.float64).transpose(0, 2).requires_grad_()
    y, expected = B.flatten(x, *dims), torch.flatten(x, *dims)
    assert torch.equal(y, expected)
    weights = torch.randn_like(y)
    grads = [torch.autograd.grad((t * weights).sum(), x)[0] for t in (y, expected)]
    assert torch.equal(*grads)


def test_what_was_flattened_may_be_written_into():
    x = torch.randn(2, 3, 4, requires_grad=True)
    y = torch.relu_(B.flatten(x, 1))
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, (x > 0).float())


@pytest.mark.parametrize("dims", [(3,), (2, 1), (0, 7)])
def test_the_same_errors(dims):
    kinds = []
    for function in (torch.flatten, B.flatten):
        with pytest.raises(Exception) as caught:
            function(torch.randn(2, 3, 4), *dims)
        kinds.append(caught.type)
    assert kinds[0] is kinds[1]


def test_what_was_unflattened_may_be_written_into():
    x = torch.randn(2, 6, requires_grad=True)
    (grad,) = torch.autograd.grad(torch.relu_(B.unflatten(x, 1, (2, 3))).sum(), x)
    assert torch.equal(grad, (x > 0).float())


@pytest.mark.parametrize(
    ("name", "shape", "setting"),
    [("pixel_shuffle", (0, 8, 2, 3), 2), ("pixel_unshuffle", (0, 2, 4, 6), 2)],
)
def test_shuffles_of_nothing_have_a_gradient(name, shape, setting):
    # torch's own backward fails here: it takes the empty error for one of another shape.
    x = torch.randn(shape, requires_grad=True)
    (grad,) = torch.autograd.grad(getattr(B, name)(x, setting).sum(), x)
    assert grad.shape == x.shape
