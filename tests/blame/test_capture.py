from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchbp import attribute
from torchbp.blame.capture import Capture, call_names, leaves, named_layers, unit_calls


def calls_of(model: nn.Module, x: torch.Tensor) -> list:
    with Capture(leaves(model)) as capture:
        model(x)
    return capture.calls


def test_units_are_one_per_cut():
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(3, 5), nn.Dropout(), nn.LayerNorm(5), nn.Linear(5, 2),
    )  # fmt: skip
    kept = unit_calls(calls_of(model, torch.randn(4, 1, 4, 4)))
    assert [c.name for c in kept] == ["2", "5", "7", "8"]


def test_channels_are_units_after_a_convolution_and_features_after_a_linear():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.AvgPool2d(2))
    assert [c.unit_dim for c in calls_of(model, torch.randn(4, 1, 6, 6))] == [1, 1, 1]
    model = nn.Sequential(nn.Linear(5, 3), nn.ReLU())
    # Four dimensions, yet the features are last: the activation follows what produced its input.
    assert [c.unit_dim for c in calls_of(model, torch.randn(4, 2, 2, 5))] == [-1, -1]


@pytest.mark.parametrize(("shape", "dim"), [((2, 3), -1), ((2, 5, 3), -1), ((2, 3, 4, 4), 1)])
def test_an_activation_of_unknown_origin_goes_by_its_dimensions(shape, dim):
    assert [c.unit_dim for c in calls_of(nn.Sequential(nn.Tanh()), torch.randn(shape))] == [dim]


def test_a_reused_module_has_a_name_per_call():
    act = nn.ReLU()
    model = nn.Sequential(nn.Linear(3, 3), act, nn.Linear(3, 3), act)
    assert call_names(calls_of(model, torch.randn(2, 3))) == ["0", "1", "2", "1#2"]


def test_attention_is_one_layer():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    names = [*leaves(model)]
    assert "self_attn" in names and "self_attn.out_proj" not in names and "linear1" in names


def test_tuple_outputs_are_understood():
    model = nn.LSTM(3, 4, batch_first=True)
    (call,) = calls_of(model, torch.randn(2, 5, 3))
    assert call.output.shape == (2, 5, 4) and call.unit_dim == -1


def test_hooks_are_gone_after_an_error():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(5, 2))
    with pytest.raises(RuntimeError), Capture(leaves(model)):
        model(torch.randn(2, 3))
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_unknown_layers_are_refused_with_a_hint():
    model = nn.ModuleDict({"encoder": nn.Linear(2, 2), "decoder": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="did you mean 'encoder'"):
        named_layers(model, ["encodr"])
    with pytest.raises(ValueError, match="not a module of the model"):
        named_layers(model, [nn.Linear(2, 2)])
    with pytest.raises(TypeError, match="int"):
        named_layers(model, [3])
    assert [*named_layers(model, [model["decoder"]])] == ["decoder"]


class Placed(nn.Module):
    """A table of positions, shared by all samples, comes before what is fed by tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(7, 4), nn.Embedding(5, 4)
        self.norm, self.out = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, tokens):
        place = self.places(torch.arange(tokens.shape[1])[None])
        return self.out(self.norm(self.words(tokens) + place).mean(1))


def test_outputs_shared_by_all_samples_do_not_disturb_the_choice_of_layers():
    tokens, y = torch.randint(7, (6, 5)), torch.randint(3, (6,))
    blame = attribute(Placed(), tokens, y, F.cross_entropy, "taylor")
    assert [*blame] == ["words", "norm"]


class NamedInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.input(x).tanh())


@pytest.mark.parametrize("method", ["taylor", "ablation", "secant", "layer_ig"])
def test_a_module_named_input_is_not_taken_for_the_models_input(method):
    model, x, y = NamedInput().double(), torch.randn(6, 4).double(), torch.randint(3, (6,))
    plain = nn.Sequential(model.input, nn.Tanh(), model.head)
    blame = attribute(model, x, y, F.cross_entropy, method, "all")
    expected = attribute(plain, x, y, F.cross_entropy, method, ["input", "0"])
    assert [*blame] == ["(input)", "input", "head"]
    torch.testing.assert_close(blame["(input)"], expected["input"])
    torch.testing.assert_close(blame["input"], expected["0"])
    assert [*attribute(model, x, y, F.cross_entropy, method)] == ["input"]
    assert [*attribute(model, x, y, F.cross_entropy, method, of="inputs")] == ["(input)"]


@pytest.mark.parametrize("steps", [6, 7])
def test_a_layer_that_runs_over_time_first_is_refused(steps):
    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.GRU(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(self.rnn(x.transpose(0, 1))[0][-1])

    model, x, y = TimeFirst(), torch.randn(6, steps, 4), torch.randint(3, (6,))
    with pytest.raises(ValueError, match=r"'rnn' returned .* does not run over the 6 samples"):
        attribute(model, x, y, F.cross_entropy, "taylor", ["rnn"])
