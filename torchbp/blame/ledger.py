"""Running sums of the tracker: over units, and over samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torchbp.blame.frame import Frame, LayerFrame


@dataclass(frozen=True)
class Layout:
    """Where each layer's units stand when all layers are laid side by side."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """Cut the last dimension into layers."""
        return dict(zip(self.names, tensor.split(self.sizes, -1), strict=True))


@dataclass
class UnitSums:
    """Sums over samples for the units of all layers.

    Attributes:
        layout: where the layers stand.
        rows: ``[6, U]``: blame, its absolute value and square; zero count and square of the
            activation; square of the error signal.
        per_class: ``[C, U]`` blame by true class, or ``None``.
        elements: per layer, how many activations of one unit the sums saw (samples x positions).
        samples: how many samples.
        loss: sum of their losses.
    """

    layout: Layout
    rows: Tensor
    per_class: Tensor | None
    elements: tuple[int, ...]
    samples: int
    loss: float

    def copy(self) -> UnitSums:
        """The same sums in memory of their own: :meth:`add` writes in place."""
        per_class = None if self.per_class is None else self.per_class.clone()
        return replace(self, rows=self.rows.clone(), per_class=per_class)

    def add(self, other: UnitSums) -> None:
        """Add another step of the same layout."""
        # Sums run over a whole training, so they are kept in double precision where there is one.
        self.rows = _added(self.rows, other.rows)
        if self.per_class is not None and other.per_class is not None:
            if len(self.per_class) == len(other.per_class):
                self.per_class = _added(self.per_class, other.per_class)
            else:
                self.per_class = _padded_sum(_wide(self.per_class), other.per_class)
        self.elements = tuple(a + b for a, b in zip(self.elements, other.elements, strict=True))
        self.samples += other.samples
        self.loss += other.loss

    def layers(self) -> dict[str, LayerFrame]:
        """The sums, layer by layer, as people read them."""
        found = {}
        by_class = {} if self.per_class is None else self.layout.split(self.per_class)
        for (name, rows), count in zip(
            self.layout.split(self.rows).items(), self.elements, strict=True
        ):
            blame, absolute, square, zero, activation, error = rows
            found[name] = LayerFrame(
                blame, absolute, square, zero / count, (activation / count).sqrt(),
                (error / count).sqrt(), by_class.get(name),
            )  # fmt: skip
        return found

    def frame(self, step: int, method: str, class_names: Sequence[str] | None) -> Frame:
        """A frame of these sums."""
        loss = self.loss / max(self.samples, 1)
        return Frame(step, method, self.samples, loss, self.layers(), class_names)


def add_up(groups: list[UnitSums], sums: UnitSums) -> None:
    """Add one step's sums to the group of its layout; a new layout opens a group of its own."""
    for known in groups:
        if known.layout == sums.layout and (known.per_class is None) == (sums.per_class is None):
            known.add(sums)
            return
    groups.append(sums.copy())


def merged(groups: Sequence[UnitSums]) -> UnitSums:
    """Add up sums of different layouts (steps that missed a layer), layer by layer."""
    if len(groups) == 1:
        return groups[0].copy()
    rows: dict[str, Tensor] = {}
    by_class: dict[str, Tensor] = {}
    elements: dict[str, int] = {}
    for group in groups:
        classes = {} if group.per_class is None else group.layout.split(_wide(group.per_class))
        for name, part in group.layout.split(_wide(group.rows)).items():
            rows[name] = rows[name] + part if name in rows else part
            if name in classes:
                table = classes[name]
                by_class[name] = by_class[name] + table if name in by_class else table
        for name, count in zip(group.layout.names, group.elements, strict=True):
            elements[name] = elements.get(name, 0) + count
    layout = Layout(tuple(rows), tuple(part.shape[1] for part in rows.values()))
    whole = len(by_class) == len(rows)
    return UnitSums(
        layout,
        torch.cat([*rows.values()], 1),
        torch.cat([by_class[name] for name in rows], 1) if whole else None,
        tuple(elements[name] for name in rows),
        sum(group.samples for group in groups),
        sum(group.loss for group in groups),
    )


def _padded_sum(a: Tensor, b: Tensor) -> Tensor:
    """Sum of two tables of classes, of which one may have fewer rows. Neither is written to."""
    long, short = (a, b) if len(a) >= len(b) else (b, a)
    total = long.to(a.dtype, copy=True)
    total[: len(short)] += short
    return total


