"""From what backward left behind to the sums of one step."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
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
        targets: as given by the user.
        output: ``[N, ...]`` what the loss was computed from.
    """

    head: LossHead
    scale: float
    losses: Tensor
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
) -> tuple[UnitSums, dict[str, Tensor]]:
    """Sum the blame of a step over samples, and per sample over the units of each layer.

    Args:
        step: the loss side.
        entries: the layers, in forward order.
        method: ``"gradient"``, ``"taylor"`` or ``"link"``.
        first_order: layers that ``link`` must leave at first order.

    Returns:
        The sums over samples, and ``[N]`` per layer.

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
    # Layer by layer: joining the contributions first would copy them all.
    done = [_layer(step, e, "taylor" if e.name in first_order else kind) for e in entries]
    layout = Layout(tuple(e.name for e in entries), tuple(e.contribution.shape[1] for e in entries))
    stats = torch.cat([e.stats for e in entries], 1)
    stats[2] /= step.scale**2
    rows = torch.cat([_joined([d[0] for d in done]), stats])
    per_class = None if step.labels is None else _joined([d[1] for d in done])
    elements = tuple(e.elements for e in entries)
    sums = UnitSums(layout, rows, per_class, elements, n, float(step.losses.sum()))
    per_sample = _joined([d[2] for d in done]).unbind(1)
    return sums, dict(zip(layout.names, per_sample, strict=True))


def _layer(step: Step, entry: Entry, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    contribution, scale = entry.contribution, step.scale
    losses, labels = step.losses.to(contribution.dtype), step.labels
    if kind == "log_odds" and sample_weights(step.head, step.targets) is not None:
        # Class weights are rare: the kernel does without them.
        contribution = link_blame(step.head, contribution / scale, losses, step.targets)
        kind, scale = "taylor", 1.0
    n_classes = 0 if labels is None else step.output.shape[1]
    sizes = (contribution.shape[1],)
    return kernels.blame_settle(contribution, losses, labels, n_classes, scale, kind, sizes)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([*parts], 1)
