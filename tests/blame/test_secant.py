from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from deep_models import DEEP, PlainLast
from models import MODELS, cnn, mlp, residual
from secant_reference import shares
from torch import nn

from torchbp import attribute, convert

CE = F.cross_entropy


@pytest.mark.parametrize("converted", [False, True], ids=["plain", "converted"])
@pytest.mark.parametrize("n_steps", [1, 8])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_conserved_at_every_cut(make, n_steps, converted):
    model, x, y = make()
    if converted:
        convert(model)
    blame = attribute(model, x, y, CE, "secant", layers="all", n_steps=n_steps)
    with torch.no_grad():
        loss, loss0 = (CE(model(v), y, reduction="none") for v in (x, torch.zeros_like(x)))
    cuts = [*blame.residual]
    assert cuts == ([*blame] if make is not residual else ["input", "head"])
    for layer in cuts:
        error = (blame.per_sample(layer) - (loss - loss0)).abs().max()
        assert error <= 1e-10 * (loss - loss0).abs().max()
    torch.testing.assert_close(blame.reference_losses, loss0)


def test_a_branch_and_its_skip_make_a_cut_together():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 5))
            self.skip, self.head = nn.Identity(), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(self.branch(x) + self.skip(x))

    model = Block().double()
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.randint(3, (6,))
    blame = attribute(model, x, y, CE, "secant", layers=["branch", "skip"])
    assert blame.residual == {}
    total = blame.per_sample("branch") + blame.per_sample("skip")
    torch.testing.assert_close(total, blame.losses - blame.reference_losses)


def reference_multipliers(model: nn.Sequential, x, x0, y) -> torch.Tensor:
    """DeepLIFT's rescale rule for an MLP, unit by unit, from its definition (Shrikumar 2017)."""
    runs = []
    for v in (x, x0):
        acts = [v]
        for module in model:
            acts.append(module(acts[-1]))
        runs.append(acts)
    a, a0 = runs
    p, p0 = a[-1].softmax(1), a0[-1].softmax(1)
    log_mean = torch.where(p == p0, p, (p - p0) / (p / p0).log())
    m = log_mean / log_mean.sum(1, keepdim=True) - F.one_hot(y, p.shape[1])
    multipliers = [m]
    for module, u, u0, v, v0 in reversed([*zip(model, a, a0, a[1:], a0[1:], strict=False)]):
        m = m @ module.weight if isinstance(module, nn.Linear) else m * (v - v0) / (u - u0)
        multipliers.insert(0, m)
    return [mult * (u - u0) for mult, u, u0 in zip(multipliers, a, a0, strict=True)]


