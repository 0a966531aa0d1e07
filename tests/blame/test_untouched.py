"""Nothing of the user's changes: gradients, parameters, buffers, random state, mode, hooks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import MODELS
from torch import nn

from torchbp import attribute

METHODS = ["gradient", "taylor", "link", "logits", "secant", "ablation"]


def fingerprint(model: nn.Module, x: torch.Tensor) -> dict:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers()), "x": x}
    return {
        "values": {n: (t.data_ptr(), t.detach().clone(), t._version) for n, t in tensors.items()},
        "grads": {n: None if t.grad is None else (id(t.grad), t.grad.clone())
                  for n, t in tensors.items()},
        "requires": {n: t.requires_grad for n, t in tensors.items()},
        "modes": [m.training for m in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "classes": [type(m) for m in model.modules()],
        "rng": torch.get_rng_state(),
        "grad mode": torch.is_grad_enabled(),
    }  # fmt: skip


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
@pytest.mark.filterwarnings("ignore:attribute. the model is in training mode")
def test_success_changes_nothing(make, method, training):
    model, x, y = make()
    F.cross_entropy(model(x), y).backward()  # gradients that must stay
    model.train(training)
    seen = []
    next(model.children()).register_forward_hook(lambda *a: seen.append(1))
    before = fingerprint(model, x)
    with torch.no_grad():
        inside = torch.is_grad_enabled()
        attribute(model, x, y, F.cross_entropy, method)
        assert torch.is_grad_enabled() == inside
    assert same(before, fingerprint(model, x)) and seen


@pytest.mark.parametrize("method", METHODS)
def test_failure_changes_nothing(method):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3))

    class Fails(nn.Module):
        def forward(self, x):
            raise ZeroDivisionError("in the middle")

    model.append(Fails())
    x, y = torch.randn(5, 4), torch.randint(3, (5,))
    before = fingerprint(model, x)
    with pytest.raises(ZeroDivisionError), pytest.warns(UserWarning, match="training mode"):
        attribute(model, x, y, F.cross_entropy, method)
    assert same(before, fingerprint(model, x))


def test_training_mode_is_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 3))
    with pytest.warns(UserWarning, match=r"1 \(Dropout\)"):
        attribute(model, torch.randn(5, 4), torch.randint(3, (5,)), F.cross_entropy, "taylor")
