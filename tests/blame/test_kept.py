"""Kept calls survive what a model writes, and tell what they could not see."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchbp import attribute
from torchbp.blame.kept import Keeper, writes


def test_only_what_shares_the_memory_is_copied() -> None:
    keeper, x, w = Keeper(), torch.ones(4, requires_grad=True), torch.ones(4)
    y = x * 2
    kept = keeper.keep("mul", (x, w, 3), (y, y[:2]))
    keeper.before_writing(y)
    with torch.no_grad():
        y.zero_()
    kept.check()
    assert torch.equal(kept.output[0], torch.full((4,), 2.0)) and kept.output[1].sum() == 4
    assert kept.args[0].data_ptr() == x.data_ptr() and kept.args[0].requires_grad
    assert kept.args[1].data_ptr() == w.data_ptr() and not kept.args[1].requires_grad
    assert kept.args[2] == 3


def test_an_unseen_write_is_found_out() -> None:
    keeper, x = Keeper(), torch.ones(4)
    kept = keeper.keep(torch.relu, (x,), x * 1)
    kept.check()
    x.add_(1)
    with pytest.raises(RuntimeError, match="relu: an argument or its output was overwritten"):
        kept.check()


def test_nothing_is_kept_for_nobody() -> None:
    keeper, y = Keeper(), torch.ones(4)
    held = weakref.ref(keeper.keep("relu", (), y))
    gc.collect()
    assert held() is None
    keeper.before_writing(y)


def test_what_writes_is_known_by_its_name() -> None:
    assert all(map(writes, (Tensor.add_, Tensor.__imul__, Tensor.__setitem__, F.relu_)))
    assert not any(
        map(writes, (Tensor.add, Tensor.__add__, Tensor.requires_grad_, Tensor.__invert__, F.relu))
    )


class Writes(nn.Module):
    """Writes over what functions without a module have returned, or does the same without."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(2), nn.Linear(2, 3)
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.conv(x)), inplace=self.in_place)
        g = F.conv2d(h, self.conv.weight, padding=1).tanh()
        if self.in_place:
            g += h
            g[:, 0].mul_(2)
        else:
            g = g + h
            g = torch.stack([g[:, 0] * 2, g[:, 1]], 1)
        pooled = torch.flatten(F.adaptive_avg_pool2d(g, 1), 1)
        return self.head(F.silu(pooled, inplace=self.in_place))


@pytest.mark.parametrize("method", ["secant", "lrp"])
@pytest.mark.parametrize("layers", ["all", ["conv", "head"], ["input"]], ids=str)
def test_functions_may_write_over_what_others_have_returned(method: str, layers: object) -> None:
    x, y = torch.randn(4, 2, 5, 5, dtype=torch.float64), torch.randint(3, (4,))
    found = []
    for in_place in (True, False):
        torch.manual_seed(0)
        model = Writes(in_place).double().eval()
        found.append(attribute(model, x, y, F.cross_entropy, method, layers=layers))
    for name in found[1]:
        torch.testing.assert_close(found[0][name], found[1][name])
    found[0].check(1e-10)
