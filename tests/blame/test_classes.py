"""The blame confusion matrix: exact, gauge-free, and what it says of single pairs."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from models import mlp
from torch import nn

from torchbp import attribute

NAMES = ("ant", "bee", "cat", "dog")


def test_the_matrix_sums_to_the_loss_above_the_reference():
    model, x, y = mlp()
    found = attribute(model, x, y, F.cross_entropy, of="classes")
    loss = F.cross_entropy(model(x), y, reduction="sum")
    torch.testing.assert_close(found.matrix.sum(), (loss - 9 * math.log(4)).detach())
    torch.testing.assert_close(found.pairs.sum(1), found.losses - found.reference_losses)
    for k in range(4):
        torch.testing.assert_close(found.matrix[k], found.pairs[y == k].sum(0))
    assert float(found.matrix.diagonal().abs().max()) == 0 and found.residual < 1e-14


def test_a_pair_is_the_integral_of_its_probability_along_the_margin():
    """Two classes: the closed form is the integral of p dz, by quadrature here."""
    z = torch.tensor([[0.3, 1.7], [2.0, -1.0]], dtype=torch.float64)
    y = torch.tensor([0, 1])
    found = attribute(Logits(2), z, y, F.cross_entropy, of="classes")
    s = torch.linspace(0, 1, 20001, dtype=torch.float64)
    for n, (true, rival) in enumerate([(0, 1), (1, 0)]):
        margin = z[n, rival] - z[n, true]
        expected = torch.trapezoid(torch.sigmoid(s * margin) * margin, s)
        assert float(found.pairs[n, rival]) == pytest.approx(float(expected), rel=1e-8)
        assert float(found.pairs[n, true]) == 0


class Logits(nn.Module):
    """Its input is its output, plus what all logits share."""

    def __init__(self, classes: int, shift: float = 0.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(classes, dtype=torch.float64))
        self.shift = shift

    def forward(self, z):
        return z * self.scale + self.shift * z.sum(1, keepdim=True)


@pytest.mark.parametrize("baseline", ["uniform", "prior", 0.1])
def test_a_constant_added_to_all_logits_changes_nothing(baseline):
    z, y = torch.randn(8, 5, dtype=torch.float64), torch.randint(5, (8,))
    plain = attribute(Logits(5), z, y, F.cross_entropy, of="classes", baseline=baseline)
    moved = attribute(Logits(5, 3.0), z, y, F.cross_entropy, of="classes", baseline=baseline)
    torch.testing.assert_close(plain.matrix, moved.matrix)


def test_references():
    model, x, y = mlp()
    prior = torch.bincount(y, minlength=4).double()
    found = attribute(model, x, y, F.cross_entropy, of="classes", baseline="prior")
    expected = F.cross_entropy(prior.clamp(min=0.5).log().expand(9, 4), y, reduction="none")
    torch.testing.assert_close(found.reference_losses, expected)
    other = torch.randn_like(x)
    found = attribute(model, x, y, F.cross_entropy, of="classes", baseline=other)
    expected = F.cross_entropy(model(other), y, reduction="none").detach()
    torch.testing.assert_close(found.reference_losses, expected)
    assert found.residual < 1e-14


def test_weights_ignored_targets_and_positions():
    z = torch.randn(3, 4, 5, dtype=torch.float64)
    y = torch.randint(4, (3, 5))
    y[0, 1] = y[2, 2] = -100
    weight = torch.rand(4, dtype=torch.float64) + 0.5
    loss = nn.CrossEntropyLoss(weight=weight, reduction="sum")
    found = attribute(nn.Conv1d(4, 4, 1).double(), z, y, loss, of="classes")
    assert found.pairs.shape == (15, 4) and found.residual < 1e-14
    assert found.labels.tolist() == [v if v >= 0 else -1 for v in y.flatten().tolist()]
    assert float(found.pairs[1].abs().max()) == 0


def test_tables_name_the_pairs():
    model, x, y = mlp()
    found = attribute(model, x, y, F.cross_entropy, of="classes", class_names=NAMES)
    true, rival, value = next(iter(found.top(1)))
    off = found.matrix.clone().fill_diagonal_(-torch.inf)
    k, c = divmod(int(off.argmax()), 4)
    assert (true, rival) == (NAMES[k], NAMES[c]) and value == pytest.approx(float(off.max()))
    assert len(found.top(100)) == 12 and all(row[0] != row[1] for row in found.top(100))
    assert "blame confusion matrix" in str(found) and "ant" in found._repr_html_()


@pytest.mark.parametrize(
    ("loss", "targets", "said"),
    [
        (F.mse_loss, torch.zeros(9, 4).double(), "needs cross-entropy"),
        (F.cross_entropy, torch.full((9, 4), 0.25).double(), "needs cross-entropy"),
        (nn.CrossEntropyLoss(label_smoothing=0.1), torch.zeros(9).long(), "label smoothing"),
    ],
)
def test_other_losses_are_refused(loss, targets, said):
    model, x, _ = mlp()
    with pytest.raises(ValueError, match=said):
        attribute(model, x, targets, loss, of="classes")


def test_bad_arguments():
    model, x, y = mlp()
    with pytest.raises(ValueError, match="baseline: expected 'uniform', 'prior' or inputs"):
        attribute(model, x, y, F.cross_entropy, of="classes", baseline="mean")
    with pytest.raises(TypeError, match="of='classes' has no option 'n_steps'"):
        attribute(model, x, y, F.cross_entropy, of="classes", n_steps=3)
    with pytest.raises(ValueError, match="of: unknown name 'class'; did you mean 'classes'"):
        attribute(model, x, y, F.cross_entropy, of="class")
