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
        n_steps: segments or nodes of its path, unless told otherwise.
    """

    name: str
    question: Question
    solve: Callable[[Problem], Result]
    options: tuple[str, ...] = ()
    n_steps: int = 1


def error_signals(
    objective: Tensor, calls: Sequence[Call], *, retain_graph: bool = False
) -> list[Tensor]:
    """``∂ objective / ∂ output`` of every call; zeros for layers without influence."""
    return gradients(objective, [c.output for c in calls], retain_graph=retain_graph)


def gradients(
    objective: Tensor, tensors: Sequence[Tensor], *, retain_graph: bool = False
) -> list[Tensor]:
    """``∂ objective`` by every tensor; zeros for those without influence."""
    if not objective.requires_grad or not tensors:
        return [torch.zeros_like(a) for a in tensors]
    grads = torch.autograd.grad(objective, tensors, retain_graph=retain_graph, allow_unused=True)
    return [torch.zeros_like(a) if g is None else g for a, g in zip(tensors, grads, strict=True)]


def left_at_cut(total: Tensor | float, change: Tensor, shares: Tensor) -> Tensor:
    """``[N]`` of what never reached a cut and is known for the batch only.

    A sample's own part is what conservation leaves for it. Should the parts not add up to the
    batch's, the error is spread over the samples, so that the residual shows it.

    Args:
        total: what the parameters or ops above the cut are known to have kept, over the batch.
        change: ``[N]`` what each sample's blame must come to.
        shares: ``[N, players]`` blame at the cut.
    """
    left = change - shares.flatten(1).sum(1)
    return left + (total - left.sum()) / len(left)
