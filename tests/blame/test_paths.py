from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import MODELS, cnn, mlp, residual
from torch import nn

from torchbp import attribute
from torchbp.blame.methods import paths
from torchbp.blame.methods.paths import RULES, quadrature

PATHS = ["conductance", "internal_influence", "layer_ig"]


def test_conductance_from_its_definition():
    model, x, y = mlp()
    nodes, _ = quadrature("gausslegendre", 7)
    activations, errors = [], []
    for s in nodes:
        h = model[:2](s * x).detach().requires_grad_()
        loss = F.cross_entropy(model[2:](h), y, reduction="sum")
        errors.append(torch.autograd.grad(loss, h)[0])
        activations.append(h.detach())
    expected = sum(errors[k] * (activations[k + 1] - activations[k]) for k in range(6))
    blame = attribute(model, x, y, F.cross_entropy, "conductance", layers=["1"], n_steps=6)
    torch.testing.assert_close(blame["1"], expected)


def test_layer_ig_from_its_definition():
    model, x, y = residual()
    a, a0 = model.act(model.inner(x)).detach(), model.act(model.inner(torch.full_like(x, 0.2)))
    expected = torch.zeros_like(a)
    for s, w in zip(*quadrature("gausslegendre", 5), strict=True):
        h = (a0 + s * (a - a0)).detach().requires_grad_()
        skip = x + h  # the rest of the network sees the input
        logits = model.head(F.silu(model.inner(skip)) * 0.5 + skip)
        (error,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), h)
        expected += w * error * (a - a0).detach()
    blame = attribute(
        model, x, y, F.cross_entropy, "layer_ig", layers=["act"], n_steps=5, baseline=0.2
    )
    torch.testing.assert_close(blame["act"], expected)


@pytest.mark.parametrize("limit", ["_ROWS", "_BYTES"])
@pytest.mark.parametrize("method", PATHS)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_points_of_one_pass_do_not_mix(make, method, limit, monkeypatch):
    model, x, y = make()
    found = []
    for bound in (1, 3 * len(x) if limit == "_ROWS" else 1 << 40):
        monkeypatch.setattr(paths, limit, bound)
        found.append(attribute(model, x, y, F.cross_entropy, method, layers="all", n_steps=7))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-11, atol=1e-14)
    assert found[0].residual == pytest.approx(found[1].residual, abs=1e-11)


def test_a_pass_holds_no_more_than_its_bounds(monkeypatch):
    model, x, y = mlp()
    rows = []
    model[0].register_forward_hook(lambda module, args, output: rows.append(len(output)))
    monkeypatch.setattr(paths, "_ROWS", 4 * len(x))
    attribute(model, x, y, F.cross_entropy, "conductance", n_steps=10)
    assert max(rows) == 4 * len(x)
    rows.clear()
    monkeypatch.undo()
    needed = 8 * len(x) * (8 + 7 + 4)  # on the way back: by ReLU, GELU and the loss
    monkeypatch.setattr(paths, "_BYTES", 4 * needed)
    attribute(model, x, y, F.cross_entropy, "conductance", n_steps=10)
    assert len(x) < max(rows) <= 4 * len(x)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_many_nodes_conserve(make):
    model, x, y = make()
    few, many = (
        attribute(model, x, y, F.cross_entropy, "conductance", layers="all", n_steps=n)
        for n in (20, 200)
    )
    assert many.expected and many.residual.keys() == few.residual.keys()
    for name, residual_ in many.residual.items():
        assert residual_ < 0.3 * few.residual[name]
    with pytest.raises(RuntimeError, match="conductance"):
        few.check()
    few.check(tolerance=0.2)


def test_many_segments_of_the_secant_are_conductance():
    model, x, y = mlp()
    smooth = nn.Sequential(model[0], nn.Tanh(), *model[2:])
    secant = attribute(smooth, x, y, F.cross_entropy, "secant", n_steps=64)
    path = attribute(smooth, x, y, F.cross_entropy, "conductance", n_steps=2000,
                     rule="riemann_middle")  # fmt: skip
    for name in secant:
        torch.testing.assert_close(secant[name], path[name], rtol=0.01, atol=1e-3)


def test_layer_ig_knows_the_sum_of_every_layer():
    model, x, y = residual()
    blame = attribute(model, x, y, F.cross_entropy, "layer_ig", layers="all", n_steps=30)
    assert [*blame.expected] == [*blame]  # also of those that a skip connection leads past
    blame.check(1e-8)
    with torch.no_grad():
        act, head = model.act(model.inner(torch.zeros_like(x))), x + 0
        h = head + act
        logits = model.head(F.silu(model.inner(h)) * 0.5 + h)
        change = blame.losses - F.cross_entropy(logits, y, reduction="none")
    torch.testing.assert_close(blame.expected["act"], change)


@pytest.mark.parametrize("method", PATHS)
def test_players_are_sums_of_elements(method):
    model, x, y = cnn()
    elements, units, positions = (
        attribute(model, x, y, F.cross_entropy, method, of=of, n_steps=3, layers=["2"])["2"]
        for of in ("elements", "units", "positions")
    )
    torch.testing.assert_close(elements.sum((2, 3)), units)
    torch.testing.assert_close(elements.sum(1), positions)


