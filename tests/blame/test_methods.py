from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from captum.attr import LayerGradientXActivation
from models import MODELS, cnn, mlp, residual
from torch import nn

from torchbp import attribute, convert


def per_sample_loss(model, y):
    return lambda x: F.cross_entropy(model(x), y, reduction="none")


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_taylor_equals_captum(make):
    model, x, y = make()
    blame = attribute(model, x, y, F.cross_entropy, "taylor", layers="all")
    for name in blame:
        layer = dict(model.named_modules()).get(name)
        if name in ("input", "inner", "inner#2"):  # Captum keeps one call of a reused module
            continue
        theirs = LayerGradientXActivation(per_sample_loss(model, y), layer).attribute(x)
        if theirs.dim() > 2:
            theirs = theirs.flatten(2).sum(2)
        torch.testing.assert_close(blame[name], theirs, rtol=1e-10, atol=1e-14)


def test_gradient_is_the_error_signal():
    model, x, y = mlp()
    hidden = model[1](model[0](x)).detach().requires_grad_()
    loss = F.cross_entropy(model[2:](hidden), y, reduction="sum")
    (expected,) = torch.autograd.grad(loss, hidden)
    blame = attribute(model, x, y, F.cross_entropy, "gradient")
    torch.testing.assert_close(blame["1"], expected)


def ablated(model: nn.Module, name: str, unit: int, x, y):
    """Loss per sample with one unit silenced, by a hook of our own."""

    def silence(module, args, output):
        output = output.clone()
        output[:, unit] = 0
        return output

    handle = dict(model.named_modules())[name].register_forward_hook(silence)
    with torch.no_grad():
        loss = F.cross_entropy(model(x), y, reduction="none")
    handle.remove()
    return loss


@pytest.mark.parametrize("make", [mlp, cnn], ids=["mlp", "cnn"])
def test_ablation_is_what_silencing_does(make):
    model, x, y = make()
    blame = attribute(model, x, y, F.cross_entropy, "ablation")
    with torch.no_grad():
        loss = F.cross_entropy(model(x), y, reduction="none")
    for name in blame:
        for unit in range(blame[name].shape[1]):
            expected = loss - ablated(model, name, unit, x, y)
            torch.testing.assert_close(blame[name][:, unit], expected)


def test_ablation_outside_a_sequential_silences_one_call_of_a_reused_module():
    model, x, y = residual()
    blame = attribute(model, x, y, F.cross_entropy, "ablation", layers=["inner"])
    assert [*blame] == ["inner", "inner#2"]

    def run(first: int | None, second: int | None):
        a = model.inner(x)
        if first is not None:
            a = a * (torch.arange(6) != first)
        h = x + model.act(a)
        b = model.inner(h)
        if second is not None:
            b = b * (torch.arange(6) != second)
        return F.cross_entropy(model.head(F.silu(b) * 0.5 + h), y, reduction="none")

    for unit in range(6):
        whole = run(None, None)
        torch.testing.assert_close(blame["inner"][:, unit], whole - run(unit, None))
        torch.testing.assert_close(blame["inner#2"][:, unit], whole - run(None, unit))


def test_logits_equals_ablation_where_the_rest_is_linear():
    model, x, y = mlp()
    exact = attribute(model, x, y, F.cross_entropy, "ablation", layers=["3"])
    linear = attribute(model, x, y, F.cross_entropy, "logits", layers=["3"])
    torch.testing.assert_close(linear["3"], exact["3"])


def test_logits_from_its_definition():
    model, x, y = cnn()
    blame = attribute(model, x, y, F.cross_entropy, "logits", layers=["2"])
    a = model[:3](x).detach()
    jacobian = torch.func.vmap(torch.func.jacrev(lambda h: model[3:](h[None])[0]))(a)
    shares = (jacobian * a[:, None]).flatten(3).sum(3)  # [N, C, U]
    z = model(x).detach()
    loss = F.cross_entropy(z, y, reduction="none")
    for unit in range(shares.shape[2]):
        expected = loss - F.cross_entropy(z - shares[:, :, unit], y, reduction="none")
        torch.testing.assert_close(blame["2"][:, unit], expected)


