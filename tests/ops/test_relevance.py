"""Every op has an LRP rule or says why not; relevance is conserved and equals known formulas."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor

import torchbp.ops  # noqa: F401  fills the registry
from torchbp.ops.base import Op
from torchbp.ops.linear import Linear
from torchbp.ops.registry import OPS, Maker
from torchbp.ops.relevance import Rule, quotient
from torchbp.verify.cases import NotApplicable, of_entry
from torchbp.verify.secants import record

#: Ops whose relevance does not sum to what came, and what takes the difference.
ABSORBS: dict[str, str] = {
    "ConstantPad": "the constant of the border is a bias",
    "Softmax": "the Taylor expansion's constant term (Achtibat et al. 2024)",
    "Softmin": "as softmax",
    "BiasAct": "the bias",
}

TINY = Rule(epsilon=1e-12)


def calls(name: str) -> list[Any]:
    """Every op call of every sample of a registered functional."""
    found: list[Any] = []
    for case in of_entry(OPS[name]):
        with suppress(NotApplicable):
            found += record(case)
    return found


def has_bias(args: tuple[Any, ...]) -> bool:
    """Layers ``(x, weight, bias, ...)`` and the affine norms lose the bias's share."""
    return sum(isinstance(a, Tensor) and a.is_floating_point() for a in args) > 2


@pytest.mark.parametrize("name", OPS)
def test_every_op_has_a_rule_or_says_why_not(name: str) -> None:
    for op in {call.op for call in calls(name)}:
        own = "relevance" in {k for c in op.__mro__ if c not in Op.__mro__ for k in vars(c)}
        assert own != bool(op.no_relevance), f"{op.__name__}: a rule or a reason, not both"
        own = any("secant" in vars(c) for c in op.__mro__ if c not in Op.__mro__)
        assert own or op.no_secant, f"{op.__name__}: a secant or a reason"


@pytest.mark.parametrize("name", OPS)
def test_relevance_is_conserved(name: str) -> None:
    for call in calls(name):
        if call.op.no_relevance or call.op.__name__ in ABSORBS or has_bias(call.args):
            continue
        output = call.output[0] if isinstance(call.output, tuple) else call.output
        if not output.numel() or output.is_complex():
            continue
        arriving = torch.rand_like(output) + 0.5
        arriving = arriving * (output.detach() != 0)  # nothing came through a zero
        with torch.no_grad():
            shares = call.op.relevance(arriving, TINY, call.args, call.output)
        assert len(shares) == len(call.args), call.op.__name__
        for share, arg in zip(shares, call.args, strict=True):
            assert share is None or share.shape == arg.shape, call.op.__name__
        total = sum(s.sum() for s in shares if s is not None)
        torch.testing.assert_close(total, arriving.sum(), rtol=1e-6, atol=1e-6)


def linear_layer() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    make = Maker(requires_grad=False)
    return make(5, 4), make(3, 4), make(3), make(5, 3)


def shares_by_hand(z: Tensor, relevance: Tensor) -> Tensor:
    """``R_i = Σ_j z_ij / Σ_i z_ij R_j`` from the contributions ``z [N, j, i]``."""
    shares = (z / z.sum(-1, keepdim=True)).nan_to_num(0)  # nothing came, nothing is shared
    return (shares * relevance[..., None]).sum(1)


@pytest.mark.parametrize("name", ["epsilon", "zplus", "alphabeta", "w2", "flat", "zb", "gamma"])
def test_rules_of_a_linear_layer_by_hand(name: str) -> None:
    x, w, _, relevance = linear_layer()
    rule = Rule(name, epsilon=0, low=-4.0, high=4.0)  # type: ignore[arg-type]
    got = Linear.relevance(relevance, rule, (x, w, None), x @ w.T)[0]
    z = x[:, None, :] * w
    up, down = z.clamp(min=0), z.clamp(max=0)
    if name == "alphabeta":
        expected = 2 * shares_by_hand(up, relevance) - shares_by_hand(down, relevance)
    elif name == "gamma":
        favoured = z + rule.gamma * torch.where(z.sum(-1, keepdim=True) >= 0, up, down)
        expected = shares_by_hand(favoured, relevance)
    else:
        contributions = {
            "epsilon": z,
            "zplus": up,
            "w2": (w**2).expand_as(z),
            "flat": torch.ones_like(z),
            "zb": z + 4 * w.clamp(min=0) - 4 * w.clamp(max=0),
        }[name]
        expected = shares_by_hand(contributions, relevance)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_the_bias_takes_its_share() -> None:
    x, w, b, relevance = linear_layer()
    z = x @ w.T + b
    got = Linear.relevance(relevance, Rule(epsilon=0), (x, w, b), z)[0]
    taken = (relevance * b / z).sum()
    torch.testing.assert_close(got.sum() + taken, relevance.sum())


def test_epsilon_keeps_the_digits_of_float64() -> None:
    got = quotient(torch.ones(2, dtype=torch.float64), torch.tensor([1.0, -1.0]).double(), 0.1)
    assert got.tolist() == [1 / (1 + 0.1), 1 / (-1 - 0.1)]


@pytest.mark.parametrize("name", ["flat", "zb"])
def test_rules_that_look_at_no_activation_leave_the_bias_out(name: str) -> None:
    x, w, b, relevance = linear_layer()
    rule = Rule(name, epsilon=0, low=-4.0, high=4.0)  # type: ignore[arg-type]
    with_bias = Linear.relevance(relevance, rule, (x, w, b), x @ w.T + b)[0]
    torch.testing.assert_close(with_bias.sum(), relevance.sum())
    without = Linear.relevance(relevance, rule, (x, w, None), x @ w.T)[0]
    torch.testing.assert_close(with_bias, without)


def test_box_limits_may_differ_between_features() -> None:
    x, w, _, relevance = linear_layer()
    low, high = torch.tensor([-3.0, -4, -5, -6]).double(), torch.tensor([3.0, 5, 4, 6]).double()
    rule = Rule("zb", epsilon=0, low=low, high=high)
    got = Linear.relevance(relevance, rule, (x, w, None), x @ w.T)[0]
    z = x[:, None, :] * w - low * w.clamp(min=0) - high * w.clamp(max=0)
    torch.testing.assert_close(got, shares_by_hand(z, relevance), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["batch_norm", "layer_norm", "group_norm"])
def test_norms_can_be_passed_by(name: str) -> None:
    for call in calls(name):
        x = call.args[0]
        arriving = torch.rand_like(x)
        shares = call.op.relevance(arriving, Rule("pass"), call.args, call.output)
        assert torch.equal(shares[0], arriving)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        (dict(name="delta"), "name: expected one of epsilon"),
        (dict(epsilon=-1.0), "epsilon=-1.0"),
        (dict(alpha=0.5), "alpha=0.5"),
        (dict(low=2.0), "low: must not exceed high"),
    ],
)
def test_rules_that_make_no_sense_are_refused(settings: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        Rule(**settings)


def test_relevance_keeps_a_half_dtype() -> None:
    x, weight = torch.randn(3, 5, dtype=torch.bfloat16), torch.randn(4, 5, dtype=torch.bfloat16)
    y = x @ weight.mT
    shares = Linear.relevance(y, Rule("gamma"), (x, weight, None), y)
    assert shares[0] is not None and shares[0].dtype == torch.bfloat16
