"""CTC against torch, against an enumeration of all paths, and at its edges."""

from __future__ import annotations

from itertools import groupby, product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchbp.functional import ctc_loss
from torchbp.ops.ctc import CTC

PADDED = torch.tensor([[1, 1, 2, 2], [3, 1, -1, 7], [2, 0, 0, 0]])
FLAT = torch.tensor([1, 1, 2, 2, 3, 1, 2])
LENGTHS = (8, 6, 7), (4, 2, 1)


def log_probs(*shape: int, seed: int = 0) -> Tensor:
    draw = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return draw.log_softmax(-1)


def gradient(function: Any, x: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    loss = function(x, *args, **options)
    error = torch.arange(1.0, 1 + loss.numel(), dtype=x.dtype).reshape(loss.shape)
    return loss.detach(), torch.autograd.grad(loss, x, error)[0]


def same(x: Tensor, *args: Any, **options: Any) -> Tensor:
    (loss, grad), (expected, expected_grad) = (
        gradient(f, x, *args, **options) for f in (ctc_loss, F.ctc_loss)
    )
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-12, equal_nan=True)
    return grad


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("as_tensors", [False, True])
def test_equals_torch(reduction: str, as_tensors: bool) -> None:
    x = log_probs(8, 3, 4)
    lengths = [torch.tensor(n) if as_tensors else n for n in LENGTHS]
    same(x, PADDED, *lengths, reduction=reduction)
    same(x, FLAT, *lengths, reduction=reduction)
    same(x, FLAT.int(), [8, 6, 7], [4, 2, 1], reduction=reduction)
    same(x, FLAT - 1, *lengths, reduction=reduction, blank=3)
    same(x[:, 0], FLAT[:3], *([n.new_tensor(3) for n in lengths] if as_tensors else ((3,), (3,))),
         reduction=reduction, zero_infinity=True)  # fmt: skip


def test_where_no_path_spells_the_target() -> None:
    x, lengths = log_probs(8, 3, 4), ((8, 1, 7), (4, 2, 0))
    grad = same(x, PADDED, *lengths, reduction="none", zero_infinity=True)
    assert not grad[:, 1].any() and grad[:, 0].any()
    loss, grad = gradient(ctc_loss, x, PADDED, *lengths, reduction="none")
    assert loss[1] == torch.inf and grad[0, 1].isnan().all()
    assert grad[:, (0, 2)].isfinite().all()


def test_gaps_between_concatenated_targets() -> None:
    gapped = torch.stack([FLAT, FLAT.flip(0)], 1)[:, 0]
    x = log_probs(8, 3, 4)
    assert torch.equal(ctc_loss(x, gapped, *LENGTHS), ctc_loss(x, FLAT, *LENGTHS))


def paths(x: Tensor, target: list[int]) -> tuple[Tensor, Tensor]:
    """Minus the logarithm of the target's probability, and the share of paths per label."""
    total, shares = torch.zeros((), dtype=x.dtype), torch.zeros_like(x)
    for path in product(range(x.shape[1]), repeat=x.shape[0]):
        if [label for label, _ in groupby(path) if label] == target:
            p = x[range(len(path)), path].sum().exp()
            total += p
            shares[range(len(path)), path] += p
    return -total.log(), shares / total


@pytest.mark.parametrize("target", [[], [1], [1, 1], [2, 1], [1, 2, 1]])
def test_equals_the_sum_over_all_paths(target: list[int]) -> None:
    x = log_probs(6, 3)
    expected, shares = paths(x, target)
    loss, grad = gradient(
        ctc_loss, x, torch.tensor(target, dtype=torch.long), (6,), (len(target),), reduction="sum"
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, x.exp() - shares)


def test_gradients_after_the_softmax_are_those_of_differences() -> None:
    # Of log-probabilities alone, as of torch's, only the part that keeps them normalised counts.
    def loss(z: Tensor) -> Tensor:
        return ctc_loss(z.log_softmax(-1), PADDED, (5, 4, 5), (3, 2, 1))

    z = log_probs(5, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(loss, z)
    assert torch.autograd.gradgradcheck(loss, z)
    assert torch.autograd.gradcheck(loss, z, check_forward_ad=True, check_backward_ad=False)


@pytest.mark.parametrize("scale", [0.01, 1.0, 20.0])
def test_secant_conserves_between_far_runs(scale: float) -> None:
    x, x0 = ((scale * log_probs(8, 3, 4, seed=s)).log_softmax(-1) for s in (1, 2))
    rest = (PADDED, *LENGTHS, 0, False, "none")
    out, out0 = CTC.forward(x, *rest), CTC.forward(x0, *rest)
    error = torch.tensor([1.0, -2.0, 0.5], dtype=x.dtype)
    m = CTC.secant(error, (x, *rest), (x0, *rest), out, out0)[0]
    assert m is not None
    terms = m * (x - x0)
    torch.testing.assert_close(
        terms.sum((0, 2)), error * (out[0] - out0[0]), rtol=1e-11, atol=1e-11
    )
    assert not m[6:, 1].any()


def test_single_precision_keeps_the_digits() -> None:
    x = (9 * log_probs(50, 2, 15)).log_softmax(-1)
    labels = torch.randint(1, 15, (2, 20), generator=torch.Generator().manual_seed(1))
    rest = (labels, (50, 50), (20, 15))
    exact = gradient(ctc_loss, x, *rest, reduction="sum")[1]
    single = gradient(ctc_loss, x.float(), *rest, reduction="sum")[1]
    torch.testing.assert_close(single.double(), exact, rtol=0, atol=2e-5)
