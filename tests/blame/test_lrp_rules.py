"""Which rule of ``lrp`` holds for which layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import mlp
from torch import Tensor, nn

from torchbp import attribute
from torchbp.blame.methods.lrp import layer_rules
from torchbp.ops.relevance import Rule

CE = F.cross_entropy


def test_rules_by_name_pattern_and_class() -> None:
    model = nn.Sequential(
        nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3)), nn.Linear(3, 3)
    )
    rule_of = layer_rules(
        model, {"0.1": "w2", "0.*": "flat", nn.Linear: "zplus", "0": Rule("gamma", gamma=1.0)}
    )
    assert rule_of("0.1").name == "w2"  # its own name first
    assert rule_of("0.0").name == "zplus"  # then the last that fits
    assert rule_of("0.2").name == "flat"
    assert rule_of("1").name == "zplus"
    assert rule_of("0").gamma == 1.0 and rule_of("").name == "epsilon"
    around = layer_rules(model, {"0": "zplus"})
    assert (around("0.2").name, around("1").name) == ("zplus", "epsilon")


def test_rules_reach_the_layers_they_are_for() -> None:
    model, x, y = mlp()
    mixed = attribute(model, x, y, CE, "lrp", layers="all", rules={"2": "zplus", nn.Linear: "w2"})
    for rules, layer in (("w2", "3"), ({"2": "zplus", "4": "w2"}, "1")):
        expected = attribute(model, x, y, CE, "lrp", layers="all", rules=rules)
        torch.testing.assert_close(mixed[layer], expected[layer])
        assert not torch.allclose(mixed["input"], expected["input"])


class Products(nn.Module):
    """One linear map, written in several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(5))
        self.head, self.way = nn.Linear(5, 4), way

    def forward(self, x: Tensor) -> Tensor:
        match self.way:
            case "linear":
                y = F.linear(x, self.weight.T, self.bias)
            case "addmm":
                y = torch.addmm(self.bias, x, self.weight)
            case "einsum":
                y = torch.einsum("ni,ij->nj", x, self.weight) + self.bias
            case _:
                y = x @ self.weight + self.bias
        return self.head(torch.relu(y))


@pytest.mark.parametrize("rule", ["epsilon", "zplus"])
def test_rules_hold_for_linear_maps_without_a_module(rule: str) -> None:
    _, x, y = mlp()
    made = []
    for way in ("linear", "addmm"):
        torch.manual_seed(1)
        made.append(attribute(Products(way).double(), x, y, CE, "lrp", layers="all", rules=rule))
    torch.testing.assert_close(made[1]["input"], made[0]["input"])
    torch.manual_seed(1)
    product = attribute(Products("@").double(), x, y, CE, "lrp", layers="all", rules=rule)
    product.check()
    if rule == "epsilon":
        torch.testing.assert_close(product["input"], made[0]["input"], rtol=1e-4, atol=1e-6)


def test_rules_that_a_product_has_not_are_refused() -> None:
    _, x, y = mlp()
    model = Products("einsum").double()
    attribute(model, x, y, CE, "lrp", layers="all").check()
    with pytest.raises(NotImplementedError, match=r"own forward: rule 'zplus' .* einsum"):
        attribute(model, x, y, CE, "lrp", layers="all", rules="zplus")


def test_pass_needs_equal_shapes() -> None:
    model, x, y = mlp()
    square = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4)).double()
    blame = attribute(square, x, y, CE, "lrp", layers="all", rules={"0": "pass"})
    torch.testing.assert_close(blame["input"], blame["0"])
    with pytest.raises(
        ValueError, match=r"lrp: module '2': rule 'pass' .* got \(9, 7\) for \(9, 8"
    ):
        attribute(model, x, y, CE, "lrp", layers="all", rules={"2": "pass"})


@pytest.mark.parametrize(
    ("rules", "error", "what"),
    [
        ({"3.weight": "zplus"}, ValueError, "rules: unknown name '3.weight'"),
        ({"features.*": "zplus"}, ValueError, r"rules: unknown name 'features.\*'"),
        ({"0": "z+"}, ValueError, "rules: unknown name 'z[+]'; did you mean 'zb'|known: epsilon"),
        ("zpluss", ValueError, "did you mean 'zplus'"),
        ({0: "zplus"}, TypeError, "expected names or module classes as keys, got 0"),
        ({F.relu: "zplus"}, TypeError, "expected names or module classes as keys"),
        (0.1, TypeError, "expected a Rule or its name, got 0.1"),
        ({"1": "zplus"}, ValueError, "rules: nothing in layer '1' follows rule 'zplus'"),
        ({"3": "pass", "0": "w2"}, ValueError, "rules: nothing in layer '3' follows rule 'pass'"),
        (None, TypeError, "expected a Rule or its name, got None"),
    ],
)
def test_rules_that_make_no_sense_are_refused(
    rules: Any, error: type[Exception], what: str
) -> None:
    model, x, y = mlp()
    with pytest.raises(error, match=what):
        attribute(model, x, y, CE, "lrp", rules=rules)
