"""Blame of weights against per-sample autograd loops, and against what follows from it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from gradient_cases import CASES, case, definition
from models import MODELS
from torch import nn

import torchbp
from torchbp.blame.weights import weight_blame


def close(a, b):
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= 1e-10 * max(float(b.abs().max()), 1.0)


@pytest.mark.parametrize("name", CASES)
def test_signed_absolute_and_square_are_those_of_single_samples(name):
    model, x, y = case(name)
    _, gradients = definition(model, x, y)
    blame = weight_blame(model, x, y, F.cross_entropy)
    assert [*blame] == [n for n, _ in model.named_parameters()]
    for n, w in model.named_parameters():
        g, w = gradients[n], w.detach()
        close(blame[n], w * g.sum(0))
        close(blame.signed(n), blame[n])
        close(blame.absolute(n), (w * g).abs().sum(0))
        close(blame.square(n), g.square().sum(0))


@pytest.mark.parametrize("name", ["linear 2-D", "linear 3-D, positions = samples = features",
                                  "conv 1d", "embedding with padding", "LSTM"])  # fmt: skip
def test_classes_add_up_and_are_those_of_their_samples(name):
    model, x, y = case(name)
    _, gradients = definition(model, x, y)
    blame = weight_blame(model, x, y, F.cross_entropy)
    for n, w in model.named_parameters():
        per_class = blame.per_class(n)
        for c in range(3):
            close(per_class[c], w.detach() * gradients[n][y == c].sum(0))
        close(per_class.sum(0), blame[n])
        close(blame.per_class(n, [2]), per_class[2:])
        close(blame.unit_classes(n), per_class.reshape(3, *blame.per_unit(n).shape, -1).sum(2))


def test_classes_beyond_the_memory_budget_are_refused_or_taken_in_parts():
    model, x, y = case("linear 2-D")
    whole = weight_blame(model, x, y, F.cross_entropy)
    tight = weight_blame(model, x, y, F.cross_entropy, memory=300)
    with pytest.raises(ValueError, match=r"per_class: 'layers.0.weight' takes 720 bytes"):
        tight.per_class("layers.0.weight")
    close(tight.per_class("layers.0.weight", [1]), whole.per_class("layers.0.weight", [1]))
    close(tight.unit_classes("layers.0.weight"), whole.unit_classes("layers.0.weight"))


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_rows_with_bias_are_the_first_order_blame_of_the_preactivation(name):
    model, x, y = MODELS[name]()
    blame = weight_blame(model, x, y, F.cross_entropy)
    units = torchbp.attribute(model, x, y, F.cross_entropy, "taylor", layers="all")
    for layer, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            rows = blame.per_unit(f"{layer}.weight") + blame.per_unit(f"{layer}.bias")
            close(rows, units.per_unit(layer))


def test_rows_under_a_norm_cancel_but_their_absolute_values_do_not():
    model = nn.Sequential(nn.Linear(5, 6, bias=False), nn.LayerNorm(6, eps=0.0), nn.Tanh(),
                          nn.Linear(6, 3)).double()  # fmt: skip
    x, y = torch.randn(8, 5).double(), torch.arange(8) % 3
    blame = weight_blame(model, x, y, F.cross_entropy)
    assert abs(float(blame["0.weight"].sum())) < 1e-12
    assert float(blame.absolute("0.weight").sum()) > 1e-2


def test_the_weights_and_the_blame_are_those_of_the_call():
    model, x, y = case("linear 2-D")
    expected = {n: b.clone() for n, b in weight_blame(model, x, y, F.cross_entropy).items()}
    blame = weight_blame(model, x, y, F.cross_entropy)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    for n in expected:
        close(blame[n], expected[n])


def test_unused_parameters_are_named_and_zero():
    model, x, y = case("tied")
    blame = weight_blame(model, x, y, F.cross_entropy)
    assert blame.unused == ("unused.weight", "unused.bias")
    for table in (blame["unused.weight"], blame.absolute("unused.weight"),
                  blame.square("unused.weight")):  # fmt: skip
        assert table.shape == (2, 2) and not table.any()


def test_tables():
    model, x, y = case("linear 2-D")
    blame = weight_blame(model, x, y, F.cross_entropy, class_names=["a", "b", "c"])
    rows = blame.top(3).rows
    every = torch.cat([b.flatten() for b in blame.values()]).sort(descending=True).values
    assert [row[3] for row in rows] == pytest.approx(every[:3].tolist())
    name, index, value, worst = rows[0]
    place = tuple(int(i) for i in index.strip("[]").split(","))
    assert float(blame[name][place]) == worst
    assert float(dict(model.named_parameters())[name][place].detach()) == value
    absolute = blame.top(1, by="absolute").rows[0]
    assert absolute[3] == max(float(blame.absolute(n).max()) for n in blame)
    assert {row[0] for row in blame.top(2, layer="layers.0.bias")} == {"layers.0.bias"}
    assert [row[0] for row in blame.layers()] == [*blame]
    assert "layers.0.weight" in str(blame) and "5 samples" in repr(blame)


def test_attribute_reaches_it():
    model, x, y = case("linear 2-D")
    blame = torchbp.attribute(model, x, y, F.cross_entropy, of="weights")
    close(blame["layers.0.weight"], weight_blame(model, x, y, F.cross_entropy)["layers.0.weight"])


def test_bad_input_is_named():
    model, x, y = case("linear 2-D")
    with pytest.raises(ValueError, match="parameters: unknown name 'layers'"):
        weight_blame(model, x, y, F.cross_entropy, parameters=["layers"])
    with pytest.raises(ValueError, match="batch is empty"):
        weight_blame(model, x[:0], y[:0], F.cross_entropy)
    with pytest.raises(FloatingPointError, match="loss"):
        weight_blame(model, x / 0, y, F.cross_entropy)
    blame = weight_blame(model, x, y, F.cross_entropy)
    with pytest.raises(KeyError, match=r"parameter: unknown name 'layers.0.wait'.*did you mean"):
        blame.absolute("layers.0.wait")
    with pytest.raises(ValueError, match="k: expected an integer"):
        blame.top(0)
    with pytest.raises(ValueError, match="by: expected"):
        blame.top(3, by="size")
    with pytest.raises(ValueError, match="classes: expected indices in"):
        blame.per_class("layers.0.bias", [3])
    model, x, y = case("tied")
    with pytest.raises(ValueError, match="not one class index for each sample"):
        weight_blame(model, x, y, F.cross_entropy).per_class("scale")
    assert weight_blame(model, x, y, F.cross_entropy).unit_classes("scale") is None
