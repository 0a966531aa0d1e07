"""Equal to Captum, element by element, on varied models."""

from __future__ import annotations

import captum.attr as theirs
import pytest
import torch
from captum_cases import CASES, Case, close, labels, smooth_mlp
from torch import nn


@pytest.fixture(autouse=True)
def float64():
    """Captum rounds its step sizes to the default dtype (and always does in LayerIG)."""
    torch.set_default_dtype(torch.float64)


#: Ours, theirs, and the tolerance: relative, of each element and of the largest.
PAIRS = {
    "taylor": (theirs.LayerGradientXActivation, 1e-10),
    "conductance": (theirs.LayerConductance, 1e-10),
    "internal_influence": (theirs.InternalInfluence, 1e-10),
    "layer_ig": (theirs.LayerIntegratedGradients, 1e-7),  # rounds step sizes to float32
}


@pytest.mark.parametrize("method", PAIRS)
@pytest.mark.parametrize("make", CASES.values(), ids=CASES.keys())
def test_equal_at_every_layer(make, method):
    case, (algorithm, tolerance) = make(), PAIRS[method]
    blame = case.blame(method)
    found = case.layers(blame)
    assert found
    along = {} if method == "taylor" else {"baselines": case.baselines}
    for name in found:
        other = algorithm(case.forward, case.model.get_submodule(name)).attribute(
            case.inputs, additional_forward_args=case.extra or None, **along
        )
        close(blame[name], other, tolerance)


@pytest.mark.parametrize("make", CASES.values(), ids=CASES.keys())
def test_gradient_and_the_input_are_equal_too(make):
    case = make()
    extra = {"additional_forward_args": case.extra or None}
    saliency = theirs.Saliency(case.forward).attribute(case.inputs, abs=False, **extra)
    path = theirs.IntegratedGradients(case.forward).attribute(
        case.inputs, baselines=case.baselines, **extra
    )
    gradient = case.blame("gradient", layers=["input"])
    integrated = case.blame("layer_ig", layers=["input"])
    if len(case.inputs) == 1:  # a path per input, where Captum moves all together
        close(integrated["input"], path, 1e-7)
    for name, g in zip(gradient, saliency, strict=False):
        close(gradient[name], (g,), 1e-10)


@pytest.mark.parametrize("rule", ["riemann_left", "riemann_right", "riemann_middle",
                                  "riemann_trapezoid", "gausslegendre"])  # fmt: skip
@pytest.mark.parametrize("n_steps", [2, 7])
def test_nodes_and_weights_of_every_rule(rule, n_steps):
    case = smooth_mlp()
    for method, (algorithm, tolerance) in PAIRS.items():
        if method != "taylor":
            blame = case.blame(method, rule=rule, n_steps=n_steps)
            other = algorithm(case.forward, case.model[2]).attribute(
                case.inputs, baselines=case.baselines, method=rule, n_steps=n_steps
            )
            close(blame["2"], other, tolerance)


def test_embeddings_of_integers():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Conv1d(5, 3, 2), nn.Tanh(), nn.Flatten(),
                          nn.Linear(9, 3))  # fmt: skip
    case = Case(model, (torch.randint(9, (6, 5)),), labels(6, 3), baselines=(2,))
    blame = case.blame("layer_ig", n_steps=20)
    for name in ("0", "1", "2"):
        other = theirs.LayerIntegratedGradients(case.forward, model.get_submodule(name))
        close(blame[name], other.attribute(case.inputs, baselines=(2,), n_steps=20), 1e-7)
