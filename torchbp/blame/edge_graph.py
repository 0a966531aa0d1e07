"""A network as a graph whose edges carry blame."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from torchbp.blame.arguments import check_count
from torchbp.blame.capture import unknown
from torchbp.blame.definitions import Question
from torchbp.tables import Table

#: A unit's index, or ``"rest"``: all units that are not shown.
Unit = int | Literal["rest"]


@dataclass(frozen=True, eq=False)
class LayerFlow:
    """What flows through one call of a linear or convolution layer.

    Attributes:
        name: of the call (``name#2`` for the second one of a layer).
        source: the call whose units are the columns (the last weighted layer before, or the input),
            where activations, norms and pooling alone lie between; ``None`` where something else
            does (a sum of branches, say).
        edges: ``[O, I]``, ``w_ji Σ_n δ_nj a_ni``: blame that passes from column to row unit.
        bias: ``[O]``, what the bias adds to each row unit.
        rows: which unit each row stands for.
        columns: which unit of ``source`` (or which input of the layer) each column stands for.
    """

    name: str
    source: str | None
    edges: Tensor
    bias: Tensor
    rows: Sequence[Unit]
    columns: Sequence[Unit]

    @property
    def arriving(self) -> Tensor:
        """``[O]``: blame of the row units: of the layer's output, before any activation."""
        return self.edges.sum(1) + self.bias

    @property
    def leaving(self) -> Tensor:
        """``[I]``: the column units' blame, as far as it passes through this layer."""
        return self.edges.sum(0)


@dataclass(repr=False, eq=False)
class EdgeFlow(Mapping[str, LayerFlow]):
    """The blame that flows along every edge of a network: a mapping from call to its flow.

    Nodes are units of layers, edges are weights (of a convolution: the sum over its kernel), and
    the flow along an edge is what it contributes to the loss, summed over the batch. Sums over
    edges are the units' blame; :meth:`prune` keeps them.

    Attributes:
        flows: the mapping itself.
        method: ``"taylor"`` or ``"secant"``.
        question: what it answers.
        missing: modules with weights that no flow is given for (embeddings, recurrent layers,
            attention, and linear layers with a forward of the user's own), by name.
    """

    flows: dict[str, LayerFlow]
    method: str
    question: Question
    missing: tuple[str, ...] = ()

    def __getitem__(self, layer: str) -> LayerFlow:
        if layer not in self.flows:
            raise KeyError(unknown("layer", str(layer), [*self.flows]))
        return self.flows[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self.flows)

    def __len__(self) -> int:
        return len(self.flows)

    def nodes(self) -> dict[tuple[str, Unit], float]:
        """Blame of every node ``(layer, unit)``: what arrives there, or leaves an input."""
        found: dict[tuple[str, Unit], float] = {}
        for name, flow in self.flows.items():
            source = flow.source or f"{name}:input"
            if source not in self.flows:
                for unit, value in zip(flow.columns, flow.leaving.tolist(), strict=True):
                    found[source, unit] = found.get((source, unit), 0.0) + value
            for unit, value in zip(flow.rows, flow.arriving.tolist(), strict=True):
                found[name, unit] = value
        return found

    def edges(self) -> Iterator[tuple[tuple[str, int | str], tuple[str, Unit], float]]:
        """Every edge: node it leaves, node it enters, blame. A bias leaves ``(layer, "bias")``."""
        for name, flow in self.flows.items():
            source = flow.source or f"{name}:input"
            for row, values, bias in zip(
                flow.rows, flow.edges.tolist(), flow.bias.tolist(), strict=True
            ):
                for column, value in zip(flow.columns, values, strict=True):
                    yield (source, column), (name, row), value
                if bias:
                    yield (name, "bias"), (name, row), bias

    def prune(self, k: int) -> EdgeFlow:
        """Keep the ``k`` units of each layer with the most blame flowing through them.

        All others of a layer become one node, ``"rest"``, whose edges are the sums of theirs: what
        a layer passes on, in all and at every unit kept, stays what it was.

        Args:
            k: how many units of each layer (and of the input) to keep.

        Raises:
            ValueError: if ``k`` is not a positive integer.
        """
        check_count("k", k)
        through: dict[str, dict[Unit, float]] = {}
        for name, flow in self.flows.items():
            size = flow.edges.abs()
            source = flow.source or f"{name}:input"
            _count(through.setdefault(name, {}), flow.rows, size.sum(1) + flow.bias.abs())
            _count(through.setdefault(source, {}), flow.columns, size.sum(0))
        kept = {layer: _largest(units, k) for layer, units in through.items()}
        flows = {}
        for name, flow in self.flows.items():
            rows, to_row = _merged(flow.rows, kept[name])
            columns, to_column = _merged(flow.columns, kept[flow.source or f"{name}:input"])
            edges = flow.edges.new_zeros(len(rows), len(flow.columns))
            edges.index_add_(0, to_row, flow.edges)
            small = edges.new_zeros(len(rows), len(columns)).index_add_(1, to_column, edges)
            bias = flow.bias.new_zeros(len(rows)).index_add_(0, to_row, flow.bias)
            flows[name] = replace(flow, edges=small, bias=bias, rows=rows, columns=columns)
        return replace(self, flows=flows)

    def top(self, k: int = 10) -> Table:
        """The ``k`` edges that raise the loss most."""
        check_count("k", k)
        found: list[tuple[float, str, int, int]] = []
        for name, flow in self.flows.items():
            best = flow.edges.flatten().topk(min(k, flow.edges.numel()))
            found += [
                (v, name, *divmod(i, len(flow.columns)))
                for v, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ]
        rows = [
            (self[n].source or f"{n}:input", self[n].columns[c], n, self[n].rows[r], value)
            for value, n, r, c in sorted(found, key=lambda row: -row[0])[:k]
        ]
        return self._table(rows, "top edges")

    def to_table(self) -> Table:
        """One row per edge; prune large networks first."""
        rows = [(*a, *b, value) for a, b, value in self.edges()]
        return self._table(rows, "edges")

    def _table(self, rows: Sequence[Sequence[object]], title: str) -> Table:
        columns = ("from", "unit", "to", "unit of it", "blame")
        title = f"{title} ({self.method}: {self.question})"
        return Table(columns, rows, title=title, signed=["blame"])

    def __repr__(self) -> str:
        count = sum(f.edges.numel() for f in self.flows.values())
        return f"EdgeFlow({len(self)} layers, {count} edges, {self.method})"

    def __str__(self) -> str:
        return str(self.top())

    def _repr_html_(self) -> str:
        return self.top()._repr_html_()


def _count(through: dict[Unit, float], units: Sequence[Unit], sizes: Tensor) -> None:
    for unit, size in zip(units, sizes.tolist(), strict=True):
        through[unit] = through.get(unit, 0.0) + size


def _largest(through: dict[Unit, float], k: int) -> list[Unit]:
    named = sorted((u for u in through if u != "rest"), key=lambda u: -through[u])[:k]
    return [u for u in through if u in set(named)]


def _merged(units: Sequence[Unit], kept: Sequence[Unit]) -> tuple[list[Unit], Tensor]:
    """The units left, and which of them each old one goes to."""
    place = {unit: i for i, unit in enumerate(kept)}
    left: list[Unit] = [*kept] if len(kept) == len(set(units)) else [*kept, "rest"]
    return left, torch.tensor([place.get(unit, len(kept)) for unit in units])
