"""Bits drawn from a generator's state: against the reference, and against torch's own draws."""

from __future__ import annotations

import pytest
import torch

import torchbp.functional as B
from torchbp import kernels
from torchbp.ops.dropout_draws import _draws_as_torch

COUNTS = (0, 1, 7, 31, 33, 257, 311, 312, 313, 4095, 4097, 70_001)
as_torch = pytest.mark.skipif(
    not _draws_as_torch(), reason="torch leaves drawing to a library on this processor"
)


def generator(numbers: int = 0) -> torch.Generator:
    """One that has drawn some numbers of 32 bits."""
    made = torch.Generator().manual_seed(11)
    torch.empty(numbers, dtype=torch.int32).random_(generator=made)
    return made


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_draws_what_the_reference_draws(count, p):
    state = generator(count % 5).get_state()
    got = kernels.bernoulli_bits(state, count, p)
    expected = kernels.KERNELS["bernoulli_bits"].reference(state, count, p)
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs)


@as_torch
@pytest.mark.parametrize("numbers", [0, 1, 623, 624, 1249])
@pytest.mark.parametrize("count", COUNTS)
def test_draws_what_torch_draws_and_leaves_the_same_state(count, numbers):
    theirs = generator(numbers)
    bits, state = kernels.bernoulli_bits(theirs.get_state(), count, 0.7)
    drawn = torch.empty(count, dtype=torch.int32).bernoulli_(0.7, generator=theirs)
    assert torch.equal(bits, kernels.dropout_bits(drawn))
    assert torch.equal(state, theirs.get_state())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_large_dropout_is_torchs_and_leaves_its_generator(order, dtype):
    x = torch.randn(16, 33, 70, dtype=dtype).permute(order).requires_grad_()
    results = []
    for dropout in (B.dropout, torch.nn.functional.dropout):
        torch.manual_seed(3)
        y = dropout(x, 0.3)
        (grad,) = torch.autograd.grad(y.sum(), x)
        results.append([y, grad, torch.randn(5), torch.get_rng_state()])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_bad_arguments():
    state = generator().get_state()
    bad = state.clone()
    bad[8:12] = 0
    calls = [(state[1:], 3, 0.5), (state.float(), 3, 0.5), (state, -1, 0.5), (state, 3, 1.5)]
    if kernels.HAS_EXT:
        calls.append((bad, 3, 0.5))
    for arguments in calls:
        with pytest.raises(RuntimeError, match=r"state|count|p:"):
            kernels.bernoulli_bits(*arguments)
