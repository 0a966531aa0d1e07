from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchbp.ops.cross_entropy import CrossEntropy, cross_entropy
from torchbp.ops.loss_binary import BCEWithLogits, binary_cross_entropy_with_logits
from torchbp.ops.loss_regression import mse_loss

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def value_and_grads(function: Any, *tensors: Tensor, **options: Any) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]
    out = function(*leaves, **options)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, wanted, normal(*out.shape, seed=9))]


def assert_same(ours: Any, torchs: Any, *tensors: Tensor, **options: Any) -> None:
    got = value_and_grads(ours, *tensors, **options)
    expected = value_and_grads(torchs, *tensors, **options)
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=0, equal_nan=True)
    for g, e in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(g, e, rtol=1e-12, atol=1e-14)


WEIGHT = torch.tensor([0.5, 2.0, 1.5], dtype=F64)
REDUCTIONS = pytest.mark.parametrize("reduction", ["none", "sum", "mean"])


@REDUCTIONS
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("extra", [None, (), (2,), (2, 3)])
def test_cross_entropy_equals_torch(
    reduction: str, smoothing: float, weight: Tensor | None, extra: Any
) -> None:
    shape = (3,) if extra is None else (4, 3, *extra)
    rows = () if extra is None else (4, *extra)
    z = normal(*shape).requires_grad_()
    index = torch.randint(3, rows, generator=torch.Generator().manual_seed(1))
    options = {"weight": weight, "reduction": reduction, "label_smoothing": smoothing}
    assert_same(cross_entropy, F.cross_entropy, z, index, **options)
    assert_same(cross_entropy, F.cross_entropy, z, index, **options, ignore_index=1)
    target = normal(*shape, seed=2).softmax(min(len(shape) - 1, 1)).requires_grad_()
    assert_same(cross_entropy, F.cross_entropy, z, target, **options)


def test_cross_entropy_gradient_of_class_weights() -> None:
    z, target = normal(4, 3).requires_grad_(), normal(4, 3, seed=1).softmax(1)
    weight = WEIGHT.clone().requires_grad_()
    for options in ({}, {"label_smoothing": 0.2}, {"reduction": "sum"}):
        assert_same(cross_entropy, F.cross_entropy, z, target, weight, **options)
    for function in (cross_entropy, F.cross_entropy):
        with pytest.raises(RuntimeError, match="weight"):
            function(z, torch.tensor([0, 1, 2, 0]), weight)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@REDUCTIONS
def test_cross_entropy_with_every_row_ignored(reduction: str, smoothing: float) -> None:
    z, index = normal(2, 3).requires_grad_(), torch.tensor([-100, -100])
    options = {"reduction": reduction, "label_smoothing": smoothing}
    assert_same(cross_entropy, F.cross_entropy, z, index, **options)


def test_cross_entropy_of_masked_logits() -> None:
    z = normal(2, 3).masked_fill(torch.tensor([False, True, False]), -torch.inf).requires_grad_()
    assert_same(cross_entropy, F.cross_entropy, z, torch.tensor([0, 2]))


@pytest.mark.parametrize("logits", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_cross_entropy_secant_conserves(logits: float, smoothing: float) -> None:
    z, z0 = logits * normal(4, 3, 2), logits * normal(4, 3, 2, seed=1)
    index = torch.randint(3, (4, 2), generator=torch.Generator().manual_seed(1))
    for reduction in ("sum", "mean"):
        rest = (index, WEIGHT, 1, reduction, smoothing)
        out, out0 = CrossEntropy.forward(z, *rest), CrossEntropy.forward(z0, *rest)
        one = torch.ones((), dtype=F64)
        m, *others = CrossEntropy.secant(one, (z, *rest), (z0, *rest), out, out0)
        assert others == [None] * 5
        terms = m * (z - z0)
        assert (terms.sum() - (out - out0)).abs() <= 1e-12 * terms.abs().sum()
        # Softmax does not see a shift of all logits, so neither may the blame.
        torch.testing.assert_close(m.sum(1), torch.zeros(4, 2, dtype=F64), rtol=0, atol=1e-15)
        assert torch.equal(
            m[(index == 1).unsqueeze(1).expand_as(m)].unique(), torch.zeros(1, dtype=F64)
        )


def test_cross_entropy_secant_with_two_classes_is_the_path_integral() -> None:
    z, z0 = normal(5, 2), normal(5, 2, seed=1)
    rest = (torch.tensor([0, 1, 1, 0, 1]), None, -100, "none", 0.0)
    m, *_ = CrossEntropy.secant(torch.ones(5, dtype=F64), (z, *rest), (z0, *rest), None, None)
    nodes, weights = np.polynomial.legendre.leggauss(40)
    expected = torch.zeros_like(z)
    for t, w in zip((nodes + 1) / 2, weights / 2, strict=True):
        point = (z0 + t * (z - z0)).requires_grad_()
        expected += (
            w * torch.autograd.grad(F.cross_entropy(point, rest[0], reduction="sum"), point)[0]
        )
    torch.testing.assert_close(m, expected, rtol=1e-12, atol=1e-14)


def test_cross_entropy_errors_are_torchs() -> None:
    z = normal(2, 3)
    for target, options in [
        (torch.tensor([0, 3]), {}),
        (torch.tensor([0, 1, 2]), {}),
        (torch.tensor([0, 1]), {"weight": WEIGHT[:2]}),
        (torch.tensor([0, 1]), {"label_smoothing": 2.0}),
        (torch.tensor([0, 1]), {"reduction": "median"}),
    ]:
        with pytest.raises((RuntimeError, ValueError, IndexError)) as theirs:
            F.cross_entropy(z, target, **options)
        with pytest.raises(type(theirs.value)) as ours:
            cross_entropy(z, target, **options)
        assert str(ours.value) == str(theirs.value)


LOSSES = [
    (cross_entropy, F.cross_entropy),
    (mse_loss, F.mse_loss),
    (binary_cross_entropy_with_logits, F.binary_cross_entropy_with_logits),
]


@pytest.mark.parametrize(("ours", "torchs"), LOSSES)
@pytest.mark.parametrize("size_average", [None, True, False])
@pytest.mark.parametrize("reduce", [None, True, False])
def test_superseded_flags(ours: Any, torchs: Any, size_average: Any, reduce: Any) -> None:
    x, y = normal(3, 4), normal(3, 4, seed=1).softmax(1)
    flags = {"size_average": size_average, "reduce": reduce}
    results, warned = [], []
    for function in (ours, torchs):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results.append(function(x, y, **flags))
        warned.append(len(caught))
    assert torch.equal(*results)
    assert warned[0] == warned[1] == (size_average is not None or reduce is not None)
    torch._dynamo.reset()
    compiled = torch.compile(lambda a, b: ours(a, b, **flags), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, y), results[0])


