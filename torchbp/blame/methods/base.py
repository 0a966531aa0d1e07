"""What a method is, and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torchbp.blame.capture import Call
from torchbp.blame.definitions import Question
from torchbp.blame.problem import Problem, Run


@dataclass
class Result:
    """Blame of every unit of every layer, and what the method can say about its own sums.

    Attributes:
        values: per layer ``[N, players]``, in units of the un-averaged loss.
        run: the forward pass on the input.
        expected: per layer ``[N]``, what the blame of a sample and what was absorbed above the
            layer must sum to; only for methods that allocate, and only for layers that are a
            complete cut between input and loss.
        reference_losses: ``[N]`` losses at the reference, for methods that have one.
        absorbed: per layer ``[N]``, the part of ``expected`` that the model between the layer and
            the loss kept to itself (biases and stabilisers of LRP; a reference prediction).
    """

    values: dict[str, Tensor]
    run: Run
    expected: dict[str, Tensor] = field(default_factory=dict)
    reference_losses: Tensor | None = None
    absorbed: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """A way to answer one question about blame.

    Attributes:
        name: as users type it.
        question: ``"removal"`` (what would vanish with the unit), ``"allocation"`` (how is
            ``L - L(reference)`` shared) or ``"sensitivity"`` (unweighted error signal).
        solve: computes it.
        options: names of the settings it takes, beyond those of every method.
    """

    name: str
    question: Question
    solve: Callable[[Problem], Result]
    options: tuple[str, ...] = ()


def error_signals(
    objective: Tensor, calls: Sequence[Call], *, retain_graph: bool = False
) -> list[Tensor]:
    """``∂ objective / ∂ output`` of every call; zeros for layers without influence."""
    outputs = [c.output for c in calls]
    grads = torch.autograd.grad(objective, outputs, retain_graph=retain_graph, allow_unused=True)
    return [torch.zeros_like(a) if g is None else g for a, g in zip(outputs, grads, strict=True)]
