"""What ``secant`` measures blame against: embeddings, predictions, checkpoints, layers off."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from deep_models import DEEP, causal_transformer
from models import cnn, mlp
from torch import Tensor, nn

from torchbp import attribute
from torchbp.blame.checkpoints import checkpoint_blame
from torchbp.blame.classes import class_blame

CE = F.cross_entropy


class Tokens(nn.Module):
    """Word and position embeddings, and a model of what they sum to."""

    def __init__(self, rest: nn.Module, words: int, length: int, width: int) -> None:
        super().__init__()
        self.word, self.place = nn.Embedding(words, width), nn.Embedding(length, width)
        self.rest = rest

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1], device=ids.device)
        return self.rest(self.word(ids) + self.place(places))


def tokens() -> tuple[Tokens, Tensor, Tensor]:
    rest, _, targets = causal_transformer()
    return Tokens(rest, 9, 6, 5).double(), torch.randint(9, (3, 6)), targets


@pytest.mark.parametrize("n_steps", [1, 4])
def test_integers_are_measured_against_zero_embeddings_at_the_same_places(n_steps: int) -> None:
    model, ids, y = tokens()
    blame = attribute(model, ids, y, CE, "secant", "all", n_steps=n_steps)
    assert "word" in blame.residual and max(blame.residual.values()) < 1e-10
    with torch.no_grad():
        words, places = model.word(ids), model.place(torch.arange(6)).expand(3, -1, -1)
    beyond = attribute(
        model.rest, words + places, y, CE, "secant", "all", baseline=places, n_steps=n_steps
    )
    torch.testing.assert_close(blame["word"], beyond["input"])
    torch.testing.assert_close(blame["rest.1.act"], beyond["1.act"])
    torch.testing.assert_close(blame.reference_losses, beyond.reference_losses)


@pytest.mark.parametrize("n_steps", [1, 4])
def test_a_baseline_of_tokens_is_reached_along_their_embeddings(n_steps: int) -> None:
    model, ids, y = tokens()
    ids0 = torch.zeros_like(ids)
    blame = attribute(model, ids, y, CE, "secant", "all", baseline=0, n_steps=n_steps)
    with torch.no_grad():
        places = model.place(torch.arange(6))
        ends = (model.word(v) + places for v in (ids, ids0))
        reference = CE(model(ids0), y, reduction="none").sum(1)
    x, x0 = ends
    beyond = attribute(model.rest, x, y, CE, "secant", "all", baseline=x0, n_steps=n_steps)
    torch.testing.assert_close(blame["word"], beyond["input"])
    torch.testing.assert_close(blame.reference_losses, reference)


def test_paths_begin_at_embeddings_whatever_layers_are_asked_for() -> None:
    model, ids, y = tokens()
    whole = attribute(model, ids, y, CE, "secant", "all", n_steps=2)
    part = attribute(model, ids, y, CE, "secant", ["rest.1.act", "rest.3"], n_steps=2)
    assert [*part] == ["rest.1.act", "rest.3"] and [*part.residual] == ["rest.3"]
    for name in part:
        torch.testing.assert_close(part[name], whole[name])


def test_a_sample_has_the_same_blame_alone_as_in_a_batch() -> None:
    """With one sample, a table of positions has the shape of an embedding of its tokens."""
    model, ids, y = tokens()
    batch = attribute(model, ids, y, CE, "secant", "all")
    alone = attribute(model, ids[:1], y[:1], CE, "secant", "all")
    torch.testing.assert_close(alone["word"], batch["word"][:1])


@pytest.mark.parametrize("make", [mlp, cnn, causal_transformer])
@pytest.mark.parametrize("n_steps", [1, 3])
@pytest.mark.parametrize("reference", ["uniform", "prior"])
def test_against_a_prediction_blame_and_the_absorbed_share_sum_to_the_change(
    make, n_steps: int, reference: str
) -> None:
    model, x, y = make()
    blame = attribute(model, x, y, CE, "secant", "all", baseline=reference, n_steps=n_steps)
    with torch.no_grad():
        z, z0 = model(x), model(torch.zeros_like(x))
        classes = z.shape[1]
        counts = torch.bincount(y.flatten(), minlength=classes).clamp(min=0.5).double()
        counts = counts if reference == "prior" else torch.ones_like(counts)
        prior = counts / counts.sum()
        losses0 = -prior.log()[y]
        change = (CE(z, y, reduction="none") - losses0).view(len(x), -1).sum(1)
    assert len(blame.residual) > 3
    for layer in blame.residual:
        total = blame.per_sample(layer) + blame.absorbed[layer]
        torch.testing.assert_close(total, change, rtol=1e-10, atol=1e-12)
    if n_steps == 1 and z.dim() == 2:
        q = z.softmax(1), prior.expand_as(z)
        mean = (q[0] - q[1]) / (q[0] / q[1]).log()
        m = mean / mean.sum(1, keepdim=True) - F.one_hot(y, classes)
        absorbed = (m * (z0 - prior.log())).sum(1)
        torch.testing.assert_close(blame.absorbed["input"], absorbed)


@pytest.mark.parametrize("n_steps", [1, 3])
def test_against_a_prediction_with_integer_inputs(n_steps: int) -> None:
    model, ids, y = tokens()
    blame = attribute(model, ids, y, CE, "secant", "all", baseline="uniform", n_steps=n_steps)
    torch.testing.assert_close(blame.reference_losses, torch.full((3,), 6 * math.log(7)).double())
    assert "word" in blame.residual
    blame.check(1e-10)


def test_a_prior_of_ones_own() -> None:
    model, x, y = mlp()
    prior = torch.tensor([4.0, 3, 2, 1])
    blame = attribute(model, x, y, CE, "secant", baseline="prior", prior=prior)
    torch.testing.assert_close(blame.reference_losses, -(prior.double() / 10).log()[y])
    uniform = attribute(model, x, y, CE, "secant", baseline="uniform")
    torch.testing.assert_close(uniform.reference_losses, torch.full((9,), math.log(4)).double())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(baseline="prior", prior=[1.0, 2.0]), r"prior: expected shape \(4,\)"),
        (dict(baseline="prior", prior=[1.0, 0.0, 1.0, 1.0]), "prior: expected positive"),
        (dict(prior=[1.0] * 4), "prior: goes with baseline='prior'"),
        (dict(baseline="mean"), "baseline: expected 'uniform', 'prior', 'layer', inputs or a"),
        (dict(baseline={"0.wieght": torch.zeros(8, 6)}), "did you mean '0.weight'"),
        (dict(baseline={"0.weight": torch.zeros(6, 8)}), r"expected shape \(8, 6\), got \(6, 8"),
    ],
)
def test_references_that_do_not_fit_are_refused(options: dict, message: str) -> None:
    model, x, y = mlp()
    with pytest.raises(ValueError, match=message):
        attribute(model, x, y, CE, "secant", **options)


def test_a_prediction_needs_cross_entropy() -> None:
    model, x, _ = mlp()
    with pytest.raises(ValueError, match="a reference prediction needs cross-entropy"):
        attribute(model, x, torch.rand(9, 4).double(), F.mse_loss, "secant", baseline="uniform")


class Named(nn.Module):
    """A model with an input by the name of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return x * self.scale * scale


