"""``logits``: the network linear up to its outputs, the loss evaluated exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from torchbp.blame.activations import reference_activations
from torchbp.blame.cut_off import without_cut_off
from torchbp.blame.methods.base import Method, Result, error_signals
from torchbp.blame.problem import Problem
from torchbp.blame.rerun import loss_can_be_repeated, losses_again

#: Rows of outputs evaluated at once; bounds memory to a few of them times the classes.
_ROWS = 1 << 16


def logits(problem: Problem) -> Result:
    """``b = l(z) - l(z - J (a - a0))``, one backward pass per output.

    ``J (a - a0)`` is what the unit adds to each output to first order. Exact for the last hidden
    layer and wherever the network above is locally linear. A number per sample, unit and output
    followed is held. Options:

    * ``rivals``: follow only the true class and so many others, each sample's strongest, in
      ``rivals + 1`` backward passes; all classes if ``None``.
    * ``seed``: of the baseline ``"resample"``.

    Raises:
        TypeError: if ``rivals`` is not an integer.
        ValueError: if the output is not ``[N]`` or ``[N, C]``, or ``rivals`` does not suit it.
    """
    run = problem.run()
    output = run.output
    if not isinstance(output, Tensor) or output.dim() not in (1, 2):
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"method 'logits' needs an output of shape [N] or [N, C], got {shape}")
    columns = output.reshape(len(output), -1)
    followed = _followed(problem, columns.detach())
    references = reference_activations(problem, run)
    shares: dict[str, list[Tensor]] = {name: [] for name in run.calls}
    for k in range(followed.shape[1]):
        objective = columns.gather(1, followed[:, k : k + 1]).sum()
        errors = error_signals(objective, [*run.calls.values()], retain_graph=True)
        for (name, call), error in zip(run.calls.items(), errors, strict=True):
            shares[name].append(problem.contribution(call, error, references[name]))
    found = {name: torch.stack(parts, -1) for name, parts in shares.items()}
    losses = run.losses.detach()
    rows = _ROWS if loss_can_be_repeated(problem, run) else 1
    values = {
        name: losses[:, None] - _losses_without(problem, output.detach(), share, followed, rows)
        for name, share in without_cut_off(problem, run, found).items()
    }
    return Result(values, run)


def _followed(problem: Problem, output: Tensor) -> Tensor:
    """``[N, k]`` the outputs to follow of every sample."""
    samples, classes = output.shape
    rivals = problem.option("rivals", None)
    if rivals is None:
        return torch.arange(classes, device=output.device).expand(samples, classes)
    if not isinstance(rivals, int) or isinstance(rivals, bool):
        raise TypeError(f"rivals: expected an integer or None, got {rivals!r}")
    if not 1 <= rivals < classes:
        raise ValueError(
            f"rivals: expected 1 to {classes - 1} for an output of {classes} classes, got {rivals}"
        )
    true = problem.targets
    if not isinstance(true, Tensor) or true.is_floating_point() or true.shape != (samples,):
        raise ValueError("rivals: expected targets that are class indices of shape [N]")
    # A sample whose class is ignored has no loss anyway.
    true = true.masked_fill(true == problem.head.settings.get("ignore_index", -100), 0)[:, None]
    others = output.scatter(1, true, -torch.inf).topk(rivals, 1).indices
    return torch.cat([true, others], 1)


def _losses_without(
    problem: Problem, output: Tensor, shares: Tensor, followed: Tensor, rows: int
) -> Tensor:
    """``[N, U]`` losses at ``output - share`` for shares ``[N, U, k]`` of the followed outputs."""
    n, units, _ = shares.shape
    step = max(1, rows // n)
    parts = []
    with torch.no_grad():
        for start in range(0, units, step):
            part = shares[:, start : start + step].transpose(0, 1)
            z = output.reshape(1, n, -1).repeat(len(part), 1, 1)
            z.scatter_add_(2, followed.expand(len(part), -1, -1), -part.to(z.dtype))
            z = z.reshape(len(part) * n, *output.shape[1:])
            parts.append(losses_again(problem, z, len(part)))
    return torch.cat(parts).T if parts else output.new_zeros(n, 0)


LOGITS = Method("logits", "removal", logits, ("rivals", "seed"))
