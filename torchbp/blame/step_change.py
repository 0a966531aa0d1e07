"""One step of a training: who changed the loss, in layers, units and weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from torchbp.tables import Table

BUFFERS = "(buffers)"
BARE = "(model)"

#: Units and weights on record for every step.
_KEPT = 5


@dataclass(frozen=True, repr=False)
class StepChange:
    """One step of the optimizer: how the loss on the probe batch changed, and through whom.

    Attributes:
        step: number of the step, counted from 0.
        before: loss before it.
        after: loss after it.
        layers: each layer's share of ``after - before``; positive: its change raised the loss.
        buffers: the share of buffers (running statistics).
        residual: ``after - before`` minus all shares: what is not accounted for.
        evaluations: gradients it took.
        units: the units with the largest shares in the direction of the change, as
            ``(layer, unit, share)``.
        weights: likewise, as ``(parameter, index, share)``.
    """

    step: int
    before: float
    after: float
    layers: dict[str, float]
    buffers: float
    residual: float
    evaluations: int
    units: tuple[tuple[str, int, float], ...] = ()
    weights: tuple[tuple[str, tuple[int, ...], float], ...] = ()

    @property
    def change(self) -> float:
        """``after - before``."""
        return self.after - self.before

    def tables(self) -> tuple[Table, Table, Table]:
        """Layers, largest share in the direction of the change first; top units; top weights."""
        sign = -1.0 if self.change < 0 else 1.0
        shares = {**self.layers, **({BUFFERS: self.buffers} if self.buffers else {})}
        layers = sorted(shares.items(), key=lambda item: -sign * item[1])
        title = (
            f"step {self.step}: loss {self.before:.4g} -> {self.after:.4g} ({self.change:+.4g}; "
            f"not accounted for: {self.residual:.1e})"
        )
        weights = [(name, str(list(index)), share) for name, index, share in self.weights]
        signed = ["change"]
        return (
            Table(("layer", "change"), layers, title=title, signed=signed),
            Table(("layer", "unit", "change"), self.units, title="units", signed=signed),
            Table(("parameter", "weight", "change"), weights, title="weights", signed=signed),
        )

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.tables()))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return "".join(table._repr_html_() for table in self.tables())


def per_unit(model: nn.Module, shares: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``[U]`` per layer: shares of weights summed over all but the unit they lead to.

    A parameter that does not fit the others of its layer stands under its own name.
    """
    found: dict[str, Tensor] = {}
    for name, share in shares.items():
        layer, _, own = name.rpartition(".")
        key, rows = _unit_rows(model.get_submodule(layer), layer, own, share)
        if key in found and found[key].shape != rows.shape:
            key = name
        found[key] = found[key] + rows if key in found else rows
    return found


def _unit_rows(module: nn.Module, layer: str, own: str, share: Tensor) -> tuple[str, Tensor]:
    if isinstance(module, _ConvTransposeNd) and share.dim() > 1:
        # [in, out / groups, ...]: the groups' inputs stand one after the other.
        grouped = share.flatten(2).sum(2).unflatten(0, (module.groups, -1))
        return layer or BARE, grouped.sum(1).flatten()
    rows = share.flatten(1).sum(1) if share.dim() > 1 else share.reshape(-1)
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and not own.startswith("weight_hr"):
        suffix = own.split("_", 2)[2:]
        key = ".".join(part for part in (layer, *suffix) if part)
        return key or BARE, rows.view(-1, module.hidden_size).sum(0)
    return layer or BARE, rows


def layer_of(name: str) -> str:
    """The module that a parameter belongs to."""
    return name.rpartition(".")[0] or BARE


def total_of(share: Tensor) -> float:
    """Sum of all entries, in double precision where there is one."""
    return float(share.sum(dtype=torch.float32 if share.device.type == "mps" else torch.float64))


def largest(shares: Mapping[str, Tensor], sign: float) -> list[tuple[str, tuple[int, ...], float]]:
    """The largest entries in the direction of ``sign``, with their place."""
    found = []
    for name, share in shares.items():
        best = (share.flatten() * sign).topk(min(_KEPT, share.numel()))
        for value, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            index = torch.unravel_index(torch.tensor(place), share.shape)
            found.append((name, tuple(int(i) for i in index), sign * value))
    return sorted(found, key=lambda row: -sign * row[2])[:_KEPT]
