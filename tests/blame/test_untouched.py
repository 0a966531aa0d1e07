"""Nothing of the user's changes: gradients, parameters, buffers, random state, mode, hooks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import MODELS
from torch import nn

from torchbp import attribute
from torchbp.blame.methods import METHODS

QUICK = {"shapley": {"n_permutations": 2}}


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
        attribute(model, x, y, F.cross_entropy, method, **QUICK.get(method, {}))
        assert torch.is_grad_enabled() == inside
    assert same(before, fingerprint(model, x)) and seen


class Trap(nn.Module):
    """Hands its input on, until it fails: in the n-th forward pass, or in the n-th backward."""

    def __init__(self, forward: int = 0, backward: int = 0) -> None:
        super().__init__()
        self.at = {"forward": forward, "backward": backward}
        self.passed = {"forward": 0, "backward": 0}

    def count(self, way):
        self.passed[way] += 1
        if self.passed[way] == self.at[way]:
            raise ZeroDivisionError("in the middle")

    def forward(self, x):
        self.count("forward")
        x = x * 1.0
        if x.requires_grad:
            x.register_hook(lambda error: self.count("backward"))
        return x


def trapped(trap: Trap) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    model = nn.Sequential(
        nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(True), trap, nn.Dropout(), nn.Linear(4, 3)
    )
    return model, torch.randn(5, 4), torch.randint(3, (5,))


@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:attribute. the model is in training mode")
def test_failure_changes_nothing(method, way):
    """Fail in every one of the passes that a method makes, one after the other."""
    options = QUICK.get(method, {})
    free = Trap()
    attribute(*_eval(trapped(free)), F.cross_entropy, method, **options)
    passes = free.passed[way]
    assert passes > 0 or (way == "backward" and method in ("ablation", "shapley"))
    for n in {1, 2, (passes + 1) // 2, passes} - {0}:
        if n > passes:
            continue
        for training in (False, True):
            model, x, y = trapped(Trap(**{way: n}))
            model.train(training)
            before = fingerprint(model, x)
            with pytest.raises(ZeroDivisionError):
                attribute(model, x, y, F.cross_entropy, method, **options)
            assert same(before, fingerprint(model, x))


def _eval(problem):
    problem[0].eval()
    return problem


def test_a_failing_loss_changes_nothing():
    def fails(z, y):
        raise ZeroDivisionError("in the loss")

    for method in METHODS:
        model, x, y = trapped(Trap())
        model.eval()
        before = fingerprint(model, x)
        with pytest.raises(ZeroDivisionError):
            attribute(model, x, y, fails, method)
        assert same(before, fingerprint(model, x))


@pytest.mark.parametrize("method", METHODS)
def test_tensors_in_containers_stay_as_they_are(method):
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x, more):
            return self.head(self.stem(x + more["shift"].mul_(2)).tanh())

    x, shift, y = torch.randn(6, 4), torch.randn(6, 4), torch.randint(3, (6,))
    kept = shift.clone()
    options = QUICK.get(method, {})
    attribute(Shifted(), (x, {"shift": shift}), y, F.cross_entropy, method, ["stem"], **options)
    assert torch.equal(shift, kept)


def test_training_mode_is_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 3))
    with pytest.warns(UserWarning, match=r"1 \(Dropout\)"):
        attribute(model, torch.randn(5, 4), torch.randint(3, (5,)), F.cross_entropy, "taylor")
