from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from captum.attr import ShapleyValues
from models import MODELS, cnn, mlp, residual
from torch import Tensor, nn

from torchbp import attribute
from torchbp.blame.methods import paths, shapley


def exact(losses, activation: Tensor, reference: Tensor | float = 0.0) -> Tensor:
    """Shapley values of every unit of ``[N, U]``, by all coalitions."""
    units = activation.shape[1]
    value = {}
    for on in itertools.product((False, True), repeat=units):
        value[on] = losses(torch.where(torch.tensor(on), activation, reference)).detach()
    out = torch.zeros_like(activation)
    for unit, on in itertools.product(range(units), value):
        if not on[unit]:
            k = sum(on)
            weight = math.factorial(k) * math.factorial(units - k - 1) / math.factorial(units)
            joined = (*on[:unit], True, *on[unit + 1 :])
            out[:, unit] += weight * (value[joined] - value[on])
    return out


def small() -> tuple[nn.Sequential, Tensor, Tensor]:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return model, torch.randn(6, 4).double(), torch.randn(6, 3).double()


def test_one_pair_is_exact_where_units_interact_in_pairs():
    model, x, y = small()
    hidden = model[:2](x).detach()

    def losses(h: Tensor) -> Tensor:
        return F.mse_loss(model[2](h), y, reduction="none").sum(1)

    blame = attribute(model, x, y, F.mse_loss, "shapley", n_permutations=2, seed=3).check()
    torch.testing.assert_close(blame["1"], exact(losses, hidden))
    theirs = torch.cat([
        ShapleyValues(lambda h, n=n: F.mse_loss(model[2](h), y[n : n + 1], reduction="none").sum(1))
        .attribute(hidden[n : n + 1])
        for n in range(len(x))
    ])  # fmt: skip
    # Captum computes them in float32.
    torch.testing.assert_close(blame["1"], theirs.double(), rtol=1e-4, atol=1e-6)


def test_many_permutations_tend_to_the_exact_values():
    torch.manual_seed(0)
    model, x, _ = small()
    y = torch.randint(3, (6,))
    model[0].weight.data *= 4
    model[2].weight.data *= 8
    hidden = model[:2](x).detach()
    expected = exact(lambda h: F.cross_entropy(model[2](h), y, reduction="none"), hidden)
    few, many = (
        (attribute(model, x, y, F.cross_entropy, "shapley", n_permutations=n)["1"] - expected)
        for n in (1, 600)
    )
    scale = float(expected.abs().max())
    assert few.abs().max() > 0.1 * scale
    assert many.abs().max() < 0.02 * scale


@pytest.mark.parametrize("of", ["units", "positions"])
@pytest.mark.parametrize("permutations", [1, 2, 5])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_every_layer_sums_to_what_switching_it_off_saves(make, permutations, of):
    model, x, y = make()
    blame = attribute(
        model, x, y, F.cross_entropy, "shapley", layers="all", n_permutations=permutations, of=of
    )
    assert [*blame.expected] == [*blame]
    blame.check(1e-11)


def test_expected_is_the_loss_less_that_without_the_layer():
    model, x, y = residual()
    blame = attribute(model, x, y, F.cross_entropy, "shapley", layers=["act"], n_permutations=2)
    off = model.head(F.silu(model.inner(x)) * 0.5 + x)
    change = blame.losses - F.cross_entropy(off, y, reduction="none").detach()
    torch.testing.assert_close(blame.expected["act"], change)


def test_units_that_are_off_take_the_reference():
    model, x, y = small()
    hidden = model[:2](x).detach()
    blame = attribute(
        model, x, y, F.mse_loss, "shapley", layers=["1"], n_permutations=2, baseline="mean"
    )
    expected = exact(
        lambda h: F.mse_loss(model[2](h), y, reduction="none").sum(1), hidden, hidden.mean(0)
    )
    torch.testing.assert_close(blame["1"], expected)


@pytest.mark.parametrize(("home", "limit"), [(paths, "_ROWS"), (shapley, "_MASKS")])
def test_batches_of_coalitions_do_not_mix(home, limit, monkeypatch):
    model, x, y = cnn()
    whole = attribute(model, x, y, F.cross_entropy, "shapley", layers=["2", "10"], n_permutations=3)
    monkeypatch.setattr(home, limit, 15)
    parts = attribute(model, x, y, F.cross_entropy, "shapley", layers=["2", "10"], n_permutations=3)
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name])


def test_the_seed_decides_and_nothing_else():
    model, x, y = mlp()

    def found(seed: int) -> Tensor:
        return attribute(
            model, x, y, F.cross_entropy, "shapley", layers=["1"], n_permutations=1, seed=seed
        )["1"]

    first = found(1)
    torch.rand(3)
    assert torch.equal(first, found(1))
    assert not torch.equal(first, found(2))


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"n_permutations": 0}, ValueError, "n_permutations: expected an integer >= 1, got 0"),
        ({"n_permutations": 2.0}, TypeError, r"n_permutations: expected an integer, got 2\.0"),
        ({"seed": "a"}, TypeError, "seed: expected an integer, got 'a'"),
        ({"baseline": "median"}, ValueError, "baseline: .*'median'"),
    ],
)
def test_bad_settings_are_named(settings, error, text):
    model, x, y = mlp()
    with pytest.raises(error, match=text):
        attribute(model, x, y, F.cross_entropy, "shapley", **settings)
