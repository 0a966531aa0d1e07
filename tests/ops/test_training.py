"""Converted models train as torch's do."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchbp import convert


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(64, 48), nn.ReLU(), nn.LayerNorm(48), nn.Dropout(0.2),
        nn.Linear(48, 48), nn.GELU(), nn.Linear(48, 10),
    )  # fmt: skip


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding="same"), nn.BatchNorm2d(16), nn.SiLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.2), nn.Linear(64, 10),
    )  # fmt: skip


@pytest.mark.parametrize("make", [mlp, cnn])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradients_equal_torch(make, training):
    theirs = make().double().train(training)
    ours = convert(copy.deepcopy(theirs))
    x, y = torch.randn(32, 64, dtype=torch.float64), torch.randint(10, (32,))
    for model in (theirs, ours):
        torch.manual_seed(3)
        F.cross_entropy(model(x), y).backward()
    for (name, a), b in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() <= 1e-12 * a.grad.abs().max().clamp(min=1e-3), name


@pytest.mark.parametrize("make", [mlp, cnn])
def test_training_curves_equal_torch(make):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(512, 64, generator=generator), torch.randint(10, (512,), generator=generator)
    start = make()
    curves = []
    for model in (copy.deepcopy(start), convert(copy.deepcopy(start))):
        torch.manual_seed(7)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        losses = []
        for step in range(100):
            index = torch.arange(step * 64, step * 64 + 64) % 512
            loss = F.cross_entropy(model(x[index]), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        curves.append(losses)
    assert curves[0][0] != curves[0][-1]
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
