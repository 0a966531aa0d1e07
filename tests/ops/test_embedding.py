from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import torchbp.functional as B
from torchbp.ops.embedding import Embedding


def table(rows: int = 6, features: int = 3) -> torch.Tensor:
    return torch.randn(rows, features, dtype=torch.float64, requires_grad=True)


def gradients(call, *wrt):
    torch.manual_seed(2)
    y = call()
    return y, torch.autograd.grad(y, wrt, torch.randn_like(y))


@pytest.mark.parametrize("padding_idx", [None, 0, 2, -1])
@pytest.mark.parametrize("sparse", [False, True])
def test_rows_that_repeat_and_rows_of_padding(padding_idx, sparse):
    indices, weight = torch.tensor([[0, 2, 2], [5, 2, 0]]), table()
    settings = dict(padding_idx=padding_idx, sparse=sparse)
    y, (grad,) = gradients(lambda: B.embedding(indices, weight, **settings), weight)
    theirs, (expected,) = gradients(lambda: F.embedding(indices, weight, **settings), weight)
    assert torch.equal(y, theirs) and grad.is_sparse == expected.is_sparse == sparse
    if sparse:
        assert grad._nnz() == expected._nnz()
        grad, expected = grad.to_dense(), expected.to_dense()
    torch.testing.assert_close(grad, expected)