def test_a_name_of_both_an_input_and_a_parameter_is_refused() -> None:
    inputs = {"x": torch.rand(2, 3), "scale": torch.ones(2, 3)}
    with pytest.raises(ValueError, match="'scale' is the name of an input and of a parameter"):
        attribute(Named(), inputs, torch.tensor([0, 1]), CE, baseline={"scale": torch.zeros(2, 3)})


def moved(model: nn.Module) -> nn.Module:
    """The model after something like a training step."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.2 * torch.randn_like(p))
        for b in other.buffers():
            if b.is_floating_point():
                b.mul_(1 + torch.rand_like(b))
    return other


@pytest.mark.parametrize("make", DEEP.values(), ids=DEEP.keys())
@pytest.mark.parametrize("n_steps", [1, 3])
def test_against_a_checkpoint_units_and_the_parameters_above_share_the_change(
    make, n_steps: int
) -> None:
    model, x, y = make()
    before = moved(model)
    blame = attribute(model, x, y, CE, "secant", "all", baseline=before, n_steps=n_steps)
    with torch.no_grad():
        losses, losses0 = (CE(m(x), y, reduction="none") for m in (model, before))
    change = (losses - losses0).view(len(x), -1).sum(1)
    assert len(blame.residual) >= 3
    blame.check(1e-10)
    for layer, expected in blame.expected.items():
        torch.testing.assert_close(expected, change, rtol=1e-10, atol=1e-12)
        assert (blame.absorbed[layer].abs() > 0).any() or layer == [*blame][-1]
    assert not blame["input"].any()


def test_what_a_checkpoint_absorbs_is_what_its_weights_above_the_cut_contributed() -> None:
    model, x, y = mlp()
    before = moved(model)
    blame = attribute(model, x[:1], y[:1], CE, "secant", "all", baseline=before.state_dict())
    weights = checkpoint_blame(model, x[:1], y[:1], CE, before)
    by_layer = [float(weights[f"{k}.weight"].sum() + weights[f"{k}.bias"].sum()) for k in "024"]
    for layer, above in (("input", 0), ("0", 1), ("1", 1), ("2", 2), ("3", 2), ("4", 3)):
        assert float(blame.absorbed[layer]) == pytest.approx(sum(by_layer[above:]), abs=1e-12)
        assert float(blame.per_sample(layer)) == pytest.approx(sum(by_layer[:above]), abs=1e-12)


def test_between_checkpoints_each_element_is_multiplier_times_difference() -> None:
    model, x, y = mlp()
    before = moved(model)
    blame = attribute(model, x, y, CE, "secant", ["2"], baseline=before)
    with torch.no_grad():
        h, h0 = (m[:3](x) for m in (model, before))
        z, z0 = model(x), before(x)
        p, p0 = z.softmax(1), z0.softmax(1)
        mean = (p - p0) / (p / p0).log()
        m = mean / mean.sum(1, keepdim=True) - F.one_hot(y, 4)
        m = m @ (model[4].weight + before[4].weight) / 2
        m = m * (F.gelu(h) - F.gelu(h0)) / (h - h0)
    torch.testing.assert_close(blame["2"], m * (h - h0))


@pytest.mark.parametrize("make", DEEP.values(), ids=DEEP.keys())
def test_against_layers_off_every_layer_sums_to_what_it_does(make) -> None:
    model, x, y = make()
    blame = attribute(model, x, y, CE, "secant", "all", baseline="layer", n_steps=2)
    assert blame.residual.keys() == {*blame}
    for name in blame:
        if name == "input":
            off = model(torch.zeros_like(x))
        else:
            path, _, number = name.partition("#")
            off = with_zeros(model, x, path, int(number or 1))
        change = CE(model(x), y, reduction="none") - CE(off, y, reduction="none")
        change = change.detach().view(len(x), -1).sum(1)
        torch.testing.assert_close(blame.expected[name], change, rtol=1e-10, atol=1e-12)
    blame.check(1e-10)


def with_zeros(model: nn.Module, x: Tensor, path: str, number: int) -> Tensor:
    calls = 0

    def silence(module: nn.Module, args: object, output: object) -> object:
        nonlocal calls
        calls += 1
        if calls != number:
            return output
        return (output[0] * 0, *output[1:]) if isinstance(output, tuple) else output * 0

    handle = model.get_submodule(path).register_forward_hook(silence)
    try:
        return model(x)
    finally:
        handle.remove()


def test_against_a_layer_off_many_segments_tend_to_its_integrated_gradients() -> None:
    model, x, y = mlp()
    blame = attribute(model, x, y, CE, "secant", ["1"], baseline="layer", n_steps=200)
    hidden = model[:2](x).detach()
    total = torch.zeros_like(hidden)
    for k in range(200):
        leaf = (hidden * (k + 0.5) / 200).requires_grad_()
        total += torch.autograd.grad(CE(model[2:](leaf), y, reduction="sum"), leaf)[0] / 200
    torch.testing.assert_close(blame["1"], total * hidden, rtol=1e-4, atol=1e-6)


def test_classes_of_integers_are_measured_against_zero_embeddings_too() -> None:
    model, ids, y = tokens()
    found = class_blame(model, ids, y, CE, baseline=None)
    places = model.place(torch.arange(6)).expand(3, -1, -1)
    expected = CE(model.rest(places), y, reduction="none")
    torch.testing.assert_close(found.reference_losses.flatten(), expected.sum(1).detach())


class Masked(nn.Module):
    """Tokens, and integers that say which of them count."""

    def __init__(self) -> None:
        super().__init__()
        self.word, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.head((self.word(ids) * mask[..., None]).mean(1).tanh())


@pytest.mark.parametrize("method", ["conductance", "internal_influence"])
def test_a_baseline_that_integers_jump_to_is_refused(method: str) -> None:
    mask = torch.ones(6, 5).long()
    mask[:, 3:] = 0
    given = dict(ids=torch.randint(9, (6, 5)), mask=mask)
    model, y = Masked().double(), torch.randint(3, (6,))
    with pytest.raises(ValueError, match=r"no path leads to this baseline"):
        attribute(model, given, y, CE, method, ["head"], baseline={"mask": 1})
    blame = attribute(model, given, y, CE, method, ["head"], baseline={"ids": 2}, n_steps=200)
    assert max(blame.residual.values(), default=0.0) < 0.01


@pytest.mark.parametrize("baseline", [0.7, torch.tensor([1.0, 1.5, 0.0, 0.0, 0.0])])
def test_a_baseline_between_two_tokens_is_refused(baseline: float | Tensor) -> None:
    model, ids = Tokens(nn.Linear(4, 3), 9, 5, 4).double(), torch.randint(9, (6, 5))
    with pytest.raises(ValueError, match=r"baseline: expected integers \(torch.int64\)"):
        attribute(model, ids, ids % 3, lambda z, t: CE(z.mT, t), "secant", baseline=baseline)
    attribute(model, ids, ids % 3, lambda z, t: CE(z.mT, t), "secant", ["word"], baseline=2.0)
