"""``lrp`` from a logit equals Zennit 0.5 (Anders et al. 2021), element by element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import mlp
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from torchbp import attribute
from torchbp.ops.relevance import Rule

zennit = pytest.importorskip("zennit")
rules = pytest.importorskip("zennit.rules")
composites = pytest.importorskip("zennit.composites")
canonizers = pytest.importorskip("zennit.canonizers")

pytestmark = pytest.mark.models

LOW, HIGH = -5.0, 4.0
RULES: dict[str, tuple[Rule, Callable[[], Any]]] = {
    "epsilon": (Rule("epsilon", epsilon=0.1), lambda: rules.Epsilon(epsilon=0.1)),
    "lrp-0": (Rule("epsilon", epsilon=0), lambda: rules.Epsilon(epsilon=0)),
    "gamma": (Rule("gamma", gamma=0.3), lambda: rules.Gamma(gamma=0.3)),
    "zplus": (Rule("zplus"), lambda: rules.ZPlus()),
    "alphabeta": (Rule("alphabeta"), lambda: rules.AlphaBeta(2, 1)),
    "alphabeta 1.5": (Rule("alphabeta", alpha=1.5), lambda: rules.AlphaBeta(1.5, 0.5)),
    "w2": (Rule("w2"), lambda: rules.WSquare()),
    "flat": (Rule("flat"), lambda: rules.Flat()),
    "zb": (Rule("zb", low=LOW, high=HIGH), lambda: rules.ZBox(LOW, HIGH)),
}


def cnn(norm: bool) -> tuple[nn.Sequential, Tensor, Tensor]:
    """Convolutions with a bias, strides and groups, and every kind of pooling."""
    layers = [
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), nn.ReLU(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Dropout(), nn.Linear(5, 3),
    ]  # fmt: skip
    if not norm:
        layers.pop(1)
    model = nn.Sequential(*layers).double()
    for _ in range(3):
        model(torch.randn(5, 2, 8, 8, dtype=torch.float64))
    return model.eval(), torch.randn(4, 2, 8, 8, dtype=torch.float64), torch.randint(3, (4,))


def logit(output: Tensor, targets: Tensor) -> Tensor:
    return output.gather(1, targets[:, None])[:, 0]


def ours(model: nn.Module, x: Tensor, y: Tensor, given: Any) -> dict[str, Tensor]:
    blame = attribute(model, x, y, logit, "lrp", layers="all", of="elements", rules=given)
    blame.check()
    return dict(blame)


def theirs(model: nn.Module, x: Tensor, y: Tensor, composite: Any) -> dict[str, Tensor]:
    """Relevance of the input and of every layer's output."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            output.retain_grad()
            found[name] = output

        return hook

    x = x.clone().requires_grad_()
    with composite.context(model):
        handles = [m.register_forward_hook(keep(n)) for n, m in model.named_modules() if n]
        output = model(x)
        chosen = torch.zeros_like(output).scatter(1, y[:, None], 1)
        output.backward((output * chosen).detach())
        for handle in handles:
            handle.remove()
    return {"input": x.grad} | {name: tensor.grad for name, tensor in found.items()}


def everywhere(model: nn.Module, hook: Callable[[], Any]) -> Any:
    weighted = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    kinds = [
        (composites.Activation, rules.Pass()),
        (composites.AvgPool, rules.Norm()),
        (composites.BatchNorm, rules.Pass()),
    ]
    return composites.NameLayerMapComposite([(weighted, hook())], kinds)


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    compared = 0
    for name, expected in theirs.items():
        if name in ours:
            torch.testing.assert_close(ours[name], expected, rtol=1e-9, atol=1e-12, msg=name)
            compared += 1
    assert compared > 4 and expected.abs().sum() > 0


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("make", [mlp, lambda: cnn(norm=False)], ids=["mlp", "cnn"])
def test_every_rule(make: Callable[..., Any], rule: str) -> None:
    model, x, y = make()
    mine, hook = RULES[rule]
    given = {nn.Linear: mine, nn.Conv2d: mine}  # pooling keeps its small epsilon
    assert_same(ours(model, x, y, given), theirs(model, x, y, everywhere(model, hook)))


def test_passing_a_norm_by() -> None:
    model, x, y = cnn(norm=True)
    given = {nn.BatchNorm2d: "pass", "0": "zplus"}
    composite = composites.NameLayerMapComposite(
        [(["0"], rules.ZPlus())],
        [
            (composites.Activation, rules.Pass()),
            ((composites.AvgPool), rules.Norm()),
            (composites.BatchNorm, rules.Pass()),
            ((nn.Linear, nn.Conv2d), rules.Epsilon()),
        ],
    )
    assert_same(ours(model, x, y, given), theirs(model, x, y, composite))


def test_a_norm_merged_into_its_convolution() -> None:
    model, x, y = cnn(norm=True)
    model[1].eps = 0.0  # which Zennit forgets to clear when it has merged the norm
    composite = composites.EpsilonPlus(canonizers=[canonizers.SequentialMergeBatchNorm()])
    expected = theirs(model, x, y, composite)
    model[0], model[1] = fuse_conv_bn_eval(model[0], model[1]), nn.Identity()
    found = ours(model, x, y, {nn.Conv2d: "zplus"})
    assert_same(found, {n: expected[n] for n in ("input", "2", "3", "4", "5", "8", "9")})


@pytest.mark.parametrize(
    ("composite", "given"),
    [
        (lambda: composites.EpsilonPlusFlat(), {nn.Conv2d: "zplus", "0": "flat"}),
        (
            lambda: composites.EpsilonGammaBox(LOW, HIGH, gamma=0.1),
            {"0": Rule("zb", low=LOW, high=HIGH), nn.Conv2d: Rule("gamma", gamma=0.1)},
        ),
        (lambda: composites.EpsilonAlpha2Beta1(), {nn.Conv2d: "alphabeta"}),
        (lambda: composites.EpsilonAlpha2Beta1Flat(), {nn.Conv2d: "alphabeta", "0": "flat"}),
    ],
    ids=["plus flat", "gamma box", "alpha beta", "alpha beta flat"],
)
def test_composites(composite: Callable[[], Any], given: dict[Any, Any]) -> None:
    model, x, y = cnn(norm=False)
    assert_same(ours(model, x, y, given), theirs(model, x, y, composite()))


def test_box_limits_per_channel() -> None:
    model, x, y = cnn(norm=False)
    low, high = (torch.tensor([[[[v]], [[2 * v]]]], dtype=torch.float64) for v in (-4.0, 3.0))
    given = {"0": Rule("zb", low=low, high=high)}
    composite = composites.NameLayerMapComposite(
        [(["0"], rules.ZBox(low, high))],
        [
            (composites.Activation, rules.Pass()),
            (composites.AvgPool, rules.Norm()),
            ((nn.Linear, nn.Conv2d), rules.Epsilon()),
        ],
    )
    assert_same(ours(model, x, y, given), theirs(model, x, y, composite))
