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
from typing import Any, Literal, NoReturn, get_args

import torch
from torch import Tensor

RuleName = Literal["epsilon", "gamma", "zplus", "alphabeta", "w2", "zb", "flat", "pass"]
Shares = tuple[Tensor | None, ...]
Part = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class Rule:
    """Which LRP rule linear layers, convolutions and recurrent layers follow.

    All other ops have one rule each, of which ``epsilon`` is the only setting; norms know ``pass``
    besides.

    Attributes:
        name: ``epsilon`` (proportional to ``x w``), ``gamma`` (contributions of the output's sign
            favoured), ``zplus`` (positive contributions only), ``alphabeta``, ``w2`` (proportional
            to ``w²``), ``zb`` (inputs known to lie in ``[low, high]``), ``flat`` (equal shares) or
            ``pass`` (handed on as it is, where the output has the input's shape).
        epsilon: added to a denominator, away from zero.
        gamma: weight of the favoured contributions.
        alpha: share of the positive contributions; the negative ones get ``1 - alpha``.
        low: least value an input can have, for ``zb``; a tensor broadcasts with the input.
        high: greatest value an input can have, likewise.

    Raises:
        ValueError: if there is no rule of that name, or if a number is out of its range.
    """

    name: RuleName = "epsilon"
    epsilon: float = 1e-6
    gamma: float = 0.25
    alpha: float = 2.0
    low: float | Tensor = 0.0
    high: float | Tensor = 1.0

    def __post_init__(self) -> None:
        names = get_args(RuleName)
        if self.name not in names:
            raise ValueError(f"name: expected one of {', '.join(names)}, got {self.name!r}")
        if self.epsilon < 0 or self.gamma < 0 or self.alpha < 1:
            raise ValueError(
                "epsilon and gamma must not be negative, and alpha not below 1; got "
                f"epsilon={self.epsilon}, gamma={self.gamma}, alpha={self.alpha}"
            )
        if bool(torch.as_tensor(self.low > self.high).any()):
            raise ValueError(f"low: must not exceed high, got {self.low} > {self.high}")


def quotient(relevance: Tensor, z: Tensor, epsilon: float) -> Tensor:
    """``relevance / (z + epsilon sign(z))``; zero where nothing came to ``z`` and epsilon is 0."""
    # The signs are exact in any dtype; epsilon itself would be rounded to float32 by where.
    stabilised = z + epsilon * torch.where(z < 0, -1.0, 1.0).to(z.dtype)
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
    others = (None,) * (len(args) - 1)
    if rule.name == "pass":
        return passed(relevance, x), *others
    total = torch.zeros_like(x)
    for share, condition, parts in _groups(rule, x, weight, bias):
        # The ops' own backward, rather than their secant, spares the weight's part of it.
        inputs = [part[0].detach().requires_grad_() for part in parts]
        with torch.enable_grad():
            z = [op.call(v, *p[1:], *settings) for v, p in zip(inputs, parts, strict=True)]
        which = relevance if condition is None else relevance * condition(output)
        s = quotient(which, sum(z[1:], z[0]).detach(), rule.epsilon) * share
        for v, back in zip(inputs, torch.autograd.grad(z, inputs, [s] * len(z)), strict=True):
            total = total + v.detach() * back
    return total, *others


def passed(relevance: Tensor, x: Tensor) -> Tensor:
    """The rule ``pass``: relevance of the output as relevance of the input.

    Raises:
        ValueError: if their shapes differ.
    """
    if relevance.shape != x.shape:
        raise ValueError(
            "rule 'pass' needs an output of the input's shape, got "
            f"{tuple(relevance.shape)} for {tuple(x.shape)}"
        )
    return relevance


def only_epsilon(name: str, rule: Rule) -> NoReturn:
    """Refuse a rule for what multiplies by constants, but is no layer that knows the rule.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(
        f"rule {rule.name!r} holds for linear layers, convolutions and recurrent layers; {name} by "
        "a constant has the rule 'epsilon' alone"
    )


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
            return [(1.0, None, [(torch.ones_like(x), torch.ones_like(w), None)])]
        case _:  # zb: the bias is no input's contribution and cancels (Montavon et al. 2017)
            low, high = (torch.as_tensor(v).to(x).expand_as(x) for v in (rule.low, rule.high))
            return [(1.0, None, [(x, w, None), (-low, plus(w), None), (-high, minus(w), None)])]


def _negative(output: Tensor) -> Tensor:
    return output < 0


def _not_negative(output: Tensor) -> Tensor:
    return output >= 0