def test_each_element_follows_the_rules():
    model, x, y = mlp()
    x0 = torch.randn(6, dtype=torch.float64)
    blame = attribute(model, x, y, CE, "secant", layers="all", baseline=x0)
    with torch.no_grad():
        expected = reference_multipliers(model, x, x0.expand_as(x), y)
    for value, layer in zip(expected, ["input", "0", "1", "2", "3", "4"], strict=True):
        torch.testing.assert_close(blame[layer], value, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("n_steps", [1, 4, 16])
@pytest.mark.parametrize("make", DEEP.values(), ids=DEEP.keys())
def test_conserved_in_deep_models_and_each_element_as_the_slow_reference_has_it(make, n_steps):
    model, x, y = make()
    x0 = torch.randn_like(x)
    names = ["input", *(name for name, m in model.named_modules() if name)]
    blame = attribute(model, x, y, CE, "secant", names, x0, n_steps, of="elements")
    with torch.no_grad():
        change = CE(model(x), y, reduction="none") - CE(model(x0), y, reduction="none")
    change = change.flatten(1).sum(1) if change.dim() > 1 else change
    assert len(blame.residual) >= 3
    for layer in blame.residual:
        error = (blame.per_sample(layer) - change).abs().max()
        assert error <= 1e-10 * change.abs().max(), layer
    plain = PlainLast(model, x.shape[1]) if make is DEEP["lstm"] else model
    expected = shares(plain, x, x0, y, n_steps)
    if plain is not model:
        expected = {"input": expected["input"], "lstm": expected["lstm.whole"]}
    assert len(expected) >= 2
    for layer, value in expected.items():
        error = (blame[layer] - value.view_as(blame[layer])).abs().max()
        assert error <= 1e-10 * value.abs().max(), layer


@pytest.mark.parametrize("make", {**MODELS, **DEEP}.values(), ids={**MODELS, **DEEP}.keys())
def test_near_the_reference_it_is_gradient_times_difference(make):
    model, x, y = make()
    direction = torch.randn_like(x)
    for size in (1e-4, 1e-6):
        x0 = x - size * direction
        blame = attribute(model, x, y, CE, "secant", ["input"], x0, of="elements")["input"]
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(CE(model(leaf), y, reduction="sum"), leaf)
        expected = gradient * size * direction
        scale = expected.abs().max()
        assert (blame - expected).abs().max() <= 20 * size * scale


def test_many_segments_tend_to_conductance():
    model, x, y = mlp()
    blame = attribute(model, x, y, CE, "secant", layers=["3"], n_steps=400)["3"]
    nodes, weights = (torch.tensor(v) for v in __import__("numpy").polynomial.legendre.leggauss(60))
    total = torch.zeros_like(blame)
    for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        point = (node * x).requires_grad_()
        hidden, tangent = torch.func.jvp(model[:4], (point.detach(),), (x,))
        hidden = hidden.requires_grad_()
        (delta,) = torch.autograd.grad(CE(model[4:](hidden), y, reduction="sum"), hidden)
        total += weight * delta * tangent
    torch.testing.assert_close(blame, total, rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize(
    "loss_fn",
    [
        nn.CrossEntropyLoss(label_smoothing=0.1, weight=torch.tensor([1.0, 3, 0.5, 2]).double()),
        lambda z, y: CE(z, y, reduction="sum"),
        lambda z, y: CE(z, y),
    ],
    ids=["settings", "sum", "scalar"],
)
def test_other_cross_entropies_are_conserved(loss_fn):
    model, x, y = mlp()
    blame = attribute(model, x, y, loss_fn, "secant", layers="all", n_steps=2)
    assert len(blame.residual) == 6 and max(blame.residual.values()) < 1e-10


@pytest.mark.parametrize("loss_fn", [F.mse_loss, nn.BCEWithLogitsLoss()])
def test_other_losses_are_conserved(loss_fn):
    model, x, _ = mlp()
    y = torch.rand(9, 4, dtype=torch.float64)
    blame = attribute(model, x, y, loss_fn, "secant", layers="all")
    assert len(blame.residual) == 6 and max(blame.residual.values()) < 1e-10


def test_control_flow_that_depends_on_values_is_refused():
    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            y = self.a(x)
            return torch.relu(y) if x.sum() != 0 else torch.tanh(y)

    x, y = torch.rand(4, 3), torch.randint(2, (4,))
    with pytest.raises(
        RuntimeError, match=r"call 1 is ReLU.* in the model, the reference has Tanh"
    ):
        attribute(Moody(), x, y, CE, "secant")


def test_in_place_functions_are_paired():
    model, x, y = mlp()
    expected = attribute(model, x, y, CE, "secant", layers=["0", "1"])
    model[1].inplace = True
    found = attribute(model, x, y, CE, "secant", layers=["0", "1"])
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_dropout_sees_the_same_mask_in_both_runs():
    model, x, y = cnn()
    model[8].train()
    with pytest.warns(UserWarning, match="training mode"):
        blame = attribute(model, x, y, CE, "secant", layers="all", n_steps=2)
    assert max(blame.residual.values()) < 1e-10


@pytest.mark.parametrize("converted", [False, True], ids=["plain", "converted"])
def test_a_forward_that_writes_into_a_layers_output_is_run_again(converted):
    """The first try finds out; the tape must not take it for the reference."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 4)
            self.act = nn.ReLU(inplace=True)

        def forward(self, x):
            y = self.a(x)
            y += 0.5
            return self.b(self.act(y))

    _, x, y = mlp()
    model = Scaled().double()
    if converted:
        convert(model)
    blame = attribute(model, x, y, CE, "secant", layers="all", n_steps=2)
    assert {"input", "a", "act"} <= blame.residual.keys()
    assert max(blame.residual.values()) < 1e-10


@pytest.mark.parametrize("n_steps", [1, 4])
def test_torchs_own_pre_norm_transformer_with_a_causal_mask(n_steps):
    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(
                8, 2, 12, 0.0, F.gelu, batch_first=True, norm_first=True
            )
            self.encoder = nn.TransformerEncoder(
                layer, 2, nn.LayerNorm(8), enable_nested_tensor=False
            )
            self.head = nn.Linear(8, 5)
            self.mask = nn.Transformer.generate_square_subsequent_mask(6, dtype=torch.float64)

        def forward(self, x):
            return self.head(self.encoder(x, mask=self.mask, is_causal=True)).transpose(1, 2)

    model = Causal().double().eval()
    x, y = torch.randn(3, 6, 8, dtype=torch.float64), torch.randint(5, (3, 6))
    names = ["input", "encoder.layers.0", "encoder.layers.1", "encoder", "head"]
    blame = attribute(model, x, y, CE, "secant", names, torch.randn(8).double(), n_steps)
    assert [*blame.residual] == names
    blame.check(1e-10)
