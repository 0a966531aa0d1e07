"""References of the removal methods: what a silenced unit is set to."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from models import cnn, mlp
from torch import nn

from torchbp import attribute

METHODS = ["taylor", "link", "logits", "curvature"]


def reference_of(kind: str, model, x):
    """A baseline, and the activations of layer 1 of the MLP that it stands for."""
    other, x0 = copy.deepcopy(model), torch.randn_like(x)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.2)
    a, a0, changed = model[:2](x), model[:2](x0), other[:2](x)
    return {
        "zero": (None, torch.zeros_like(a)),
        "mean": ("mean", a.mean(0, keepdim=True)),
        "input": (x0, a0),
        "tuple": ((x0,), a0),
        "one for all": (x0[:1], model[:2](x0[:1])),
        "number": (1, model[:2](torch.ones_like(x))),
        "module": (other, changed),
        "state": (other.state_dict(), changed),
    }[kind]


KINDS = ["zero", "mean", "input", "tuple", "one for all", "number", "module", "state"]


@pytest.mark.parametrize("kind", KINDS)
def test_methods_measure_from_the_reference(kind):
    model, x, y = mlp()
    baseline, a0 = reference_of(kind, model, x)
    a = model[:2](x).detach().requires_grad_()
    z = model[2:](a)
    loss = F.cross_entropy(z, y, reduction="none")
    (delta,) = torch.autograd.grad(loss.sum(), a, retain_graph=True)
    gap, loss = (a - a0).detach(), loss.detach()
    given = dict(layers=["1"], baseline=baseline)
    t = gap * delta
    found = {m: attribute(model, x, y, F.cross_entropy, m, **given)["1"] for m in METHODS[:3]}
    torch.testing.assert_close(found["taylor"], t)
    r = 1 - (-loss).exp()
    odds = loss.expm1().log()[:, None]
    torch.testing.assert_close(found["link"], loss[:, None] - F.softplus(odds - t / r[:, None]))
    u = torch.stack(
        [gap * torch.autograd.grad(z[:, c].sum(), a, retain_graph=True)[0] for c in range(4)], -1
    )
    for unit in range(8):
        without = F.cross_entropy(z.detach() - u[:, unit], y, reduction="none")
        torch.testing.assert_close(found["logits"][:, unit], loss - without)
    curved = attribute(model, x, y, F.cross_entropy, "curvature", **given, estimate="exact")
    p = z.detach().softmax(1)[:, None]
    bend = (p * u.square()).sum(2) - (p * u).sum(2).square()
    torch.testing.assert_close(curved["1"], t - bend / 2)


def test_the_mean_is_taken_over_samples_position_by_position():
    model, x, y = cnn()
    blame = attribute(model, x, y, F.cross_entropy, "taylor", layers=["2"], baseline="mean")
    a = model[:3](x).detach().requires_grad_()
    loss = F.cross_entropy(model[3:](a), y, reduction="sum")
    (delta,) = torch.autograd.grad(loss, a)
    expected = ((a - a.mean(0)) * delta).flatten(2).sum(2).detach()
    torch.testing.assert_close(blame["2"], expected)


@pytest.mark.parametrize("method", METHODS)
def test_resampled_references_are_other_samples(method):
    model, x, y = mlp()
    given = dict(method=method, layers=["1"])
    if method == "curvature":
        given["estimate"] = "exact"
    blame = attribute(model, x, y, F.cross_entropy, **given, baseline="resample", seed=2)
    shifted = [
        attribute(model, x, y, F.cross_entropy, **given, baseline=x.roll(k, 0)) for k in range(1, 9)
    ]
    for n in range(len(x)):
        assert any(torch.allclose(blame["1"][n], other["1"][n]) for other in shifted)


def test_tokens_of_another_input_are_attribution_patching():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)).double()
    x, other, y = torch.randint(7, (5, 3)), torch.randint(7, (5, 3)), torch.randint(3, (5,))
    blame = attribute(model, x, y, F.cross_entropy, "taylor", ["1"], other, of="positions")
    a = model[:2](x).detach().requires_grad_()
    loss = F.cross_entropy(model[2:](a), y, reduction="sum")
    (delta,) = torch.autograd.grad(loss, a)
    expected = ((a - model[:2](other)) * delta).sum(2).detach()
    torch.testing.assert_close(blame["1"], expected)


def test_keyword_inputs_are_replaced_by_name():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.head = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(4, 2)

        def forward(self, left, right):
            return self.head(torch.tanh(self.left(left)) * self.right(right))

    model, y = Two().double(), torch.randint(2, (5,))
    x = {"left": torch.randn(5, 3).double(), "right": torch.randn(5, 2).double()}
    new = torch.randn(5, 2).double()
    given = dict(method="taylor", layers=["right"])
    found = attribute(model, x, y, F.cross_entropy, **given, baseline={"right": new})
    zero = attribute(model, x, y, F.cross_entropy, **given)
    share = model.right(new) / model.right(x["right"])  # of the error signal's factor
    torch.testing.assert_close(found["right"], (zero["right"] * (1 - share)).detach())


class Narrow(nn.Module):
    """Calls its layer only where the input is positive somewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.rare, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        h = self.stem(x)
        if bool(x.any()):
            h = h + self.rare(x)
        return self.head(h)