class Scaled(nn.Module):
    """Takes a tensor that does not run over samples."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, value, scale=None, order=None):
        h = self.a(value).tanh()
        return self.b((h * scale)[:, order] if scale is not None else h)


@pytest.mark.parametrize("method", PATHS)
def test_inputs_without_samples_are_not_repeated(method):
    torch.manual_seed(0)
    model, scale, order = Scaled().double(), torch.rand(5).double() + 1, torch.randperm(5)
    x, y = torch.randn(7, 4, dtype=torch.float64), torch.randint(3, (7,))
    inputs = {"value": x, "scale": scale, "order": order}
    blame = attribute(
        model,
        inputs,
        y,
        F.cross_entropy,
        method,
        layers=["a"],
        n_steps=4,
        baseline={"scale": scale},
    )
    folded = Scaled().double()
    folded.load_state_dict(model.state_dict())
    folded.b.weight.data[:, order] = model.b.weight.data.clone() * scale[order]
    expected = attribute(folded, x, y, F.cross_entropy, method, layers=["a"], n_steps=4)
    torch.testing.assert_close(blame["a"], expected["a"])


@pytest.mark.parametrize("method", PATHS)
def test_samples_may_run_over_another_dimension_of_some_inputs(method):
    class Remembering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 3)

        def forward(self, sequence, state):  # [N, T, 3] and [1, N, 4]
            return self.head(self.rnn(sequence, state)[0][:, -1])

    model, y = Remembering().double(), torch.randint(3, (5,))
    sequence, state = torch.randn(5, 4, 3).double(), torch.randn(1, 5, 4).double()

    def blame(*samples):
        inputs = sequence[[*samples]], state[:, [*samples]]
        return attribute(model, inputs, y[[*samples]], F.cross_entropy, method, layers=["rnn"])

    alone = torch.cat([blame(n)["rnn"] for n in range(5)])
    torch.testing.assert_close(blame(*range(5))["rnn"], alone)


def test_a_mask_of_infinities_stays_as_it_is():
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, value, mask):
            return self.b((self.a(value) + mask).softmax(-1))

    model, x, y = Masked().double(), torch.randn(6, 4).double(), torch.randint(3, (6,))
    mask = torch.zeros(6, 5).double().masked_fill(torch.eye(6, 5).bool(), -torch.inf)
    blame = attribute(model, (x, mask), y, F.cross_entropy, "conductance", layers=["a"],
                      baseline=(0, mask), n_steps=400)  # fmt: skip
    blame.check(0.01)
    assert [*blame.expected] == ["a"]


@pytest.mark.parametrize("method", ["conductance", "internal_influence"])
@pytest.mark.parametrize("rule", ["gausslegendre", "riemann_trapezoid", "riemann_left"])
def test_the_path_of_integers_lies_in_their_embeddings(method, rule):
    rest = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    table = nn.Embedding(7, 4).double()
    x, x0, y = torch.randint(7, (6, 3)), torch.randint(7, (6, 3)), torch.randint(3, (6,))
    for baseline in (None, x0):
        start = 0 if baseline is None else table(baseline).detach()
        blame = attribute(nn.Sequential(table, *rest), x, y, F.cross_entropy, method,
                          layers=["0", "3"], baseline=baseline, rule=rule, n_steps=9)  # fmt: skip
        expected = attribute(rest, table(x).detach(), y, F.cross_entropy, method, n_steps=9,
                             layers=["input", "2"], baseline=start, rule=rule)  # fmt: skip
        torch.testing.assert_close(blame["0"], expected["input"])
        torch.testing.assert_close(blame["3"], expected["2"])


@pytest.mark.filterwarnings("ignore:attribute. the model is in training mode")
def test_training_mode_goes_point_by_point():
    model, x, y = cnn()
    model.train()
    sizes = []
    model[1].register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    before = model[1].running_mean.clone()
    attribute(model, x, y, F.cross_entropy, "conductance", n_steps=5)
    assert {*sizes} == {len(x)} and torch.equal(model[1].running_mean, before)


@pytest.mark.parametrize("rule", RULES)
def test_quadrature_integrates(rule):
    n = 400
    nodes, weights = quadrature(rule, n)
    assert len(nodes) == len(weights) == n and 0 <= min(nodes) and max(nodes) <= 1
    integral = sum(w * s**2 for s, w in zip(nodes, weights, strict=True))
    assert integral == pytest.approx(1 / 3, abs=1e-14 if rule == "gausslegendre" else 3e-3)


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"rule": "gauslegendre"}, ValueError, "rule: unknown name 'gauslegendre'.*gausslegendre"),
        ({"rule": 3}, TypeError, "rule: expected a string, got int"),
        ({"rule": "riemann_left", "n_steps": 1}, ValueError, "n_steps: .*at least 2 nodes, got 1"),
        ({"n_steps": 0}, ValueError, "n_steps: expected an integer >= 1, got 0"),
        ({"nodes": 3}, TypeError, "no option 'nodes'.*rule"),
        ({"baseline": torch.zeros(5)}, ValueError, r"baseline: .*\(9, 6\), got \(5,\)"),
    ],
)
def test_bad_settings_are_named(settings, error, text):
    model, x, y = mlp()
    with pytest.raises(error, match=text):
        attribute(model, x, y, F.cross_entropy, "internal_influence", **settings)


def test_a_layer_that_the_reference_does_not_call_is_named():
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.act, self.b = nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)

        def forward(self, value):
            h = self.a(value)
            return self.b(self.act(h) if bool(value.any()) else h)

    x, y = torch.randn(5, 4), torch.randint(3, (5,))
    with pytest.raises(ValueError, match="layer 'act' is called on the input, but not at the ref"):
        attribute(Branch(), x, y, F.cross_entropy, "layer_ig")
