"""``logits``: the network linear up to its outputs, the loss evaluated exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from torchbp.blame.methods.base import Method, Result, error_signals
from torchbp.blame.problem import Problem

#: Rows of outputs evaluated at once; bounds memory to a few of them times the classes.
_ROWS = 1 << 16


def logits(problem: Problem) -> Result:
    """``b = l(z) - l(z - J a)``, one backward pass per output.

    ``J a`` is what the unit adds to each output to first order. Exact for the last hidden layer
    and wherever the network above is locally linear.

    Raises:
        ValueError: if the output is not ``[N]`` or ``[N, C]``.
    """
    run = problem.run()
    output = run.output
    if not isinstance(output, Tensor) or output.dim() not in (1, 2):
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"method 'logits' needs an output of shape [N] or [N, C], got {shape}")
    calls = [*run.calls.values()]
    columns = output[:, None] if output.dim() == 1 else output
    shares: list[list[Tensor]] = [[] for _ in calls]
    for c in range(columns.shape[1]):
        errors = error_signals(columns[:, c].sum(), calls, retain_graph=True)
        for share, call, error in zip(shares, calls, errors, strict=True):
            share.append(problem.contribution(call, error))
    losses = run.losses.detach()
    values = {
        name: losses[:, None] - _loss_without(problem, output.detach(), torch.stack(share, -1))
        for name, share in zip(run.calls, shares, strict=True)
    }
    return Result(values, run)


def _loss_without(problem: Problem, output: Tensor, shares: Tensor) -> Tensor:
    """``[N, U]`` losses at ``output - share`` for shares ``[N, U, C]``."""
    n, units, _ = shares.shape
    step = max(1, _ROWS // max(n, 1))
    parts = []
    with torch.no_grad():
        for start in range(0, units, step):
            part = shares[:, start : start + step]
            width = part.shape[1]
            z = output.reshape(n, 1, -1) - part
            targets = problem.targets.repeat_interleave(width, 0)
            flat = z.reshape(n * width, *output.shape[1:])
            parts.append(problem.head.per_sample(flat, targets).reshape(n, width))
    return torch.cat(parts, 1) if parts else output.new_zeros(n, 0)


LOGITS = Method("logits", "removal", logits)
