"""The edge flow against the units' blame, whose sums it must be, and against single edges."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import MODELS, Residual
from test_untouched import fingerprint, same
from torch import nn

import torchbp
from torchbp.blame.edges import edge_flow
from torchbp.blame.weights import weight_blame


def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding_mode="circular", padding=1, stride=3), nn.Flatten(),
        nn.Linear(24, 8), nn.Dropout(), nn.Tanh(), nn.Linear(8, 3),
    )  # fmt: skip
    model = model.double().eval()
    return model, torch.randn(7, 2, 8, 8).double(), torch.randint(3, (7,))


#: Layers with weights, and the call whose units are their inputs.
INPUTS = {"0": "input", "3": "2", "6": "5", "11": "10"}


def close(a, b):
    assert a.shape == b.shape and float((a - b).abs().max()) < 1e-12


@pytest.mark.parametrize("method, n_steps", [("taylor", 1), ("secant", 1), ("secant", 3)])
def test_sums_over_edges_are_the_blame_of_units(method, n_steps):
    model, x, y = network()
    flow = edge_flow(model, x, y, F.cross_entropy, method, n_steps=n_steps)
    given = {"n_steps": n_steps} if method == "secant" else {}
    units = torchbp.attribute(model, x, y, F.cross_entropy, method, layers="all", **given)
    assert [*flow] == ["0", "3", "6", "8", "11"]
    for name, layer in flow.items():
        close(layer.arriving, units.per_unit(name))
    for name, before in INPUTS.items():
        close(flow[name].leaving, units.per_unit(before))
    close(flow["8"].leaving, units["7"].sum(0).view(6, 4).sum(1))  # flattened channels
    assert not (method == "secant" and any(layer.bias.any() for layer in flow.values()))
    assert [layer.source for layer in flow.values()] == ["input", "0", "3", "6", "8"]


def test_secant_edges_sum_to_the_loss_since_the_baseline():
    model, x, y = MODELS["mlp"]()
    for n_steps in (1, 4):
        flow = edge_flow(model, x, y, F.cross_entropy, "secant", torch.ones_like(x), n_steps)
        change = F.cross_entropy(model(x), y, reduction="sum") - F.cross_entropy(
            model(torch.ones_like(x)), y, reduction="sum"
        )
        for layer in flow.values():
            assert float(layer.edges.sum()) == pytest.approx(float(change.detach()), rel=1e-10)


def test_edges_of_linear_layers_are_the_blame_of_weights():
    model, x, y = MODELS["mlp"]()
    blame, flow = (f(model, x, y, F.cross_entropy) for f in (weight_blame, edge_flow))
    for name, layer in flow.items():
        close(layer.edges, blame[f"{name}.weight"])
        close(layer.bias, blame[f"{name}.bias"])


def test_a_reused_layer_has_a_flow_for_every_call():
    torch.manual_seed(0)
    model, x, y = Residual().double(), torch.randn(8, 6).double(), torch.arange(8) % 3
    flow = edge_flow(model, x, y, F.cross_entropy)
    assert [*flow] == ["inner", "inner#2", "head"]
    units = torchbp.attribute(model, x, y, F.cross_entropy, "taylor", layers="all")
    for name, layer in flow.items():
        close(layer.arriving, units.per_unit(name))
    both = flow["inner"].edges + flow["inner#2"].edges
    close(both, weight_blame(model, x, y, F.cross_entropy)["inner.weight"])
    # A sum of branches is no single layer's output.
    assert flow["inner#2"].source is None and flow["head"].source is None


@pytest.mark.parametrize("k", [1, 2, 100])
def test_pruning_keeps_every_sum(k):
    model, x, y = network()
    flow = edge_flow(model, x, y, F.cross_entropy)
    pruned = flow.prune(k)
    for name, layer in flow.items():
        small = pruned[name]
        assert small.edges.shape == (len(small.rows), len(small.columns))
        assert float(small.edges.sum()) == pytest.approx(float(layer.edges.sum()), abs=1e-13)
        assert float(small.bias.sum()) == pytest.approx(float(layer.bias.sum()), abs=1e-13)
        for i, unit in enumerate(small.rows):
            if unit != "rest":
                close(small.arriving[i], layer.arriving[unit])
        for i, unit in enumerate(small.columns):
            if unit != "rest":
                close(small.leaving[i], layer.leaving[unit])
        assert sum(u != "rest" for u in small.rows) == min(k, len(layer.rows))
        assert small.rows.count("rest") == (k < len(layer.rows))
    # A unit is the same node where it is entered and where it is left.
    assert set(pruned["3"].rows) == set(pruned["6"].columns)
    again = pruned.prune(1)
    for name, layer in flow.items():
        assert float(again[name].edges.sum()) == pytest.approx(float(layer.edges.sum()), abs=1e-13)


def test_the_units_kept_have_the_most_flow():
    model, x, y = MODELS["mlp"]()
    flow = edge_flow(model, x, y, F.cross_entropy)
    through = flow["0"].edges.abs().sum(1) + flow["0"].bias.abs() + flow["2"].edges.abs().sum(0)
    assert set(flow.prune(3)["0"].rows) - {"rest"} == set(through.topk(3).indices.tolist())


def test_graph_and_tables():
    model, x, y = MODELS["mlp"]()
    flow = edge_flow(model, x, y, F.cross_entropy)
    nodes = flow.nodes()
    for name, layer in flow.items():
        arriving: dict = {}
        for _, end, value in flow.edges():
            if end[0] == name:
                arriving[end] = arriving.get(end, 0.0) + value
        for unit in layer.rows:
            assert arriving[name, unit] == pytest.approx(nodes[name, unit], abs=1e-13)
    assert {("input", 0), ("0", 7), ("4", 3)} <= set(nodes)
    assert len(flow.to_table().rows) == sum(
        f.edges.numel() + f.bias.count_nonzero() for f in flow.values()
    )
    best = max((value for a, _, value in flow.edges() if a[1] != "bias"))
    assert flow.top(1).rows[0][-1] == best
    assert "3 layers, 132 edges, taylor" in repr(flow)


def test_layers_without_a_flow_are_named():
    model = nn.Sequential(nn.Embedding(5, 4), nn.LSTM(4, 4, batch_first=True)).double()

    class Read(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.head = model, nn.Linear(4, 3).double()

        def forward(self, ids):
            return self.head(self.layers(ids)[0][:, -1])

    flow = edge_flow(Read(), torch.randint(5, (4, 3)), torch.arange(4) % 3, F.cross_entropy)
    assert [*flow] == ["head"] and flow.missing == ("layers.0", "layers.1")


def test_parametrized_and_bare_weights_are_named_as_missing():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(1, 4))
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 5))
            self.attend, self.head = nn.MultiheadAttention(5, 1), nn.Linear(5, 3)

        def forward(self, x):
            h = self.normed(x + self.table)[None]
            return self.head(self.attend(h, h, h)[0][0])

    flow = edge_flow(Bare().eval(), torch.randn(7, 4), torch.arange(7) % 3, F.cross_entropy)
    assert flow.missing == ("(model)", "normed", "attend")


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.rnn, self.b = nn.Linear(4, 5), nn.LSTM(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.b(self.rnn(self.a(x))[0])


ENDS = nn.AdaptiveAvgPool2d((1, 3)), nn.Flatten()
BETWEEN = {
    "a recurrent layer": (Recurrent(), "b", (7, 4)),
    "a change of the order": (
        nn.Sequential(nn.Conv2d(2, 4, 1), nn.ChannelShuffle(2), nn.Conv2d(4, 3, 1), nn.Flatten()),
        "2", (7, 2, 1, 1),
    ),
    "another dimension": (
        nn.Sequential(nn.Conv1d(2, 4, 1), nn.Linear(4, 3), *ENDS), "1", (7, 2, 4),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BETWEEN)
def test_columns_that_are_no_units_of_the_layer_before_have_no_source(name):
    model, layer, shape = BETWEEN[name]
    flow = edge_flow(model.eval(), torch.randn(shape), torch.randint(3, (7,)), F.cross_entropy)
    assert flow[layer].source is None


def test_a_model_that_is_a_linear_layer_and_a_layer_that_is_called_input():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.input, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(self.input(x))

    x, y = torch.randn(7, 4).double(), torch.randint(3, (7,))
    for model in (nn.Linear(4, 3).double(), Named().double()):
        for method in ("taylor", "secant"):
            flow = edge_flow(model, x, y, F.cross_entropy, method)
            units = torchbp.attribute(model, x, y, F.cross_entropy, method, layers="all")
            assert len(flow) == len([*model.modules()]) - isinstance(model, Named)
            source = "(input)" if isinstance(model, Named) else "input"
            assert flow[next(iter(flow))].source == source
            for name, layer in flow.items():
                close(layer.arriving, units.per_unit(name))
            assert flow.prune(2).nodes()


def test_a_linear_layer_with_a_forward_of_its_own_is_named_as_missing():
    class Tripled(nn.Linear):
        def forward(self, input):
            return F.linear(input, 3 * self.weight, self.bias)

    model = nn.Sequential(Tripled(4, 5), nn.Tanh(), nn.Linear(5, 3)).eval()
    flow = edge_flow(model, torch.randn(7, 4), torch.randint(3, (7,)), F.cross_entropy)
    assert [*flow] == ["2"] and flow.missing == ("0",)


def test_edges_of_half_precision_are_summed_in_single():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 3)).bfloat16().eval()
    x, y = torch.randn(500, 40).bfloat16(), torch.randint(3, (500,))
    flow = edge_flow(model, x, y, F.cross_entropy)
    assert flow["0"].edges.dtype == flow["0"].bias.dtype == torch.float32
    units = torchbp.attribute(model, x, y, F.cross_entropy, "taylor", layers="all").per_unit("0")
    assert float((flow["0"].arriving - units).abs().max()) < 2e-3 * float(units.abs().max())


@pytest.mark.parametrize("method", ["taylor", "secant"])
def test_nothing_of_the_users_changes(method):
    model, x, y = network()
    before = fingerprint(model, x)
    edge_flow(model, x, y, F.cross_entropy, method)
    assert same(before, fingerprint(model, x))
    with pytest.raises(ValueError, match="targets"):
        edge_flow(model, x, y + 3, F.cross_entropy, method)
    assert same(before, fingerprint(model, x))


def test_bad_input_is_named():
    model, x, y = MODELS["mlp"]()
    ok = (model, x, y, F.cross_entropy)
    with pytest.raises(ValueError, match="method: expected 'taylor' or 'secant', got 'lrp'"):
        edge_flow(*ok, method="lrp")
    with pytest.raises(FloatingPointError, match="layer '0': its edges hold NaN"):
        edge_flow(model, torch.full_like(x, torch.nan), y, F.cross_entropy)
    with pytest.raises(ValueError, match="baseline: method 'taylor'"):
        edge_flow(*ok, baseline=x)
    with pytest.raises(ValueError, match="baseline: expected inputs"):
        edge_flow(*ok, method="secant", baseline="uniform")
    with pytest.raises(ValueError, match="not a checkpoint"):
        other = {"0.weight": model[0].weight.detach() * 2}
        edge_flow(*ok, method="secant", baseline=other)
    with pytest.raises(ValueError, match="n_steps"):
        edge_flow(*ok, method="secant", n_steps=0)
    with pytest.raises(ValueError, match="batch is empty"):
        edge_flow(model, x[:0], y[:0], F.cross_entropy)
    with pytest.raises(ValueError, match="none of its linear and convolution layers"):
        edge_flow(nn.Sequential(nn.LayerNorm(6), nn.Tanh()).double(), x, y, F.cross_entropy)
    flow = edge_flow(*ok)
    with pytest.raises(KeyError, match="layer: unknown name '7'"):
        flow["7"]
    for call in (flow.prune, flow.top):
        with pytest.raises(ValueError, match="k: expected an integer"):
            call(0)
