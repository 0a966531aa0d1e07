from __future__ import annotations

import copy
import importlib
import sys

import captum.attr as theirs
import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captum.attr import visualization
from captum.metrics import infidelity, sensitivity_max
from torch import Tensor, nn

import torchbp.integrations.captum as ours
from torchbp import attribute, convert
from torchbp.blame.methods import METHODS

pytestmark = pytest.mark.filterwarnings(
    "ignore:Input Tensor", "ignore:Setting forward, backward hooks", "ignore:Setting backward hooks"
)


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)


def cnn() -> tuple[nn.Sequential, Tensor, Tensor]:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 3, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5),
    )  # fmt: skip
    model(torch.randn(9, 2, 6, 6))
    return model.eval(), torch.randn(7, 2, 6, 6), torch.randint(5, (7,))


class Scaled(nn.Module):
    """An input, and arguments that are none."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Linear(4, 5), nn.Softplus(), nn.Linear(5, 3)

    def forward(self, value: Tensor, scale: Tensor, power: int) -> Tensor:
        return self.b((self.act(self.a(value)) * scale) ** power)


class Map(nn.Module):
    """Outputs of shape ``[N, 3, 2]``."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 6)

    def forward(self, value: Tensor) -> Tensor:
        return self.b(self.a(value).tanh()).view(-1, 3, 2)


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 5), nn.Linear(3, 5), nn.Linear(5, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.head((self.a(left) * self.b(right)).tanh())


PATHS = [
    (ours.LayerConductance, theirs.LayerConductance),
    (ours.LayerIG, theirs.LayerIntegratedGradients),
    (ours.LayerInternalInfluence, theirs.InternalInfluence),
]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_class_for_layers_and_one_for_inputs(method):
    model, x, y = cnn()
    options = {"n_permutations": 2} if method == "shapley" else {}
    given = {"n_steps": 3} if METHODS[method].n_steps > 1 else {}
    layer = getattr(ours, f"Layer{ours._title(method)}")(model, model[2], F.cross_entropy)
    inputs = getattr(ours, ours._title(method))(model, F.cross_entropy)
    expected = attribute(
        model, x, y, F.cross_entropy, method, layers=["input", "2"], of="elements",
        **given, **options,
    )  # fmt: skip
    assert isinstance(layer, theirs.LayerAttribution) and isinstance(inputs, theirs.Attribution)
    found = layer.attribute(x, target=y, **given, **options)
    assert found.shape == model[:3](x).shape
    torch.testing.assert_close(found, expected["2"])
    torch.testing.assert_close(inputs.attribute(x, target=y, **given, **options), expected["input"])


def test_classes_stand_in_the_table_and_tell_their_names():
    assert len(ours.CLASSES) == 2 * len(METHODS) and {*ours.CLASSES} <= {*dir(ours)}
    assert ours.LayerConductance.get_name() == "Layer Conductance"
    assert ours.LayerLink(*cnn()[:1], "2").multiplies_by_inputs
    assert not ours.LayerGradient(*cnn()[:1], "2").multiplies_by_inputs
    with pytest.raises(AttributeError, match="LayerGuess"):
        _ = ours.LayerGuess


@pytest.mark.parametrize(("mine", "captums"), PATHS)
@pytest.mark.parametrize("to_input", [False, True])
@pytest.mark.parametrize("kind", ["one", "tensor", "list", "one in a tensor"])
def test_targets_select_outputs_as_captum_does(mine, captums, kind, to_input):
    model, x, y = cnn()
    targets = {"one": 2, "tensor": y, "list": y.tolist(), "one in a tensor": torch.tensor([2])}
    given = {"target": targets[kind], "baselines": 0.1, "attribute_to_layer_input": to_input}
    found = mine(model, model[4]).attribute(x, n_steps=9, **given)
    expected = captums(model, model[4]).attribute(x, n_steps=9, **given)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-7, atol=1e-8)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("target", [(2, 1), [(0, 1), (1, 0), (2, 1), (2, 0), (1, 1)]])
def test_targets_of_outputs_with_more_dimensions(target):
    model, x = Map(), torch.randn(5, 4)
    found = ours.LayerConductance(model, "a").attribute(x, target=target)
    expected = theirs.LayerConductance(model, model.a).attribute(x, target=target)
    torch.testing.assert_close(found, expected.detach())


def test_an_output_with_one_number_needs_no_target():
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)), torch.randn(5, 4)
    found = ours.IG(model).attribute(x)
    torch.testing.assert_close(found, theirs.IntegratedGradients(model).attribute(x).detach(),
                               rtol=1e-7, atol=1e-8)  # fmt: skip


def test_further_arguments_stay_what_they_are():
    model, x, scale = Scaled(), torch.randn(6, 4), torch.rand(6, 5)
    given = {"target": 1, "additional_forward_args": (scale, 2)}
    for mine, captums in PATHS:
        found = mine(model, model.act).attribute(x, **given)
        expected = captums(model, model.act).attribute(x, **given)
        torch.testing.assert_close(found, expected.detach(), rtol=1e-7, atol=1e-8)
    secant, delta = ours.LayerSecant(model, model.act).attribute(
        x, return_convergence_delta=True, **given
    )
    assert secant.shape == (6, 5) and delta.abs().max() < 1e-12


