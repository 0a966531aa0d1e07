"""Secants and LRP rules of pooling, by hand and inside a user's forward."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchbp import attribute
from torchbp.ops.avg_pool import AdaptiveAvgPool, AvgPool1d
from torchbp.ops.lp_pool import LpPool1d
from torchbp.ops.max_pool import MaxPool1d, MaxPool2d, MaxPool3d
from torchbp.ops.max_unpool import MaxUnpool1d
from torchbp.ops.relevance import Rule


def multiplier(op: Any, m: Tensor, x: Tensor, x0: Tensor, *settings: Any) -> Tensor:
    outputs = [op.forward(v, *settings) for v in (x, x0)]
    found: Tensor = op.secant(m, (x, *settings), (x0, *settings), *outputs)[0]
    return found


@pytest.mark.parametrize(("dims", "op"), [(1, MaxPool1d), (2, MaxPool2d), (3, MaxPool3d)])
def test_a_moving_maximum_splits_its_multiplier_in_fixed_proportion(dims: int, op: Any) -> None:
    # One window; the maximum moves from the second element (3) to the first (5):
    # a = 5 - 2 = 3, b = 3 - 1 = 2, so 3/5 go to the first and 2/5 to the second.
    shape, kernel = (1,) * dims + (2,), (1,) * (dims - 1) + (2,)
    x, x0 = torch.tensor([5.0, 2.0]).view(shape), torch.tensor([1.0, 3.0]).view(shape)
    got = multiplier(op, torch.ones((1,) * (dims + 1)), x, x0, kernel, kernel, 0, 1, False)
    torch.testing.assert_close(got.flatten(), torch.tensor([0.6, 0.4]))


def test_multipliers_are_finite_where_the_maximum_is_not() -> None:
    x, x0 = (torch.full((1, 1, 4), -math.inf) for _ in range(2))
    x[..., 2:] = torch.tensor([1.0, 2.0])
    x0[..., :2] = torch.tensor([1.0, 2.0])
    got = multiplier(MaxPool1d, torch.ones(1, 1, 2), x, x0, 2, 2, 0, 1, False)
    assert got.isfinite().all()


@pytest.mark.parametrize("p", [2, 3, 0.5, 1.5, 2.5])
@pytest.mark.parametrize("scale", [1.0, 1e-9])
def test_lp_pooling_is_conserved_down_to_nothing(p: float, scale: float) -> None:
    torch.manual_seed(0)
    x, x0 = (scale * torch.rand(4, 3, 10, dtype=torch.float64) for _ in range(2))
    x0[0], x0[1, :, :4] = 0, x[1, :, :4]
    x0[2] = x[2] * (1 + 1e-9)
    settings = (p, (2,), (2,), False)
    m = torch.rand(4, 3, 5, dtype=torch.float64)
    got = multiplier(LpPool1d, m, x, x0, *settings)
    y, y0 = (LpPool1d.forward(v, *settings) for v in (x, x0))
    through = (got * (x - x0)).unflatten(2, (5, 2)).sum(3)
    assert got.isfinite().all()
    torch.testing.assert_close(through, m * (y - y0), rtol=1e-11, atol=1e-14 * scale)


def test_relevance_of_each_kind_by_hand() -> None:
    x, r = torch.tensor([[[1.0, 3.0, 2.0, 2.0]]]), torch.tensor([[[4.0, 1.0]]])
    windows = ((2,), (2,), (0,), False, True, None)

    def of(op: Any, *settings: Any) -> list[float]:
        share: Tensor = op.relevance(r, Rule(epsilon=0), (x, *settings), op.forward(x, *settings))[
            0
        ]
        return [round(v, 5) for v in share.flatten().tolist()]

    assert of(AvgPool1d, *windows) == of(AdaptiveAvgPool, 2, 1) == [1.0, 3.0, 0.5, 0.5]
    assert of(LpPool1d, 2, (2,), (2,), False) == [0.4, 3.6, 0.5, 0.5]
    assert of(MaxPool1d, 2, 2, 0, 1, False) == [0.0, 4.0, 1.0, 0.0]


def test_unpooling_counts_an_element_that_stays_once() -> None:
    # Both go to position 1; the second one stays.
    x, x0 = torch.tensor([[[5.0, 7.0]]]), torch.tensor([[[1.0, 4.0]]])
    indices = torch.tensor([[[1, 1]]])
    got = multiplier(MaxUnpool1d, torch.tensor([[[10.0, 3.0]]]), x, x0, indices, 1)
    assert got.tolist() == [[[0.0, 3.0]]]


def test_unpooling_between_runs_with_other_maxima_is_refused() -> None:
    x = torch.ones(1, 1, 2)
    runs = [(x, torch.tensor([[positions]]), 2) for positions in ([0, 2], [1, 2])]
    outputs = [MaxUnpool1d.forward(*run) for run in runs]
    with pytest.raises(NotImplementedError, match="maxima lie at different positions"):
        MaxUnpool1d.secant(torch.ones(1, 1, 4), *runs, *outputs)


class Pooled(nn.Module):
    """Pooling as users call it, between two layers."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.head = nn.Conv2d(1, 2, 3, padding=1), nn.LazyLinear(3)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self.layer(x)).flatten(1))


CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "F.max_pool2d": lambda x: F.max_pool2d(x, 3, 2, 1),
    "torch.max_pool2d": lambda x: torch.max_pool2d(x, 2),
    "return_indices": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    "with_indices": lambda x: F.max_pool2d_with_indices(x, 2)[0],
    "torch.max_pool1d_with_indices": lambda x: torch.max_pool1d_with_indices(x.flatten(2), 3)[0],
    "torch.adaptive_max_pool1d": lambda x: torch.adaptive_max_pool1d(x.flatten(2), 5)[0],
    "adaptive, indices": lambda x: F.adaptive_max_pool2d(x, 4, return_indices=True)[0],
    "3d": lambda x: F.max_pool3d(x, (2, 3, 3), (1, 2, 2)),
    "fractional": lambda x: F.fractional_max_pool2d(x, 2, output_ratio=(0.6, 0.5)),
    "fractional, indices": lambda x: F.fractional_max_pool2d(x, 2, 3, return_indices=True)[0],
    "average": lambda x: F.avg_pool2d(x, 3, 2, 1) ** 2,
    "torch.avg_pool1d": lambda x: torch.avg_pool1d(x.flatten(2), 3),
    "torch.adaptive_avg_pool1d": lambda x: torch.adaptive_avg_pool1d(x.flatten(2), 5),
    "F.adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, (None, 3)),
    "lp": lambda x: F.lp_pool2d(x, 2, 3, 2),
    "lp, infinite": lambda x: F.lp_pool2d(x, math.inf, 2) + F.lp_pool2d(x, -math.inf, 2),
    "unpool": lambda x: F.max_unpool2d(F.max_pool2d(x, 2), UP[: len(x)], 2),
}
UP = F.max_pool2d(torch.rand(99, 2, 6, 6), 2, return_indices=True)[1]


@pytest.mark.parametrize("name", CALLS)
def test_calls_in_a_users_forward_are_attributed_exactly(name: str) -> None:
    torch.manual_seed(0)
    model = Pooled(CALLS[name])
    x, x0 = (torch.randn(3, 1, 6, 6, dtype=torch.float64) for _ in range(2))
    model(x.float())
    model.double()
    y = torch.tensor([0, 1, 2])
    for n_steps in (1, 2):
        blame = attribute(
            model, x, y, F.cross_entropy, "secant", layers=["input", "layer"], baseline=x0,
            n_steps=n_steps,
        )  # fmt: skip
        change = blame.losses - blame.reference_losses
        for cut in ("input", "layer"):
            torch.testing.assert_close(blame.per_sample(cut), change, rtol=1e-10, atol=1e-12)
