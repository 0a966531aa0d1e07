"""Why two checkpoints of a model differ in loss: shared among their weights, exactly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchbp.blame.arguments import as_arguments, check_count, check_model
from torchbp.blame.capture import unknown
from torchbp.blame.definitions import LossHead, Question
from torchbp.blame.methods.base import gradients
from torchbp.blame.problem import Point, Problem
from torchbp.blame.result import default_tolerance
from torchbp.blame.state import checkpoint_state, differing, state_between
from torchbp.blame.summary import Summary
from torchbp.blame.tape import SecantTape
from torchbp.tables import Table


@dataclass(repr=False, eq=False)
class CheckpointBlame(Summary, Mapping[str, Tensor]):
    """Which weights changed the loss between two checkpoints, and by how much.

    A mapping from the name of every parameter and buffer that differs to a tensor of its shape:
    each weight's share of ``Σ_n l_n(after) - l_n(before)``. Positive: its change raised the loss.

    Attributes:
        shares: the mapping itself.
        losses: ``[N]`` un-averaged losses of the checkpoint after.
        reference_losses: ``[N]`` losses of the checkpoint before.
        buffers: names among the shares that are buffers (running statistics, say).
    """

    shares: dict[str, Tensor]
    losses: Tensor
    reference_losses: Tensor
    buffers: tuple[str, ...] = ()
    method = "secant between checkpoints"
    question: Question = "allocation"
    class_names = None

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shares:
            raise KeyError(unknown("parameter", name, [*self.shares]))
        return self.shares[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shares)

    def __len__(self) -> int:
        return len(self.shares)

    def layer_names(self) -> Iterator[str]:
        """Parameters and buffers that differ, in the order the model has them."""
        return iter(self.shares)

    def per_unit(self, layer: str, dim: int = 0) -> Tensor:
        """``[U]`` shares of one parameter, summed over all its dimensions but one.

        Args:
            layer: name of the parameter.
            dim: the dimension to keep. The first runs over the units a weight leads to (over the
                rows of an embedding, the gates of a recurrent layer, one after the other).
        """
        share = self[layer]
        if share.dim() == 0:
            return share[None]
        return share.movedim(dim, 0).flatten(1).sum(1) if share.dim() > 1 else share

    def unit_classes(self, layer: str) -> None:
        """There are no classes: the shares of all samples are one sum."""
        return None

    @property
    def expected(self) -> Tensor:
        """What all shares sum to: ``Σ_n l_n(after) - l_n(before)``."""
        return (self.losses - self.reference_losses).sum()

    @property
    def residual(self) -> dict[str, float]:
        """The error of the sum, relative to the change of the loss summed sample by sample."""
        total = torch.zeros_like(self.expected)
        for share in self.shares.values():
            total = total + share.sum()
        scale = (self.losses - self.reference_losses).abs().sum()
        error = (total - self.expected).abs()
        return {"all parameters": float(error / scale.clamp(min=torch.finfo(scale.dtype).tiny))}

    def check(self, tolerance: float | None = None) -> CheckpointBlame:
        """Make sure that the shares sum to the change of the loss.

        Args:
            tolerance: largest relative residual to accept; by default 1e-9 in float64, 1e-4 in
                float32 and 5e-2 below.

        Returns:
            Itself, so that a call can be chained.

        Raises:
            RuntimeError: if they do not.
        """
        allowed = default_tolerance(self.losses.dtype) if tolerance is None else tolerance
        residual = self.residual["all parameters"]
        if not residual <= allowed:  # written so that NaN fails
            raise RuntimeError(
                f"check: the shares of all parameters miss the change of the loss by "
                f"{residual:.2e} (relative), more than {allowed:.1e}"
            )
        return self

    def layers(self) -> Table:
        """One row per module: how many of its weights differ, their total, culprits, helpers."""
        groups: dict[str, list[Tensor]] = {}
        for name, share in self.shares.items():
            groups.setdefault(name.rpartition(".")[0] or "(model)", []).append(share.flatten())
        rows = []
        for name, parts in groups.items():
            values = torch.cat(parts)
            rows.append(
                (name, int(values.count_nonzero()), float(values.sum()),
                 float(values.clamp(min=0).sum()), float(values.clamp(max=0).sum()))
            )  # fmt: skip
        columns = ("layer", "weights", "total", "culprits", "helpers")
        title = f"change of the loss by layer ({self.method}: {self.question})"
        return Table(columns, rows, title=title, signed=columns[2:])

    def __repr__(self) -> str:
        return f"CheckpointBlame({len(self)} tensors, change {float(self.expected):+.4g})"


def checkpoint_blame(
    model: nn.Module,
    inputs: Any,
    targets: Any,
    loss_fn: Any,
    before: Any,
    after: Any = None,
    n_steps: int = 1,
) -> CheckpointBlame:
    """Share the difference in loss between two checkpoints among the weights that differ.

    The secant of every op between the two runs, on the same inputs, hands the change of the loss
    back to the parameters: a product of activation and weight gives each its difference times the
    other's midpoint. All shares sum to the change to rounding, however far apart the checkpoints
    are; a parameter that is used several times, or tied, gets one share for all uses.

    Args:
        model: a model of the checkpoints' architecture, in the mode in which they shall be judged.
        inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs.
        targets: as ``loss_fn`` takes them.
        loss_fn: ``loss_fn(output, targets)``, with any reduction; shares are of un-averaged losses.
        before: state dict or module; what a state dict leaves out is as in the model.
        after: likewise; the model itself if ``None``.
        n_steps: segments between the checkpoints: with many, shares tend to the path integral of
            the gradient.

    Returns:
        A :class:`CheckpointBlame`.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: naming a parameter of a checkpoint that the model does not have, or has in
            another shape; for wrong targets, an empty batch or ``n_steps`` below 1.
        NotImplementedError: naming a function between weights and loss that has no secant rule.
        RuntimeError: if the two runs call different functions or take different masks.
    """
    check_model(model)
    check_count("n_steps", n_steps)
    args, kwargs = as_arguments(inputs)
    start = checkpoint_state(model, before, "before")
    end = checkpoint_state(model, model if after is None else after, "after")
    changed = differing(start, end)
    problem = Problem(model, args, kwargs, targets, LossHead.of(loss_fn), "all")
    tape, shares = SecantTape(), {name: torch.zeros_like(end[name]) for name in changed}
    with problem.session():
        last = state_between(start, end, 0, changed)
        losses = first = problem.run(Point(args, kwargs, last), mode=tape).losses.detach()
        for k in range(1, n_steps + 1):
            state = state_between(start, end, k / n_steps, changed)
            objective = problem.run(Point(args, kwargs, state), mode=tape).losses
            multipliers = gradients(objective.sum(), [state[name] for name in changed])
            for name, m in zip(changed, multipliers, strict=True):
                shares[name] += m * (state[name] - last[name]).detach()
            losses, last = objective.detach(), state
    buffers = tuple(name for name, _ in model.named_buffers() if name in shares)
    return CheckpointBlame(shares, losses, first, buffers)