def test_modules_keep_their_modes_and_layers_may_take_keywords():
    class Named(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[2](input=self[1](self[0](x)).tanh())

    torch.manual_seed(0)
    model = Named(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    model[1].eval()  # frozen, in a model that trains
    x = torch.randn(6, 4).double()
    into = ours.LayerBlame(model, model[2], method="taylor")
    found = into.attribute(x, target=1, attribute_to_layer_input=True)
    assert [m.training for m in model.modules()] == [True, True, False, True]
    hidden = model[1](model[0](x)).tanh()
    torch.testing.assert_close(found, hidden * model[2].weight[1])


def test_a_module_called_input_is_not_the_input():
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("input", nn.Linear(4, 5))
    model.add_module("head", nn.Linear(5, 3))
    x = torch.randn(6, 4)
    found = ours.Taylor(model).attribute(x, target=1)
    torch.testing.assert_close(found, theirs.InputXGradient(model).attribute(x, target=1))


def test_one_sweep_serves_a_list_of_layers():
    model, x, y = cnn()
    passes = []
    model[0].register_forward_hook(lambda *args: passes.append(1))
    alone = ours.LayerConductance(model, "2").attribute(x, target=y)
    one, passes[:] = len(passes), []
    (first, second), deltas = ours.LayerConductance(model, [model[2], "5"]).attribute(
        x, target=y, return_convergence_delta=True
    )
    assert len(passes) == one and len(deltas) == 2
    torch.testing.assert_close(first, alone)
    assert second.shape == model[:6](x).shape


def test_a_layer_that_runs_twice_has_attributions_of_each_call():
    act = nn.Tanh()
    model = nn.Sequential(nn.Linear(4, 5), act, nn.Linear(5, 3), act, nn.Linear(3, 2))
    first, second = ours.LayerTaylor(model, act).attribute(torch.randn(6, 4), target=0)
    assert first.shape == (6, 5) and second.shape == (6, 3)


def test_the_convergence_delta_is_captums():
    model, x, y = cnn()
    given = {"target": y, "baselines": torch.randn(1, 2, 6, 6), "return_convergence_delta": True}
    mine, captums = (h.LayerConductance(model, model[5]) for h in (ours, theirs))
    (found, delta), (_, expected) = mine.attribute(x, **given), captums.attribute(x, **given)
    torch.testing.assert_close(delta, expected)
    assert delta.abs().max() > 1e-6 and mine.has_convergence_delta()
    again = mine.compute_convergence_delta(found, given["baselines"], x, target=y)
    torch.testing.assert_close(again, expected)


def test_the_convergence_delta_of_a_loss():
    model, x, y = cnn()
    secant = ours.Secant(model, F.cross_entropy)
    found, delta = secant.attribute(x, target=y, return_convergence_delta=True)
    assert delta.abs().max() < 1e-12
    with torch.no_grad():
        losses = [F.cross_entropy(model(v), y, reduction="none") for v in (torch.zeros_like(x), x)]
    short = 0.5 * found
    expected = short.sum((1, 2, 3)) - (losses[1] - losses[0])
    torch.testing.assert_close(secant.compute_convergence_delta(short, None, x, y), expected)


def test_the_convergence_delta_of_shapley_is_measured_from_the_layer_off():
    model, x, y = cnn()
    shapley = ours.LayerShapley(model, model[5])
    _, delta = shapley.attribute(x, target=y, n_permutations=1, return_convergence_delta=True)
    assert delta.abs().max() < 1e-12


def test_several_inputs_come_back_as_they_went_in():
    model, left, right = Sum(), torch.randn(6, 4), torch.randn(6, 3)
    conductance = ours.Conductance(model)
    found, delta = conductance.attribute((left, right), target=1, return_convergence_delta=True)
    assert [a.shape for a in found] == [left.shape, right.shape]
    assert len(conductance.attribute([left, right], target=1)) == 2
    total = found[0].sum(1) + found[1].sum(1)
    start = torch.zeros_like(left), torch.zeros_like(right)
    change = (model(left, right) - model(*start))[:, 1].detach()
    torch.testing.assert_close(delta, total - change)
    assert delta.abs().max() < 0.1 * change.abs().max()


@pytest.mark.parametrize("name", ["Conductance", "IG", "Taylor"])
def test_captums_metrics_take_ours(name):
    model, x, y = cnn()
    method = getattr(ours, name)(model)
    captums = (
        theirs.InputXGradient(model) if name == "Taylor" else theirs.IntegratedGradients(model)
    )

    def perturb(inputs):
        noise = 0.1 * torch.randn_like(inputs)
        return noise, inputs - noise

    def measures(algorithm):
        given = {} if name == "Taylor" else {"n_steps": 400}
        found = algorithm.attribute(x, target=y, **given).detach()
        torch.manual_seed(1)
        faithless = infidelity(model, perturb, x, found, target=y, n_perturb_samples=5)
        torch.manual_seed(1)
        return faithless, sensitivity_max(algorithm.attribute, x, target=y, n_perturb_samples=2)

    # Conductance of an input is integrated gradients in the limit.
    tolerance = {"rtol": 0.05, "atol": 0.02} if name == "Conductance" else {"rtol": 1e-6, "atol": 0}
    for mine, other in zip(measures(method), measures(captums), strict=True):
        assert float(other.min()) > 0
        torch.testing.assert_close(mine, other.detach(), **tolerance)


def test_captum_draws_ours():
    matplotlib.use("Agg")
    model, x, y = cnn()
    found = ours.Secant(model, F.cross_entropy).attribute(x, target=y)
    picture = np.transpose(found[0].numpy(), (1, 2, 0))
    _, axis = visualization.visualize_image_attr(
        picture, method="heat_map", sign="all", use_pyplot=False
    )
    drawn = axis.images[0].get_array()
    assert drawn.shape == (6, 6)
    assert np.array_equal(
        np.sign(drawn)[np.abs(drawn) == 1], np.sign(picture.sum(2))[np.abs(drawn) == 1]
    )


@pytest.mark.parametrize(
    ("algorithm", "layer"),
    [
        (theirs.Saliency, None),
        (theirs.IntegratedGradients, None),
        (theirs.DeepLift, None),
        (theirs.GuidedBackprop, None),
        (theirs.FeatureAblation, None),
        (theirs.LayerConductance, 4),
        (theirs.LayerDeepLift, 4),
        (theirs.LayerGradCam, 4),
    ],
)
def test_converted_models_are_treated_as_plain_ones(algorithm, layer):
    model, x, y = cnn()
    other = convert(copy.deepcopy(model))
    assert type(other[2]) is not nn.ReLU
    plain, mine = (
        (algorithm(m) if layer is None else algorithm(m, m[layer])).attribute(x, target=y)
        for m in (model, other)
    )
    torch.testing.assert_close(mine, plain)


class WithoutFlatten(nn.Module):
    """Captum's LRP has no rule for ``torch.nn.Flatten``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(16, 5)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.pool(self.act(self.norm(self.conv(image)))).flatten(1))


def test_converted_models_have_captums_lrp():
    model, x = WithoutFlatten().eval(), torch.randn(3, 2, 6, 6)
    other = convert(copy.deepcopy(model))
    for mine, plain in (
        (theirs.LRP(other), theirs.LRP(model)),
        (theirs.LayerLRP(other, other.norm), theirs.LayerLRP(model, model.norm)),
    ):
        torch.testing.assert_close(mine.attribute(x, target=1), plain.attribute(x, target=1))


def test_importing_twice_enters_a_drop_in_once():
    from captum.attr._core import lrp

    before = len(lrp.SUPPORTED_NON_LINEAR_LAYERS)
    importlib.reload(ours)
    assert len(lrp.SUPPORTED_NON_LINEAR_LAYERS) == before


@pytest.mark.parametrize(
    ("target", "error", "text"),
    [
        ("cat", TypeError, "target: expected an integer, .* got str"),
        ([1.5] * 7, TypeError, "target: expected integers as indices, got floating"),
        ([1, 2], ValueError, "target: expected one for each of 7 samples, got 2"),
        ((1, 2), ValueError, r"target: expected 1 indices per sample, .*\(7, 5\).* got 2"),
        (None, ValueError, r"target: expected 1 indices per sample, .*\(7, 5\).* got 0"),
        (9, IndexError, "index 9"),
    ],
)
def test_targets_that_do_not_fit_are_named(target, error, text):
    model, x, _ = cnn()
    with pytest.raises(error, match=text):
        ours.LayerTaylor(model, "2").attribute(x, target=target)


def test_what_cannot_be_done_is_named():
    model, x, y = cnn()
    with pytest.raises(TypeError, match=r"forward_func: expected a torch.nn.Module.* got function"):
        ours.LayerTaylor(lambda v: model(v), model[2])
    with pytest.raises(ValueError, match="method 'taylor' answers removal"):
        ours.LayerTaylor(model, "2").attribute(x, target=y, return_convergence_delta=True)
    with pytest.raises(TypeError, match="no option 'nodes'"):
        ours.LayerTaylor(model, "2").attribute(x, target=y, nodes=3)
    with pytest.raises(ValueError, match=r"method: unknown name 'tailor'.*'taylor'"):
        ours.LayerBlame(model, "2", method="tailor")
    tokens = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(12, 3))
    with pytest.raises(ValueError, match=r"inputs: number 0 is torch.int64.*the embedding"):
        ours.Secant(tokens).attribute(torch.randint(5, (6, 3)), target=1)


def test_without_captum_the_error_says_what_to_install(monkeypatch):
    for name in [n for n in sys.modules if n.partition(".")[0] == "captum"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "captum", None)
    monkeypatch.delitem(sys.modules, "torchbp.integrations.captum")
    with pytest.raises(ImportError, match=r"pip install torchbp\[captum\]"):
        importlib.import_module("torchbp.integrations.captum")