@REDUCTIONS
@pytest.mark.parametrize("weighted", [False, True])
def test_mse_equals_torch(reduction: str, weighted: bool) -> None:
    x = normal(3, 1).requires_grad_()
    y = normal(4, seed=1).requires_grad_()
    weight = [normal(3, 1, seed=2).exp().requires_grad_()] if weighted else []

    def call(function: Any) -> Any:
        return lambda x, y, *w: function(x, y, reduction=reduction, weight=w[0] if w else None)

    with pytest.warns(UserWarning, match="target"):
        assert_same(call(mse_loss), call(F.mse_loss), x, y, *weight)


def test_mse_errors() -> None:
    x = normal(3, 4)
    for function in (mse_loss, F.mse_loss):
        with pytest.raises(ValueError, match="eight"):
            function(x, x, weight=x[0])
        with pytest.raises(ValueError, match="reduction"):
            function(x, x, weight=x, reduction="median")
        with pytest.raises(ValueError, match="median"):
            function(x, x, reduction="median")


def test_mse_of_mixed_dtypes() -> None:
    x, y = normal(3).float().requires_grad_(), normal(3, seed=1).requires_grad_()
    assert_same(mse_loss, F.mse_loss, x, y)


@REDUCTIONS
@pytest.mark.parametrize("weight", [None, normal(4, seed=2).abs()])
@pytest.mark.parametrize("pos_weight", [None, normal(3, 1, seed=3).abs()])
def test_bce_equals_torch(reduction: str, weight: Any, pos_weight: Any) -> None:
    z = (20 * normal(3, 4)).requires_grad_()
    y = normal(3, 4, seed=1).sigmoid().requires_grad_()
    ours, torchs = LOSSES[2]
    assert_same(ours, torchs, z, y, weight=weight, pos_weight=pos_weight, reduction=reduction)


def test_bce_errors() -> None:
    z = normal(3, 4)
    for function in LOSSES[2]:
        with pytest.raises(ValueError, match="size"):
            function(z, z[0])
        for name in ("weight", "pos_weight"):
            with pytest.raises(RuntimeError, match=name):
                function(z, z, **{name: z[0].clone().requires_grad_()})
            with torch.no_grad():
                function(z, z, **{name: z[0].clone().requires_grad_()})


@pytest.mark.parametrize("gap", [0.0, 1e-9, 1e-3, 1.0, 30.0, 2000.0])
def test_bce_secant_is_the_mean_slope(gap: float) -> None:
    z = torch.linspace(-3, 3, 7, dtype=F64)
    z0 = z - gap
    y, one = torch.full((7,), 0.25, dtype=F64), torch.ones(7, dtype=F64)
    rest = (y, None, None, "none")
    m, *_ = BCEWithLogits.secant(one, (z, *rest), (z0, *rest), None, None)
    if gap == 0:
        expected = z.sigmoid() - y
    elif gap < 0.1:  # the slope at the midpoint, to second order in the gap
        expected = (z - gap / 2).sigmoid() - y
    else:
        values = [F.binary_cross_entropy_with_logits(v, y, reduction="none") for v in (z, z0)]
        expected = (values[0] - values[1]) / gap
    torch.testing.assert_close(
        m, expected, rtol=0, atol=max(1e-14, gap**2 / 50 if gap < 0.1 else 0)
    )