BAD = {
    "word": ("median", ValueError, "baseline: expected 'mean', 'resample', a tensor.*'median'"),
    "shape": (torch.zeros(5), ValueError, r"baseline: expected a shape .*\(9, 6\), got \(5,\)"),
    "count": ((torch.zeros(9, 6),) * 2, ValueError, "baseline: expected 1 tensors, got 2"),
    "type": ([1.0], TypeError, "baseline: expected a tensor or a number, got list"),
    "name": ({"x": torch.zeros(9, 6)}, ValueError, "baseline: unknown name 'x'"),
    "checkpoint": (
        nn.Sequential(nn.Linear(6, 5)), ValueError,
        r"baseline\['0.weight'\]: expected shape \(8, 6\), got \(5, 6\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("method", [*METHODS, "ablation"])
@pytest.mark.parametrize(("baseline", "error", "message"), BAD.values(), ids=BAD.keys())
def test_a_reference_that_does_not_fit_is_named(baseline, error, message, method):
    model, x, y = mlp()
    with pytest.raises(error, match=message):
        attribute(model, x, y, F.cross_entropy, method, baseline=baseline)


def test_a_layer_that_the_reference_does_not_reach_is_named():
    x, y = torch.randn(3, 6), torch.zeros(3).long()
    with pytest.raises(ValueError, match="'rare' is called on the input, but not at the reference"):
        attribute(Narrow(), x, y, F.cross_entropy, "taylor", baseline=0)


def test_a_layer_of_another_shape_at_the_reference_is_named():
    class Trims(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Conv1d(1, 2, 1), nn.Linear(2, 3)

        def forward(self, x):
            filled = int(x[0, 0].count_nonzero())
            return self.head(self.layer(x[:, :, :filled]).mean(2))

    x, y = torch.rand(3, 1, 6) + 1, torch.zeros(3).long()
    x0 = x * (torch.arange(6) < 4)
    with pytest.raises(ValueError, match=r"'layer' returns \(3, 2, 6\) .* \(3, 2, 4\) at the ref"):
        attribute(Trims(), x, y, F.cross_entropy, "taylor", baseline=x0)


def test_one_sample_has_no_other():
    model, x, y = mlp()
    with pytest.raises(ValueError, match="'resample' needs at least two samples"):
        attribute(model, x[:1], y[:1], F.cross_entropy, "taylor", baseline="resample")


def test_an_error_signal_has_no_reference():
    model, x, y = mlp()
    with pytest.raises(ValueError, match="baseline: method 'gradient' measures against nothing"):
        attribute(model, x, y, F.cross_entropy, "gradient", baseline=0)
