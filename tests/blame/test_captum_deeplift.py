"""One secant is DeepLIFT where Captum has the rule; and where Captum is not to be followed."""

from __future__ import annotations

import captum.attr as theirs
import pytest
import torch
from captum_cases import Case, close, labels, smooth_mlp, x
from torch import Tensor, nn


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)


def tanh_mlp() -> Case:
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 5),
                          nn.Sigmoid(), nn.Linear(5, 3))  # fmt: skip
    return Case(model, (x(6, 5),), labels(6, 3), loss=False)


def averaging_cnn() -> Case:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2),
        nn.Conv2d(4, 5, 3), nn.LeakyReLU(0.2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(5, 3),
    )  # fmt: skip
    model(x(8, 2, 9, 9) * 2)
    return Case(
        model.eval(), (x(5, 2, 9, 9),), labels(5, 3), loss=False, baselines=(x(1, 2, 9, 9),)
    )


def deep_mlp() -> Case:
    parts = [part for _ in range(5) for part in (nn.Linear(6, 6), nn.ReLU())]
    return Case(nn.Sequential(*parts, nn.Linear(6, 3)), (x(6, 6) * 2,), labels(6, 3), loss=False)


def grouped_conv1d() -> Case:
    model = nn.Sequential(
        nn.Conv1d(4, 6, 3, groups=2, dilation=2), nn.ELU(), nn.Conv1d(6, 4, 2, stride=2), nn.ReLU(),
        nn.AvgPool1d(2), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip
    return Case(model, (x(5, 4, 14),), labels(5, 3), loss=False, baselines=(0.3,))


def transposed_conv() -> Case:
    model = nn.Sequential(
        nn.ConvTranspose2d(2, 3, 3, stride=2), nn.Softplus(), nn.Conv2d(3, 4, 3), nn.Tanh(),
        nn.Flatten(), nn.Linear(100, 3),
    )  # fmt: skip
    return Case(model, (x(4, 2, 3, 3),), labels(4, 3), loss=False, baselines=(x(1, 2, 3, 3),))


def conv3d() -> Case:
    model = nn.Sequential(
        nn.Conv3d(1, 3, 2), nn.BatchNorm3d(3), nn.LeakyReLU(0.1), nn.AvgPool3d(2), nn.Flatten(),
        nn.Linear(3, 3),
    )  # fmt: skip
    model(x(6, 1, 4, 4, 4))
    return Case(model.eval(), (x(4, 1, 4, 4, 4),), labels(4, 3), loss=False)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(5, 4), nn.Linear(5, 3), nn.Linear(7, 3)
        self.left, self.right = nn.Sigmoid(), nn.ReLU()

    def forward(self, value: Tensor) -> Tensor:
        return self.head(torch.cat([self.left(self.a(value)), self.right(self.b(value))], 1))


def branches() -> Case:
    return Case(Branches(), (x(6, 5),), labels(6, 3), loss=False, baselines=(x(1, 5),))


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.act, self.head = (
            nn.Linear(3, 5), nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 3)
        )  # fmt: skip

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.head(self.act(self.a(left) + self.b(right)))


def sum_of_two_inputs() -> Case:
    return Case(Sum(), (x(5, 3), x(5, 2)), labels(5, 3), loss=False, baselines=(0.5, x(5, 2)))


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.act, self.last = nn.Softplus(), nn.ELU()

    def forward(self, value: Tensor) -> Tensor:
        value = value + self.b(self.act(self.a(value)))
        return self.head(self.last(value))


def skip() -> Case:
    return Case(Skip(), (x(6, 5),), labels(6, 3), loss=False, baselines=(0.4,))


RESCALED = (
    smooth_mlp, tanh_mlp, deep_mlp, averaging_cnn, grouped_conv1d, transposed_conv, conv3d,
    branches, sum_of_two_inputs, skip,
)  # fmt: skip


@pytest.mark.parametrize("make", RESCALED)
def test_one_secant_is_deeplift_where_captum_has_the_rule(make):
    case = make()
    blame = case.blame("secant").check()
    given = {"baselines": case.baselines, "target": case.y}
    for name in case.layers(blame):
        other = theirs.LayerDeepLift(case.model, case.model.get_submodule(name))
        close(blame[name], other.attribute(case.inputs, **given), 1e-9)
    inputs = theirs.DeepLift(case.model).attribute(case.inputs, **given)
    for name, other in zip(("input", "input#2"), inputs, strict=False):
        close(blame[name], other, 1e-9)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, value: Tensor) -> Tensor:
        return self.b(self.a(value).relu())


class Weighing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.softmax = nn.Linear(5, 7), nn.Linear(7, 3), nn.Softmax(-1)

    def forward(self, value: Tensor) -> Tensor:
        return self.b(self.softmax(self.a(value)))


def gelu() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3))


def max_pool() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 5)), nn.MaxPool1d(2, 1), nn.Conv1d(1, 2, 2), nn.ReLU(), nn.Flatten(),
        nn.Linear(6, 3),
    )  # fmt: skip


@pytest.mark.parametrize("model", [Functional, Weighing, gelu, max_pool])
def test_secant_keeps_the_sum_where_captum_does_not(model):
    torch.manual_seed(0)
    case = Case(model(), (x(6, 5) * 3,), labels(6, 3), loss=False, baselines=(x(1, 5),))
    case.blame("secant", layers=["input"]).check(1e-10)
    _, delta = theirs.DeepLift(case.model).attribute(
        case.inputs, case.baselines, target=case.y, return_convergence_delta=True
    )
    assert delta.abs().max() > 1e-2


def test_captum_mixes_the_samples_of_a_softmax():
    torch.manual_seed(0)
    case = Case(Weighing(), (x(6, 5) * 3,), labels(6, 3), loss=False)
    alone = Case(case.model, (case.inputs[0][:1],), case.y[:1], loss=False)
    close(case.blame("secant")["input"][:1], alone.blame("secant")["input"], 1e-12)
    together, single = (
        theirs.DeepLift(case.model).attribute(c.inputs, target=c.y)[0] for c in (case, alone)
    )
    assert (together[:1] - single).abs().max() > 1e-3


def test_secant_treats_a_module_that_runs_twice_where_captum_refuses():
    act = nn.ReLU()
    case = Case(nn.Sequential(nn.Linear(5, 7), act, nn.Linear(7, 6), act, nn.Linear(6, 3)),
                (x(6, 5),), labels(6, 3), loss=False)  # fmt: skip
    case.blame("secant").check(1e-10)
    with pytest.raises(RuntimeError, match="being used more than once"):
        theirs.DeepLift(case.model).attribute(case.inputs, target=case.y)
