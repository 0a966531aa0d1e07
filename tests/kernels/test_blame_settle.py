"""blame_settle: against the reference, the blame definitions, and the formula in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from torchbp import kernels
from torchbp.kernels import reference

KINDS = reference.BLAME_KINDS
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6}
kinds = pytest.mark.parametrize("kind", KINDS)
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
# Samples and layers. Wide layers are cut into several tiles.
SHAPES = [
    (0, [3, 4]), (3, [0]), (0, [0]), (1, [1]), (5, [0, 7, 0, 1]), (64, [64, 64, 10]),
    (129, [31, 2, 600, 127]), (7, [9000]), (70, [513, 511, 1, 3000]),
]  # fmt: skip


def make(
    samples: int, units: int, dtype: torch.dtype, n_classes: int = 7
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(samples + units)
    contribution = torch.randn(samples, units) * torch.logspace(-5, 0.5, units)
    losses = torch.rand(samples) * 8
    losses[::5] = 0
    labels = torch.randint(-2, n_classes + 2, (samples,))
    return contribution.to(dtype), losses.to(dtype), labels


def settle(
    contribution: Tensor,
    losses: Tensor,
    labels: Tensor | None,
    n_classes: int,
    scale: float,
    kind: str,
    sizes: Sequence[int],
    call: Callable[..., Any] = kernels.blame_settle,
) -> tuple[Tensor, Tensor, Tensor]:
    """Layers of `sizes` columns each, of one kind; their stats are made up."""
    stats = torch.arange(3 * contribution.shape[1]).view(3, -1).to(contribution)
    layers = [t.split(list(sizes), 1) for t in (contribution, stats)]
    number: Any = kind if call is kernels.blame_settle else KINDS.index(kind)
    return call(*layers, losses, labels, n_classes, scale, [number] * len(sizes))


def elements(taylor: Tensor, losses: Tensor, kind: str) -> Tensor:
    """Blame one by one: with one layer per unit, ``per_sample`` is the blame itself."""
    return settle(taylor, losses, None, 0, 1.0, kind, [1] * taylor.shape[1])[2]


def assert_same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == dtype and ours.is_contiguous()
        scale = theirs.abs().max().item() if theirs.numel() else 0.0
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(
            ours.double(), theirs.double(), rtol=tolerance, atol=tolerance * scale
        )


@kinds
@dtypes
@pytest.mark.parametrize("samples, sizes", SHAPES, ids=str)
@pytest.mark.parametrize("with_labels", [True, False], ids=["labels", "none"])
def test_equals_reference(kind, dtype, samples, sizes, with_labels):
    contribution, losses, labels = make(samples, sum(sizes), dtype)
    labels = labels if with_labels else None
    got = settle(contribution, losses, labels, 7, 0.3, kind, sizes)
    wide = contribution.double(), losses.double()
    expected = settle(*wide, labels, 7, 0.3, kind, sizes, reference.blame_settle)
    assert_same(got, expected, dtype)


@kinds
def test_sums_equal_the_definition(kind):
    """Loops in Python, one sample after another."""
    from torchbp.blame.definitions import log_odds_blame, squared_error_blame

    contribution, losses, labels = make(40, 150, torch.float64)
    blame = contribution / 0.3
    if kind == "log_odds":
        blame = log_odds_blame(blame.clone(), losses)
    elif kind == "squared":
        blame = squared_error_blame(blame, losses)
    per_class = torch.zeros(7, 150, dtype=torch.float64)
    for row, label in zip(blame, labels.tolist(), strict=True):
        if 0 <= label < 7:
            per_class[label] += row
    per_sample = torch.stack([blame[:, :100].sum(1), blame[:, 100:].sum(1)], 1)
    stats = torch.arange(450.0, dtype=torch.float64).view(3, 150)
    sums = [blame.sum(0), blame.abs().sum(0), (blame**2).sum(0)]
    rows = torch.stack([*sums, stats[0], stats[1], stats[2] / 0.09])
    got = settle(contribution, losses, labels, 7, 0.3, kind, (100, 50))
    assert_same(got, (rows, per_class, per_sample), torch.float64)


EXTREME_LOSSES = [
    0.0, 1e-12, 1e-6, 0.1, 1.0, 1.999, 2.001, 4.0, 16.9, 17.1, 30.0, 60.0, 110.0, 200.0,
]  # fmt: skip


@dtypes
@pytest.mark.parametrize("loss", EXTREME_LOSSES)
def test_every_element_of_the_link(dtype, loss):
    """Blame of every size and sign; a rounded exponent costs its own size in digits."""
    size = torch.logspace(-12, 6, 4001, dtype=torch.float64)
    taylor = torch.cat([size, -size, size.new_tensor([0.0, loss, -loss])]).to(dtype)[None]
    losses = torch.tensor([loss], dtype=dtype)
    got = elements(taylor, losses, "log_odds").double()
    t, wide_loss = taylor.double(), losses.double()
    expected = reference.settled_blame(t, wide_loss, 1)
    r = -torch.expm1(-wide_loss)
    exponent = torch.where(r > 0, t / r, t).abs().clamp(max=80) if loss < 2 else 0.0
    unit = 1e-14 if dtype == torch.float64 else 2.5e-7
    tolerance = unit * ((2 if kernels.HAS_EXT else 8) + exponent)
    assert got.isfinite().all() and bool((got <= wide_loss).all())
    assert bool(((got - expected).abs() <= tolerance * expected.abs()).all())


@pytest.mark.parametrize("loss", [1e-12, 0.1, 5.0, 30.0, 200.0])
def test_the_link_is_the_loss_without_the_unit(loss):
    """The loss before and after the log-odds of error move by ``t / r``, with 200 digits."""
    mpmath = pytest.importorskip("mpmath")
    with mpmath.workdps(200):
        r = 1 - mpmath.exp(-mpmath.mpf(loss))
        odds = mpmath.log(r) + loss
        for t in (-300.0, -3.0, -1e-9, 1e-9, 0.2, 7.0, 250.0):
            without = mpmath.log1p(mpmath.exp(odds - t / r))
            taylor = torch.tensor([[t]], dtype=torch.float64)
            losses = torch.tensor([loss], dtype=torch.float64)
            got = elements(taylor, losses, "log_odds").item()
            exponent = min(80.0, abs(t) / float(r))
            assert math.isclose(got, float(loss - without), rel_tol=1e-15 * (1 + exponent))


@kinds
@dtypes
def test_zero_negative_and_infinite_losses(kind, dtype):
    losses = torch.tensor([0.0, -0.0, -1e-7, float("inf")], dtype=dtype)
    taylor = torch.tensor([-1e3, -1e-3, 0.0, 1e-3, 1e3], dtype=dtype).expand(4, 5)
    got = elements(taylor, losses, kind)
    torch.testing.assert_close(got, reference.settled_blame(taylor, losses, KINDS.index(kind)))


@kinds
@dtypes
@pytest.mark.parametrize("loss", [0.0, 0.5, 5.0, 50.0])
def test_nan_and_infinity_stay_in_their_sums(kind, dtype, loss):
    contribution = torch.full((5, 40), 1e-2, dtype=dtype)
    contribution[1, 3], contribution[2, 21] = float("nan"), -float("inf")
    losses = torch.full((5,), loss, dtype=dtype)
    labels = torch.tensor([0, 1, 2, 0, 1])
    rows, per_class, per_sample = settle(contribution, losses, labels, 3, 1.0, kind, (20, 20))
    assert (~rows[0].isfinite()).nonzero().flatten().tolist() == [3, 21]
    assert (~per_class.isfinite()).nonzero().tolist() == [[1, 3], [2, 21]]
    assert (~per_sample.isfinite()).nonzero().tolist() == [[1, 0], [2, 1]]
    assert rows[:3, 3].isnan().all()
    losses[4] = float("nan")
    if kind == "log_odds":
        assert settle(contribution, losses, None, 0, 1.0, kind, [40])[0][:3].isnan().all()


def test_any_layout():
    contribution, losses, labels = make(30, 90, torch.float32)
    expected = settle(contribution, losses, labels, 7, 0.5, "log_odds", (90,))
    got = settle(
        contribution.t().contiguous().t(),
        losses.repeat_interleave(2)[::2],
        torch.stack([labels, labels], 1)[:, 0],
        7,
        0.5,
        "log_odds",
        [90],
    )
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@kinds
@pytest.mark.parametrize("samples, sizes", [(500, [700, 800]), (64, [6154]), (9000, [3])], ids=str)
def test_does_not_depend_on_threads(kind, samples, sizes):
    contribution, losses, labels = make(samples, sum(sizes), torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(settle(contribution, losses, labels, 7, 0.3, kind, sizes))
    finally:
        torch.set_num_threads(threads)
    wide = contribution.double(), losses.double()
    exact = settle(*wide, labels, 7, 0.3, kind, sizes, reference.blame_settle)
    for ours, theirs in zip(results[0], exact, strict=True):
        scale = theirs.abs().max().item()
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6 * scale)
    if kernels.HAS_EXT:
        for other in results[1:]:
            assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_layers_of_different_kinds_and_the_default():
    contribution, losses, labels = make(40, 150, torch.float64)
    layers, stats = contribution.split(50, 1), torch.ones(3, 150).double().split(50, 1)
    got = kernels.blame_settle(layers, stats, losses, labels, 7, 0.3, KINDS)
    for i, kind in enumerate(KINDS):
        alone = settle(layers[i], losses, labels, 7, 0.3, kind, [50])
        part = slice(50 * i, 50 * i + 50)
        torch.testing.assert_close(got[0][:3, part], alone[0][:3])
        torch.testing.assert_close(got[1][:, part], alone[1])
        torch.testing.assert_close(got[2][:, i : i + 1], alone[2])
    plain = kernels.blame_settle(layers, stats, losses)
    assert torch.equal(
        plain[0], kernels.blame_settle(layers, stats, losses, kinds=3 * KINDS[:1])[0]
    )


@pytest.mark.parametrize("loss", [1e-6, 0.02, 0.7, 1.9, 2.1, 6.0, 40.0])
def test_rows_of_small_contributions(loss):
    """Whole rows near 0, for which float32 sums a series, against float64, which does not."""
    losses = torch.tensor([loss], dtype=torch.float64)
    r = -torch.expm1(-losses).item()
    size = torch.logspace(-12, 0, 500, dtype=torch.float64) * 0.1249 * r
    taylor = torch.cat([size, -size]).float()[None]
    got = settle(taylor, losses.float(), None, 0, 1.0, "log_odds", [1000])[0][0].double()
    expected = reference.settled_blame(taylor.double(), losses.float().double(), 1)[0]
    assert bool(((got - expected).abs() <= 3e-7 * expected.abs()).all())


def test_opcheck():
    contribution, losses, labels = make(6, 9, torch.float32)
    layers, stats = contribution.split([4, 5], 1), torch.ones(3, 9).split([4, 5], 1)
    lists = [t.contiguous() for t in layers], [t.contiguous() for t in stats]
    torch.library.opcheck(torch.ops.torchbp.blame_settle, (*lists, losses, labels, 7, 0.3, [0, 1]))


C, S, L, Y = torch.ones(4, 6), torch.ones(3, 6), torch.ones(4), torch.arange(4)
BAD = {
    "none": (([], [], L), "contributions: expected at least one layer, got none"),
    "dims": (([C[0]], [S], L), "contributions: expected samples x units, got 1 dims"),
    "half": (([C.half()], [S.half()], L.half()), "contributions: expected float32 or float64, got"),
    "mixed": (([C, C.double()], [S, S], L), "contributions: expected the dtype of the first"),
    "samples": (([C, C[1:]], [S, S], L), "contributions: expected 4 samples.* got 3"),
    "stats": (([C], [S, S], L), "stats: expected one for each of 1 layers, got 2"),
    "stats shape": (([C], [S[:, 1:]], L), "stats: expected 3 x 6"),
    "stats dtype": (([C], [S.double()], L), "stats: expected the dtype of the contributions"),
    "losses length": (([C], [S], L[:3]), "losses: expected one for each of 4 samples"),
    "losses dims": (([C], [S], L[:, None]), "losses: expected one for each of 4 samples"),
    "losses dtype": (([C], [S], L.double()), "losses: expected the dtype of the contributions"),
    "labels length": (([C], [S], L, Y[1:], 3), "labels: expected one for each of 4 samples"),
    "labels dims": (([C], [S], L, C.long(), 3), "labels: expected one for each of 4 samples"),
    "labels dtype": (([C], [S], L, Y.int(), 3), "labels: expected int64, got"),
    "n_classes": (([C], [S], L, Y, -1), "n_classes: expected 0 or more, got -1"),
    "scale": (([C], [S], L, Y, 3, 0.0), "scale: expected a number other than 0"),
    "kinds": (([C], [S], L, Y, 3, 1.0, ["taylor"] * 2), "kinds: expected one for each of 1 layers"),
    "kind": (([C], [S], L, Y, 3, 1.0, ["x"]), "kinds: expected taylor, log_odds, squared, got x"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    arguments, message = BAD[name]
    with pytest.raises(RuntimeError, match=message):
        kernels.blame_settle(*arguments)
    if name != "kind":
        whole = arguments + (None, 0, 1.0, ["taylor"] * len(arguments[0]))[len(arguments) - 3 :]
        with pytest.raises(RuntimeError, match=message):
            reference.blame_settle(*whole[:6], [KINDS.index(kind) for kind in whole[6]])


@pytest.mark.parametrize("number", [-1, 3])
def test_the_operator_refuses_other_kinds(number):
    for call in (torch.ops.torchbp.blame_settle, reference.blame_settle):
        with pytest.raises(RuntimeError, match=f"kinds: expected 0 .*, got {number}"):
            call([C], [S], L, None, 0, 1.0, [number])
