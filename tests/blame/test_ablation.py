"""Ablation equals silencing by hand, whatever is silenced, and to whatever."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from models import MODELS, cnn, mlp
from torch import Tensor, nn

from torchbp import attribute
from torchbp.blame.definitions import LossHead


def by_hand(model, layer, x, y, players, reference, loss_fn=F.cross_entropy) -> Tensor:
    """``[N, *players]``: for every index of a player, a forward pass with a hook of our own."""
    head = LossHead.of(loss_fn)
    with torch.no_grad():
        whole = head.per_sample(model(x), y)
        parts = []
        for player in players:

            def silence(module, args, output, player=player):
                output = output.clone()
                output[player] = reference.expand_as(output)[player]
                return output

            handle = layer.register_forward_hook(silence)
            parts.append(whole - head.per_sample(model(x), y))
            handle.remove()
    return torch.stack(parts, 1)


ANY = slice(None)


@pytest.mark.parametrize("of", ["units", "positions", "elements"])
def test_every_kind_of_player(of):
    model, x, y = cnn()
    blame = attribute(model, x, y, F.cross_entropy, "ablation", layers=["5"], of=of)["5"]
    shape = model[:6](x).shape[1:]
    players = {
        "units": [(ANY, u) for u in range(shape[0])],
        "positions": [(ANY, ANY, i, j) for i in range(shape[1]) for j in range(shape[2])],
        "elements": [(ANY, u, i, j) for u in range(shape[0]) for i in range(shape[1])
                     for j in range(shape[2])],
    }[of]  # fmt: skip
    expected = by_hand(model, model[5], x, y, players, torch.zeros(()).double())
    torch.testing.assert_close(blame.flatten(1), expected)


def other_model(make):
    other = make()[0]
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1)
    return other


@pytest.mark.parametrize("kind", ["mean", "input", "number", "module", "state"])
@pytest.mark.parametrize("make", [mlp, cnn], ids=["mlp", "cnn"])
def test_references_other_than_zero(make, kind):
    model, x, y = make()
    other, x0 = other_model(make), torch.randn_like(x)
    name = {mlp: "1", cnn: "5"}[make]
    upto = int(name) + 1
    baseline, reference = {
        "mean": ("mean", model[:upto](x).mean(0)),
        "input": (x0, model[:upto](x0)),
        "number": (0.5, model[:upto](torch.full_like(x, 0.5))),
        "module": (other, other[:upto](x)),
        "state": (other.state_dict(), other[:upto](x)),
    }[kind]
    given = dict(layers=[name], baseline=baseline)
    blame = attribute(model, x, y, F.cross_entropy, "ablation", **given)[name]
    players = [(ANY, u) for u in range(blame.shape[1])]
    expected = by_hand(model, model[int(name)], x, y, players, reference.detach())
    torch.testing.assert_close(blame, expected)


def test_resampling_takes_activations_of_other_samples():
    model, x, y = mlp()
    given = dict(method="ablation", layers=["1"], baseline="resample")
    blame = attribute(model, x, y, F.cross_entropy, **given)
    again = attribute(model, x, y, F.cross_entropy, **given)
    another = attribute(model, x, y, F.cross_entropy, **given, seed=1)
    assert torch.equal(blame["1"], again["1"]) and not torch.equal(blame["1"], another["1"])
    h = model[:2](x).detach()
    players = [(ANY, u) for u in range(h.shape[1])]
    by_shift = [by_hand(model, model[1], x, y, players, h.roll(k, 0)) for k in range(1, len(x))]
    for n in range(len(x)):  # every sample has been given one other sample's activations
        assert any(torch.allclose(blame["1"][n], expected[n]) for expected in by_shift)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_a_small_memory_gives_the_same_in_smaller_batches(make):
    model, x, y = make()
    rows = []
    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    head.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    whole = attribute(model, x, y, F.cross_entropy, "ablation")
    most = max(rows)
    rows.clear()
    single = attribute(model, x, y, F.cross_entropy, "ablation", memory=1)
    assert most > max(rows) == len(x)
    for name in whole:
        torch.testing.assert_close(whole[name], single[name])


def test_memory_bounds_the_bytes_of_the_widest_layer():
    model = nn.Sequential(nn.Linear(4, 100), nn.ReLU(), nn.Linear(100, 2))
    x, y = torch.randn(10, 4), torch.zeros(10).long()
    rows = []
    model[2].register_forward_hook(lambda module, args, output: rows.append(len(output)))
    attribute(model, x, y, F.cross_entropy, "ablation", memory=4 * 400 * 35)
    assert max(rows[2:]) == 30  # 35 rows of 400 bytes, four times over, in whole batches of 10


@pytest.mark.filterwarnings("ignore:attribute. the model is in training mode")
def test_training_mode_silences_one_unit_in_one_batch():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.BatchNorm1d(6), nn.Linear(6, 3)).double()
    x, y = torch.randn(9, 4).double(), torch.randint(3, (9,))
    blame = attribute(model, x, y, F.cross_entropy, "ablation", layers=["1"])["1"]
    twin = copy.deepcopy(model)
    players = [(ANY, u) for u in range(6)]
    expected = by_hand(twin, twin[1], x, y, players, torch.zeros(()).double())
    torch.testing.assert_close(blame, expected)


@pytest.mark.filterwarnings("ignore:attribute. the model is in training mode")
def test_dropout_is_the_same_with_a_unit_and_without_it():
    model = nn.Sequential(nn.Dropout(), nn.Linear(4, 6), nn.ReLU(), nn.Dropout(), nn.Linear(6, 3))
    nn.init.constant_(model[1].bias[:1], -100.0)  # a unit that is silent already
    x, y = torch.randn(9, 4), torch.randint(3, (9,))
    blame = attribute(model, x, y, F.cross_entropy, "ablation", layers=["2"])["2"]
    assert float(blame[:, 0].abs().max()) == 0 and float(blame.abs().max()) > 0


def test_memory_is_checked():
    model, x, y = mlp()
    for memory, error in ((0, ValueError), (1e6, TypeError), (True, TypeError)):
        with pytest.raises(error, match="memory: expected"):
            attribute(model, x, y, F.cross_entropy, "ablation", memory=memory)


def own_loss(z, y):
    return (z - F.one_hot(y, z.shape[1])).abs().sum()


@pytest.mark.parametrize(
    ("loss_fn", "targets"),
    [
        (own_loss, torch.randint(4, (9,))),
        (F.mse_loss, torch.randn(9, 4).double()),
        (nn.BCEWithLogitsLoss(), torch.randint(2, (9, 4)).double()),
        (lambda z, y: (z * y["factor"]).sum(1), {"factor": torch.randn(9, 4).double()}),
    ],
    ids=["own scalar", "regression", "multi-label", "targets in a dict"],
)
def test_any_loss(loss_fn, targets):
    model, x, _ = mlp()
    blame = attribute(model, x, targets, loss_fn, "ablation", layers=["1"])["1"]
    players = [(ANY, u) for u in range(8)]
    zero = torch.zeros(()).double()
    expected = by_hand(model, model[1], x, targets, players, zero, loss_fn)
    torch.testing.assert_close(blame, expected)


class Sequences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.lstm = nn.LSTM(4, 3, batch_first=True)
        layer = nn.TransformerEncoderLayer(3, 1, 6, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(3, 5)

    def forward(self, ids):
        return self.head(self.encoder(self.lstm(self.embed(ids))[0])).transpose(1, 2)


def test_layers_of_sequences_that_torch_would_fuse_in_eval():
    model = Sequences().double().eval()
    ids, y = torch.randint(7, (4, 6)), torch.randint(5, (4, 6))
    blame = attribute(model, ids, y, F.cross_entropy, "ablation", layers="all")
    assert {"embed", "lstm", "encoder.layers.0.linear1", "encoder.layers.1.norm2"} <= {*blame}
    plain = copy.deepcopy(model).train()  # training mode never takes the fused path
    for module in plain.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    layer = plain.encoder.layers[0].linear1
    players = [(ANY, ANY, u) for u in range(6)]
    expected = by_hand(plain, layer, ids, y, players, torch.zeros(()).double())
    torch.testing.assert_close(blame["encoder.layers.0.linear1"], expected)
    assert float(blame["lstm"].abs().min()) > 0
