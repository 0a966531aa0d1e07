"""One backward pass: ``gradient``, ``taylor`` and ``link``."""

from __future__ import annotations

from torch import Tensor

from torchbp.blame.definitions import link_blame, one_term_reason
from torchbp.blame.methods.base import Method, Result, error_signals
from torchbp.blame.problem import Problem, Run


def _pass(problem: Problem) -> tuple[Run, list[Tensor]]:
    run = problem.run()
    return run, error_signals(run.losses.sum(), [*run.calls.values()])


def gradient(problem: Problem) -> Result:
    """``Σ δ``: the error signal itself, summed over positions."""
    run, errors = _pass(problem)
    pairs = zip(run.calls.items(), errors, strict=True)
    return Result({name: problem.reduce(e, c) for (name, c), e in pairs}, run)


def taylor(problem: Problem) -> Result:
    """``t = Σ a δ``: first-order estimate of what silencing the unit saves.

    Exact where the loss is linear in the activation (Mozer & Smolensky 1989; Molchanov 2017).
    """
    run, errors = _pass(problem)
    pairs = zip(run.calls.items(), errors, strict=True)
    return Result({name: problem.contribution(c, e) for (name, c), e in pairs}, run)


def link(problem: Problem) -> Result:
    """``taylor`` carried through the loss exactly: the network linear, the loss not.

    Exact for two classes or one output in a locally linear network. The derivation stands at
    :func:`torchbp.blame.definitions.log_odds_blame`.

    Raises:
        ValueError: if samples have more than one loss term.
    """
    result = taylor(problem)
    output = result.run.output
    reason = one_term_reason(problem.head, output, problem.targets)
    if reason is not None:
        raise ValueError(
            f"method 'link' needs one loss term per sample, but {reason}; use 'taylor', or "
            "'logits' where the output is [N, classes]"
        )
    losses = result.run.losses.detach()
    values = {
        name: link_blame(problem.head, t, losses, problem.targets)
        for name, t in result.values.items()
    }
    return Result(values, result.run)


GRADIENT = Method("gradient", "sensitivity", gradient)
TAYLOR = Method("taylor", "removal", taylor)
LINK = Method("link", "removal", link)
