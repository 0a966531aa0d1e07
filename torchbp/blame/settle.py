"""From what backward left behind to the sums of one step."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from torchbp import kernels
from torchbp.blame.definitions import LossHead, link_blame, sample_weights
from torchbp.blame.ledger import Layout, UnitSums
from torchbp.blame.watch import Entry


@dataclass
class Step:
    """What the loss said about one tracked step.

    Attributes:
        head: the loss.
        scale: what the un-averaged error signals were multiplied by.
        losses: ``[N]``, un-averaged.
        total: their sum.
        targets: as given by the user.
        output: ``[N, ...]`` what the loss was computed from.
    """

    head: LossHead
    scale: float
    losses: Tensor
    total: float
    targets: Any
    output: Tensor

    @property
    def labels(self) -> Tensor | None:
        """``[N]`` class indices, or ``None`` where the targets are none."""
        t = self.targets
        known = self.head.kind == "cross_entropy" and not t.is_floating_point() and t.dim() == 1
        return t if known else None


def settle(
    step: Step, entries: Sequence[Entry], method: str, first_order: Collection[str]
) -> tuple[UnitSums, Tensor]:
    """Sum the blame of a step over samples, and per sample over the units of each layer.

    Args:
        step: the loss side.
        entries: the layers, in forward order.
        method: ``"gradient"``, ``"taylor"`` or ``"link"``.
        first_order: layers that ``link`` must leave at first order.

    Returns:
        The sums over samples, and ``[N, layers]`` per sample.

    Raises:
        ValueError: if a layer's dimension 0 does not run over the samples.
    """
    n = len(step.losses)
    for e in entries:
        if len(e.contribution) != n:
            raise ValueError(
                f"layer {e.name!r}: dimension 0 has size {len(e.contribution)}, but there are "
                f"{n} samples; it must run over samples"
            )
    kind = "taylor" if method != "link" else "squared" if step.head.kind == "mse" else "log_odds"
    kinds = ["taylor" if e.name in first_order else kind for e in entries]
    contributions, stats = _of_one_dtype(entries)
    losses, labels, scale = step.losses.to(contributions[0].dtype), step.labels, step.scale
    if kind == "log_odds" and sample_weights(step.head, step.targets) is not None:
        contributions, stats = _with_class_weights(step, losses, kinds, contributions, stats)
        kinds, scale = ["taylor"] * len(kinds), 1.0
    n_classes = 0 if labels is None else step.output.shape[1]
    rows, per_class, per_sample = kernels.blame_settle(
        contributions, stats, losses, labels, n_classes, scale, kinds
    )
    layout = Layout(tuple(e.name for e in entries), tuple(c.shape[1] for c in contributions))
    elements = tuple(e.elements for e in entries)
    by_class = None if labels is None else per_class
    return UnitSums(layout, rows, by_class, elements, n, step.total), per_sample


def _of_one_dtype(entries: Sequence[Entry]) -> tuple[list[Tensor], list[Tensor]]:
    """Contributions and stats; a model may have float32 and float64 layers."""
    contributions, stats = [e.contribution for e in entries], [e.stats for e in entries]
    if len({c.dtype for c in contributions}) > 1:
        return [c.double() for c in contributions], [s.double() for s in stats]
    return contributions, stats


def _with_class_weights(
    step: Step,
    losses: Tensor,
    kinds: Sequence[str],
    contributions: Sequence[Tensor],
    stats: Sequence[Tensor],
) -> tuple[list[Tensor], list[Tensor]]:
    """Blame in place of contributions, everything unscaled: the kernel knows no class weights."""
    blame = [
        c / step.scale
        if kind == "taylor"
        else link_blame(step.head, c / step.scale, losses, step.targets)
        for c, kind in zip(contributions, kinds, strict=True)
    ]
    unscaled = [s.new_tensor([[1.0], [1.0], [step.scale**-2]]) * s for s in stats]
    return blame, unscaled
