"""``ablation``: silence a unit, run the rest of the network, and see. The ground truth."""

from __future__ import annotations

import torch
from torch import Tensor

from torchbp.blame.activations import reference_activations
from torchbp.blame.capture import Call, Of, first_tensor
from torchbp.blame.methods.base import Method, Result
from torchbp.blame.problem import Problem, Run
from torchbp.blame.rerun import can_be_repeated, losses_again, rerun

#: Bytes that the rest of the network may take at once, unless told otherwise.
MEMORY = 1 << 28

#: Tensors of the widest layer's size that are alive at once: an op's input and output, and what
#: convolutions and losses need beside them.
_ALIVE = 4


def ablation(problem: Problem) -> Result:
    """``b = L - L(unit := reference)`` for every unit of every layer, each by a forward pass.

    The rest of the network runs again from the layer on, see :func:`torchbp.blame.rerun.rerun`;
    many units go through in one batch, unless that would change the losses: in training mode, where
    a batch of its own gives every unit the same statistics and the same dropout, or where the loss
    or an input is made for one batch. Baselines are those of
    :func:`torchbp.blame.activations.reference_activations`. Options:

    * ``memory``: about how many bytes these batches may take; at least one unit goes at a time.
    * ``seed``: of the baseline ``"resample"``.

    Raises:
        TypeError: if ``memory`` is not an integer, or a layer's output cannot be replaced.
        ValueError: if ``memory`` is not positive, or the baseline does not fit.
    """
    memory = problem.option("memory", MEMORY)
    if not isinstance(memory, int) or isinstance(memory, bool):
        raise TypeError(f"memory: expected a number of bytes, got {memory!r}")
    if memory < 1:
        raise ValueError(f"memory: expected a positive number of bytes, got {memory}")
    run = problem.run()
    references = reference_activations(problem, run)
    rows = max(1, memory // (_ALIVE * _row_bytes(run)))
    step = max(1, rows // len(run.losses))
    if step > 1 and not can_be_repeated(problem, run):
        step = 1
    with torch.no_grad():
        values = {n: _ablate(problem, n, c, references[n], step) for n, c in run.calls.items()}
    return Result(values, run)


def _row_bytes(run: Run) -> int:
    """Bytes of the widest thing that one sample becomes, as far as it was recorded."""
    seen = [c.output for c in run.calls.values()] + [*run.sources]
    output = first_tensor(run.output)
    seen += [] if output is None else [output]
    return max(t.element_size() * max(t.numel() // max(len(t), 1), 1) for t in seen if t.dim())


def player_masks_shape(activation: Tensor, call: Call, of: Of) -> torch.Size:
    """Shape, without samples, of a mask with one entry per player that fits the activation."""
    dim = call.unit_dim % activation.dim()
    kept = {"units": [dim], "elements": [*range(1, activation.dim())]}.get(
        of, [d for d in range(1, activation.dim()) if d != dim]
    )
    return torch.Size(activation.shape[d] if d in kept else 1 for d in range(1, activation.dim()))


def _ablate(problem: Problem, name: str, call: Call, reference: Tensor | None, step: int) -> Tensor:
    """``[N, players]``, ``step`` of them at a time."""
    activation = call.output.detach()
    reference = torch.zeros_like(activation) if reference is None else reference
    reference = reference.expand_as(activation)
    if activation.dim() == 1:
        activation, reference = activation[:, None], reference[:, None]
    shape = player_masks_shape(activation, call, problem.of)
    players, rest = shape.numel(), rerun(problem, name, call)
    losses = losses_again(problem, rest(call.output.detach(), 1), 1)
    parts = []
    for start in range(0, players, step):
        chosen = torch.arange(start, min(start + step, players), device=activation.device)
        silent = torch.zeros(len(chosen), players, dtype=torch.bool, device=activation.device)
        silent.scatter_(1, chosen[:, None], True)
        silenced = torch.where(silent.view(-1, 1, *shape), reference, activation)
        output = rest(silenced.reshape(-1, *call.output.shape[1:]), len(chosen))
        parts.append(losses - losses_again(problem, output, len(chosen)))
    return torch.cat(parts).T if parts else losses.new_zeros(losses.shape[1], 0)


ABLATION = Method("ablation", "removal", ablation, ("memory", "seed"))