@pytest.mark.parametrize("rivals", [1, 2, 3])
def test_rivals_follow_the_true_class_and_the_strongest_others(rivals):
    model, x, y = mlp()
    found = attribute(model, x, y, F.cross_entropy, "logits", layers=["1"], rivals=rivals)["1"]
    a = model[:2](x).detach()
    jacobian = torch.func.vmap(torch.func.jacrev(lambda h: model[2:](h[None])[0]))(a)
    z = model(x).detach()
    loss = F.cross_entropy(z, y, reduction="none")
    for n in range(len(x)):
        others = [c for c in z[n].argsort(descending=True).tolist() if c != int(y[n])]
        kept = torch.zeros(4, dtype=torch.float64)
        kept[[int(y[n]), *others[:rivals]]] = 1
        without = z[n] - (jacobian[n] * a[n]).T * kept
        expected = loss[n] - F.cross_entropy(without, y[n].expand(8), reduction="none")
        torch.testing.assert_close(found[n], expected)
    everything = attribute(model, x, y, F.cross_entropy, "logits", layers=["1"])["1"]
    assert torch.allclose(found, everything) == (rivals == 3)


def test_logits_serves_regression():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    exact = attribute(model, x, y, F.mse_loss, "ablation")
    torch.testing.assert_close(attribute(model, x, y, F.mse_loss, "logits")["1"], exact["1"])


@pytest.mark.parametrize("loss_fn", [F.mse_loss, F.binary_cross_entropy_with_logits])
def test_link_is_exact_for_one_output_and_a_linear_rest(loss_fn):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0)).double()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randint(2, (5,)).double()
    exact = attribute(model, x, y, loss_fn, "ablation")
    torch.testing.assert_close(attribute(model, x, y, loss_fn, "link")["1"], exact["1"])


@pytest.mark.parametrize("method", ["gradient", "taylor", "link", "logits", "secant", "ablation"])
@pytest.mark.parametrize("make", [mlp, cnn], ids=["mlp", "cnn"])
def test_converted_and_plain_models_give_the_same(make, method):
    model, x, y = make()
    plain = attribute(model, x, y, F.cross_entropy, method)
    ours = attribute(convert(copy.deepcopy(model)), x, y, F.cross_entropy, method)
    assert [*plain] == [*ours]
    for name in plain:
        torch.testing.assert_close(plain[name], ours[name], rtol=1e-10, atol=1e-14)


def test_in_place_activations_do_not_falsify_the_layer_before():
    model, x, y = mlp()
    expected = attribute(model, x, y, F.cross_entropy, "taylor", layers=["0", "1"])
    model[1].inplace = True
    found = attribute(model, x, y, F.cross_entropy, "taylor", layers=["0", "1"])

    class Hidden(nn.Module):  # the same, but nothing announces it
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, x):
            return self.net[2:](torch.relu_(self.net[0](x)))

    hidden = attribute(Hidden(), x, y, F.cross_entropy, "taylor", layers=["net.0"])
    torch.testing.assert_close(found["0"], expected["0"])
    torch.testing.assert_close(found["1"], expected["1"])
    torch.testing.assert_close(hidden["net.0"], expected["0"])


def test_frozen_models_and_integer_inputs_have_blame_too():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 3)).double()
    model.requires_grad_(False)
    x, y = torch.randint(7, (5, 3)), torch.randint(3, (5,))
    blame = attribute(model, x, y, F.cross_entropy, "taylor", layers=["0"])
    h = model[0](x).requires_grad_()
    loss = F.cross_entropy(model[1:](h), y, reduction="sum")
    expected = (h * torch.autograd.grad(loss, h)[0]).sum(1)
    torch.testing.assert_close(blame["0"], expected.detach())


def test_inputs_may_be_tuples_or_dicts():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(2, 4)

        def forward(self, left, right):
            return self.a(left) + self.b(right)

    model, left, right = Two(), torch.randn(5, 3), torch.randn(5, 2)
    y = torch.randint(4, (5,))
    one = attribute(model, (left, right), y, F.cross_entropy, "taylor")
    two = attribute(model, {"right": right, "left": left}, y, F.cross_entropy, "taylor")
    assert [*one] == [*two] == ["a", "b"]
    torch.testing.assert_close(one["b"], two["b"])
