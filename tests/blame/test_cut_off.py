"""Zero is the right blame of a dead branch, and a wrong one below something without gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchbp import attribute


class Cut(nn.Module):
    """A stem, something between, a head."""

    def __init__(self, between) -> None:
        super().__init__()
        self.stem, self.head, self.between = nn.Linear(4, 4), nn.Linear(4, 3), between

    def forward(self, x):
        return self.head(self.between(self.stem(x)))


def without_grad(h):
    with torch.no_grad():
        return h * 1.0


BETWEEN = {
    "detach": lambda h: h.detach(),
    "no_grad": without_grad,
    "argmax": lambda h: F.one_hot(h.argmax(1), 4).float(),
    "comparison": lambda h: (h > 0).float(),
    "round": lambda h: (3 * h).round(),
    "sign": torch.sign,
}


@pytest.mark.parametrize("method", ["taylor", "link", "logits", "curvature"])
@pytest.mark.parametrize("between", BETWEEN.values(), ids=BETWEEN.keys())
def test_a_layer_without_gradient_is_named(between, method):
    model, x, y = Cut(between), torch.randn(6, 4), torch.randint(3, (6,))
    with pytest.raises(ValueError, match="'stem': the output moves the loss, but not by a gradie"):
        attribute(model, x, y, F.cross_entropy, method, layers=["stem", "head"])
    blame = attribute(model, x, y, F.cross_entropy, "ablation", layers=["stem"])
    assert float(blame["stem"].abs().max()) > 0


@pytest.mark.parametrize("layers", [["stem", "head"], "all"], ids=["named", "all"])
@pytest.mark.parametrize(
    ("method", "baseline"),
    [("secant", None), ("secant", "layer"), ("lrp", None), ("conductance", None),
     ("layer_ig", None), ("internal_influence", None)],
)  # fmt: skip
def test_methods_that_allocate_name_it_too(method, baseline, layers):
    model, x, y = Cut(torch.detach), torch.randn(6, 4), torch.randint(3, (6,))
    given = dict(layers=layers, baseline=baseline)
    if layers != "all":
        with pytest.raises(ValueError, match="'stem': the output moves the loss, but not by a gra"):
            attribute(model, x, y, F.cross_entropy, method, **given)
        return
    with pytest.warns(UserWarning, match="'input', 'stem': the output moves .* Left out"):
        blame = attribute(model, x, y, F.cross_entropy, method, **given)
    assert [*blame] == ["head"] and {*blame.expected} <= {"head"}


def test_the_step_is_named():
    model, x, y = Cut(torch.floor), 3 * torch.randn(6, 4), torch.randint(3, (6,))
    with pytest.raises(ValueError, match=r"stands between them \(such as floor\)"):
        attribute(model, x, y, F.cross_entropy, "taylor", layers=["stem"])


def test_an_output_that_is_cut_off_altogether():
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return F.one_hot(self.head(self.stem(x).relu()).argmax(1), 3).float()

    x, y = torch.randn(9, 4), torch.randint(3, (9,))
    with pytest.raises(ValueError, match="Method 'ablation' needs no gradient"):
        attribute(Whole(), x, y, F.cross_entropy, "taylor")


def test_layers_that_were_not_asked_for_by_name_are_left_out_with_a_warning():
    model, x, y = Cut(torch.detach), torch.randn(6, 4), torch.randint(3, (6,))
    with pytest.warns(UserWarning, match="'input', 'stem': the output moves .* Left out") as caught:
        blame = attribute(model, x, y, F.cross_entropy, "taylor", layers="all")
    assert [*blame] == ["head"] and caught[0].filename == __file__


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.dead = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        self.dead(x)
        return self.used(x)


def test_a_dead_branch_is_zero():
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    blame = attribute(Branches(), x, y, F.cross_entropy, "taylor", layers=["used", "dead"])
    assert float(blame["dead"].abs().max()) == 0 and float(blame["used"].abs().min()) > 0


def test_dead_units_are_zero():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    nn.init.constant_(model[0].bias, -100.0)  # another output of layer 0 would move the loss
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    blame = attribute(model, x, y, F.cross_entropy, "taylor", layers=["0", "2"])
    assert float(blame["0"].abs().max()) == 0


def test_dead_units_beside_a_step_are_zero():
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dead, self.stepped, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(torch.cat([self.dead(x).relu(), self.stepped(x).sign()], 1))

    model = Beside()
    nn.init.constant_(model.dead.bias, -100.0)
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    blame = attribute(model, x, y, F.cross_entropy, "taylor", layers=["dead", "head"])
    assert float(blame["dead"].abs().max()) == 0


def test_a_perfect_batch_is_zero():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    nn.init.constant_(model[1].bias[:1], 1e4)
    blame = attribute(model, torch.randn(6, 4), torch.zeros(6).long(), F.cross_entropy, "taylor")
    assert float(blame["0"].abs().max()) == 0
