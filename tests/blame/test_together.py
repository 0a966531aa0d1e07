"""Tools that look at one training loop at the same time do not disturb each other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from models import mlp

from torchbp import BlameTracker, LossChange, attribute
from torchbp.blame import InRunInfluence


def train(model, x, y, steps, **tools):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with BlameTracker(model) as tracker:
        for _ in range(steps):
            loss = F.cross_entropy(model(x), y)
            if "attribute" in tools:
                attribute(model, x, y, F.cross_entropy, "taylor")
            loss.backward()
            if "influence" in tools:
                tools["influence"].step(x, y, range(len(x)), 0.1)
            tracker.step(loss, targets=y)
            optimizer.step()
            optimizer.zero_grad()
            if "change" in tools:
                tools["change"].step()
    return tracker.report()


def test_the_tracker_counts_its_own_loops_passes_only():
    model, x, y = mlp()
    start = {k: v.clone() for k, v in model.state_dict().items()}
    alone = train(model, x, y, 3)
    model.load_state_dict(start)
    with LossChange(model, x, y, F.cross_entropy) as change:
        influence = InRunInfluence(model, (x, y), F.cross_entropy)
        among = train(model, x, y, 3, attribute=True, change=change, influence=influence)
    for name in alone.layer_names():
        torch.testing.assert_close(among.per_unit(name), alone.per_unit(name))
    assert len(change.steps) == 3
