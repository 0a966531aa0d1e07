"""Layer-wise relevance propagation (LRP): the rules that ops share.

An op's ``relevance(relevance, rule, args, output)`` hands the relevance of its output on to its
arguments: one tensor per argument, ``None`` for parameters and constants. What a bias or the
stabiliser takes is not handed on; everything else is conserved. An op writes its rule beside its
secant, mostly by naming one of these::

    relevance = classmethod(passes)

Sources: Bach et al. 2015 (epsilon, alpha-beta, flat), Montavon et al. 2017 (z+, w², zB), Montavon
et al. 2019 (gamma), Andéol et al. 2021 (gamma for inputs of both signs), Achtibat et al. 2024
(softmax, products and norms in transformers).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

RuleName = Literal["epsilon", "gamma", "zplus", "alphabeta", "w2", "zb", "flat"]
Shares = tuple[Tensor | None, ...]
Part = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class Rule:
    """Which LRP rule layers with weights follow; all other layers have one rule each.

    Attributes:
        name: ``epsilon`` (proportional to ``x w``), ``gamma`` (positive contributions favoured),
            ``zplus`` (positive contributions only), ``alphabeta``, ``w2`` (proportional to ``w²``),
            ``zb`` (inputs known to lie in ``[low, high]``) or ``flat`` (equal shares).
        epsilon: added to a denominator, away from zero.
        gamma: weight of the favoured contributions.
        alpha: share of the positive contributions; the negative ones get ``1 - alpha``.
        low: least value an input can have, for ``zb``.
        high: greatest value an input can have, for ``zb``.

    Raises:
        ValueError: if there is no rule of that name, or if a number is out of its range.
    """

    name: RuleName = "epsilon"
    epsilon: float = 1e-6
    gamma: float = 0.25
    alpha: float = 2.0
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        names = get_args(RuleName)
        if self.name not in names:
            raise ValueError(f"name: expected one of {', '.join(names)}, got {self.name!r}")
        if self.epsilon < 0 or self.gamma < 0 or self.alpha < 1:
            raise ValueError(
                "epsilon and gamma must not be negative, and alpha not below 1; got "
                f"epsilon={self.epsilon}, gamma={self.gamma}, alpha={self.alpha}"
            )
        if self.low > self.high:
            raise ValueError(f"low: must not exceed high, got {self.low} > {self.high}")


def quotient(relevance: Tensor, z: Tensor, epsilon: float) -> Tensor:
    """``relevance / (z + epsilon sign(z))``; zero where nothing came to ``z`` and epsilon is 0."""
    stabilised = z + torch.where(z < 0, -epsilon, epsilon).to(z.dtype)
    return torch.where(stabilised == 0, 0, relevance / stabilised.masked_fill(stabilised == 0, 1))


def passes(op: Any, relevance: Tensor, rule: Rule, args: tuple[Any, ...], output: Any) -> Shares:
    """Elementwise functions hand on what they get."""
    return relevance, *(None,) * (len(args) - 1)


def routes(op: Any, relevance: Tensor, rule: Rule, args: tuple[Any, ...], output: Any) -> Shares:
    """What copies or selects elements hands relevance back to where each came from."""
    return _transposed(op, relevance, args, output), *(None,) * (len(args) - 1)


def proportional(
    op: Any, relevance: Tensor, rule: Rule, args: tuple[Any, ...], output: Any
) -> Shares:
    """A map linear in its first argument: shares in proportion to the contributions to a sum."""
    first = output[0] if isinstance(output, tuple) else output
    back = _transposed(op, quotient(relevance, first, rule.epsilon), args, output)
    return args[0] * back, *(None,) * (len(args) - 1)


def weighted(op: Any, relevance: Tensor, rule: Rule, args: tuple[Any, ...], output: Any) -> Shares:
    """Layers ``(x, weight, bias, *settings)`` that are linear in x and in the weight."""
    x, weight, bias, *settings = args
    total = torch.zeros_like(x)
    for share, condition, parts in _groups(rule, x, weight, bias):
        z = [op.forward(*part, *settings) for part in parts]
        which = relevance if condition is None else relevance * condition(output)
        s = quotient(which, sum(z[1:], z[0]), rule.epsilon) * share
        for part, out in zip(parts, z, strict=True):
            total = total + part[0] * _transposed(op, s, (*part, *settings), out)
    return total, *(None,) * (len(args) - 1)


def _transposed(op: Any, m: Tensor, args: tuple[Any, ...], output: Any) -> Tensor:
    # Between a run and itself the secant is the tangent.
    result: Tensor = op.secant(m, args, args, output, output)[0]
    return result


def _groups(rule: Rule, x: Tensor, w: Tensor, b: Tensor | None) -> list[tuple[float, Any, Any]]:
    """What relevance is shared out among: (share, outputs concerned or all, contributions)."""

    def plus(t: Tensor | None) -> Any:
        return None if t is None else t.clamp(min=0)

    def minus(t: Tensor | None) -> Any:
        return None if t is None else t.clamp(max=0)

    match rule.name:
        case "epsilon":
            return [(1.0, None, [(x, w, b)])]
        case "gamma":
            more = w + rule.gamma * plus(w), w + rule.gamma * minus(w)
            shift = [None if b is None else b + rule.gamma * f(b) for f in (plus, minus)]
            up = [(plus(x), more[0], shift[0]), (minus(x), more[1], None)]
            down = [(plus(x), more[1], shift[1]), (minus(x), more[0], None)]
            return [(1.0, _not_negative, up), (1.0, _negative, down)]
        case "zplus":
            return [(1.0, None, [(plus(x), plus(w), plus(b)), (minus(x), minus(w), None)])]
        case "alphabeta":
            positive = [(plus(x), plus(w), plus(b)), (minus(x), minus(w), None)]
            negative = [(plus(x), minus(w), minus(b)), (minus(x), plus(w), None)]
            return [(rule.alpha, None, positive), (1 - rule.alpha, None, negative)]
        case "w2":
            square = None if b is None else b.square()
            return [(1.0, None, [(torch.ones_like(x), w.square(), square)])]
        case "flat":
            one = None if b is None else torch.ones_like(b)
            return [(1.0, None, [(torch.ones_like(x), torch.ones_like(w), one)])]
        case _:
            low, high = torch.full_like(x, -rule.low), torch.full_like(x, -rule.high)
            return [(1.0, None, [(x, w, b), (low, plus(w), None), (high, minus(w), None)])]


def _negative(output: Tensor) -> Tensor:
    return output < 0


def _not_negative(output: Tensor) -> Tensor:
    return output >= 0
