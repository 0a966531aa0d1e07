"""One backward pass: ``gradient``, ``taylor`` and ``link``."""

from __future__ import annotations

from torch import Tensor

from torchbp.blame.activations import reference_activations
from torchbp.blame.cut_off import without_cut_off
from torchbp.blame.definitions import link_blame, one_term_reason
from torchbp.blame.methods.base import Method, Result, error_signals
from torchbp.blame.problem import Problem, Run


def backward_pass(problem: Problem, *, retain_graph: bool = False) -> tuple[Run, dict[str, Tensor]]:
    """A forward pass and the error signal of every layer that the loss can be differentiated by.

    Raises:
        ValueError: for a layer that moves the loss, but has no error signal.
    """
    run = problem.run()
    calls = [*run.calls.values()]
    found = error_signals(run.losses.sum(), calls, retain_graph=retain_graph)
    return run, without_cut_off(problem, run, dict(zip(run.calls, found, strict=True)))


def gradient(problem: Problem) -> Result:
    """``Σ δ``: the error signal itself, summed over positions.

    Raises:
        ValueError: for a baseline: an error signal has none.
    """
    if problem.baseline is not None:
        raise ValueError("baseline: method 'gradient' measures against nothing; use 'taylor'")
    run, errors = backward_pass(problem)
    return Result({n: problem.reduce(e, run.calls[n]) for n, e in errors.items()}, run)


def taylor(problem: Problem) -> Result:
    """``t = Σ (a - a0) δ``: first-order estimate of what silencing the unit saves.

    Exact where the loss is linear in the activation (Mozer & Smolensky 1989; Molchanov 2017); with
    the activations of another input for ``a0``, attribution patching (Nanda 2023). The baseline is
    one of :func:`torchbp.blame.activations.reference_activations`.
    """
    run, errors = backward_pass(problem)
    references = reference_activations(problem, run)
    values = {
        name: problem.contribution(run.calls[name], error, references[name])
        for name, error in errors.items()
    }
    return Result(values, run)


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
            f"method 'link' needs one loss term per sample, but {reason}; use 'curvature', "
            "'taylor', or 'logits' where the output is [N, classes]"
        )
    losses = result.run.losses.detach()
    values = {
        name: link_blame(problem.head, t, losses, problem.targets)
        for name, t in result.values.items()
    }
    return Result(values, result.run)


GRADIENT = Method("gradient", "sensitivity", gradient)
TAYLOR = Method("taylor", "removal", taylor, ("seed",))
LINK = Method("link", "removal", link, ("seed",))