def _added(total: Tensor, more: Tensor) -> Tensor:
    """Sum of the two: written into ``total`` where that is wide already."""
    wide = _wide(total)
    return wide.add_(more) if wide is total else wide + more


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.device.type == "mps" else tensor.double()


def sample_ids(samples: Any, n: int) -> Tensor:
    """``[n]`` ids of a batch's samples, on the CPU.

    Raises:
        ValueError: if they are not ``n`` non-negative integers.
    """
    if isinstance(samples, range):  # torch would go through it one by one
        ids = torch.arange(samples.start, samples.stop, samples.step)
        if len(ids) == n and (n == 0 or min(samples[0], samples[-1]) >= 0):
            return ids
        samples = ids
    ids = torch.as_tensor(samples).cpu()
    if ids.is_floating_point() or ids.dtype == torch.bool or ids.shape != (n,):
        raise ValueError(
            f"samples: expected {n} integer ids, got {ids.dtype} of shape {tuple(ids.shape)}"
        )
    ids = ids.long()
    if n and int(ids.min()) < 0:
        raise ValueError(f"samples: ids must not be negative, got {int(ids.min())}")
    return ids


class SampleLedger:
    """What is known of every training sample: its loss over time, and the blame it caused."""

    def __init__(self) -> None:
        self.loss = torch.zeros(0, dtype=torch.float64)
        self.seen = torch.zeros(0, dtype=torch.int64)
        self.label = torch.zeros(0, dtype=torch.int64)
        self.rival = torch.zeros(0, dtype=torch.int64)
        self._tables: dict[tuple[str, ...], Tensor] = {}  # [n, layers] for every set of layers

    def add(
        self,
        samples: Tensor,
        losses: Tensor,
        layers: Sequence[str],
        blame: Tensor,
        labels: Tensor | None,
        predictions: Tensor | None,
    ) -> None:
        """Add one step.

        Args:
            samples: ``[N]`` ids, non-negative integers.
            losses: ``[N]``.
            layers: names of the layers.
            blame: ``[N, layers]``, summed over the units of each.
            labels: ``[N]`` true classes, or ``None``.
            predictions: ``[N]`` predicted classes, or ``None``.
        """
        self._grow(int(samples.max()) + 1 if len(samples) else 0)
        self.loss.index_add_(0, samples, losses.double().cpu())
        self.seen.index_add_(0, samples, torch.ones_like(samples))
        self._table(layers).index_add_(0, samples, blame.double().cpu())
        if labels is not None and predictions is not None:
            labels, predictions = labels.cpu(), predictions.cpu()
            self.label[samples] = labels
            wrong = labels != predictions
            self.rival[samples[wrong]] = predictions[wrong]

    @property
    def blame(self) -> dict[str, Tensor]:
        """Per layer ``[n]``, summed over its units and the steps."""
        found: dict[str, Tensor] = {}
        for layers, table in self._tables.items():
            for name, column in zip(layers, table.unbind(1), strict=True):
                found[name] = found[name] + column if name in found else column.clone()
        return found

    def _table(self, layers: Sequence[str]) -> Tensor:
        key = tuple(layers)
        if key not in self._tables:
            self._tables[key] = self.loss.new_zeros(len(self.loss), len(key))
        return self._tables[key]

    def _grow(self, size: int) -> None:
        more = size - len(self.loss)
        if more <= 0:
            return
        self.loss = torch.cat([self.loss, self.loss.new_zeros(more)])
        self.seen = torch.cat([self.seen, self.seen.new_zeros(more)])
        self.label = torch.cat([self.label, self.label.new_full((more,), -1)])
        self.rival = torch.cat([self.rival, self.rival.new_full((more,), -1)])
        self._tables = {
            k: torch.cat([t, t.new_zeros(more, len(k))]) for k, t in self._tables.items()
        }

    def suspicion(self) -> Tensor:
        """``[n]`` mean loss of every sample over the steps that saw it; NaN if none did."""
        mean = self.loss / self.seen.clamp(min=1)
        return mean.masked_fill(self.seen == 0, float("nan"))

    def state_dict(self) -> dict[str, Any]:
        """Tensors only, in memory of their own: :meth:`add` writes in place."""
        return {
            "loss": self.loss.clone(), "seen": self.seen.clone(), "label": self.label.clone(),
            "rival": self.rival.clone(), "blame": self.blame,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.loss, self.seen = state["loss"].clone(), state["seen"].clone()
        self.label, self.rival = state["label"].clone(), state["rival"].clone()
        blame = state["blame"]
        self._tables = {tuple(blame): torch.stack([*blame.values()], 1)} if blame else {}
