"""The views that every result shares: top units, layers, tables for terminal and notebook."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from torchbp.blame.arguments import check_count
from torchbp.blame.definitions import Question
from torchbp.blame.frame import class_name, worst_class
from torchbp.tables import Table


class Summary:
    """Blame summed over samples, and the tables people read.

    Subclasses give ``layer_names``, ``per_unit`` and ``unit_classes``.
    """

    method: str
    question: Question
    class_names: Sequence[str] | None

    def layer_names(self) -> Iterable[str]:
        """Layers, in the order of the forward pass."""
        raise NotImplementedError

    def per_unit(self, layer: str) -> Tensor:
        """``[U]`` blame summed over samples."""
        raise NotImplementedError

    def unit_classes(self, layer: str) -> Tensor | None:
        """``[C, U]`` blame per true class; ``None`` where the targets are not classes."""
        raise NotImplementedError

    @property
    def residual(self) -> dict[str, float]:
        """Relative error of conservation per complete cut; empty where nothing is allocated."""
        return {}

    def top(self, k: int = 10, layer: str | None = None) -> Table:
        """The ``k`` units with the highest blame: the worst culprits first.

        Args:
            k: how many rows.
            layer: only this layer's units; all layers if ``None``.

        Returns:
            Columns: layer, unit, blame (summed over samples), share of the layer's absolute blame,
            and the true class it hurts most, where targets are classes.
        """
        names = [layer] if layer is not None else [*self.layer_names()]
        totals = {name: self.per_unit(name) for name in names}
        by_class = {name: self.unit_classes(name) for name in names}
        classes = any(table is not None for table in by_class.values())
        rows = []
        for name, unit, value in _largest(totals, k):
            share = value / max(float(totals[name].abs().sum()), 1e-300)
            row: list[object] = [name, unit, value, f"{100 * share:.1f} %"]
            if classes:
                worst = worst_class(by_class[name], unit)
                row.append(None if worst is None else self.class_name(worst))
            rows.append(row)
        columns = ["layer", "unit", "blame", "share", *(["hurts most"] if classes else [])]
        title = f"top blame ({self.method}: {self.question})"
        return Table(columns, rows, title=title, signed=["blame"])

    def to_table(self) -> Table:
        """One row per unit: layer, unit and blame summed over samples."""
        rows = [
            (name, unit, value)
            for name in self.layer_names()
            for unit, value in enumerate(self.per_unit(name).tolist())
        ]
        title = f"blame ({self.method}: {self.question})"
        return Table(("layer", "unit", "blame"), rows, title=title, signed=["blame"])

    def to_pandas(self) -> Any:
        """The rows of :meth:`to_table` as a ``pandas.DataFrame``."""
        return self.to_table().to_pandas()

    def layers(self) -> Table:
        """One row per layer: units, total, culprits, helpers and conservation residual."""
        residual = self.residual
        rows = []
        for name in self.layer_names():
            unit = self.per_unit(name)
            rows.append(
                (name, unit.numel(), float(unit.sum()), float(unit.clamp(min=0).sum()),
                 float(unit.clamp(max=0).sum()), residual.get(name))
            )  # fmt: skip
        columns = ("layer", "units", "total", "culprits", "helpers", "residual")
        title = f"blame by layer ({self.method}: {self.question})"
        return Table(columns, rows, title=title, signed=["total", "culprits", "helpers"])

    def class_name(self, index: int) -> str:
        """Name of a class, or its index."""
        return class_name(self.class_names, index)

    def __str__(self) -> str:
        return f"{self.layers()}\n\n{self.top()}"

    def _repr_html_(self) -> str:
        return self.layers()._repr_html_() + self.top()._repr_html_()


def _largest(totals: dict[str, Tensor], k: int) -> Iterator[tuple[str, int, float]]:
    """The ``k`` largest values over all layers, with their layer and unit."""
    check_count("k", k)
    found: list[tuple[float, str, int]] = []
    for name, values in totals.items():
        best = values.topk(min(k, values.numel()))
        found += [
            (v, name, u) for v, u in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
    for value, name, unit in sorted(found, key=lambda row: -row[0])[:k]:
        yield name, unit, value
