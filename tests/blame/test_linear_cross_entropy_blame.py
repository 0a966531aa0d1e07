"""Blame where the loss is linear_cross_entropy: the same numbers as with its two halves."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchbp
from torchbp.functional import linear_cross_entropy
from torchbp.ops import linear_cross_entropy_chunks


def test_attribute_and_a_backward_in_chunks_agree_with_the_composition(monkeypatch):
    monkeypatch.setattr(linear_cross_entropy_chunks, "CHUNK_BYTES", 64)  # three rows of five
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    head = torch.randn(5, 3, dtype=torch.float64)
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.randint(5, (8,))

    def chunked(output: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
        return linear_cross_entropy(output, head, target, reduction=reduction)

    def composed(output: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
        return F.cross_entropy(F.linear(output, head), target, reduction=reduction)

    for method in ("taylor", "secant"):
        ours, theirs = (
            torchbp.attribute(model, x, y, f, method=method) for f in (chunked, composed)
        )
        for layer in theirs:
            torch.testing.assert_close(ours[layer], theirs[layer], rtol=1e-10, atol=1e-12)
    reports = []
    for f in (chunked, composed):
        with torchbp.BlameTracker(model, method="taylor", layers=["0"], loss_fn=f) as tracker:
            loss = f(model(x), y)
            loss.backward()
            tracker.step(loss, targets=y)
        reports.append(tracker.report().per_unit("0"))
        model.zero_grad()
    assert reports[1].abs().max() > 1e-3
    torch.testing.assert_close(*reports, rtol=1e-6, atol=1e-9)
