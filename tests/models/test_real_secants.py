"""``secant`` on BERT, GPT-2 and ResNet-18: conserved at every cut, for any number of segments."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchbp import attribute
from torchbp.blame.checkpoints import checkpoint_blame

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from _zoo import MODELS

pytestmark = pytest.mark.models
CE = nn.functional.cross_entropy

Problem = tuple[nn.Module, dict[str, Any], Tensor, Callable[[Any, Tensor], Tensor]]


def bert() -> Problem:
    given = MODELS["bert"](1).to(torch.float64)
    inputs = {"input_ids": given.args[0], **given.kwargs}
    labels = torch.randint(3, (len(given.args[0]),))
    return given.model.eval(), inputs, labels, lambda out, y: CE(out.logits, y, reduction="none")


def gpt2() -> Problem:
    given = MODELS["gpt2"](1).to(torch.float64)
    ids = given.args[0]

    def loss(out: Any, y: Tensor) -> Tensor:
        return CE(out.logits[:, :-1].transpose(1, 2), y, reduction="none")

    return given.model.eval(), {"input_ids": ids, **given.kwargs}, ids[:, 1:], loss


def resnet18() -> Problem:
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.resnet18(num_classes=10).double()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # without statistics the signal of random weights fades away
    model(images)
    return model.eval(), {"x": images}, torch.randint(10, (2,)), CE


CASES = {"bert": (bert, 11), "gpt2": (gpt2, 4), "resnet18": (resnet18, 15)}


@pytest.mark.parametrize("n_steps", [1, 4, 16])
@pytest.mark.parametrize(("make", "cuts"), CASES.values(), ids=CASES.keys())
def test_conserved_at_every_cut(make: Callable[[], Problem], cuts: int, n_steps: int) -> None:
    model, inputs, targets, loss_fn = make()
    blame = attribute(model, inputs, targets, loss_fn, "secant", "all", n_steps=n_steps)
    assert len(blame.residual) >= cuts
    assert float((blame.losses - blame.reference_losses).abs().min()) > 1e-6
    worst = max(blame.residual.values())
    print(f"K={n_steps}: {len(blame.residual)} cuts, largest relative residual {worst:.1e}")
    assert worst <= 1e-10


@pytest.mark.parametrize("make", [make for make, _ in CASES.values()], ids=CASES.keys())
def test_weights_of_two_checkpoints(make: Callable[[], Problem]) -> None:
    """Tied weights and running statistics among them."""
    model, inputs, targets, loss_fn = make()
    before = copy.deepcopy(model)
    with torch.no_grad():
        for p in before.parameters():
            p.add_(0.02 * torch.randn_like(p))
        for b in before.buffers():
            if b.is_floating_point():
                b.mul_(1 + 0.1 * torch.rand_like(b))
    blame = checkpoint_blame(model, inputs, targets, loss_fn, before.state_dict())
    with torch.no_grad():
        change = loss_fn(model(**inputs), targets) - loss_fn(before(**inputs), targets)
    if change.dim() == 0:  # a mean
        change = change * len(targets)
    total = sum(float(share.sum()) for share in blame.shares.values())
    assert total == pytest.approx(float(change.sum()), rel=1e-9)
    blame.check(1e-10)
    units = attribute(model, inputs, targets, loss_fn, "secant", "all", baseline=before)
    assert units.residual and max(units.residual.values()) <= 1e-10