def test_by_frequency_a_row_gets_the_mean():
    indices, weight = torch.tensor([0, 2, 2, 2, 5]), table()
    (grad,) = torch.autograd.grad(
        B.embedding(indices, weight, scale_grad_by_freq=True).sum(), weight
    )
    assert torch.equal(grad[:, 0], torch.tensor([1.0, 0, 1, 0, 0, 1], dtype=torch.float64))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_by_frequency_in_bags(mode):
    indices, offsets, weight = torch.tensor([0, 2, 2, 2]), torch.tensor([0, 2]), table()
    if mode == "max":
        with pytest.raises(ValueError, match="max mode does not support"):
            B.embedding_bag(indices, weight, offsets, mode=mode, scale_grad_by_freq=True)
        return
    y = B.embedding_bag(indices, weight, offsets, mode=mode, scale_grad_by_freq=True)
    (grad,) = torch.autograd.grad(y.sum(), weight)
    # Row 2 was looked up three times: a third of what it would get.
    each = 1.0 if mode == "sum" else 0.5
    expected = torch.tensor([each, 0, each, 0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(grad[:, 0], expected)


def test_sparse_by_frequency_is_refused_as_torch_does():
    indices, weight = torch.tensor([0, 2]), table()
    for function in (F.embedding, B.embedding):
        y = function(indices, weight, scale_grad_by_freq=True, sparse=True)
        with pytest.raises(RuntimeError, match="scale_grad_by_freq"):
            y.sum().backward()


def test_max_norm_shortens_in_place_before_looking_up():
    weight = (torch.randn(5, 3, dtype=torch.float64) * 4).requires_grad_()
    theirs = weight.detach().clone().requires_grad_()
    indices = torch.tensor([0, 3, 3])
    y = B.embedding(indices, weight, max_norm=1.0)
    expected = F.embedding(indices, theirs, max_norm=1.0)
    assert torch.equal(y, expected) and torch.equal(weight, theirs)
    assert (weight[[0, 3]].norm(dim=1) <= 1 + 1e-6).all() and weight[1].norm() > 1
    y.sum().backward()


def test_nothing_is_shortened_if_the_call_is_refused():
    weight = torch.randn(5, 3) * 4
    before = weight.clone()
    with pytest.raises(ValueError, match="offsets"):
        B.embedding_bag(torch.tensor([0, 1]), weight, max_norm=1.0)
    with pytest.raises(AssertionError, match="num_embeddings"):
        B.embedding(torch.tensor([0, 1]), weight, padding_idx=7, max_norm=1.0)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding_idx", [None, 2, -1])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("last", [False, True])
def test_bags_with_empty_ones_and_padding(mode, padding_idx, dtype, last):
    indices = torch.tensor([0, 2, 2, 5, 1, 2, 2], dtype=dtype)
    # The last bag holds padding only, if 2 is padding.
    offsets = torch.tensor([0, 0, 3, 5] + [7] * last, dtype=dtype)
    weight = table()
    settings = dict(mode=mode, padding_idx=padding_idx, include_last_offset=last)
    ours, (grad,) = gradients(lambda: B.embedding_bag(indices, weight, offsets, **settings), weight)
    theirs, (expected,) = gradients(
        lambda: F.embedding_bag(indices, weight, offsets, **settings), weight
    )
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(grad, expected)


def test_a_bag_of_padding_has_a_finite_second_derivative():
    indices, offsets = torch.tensor([0, 1, 2, 2]), torch.tensor([0, 2])
    call = lambda w: B.embedding_bag(indices, w, offsets, mode="mean", padding_idx=2)  # noqa: E731
    assert torch.autograd.gradgradcheck(call, (table(),))


@pytest.mark.parametrize("sparse", [False, True])
def test_factors_of_the_rows(sparse):
    indices, weight = torch.tensor([[0, 2, 2], [5, 1, 0]]), table()
    factors = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    settings = dict(mode="sum", per_sample_weights=factors, padding_idx=1, sparse=sparse)
    _, ours = gradients(lambda: B.embedding_bag(indices, weight, **settings), weight, factors)
    _, theirs = gradients(lambda: F.embedding_bag(indices, weight, **settings), weight, factors)
    for a, b in zip(ours, theirs, strict=True):
        assert a.is_sparse == b.is_sparse
        torch.testing.assert_close(a.to_dense(), b.to_dense())


def test_runs_that_looked_up_different_rows_share_the_difference_of_the_table():
    indices, indices0 = torch.tensor([0, 1, 1]), torch.tensor([2, 1, 3])
    weight, weight0 = (torch.randn(4, 2, dtype=torch.float64) for _ in range(2))
    m = torch.randn(3, 2, dtype=torch.float64)
    runs = [(i, w, None, False, False) for i, w in ((indices, weight), (indices0, weight0))]
    share = Embedding.secant(m, *runs, None, None)[1]
    of_table = (share * (weight - weight0)).sum()
    of_indices = (m * ((weight + weight0)[indices] - (weight + weight0)[indices0])).sum() / 2
    total = (m * (weight[indices] - weight0[indices0])).sum()
    torch.testing.assert_close(of_table + of_indices, total)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("embedding", (torch.tensor([0, 9]), table())),
        ("embedding", (torch.tensor([0.5]), table())),
        ("embedding", (torch.tensor([0]), table()[0])),
        ("embedding", (torch.tensor([0]), table(), 6)),
        ("embedding_bag", (torch.tensor([0, 1]), table())),
        ("embedding_bag", (torch.tensor([[0, 1]]), table(), torch.tensor([0]))),
        ("embedding_bag", (torch.tensor(0), table())),
        ("embedding_bag", (torch.tensor([[0, 9]]), table())),
        ("embedding_bag", (torch.tensor([[0, 1]]), table(), None, None, 2, False, "median")),
        ("embedding_bag", (torch.tensor([[0, 1]]), table(), None, None, 2, False, "max", True)),
        (
            "embedding_bag",
            (torch.tensor([[0]]), table(), None, None, 2, False, "mean", False, table()[:1, :1]),
        ),
    ],
)
def test_the_same_errors(name, arguments):
    kinds = []
    for home in (F, B):
        with pytest.raises(Exception) as caught:
            getattr(home, name)(*arguments)
        kinds.append(caught.type)
    assert kinds[0] is kinds[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_dtypes_count_beyond_what_they_can_hold(dtype):
    indices = torch.zeros(3000, dtype=torch.long)
    weight = torch.randn(4, 3, dtype=dtype, requires_grad=True)
    calls = {
        3000.0: lambda: B.embedding(indices, weight),
        1.0: lambda: B.embedding(indices, weight, scale_grad_by_freq=True),
    }
    for expected, call in calls.items():
        (grad,) = torch.autograd.grad(call().sum(), weight)
        assert grad[0, 0] == torch.tensor(expected, dtype=dtype)
    (grad,) = torch.autograd.grad(B.embedding_bag(indices[None], weight).sum(), weight)
    assert grad[0, 0] == 1
