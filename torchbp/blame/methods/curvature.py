"""``curvature``: the network linear up to its outputs, the loss to second order."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from torchbp.blame.activations import reference_activations, seed_of
from torchbp.blame.capture import Call
from torchbp.blame.loss_curvature import RandomCurvature, second_derivatives
from torchbp.blame.methods.base import Method, Result, error_signals
from torchbp.blame.methods.tangent import backward_pass
from torchbp.blame.problem import Problem, Run
from torchbp.ops.base import wide

_ESTIMATES = ("montecarlo", "exact", "empirical")


def curvature(problem: Problem) -> Result:
    """``b = t - u' H u / 2``: ``taylor``, and what the loss bends on the way.

    ``u = J (a - a0)`` is what a unit adds to the outputs of a sample, over all positions and tokens
    together, and ``H`` the second derivative of the loss by the outputs (the generalised
    Gauss-Newton matrix; Schraudolph 2002). Exact for squared error and a locally linear network;
    for losses with many terms per sample, where ``link`` has no closed form, the best there is.
    Options:

    * ``estimate``: ``"montecarlo"`` (unbiased: ``E (g . u)^2 = u' H u`` for random directions ``g``
      with ``E g g' = H``, one backward pass each; those of cross-entropy have random signs in
      place of labels drawn from the prediction, with the same mean), ``"exact"`` (one backward pass
      per number of a sample's output) or ``"empirical"`` (no further pass: ``u' H u`` is taken for
      the square of ``t``; for one target per position, as in a token loss, for the sum of each
      position's square).
    * ``draws``: random directions of ``"montecarlo"``.
    * ``seed``: of those, and of the baseline ``"resample"``.

    Raises:
        TypeError: if ``draws`` or ``seed`` is not an integer.
        ValueError: for an unknown estimate, ``draws`` below 1, or a loss the estimate cannot treat.
    """
    estimate = problem.option("estimate", "montecarlo")
    if estimate not in _ESTIMATES:
        raise ValueError(f"estimate: expected one of {', '.join(_ESTIMATES)}, got {estimate!r}")
    draws = problem.count_option("draws", 4)
    generator = torch.Generator().manual_seed(seed_of(problem))
    run, errors = backward_pass(problem, retain_graph=estimate != "empirical")
    references = reference_activations(problem, run)
    calls = {name: run.calls[name] for name in errors}
    values = {n: problem.contribution(c, errors[n], references[n]) for n, c in calls.items()}
    if estimate == "empirical":
        for name, call in calls.items():
            values[name] -= _own_square(problem, call, errors[name], references[name]) / 2
        return Result(values, run)
    if estimate == "exact":
        directions = _exact(problem, run)
    else:
        random = RandomCurvature(problem.head, run.output, problem.targets)
        share = run.losses.new_full((), 1 / draws)
        directions = ((random.draw(generator), share, random.outputs) for _ in range(draws))
    for direction, weight, outputs in directions:
        objective = torch.stack(
            [(o * g).sum() for o, g in zip(outputs, direction, strict=True)]
        ).sum()
        along = error_signals(objective, [*calls.values()], retain_graph=True)
        for (name, call), g in zip(calls.items(), along, strict=True):
            bend = problem.contribution(call, g, references[name]).square()
            values[name] -= bend * weight / 2
    return Result(values, run)


Directions = Iterator[tuple[list[Tensor], Tensor, list[Tensor]]]


def _exact(problem: Problem, run: Run) -> Directions:
    """The eigenvectors of every sample's second derivatives, weighted by their eigenvalues."""
    hessian = second_derivatives(problem.head, run.output, problem.targets)
    weights, vectors = torch.linalg.eigh(wide(hessian))
    for k in range(weights.shape[1]):
        yield [vectors[:, :, k].reshape_as(run.output)], weights[:, k, None], [run.output]


def _own_square(problem: Problem, call: Call, error: Tensor, reference: Tensor | None) -> Tensor:
    """``[N, players]``: the square of first-order blame, position by position where those count."""
    targets, dim = problem.targets, call.unit_dim % max(call.output.dim(), 2)
    positions = [size for d, size in enumerate(call.output.shape) if d not in (0, dim)]
    per_position = (
        problem.of == "units"
        and isinstance(targets, Tensor)
        and len(positions) > 0
        and list(targets.shape[1:]) == positions
    )
    if not per_position:
        return problem.contribution(call, error, reference).square()
    activation = call.output.detach()
    gap = activation if reference is None else activation - reference
    return problem.reduce((wide(gap) * wide(error)).square(), call)


CURVATURE = Method("curvature", "removal", curvature, ("estimate", "draws", "seed"))
