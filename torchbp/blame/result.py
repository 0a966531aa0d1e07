"""The result of an attribution: blame per sample and unit, and the sums people ask for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchbp.blame.capture import Of, unknown
from torchbp.blame.definitions import Question
from torchbp.blame.samples import drivers, has_classes
from torchbp.blame.summary import Summary
from torchbp.tables import Table

#: Relative residuals that rounding explains.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def default_tolerance(dtype: torch.dtype) -> float:
    """The largest relative residual that rounding in ``dtype`` explains."""
    return _TOLERANCE.get(dtype, 5e-2)


@dataclass(repr=False, eq=False)
class Blame(Summary, Mapping[str, Tensor]):
    """Blame of every unit of every layer, sample by sample.

    A mapping from layer name to a ``[N, *players]`` tensor in units of the un-averaged loss:
    ``[N, U]`` for units, ``[N, *positions]`` or ``[N, *shape]`` where those were asked for.
    Positive blame raises the loss (a culprit), negative blame lowers it (a helper).

    Attributes:
        units: the mapping itself.
        method: which method made it.
        question: what it answers: ``"removal"``, ``"allocation"`` or ``"sensitivity"``.
        targets: the targets it was made for.
        output: the model's output, where it is a tensor.
        losses: ``[N]`` un-averaged losses.
        reference_losses: ``[N]`` losses at the reference, for methods that have one.
        expected: per layer ``[N]`` what the blame of each sample, with what was absorbed, must sum
            to; only for allocating methods and for layers that are a complete cut.
        absorbed: per layer ``[N]`` what the model above the layer kept of it: biases and
            stabilisers of LRP, a prediction taken for reference.
        of: what the numbers belong to: ``"units"``, ``"positions"`` or ``"elements"`` of a layer.
        class_names: names of the classes, where given.
    """

    units: dict[str, Tensor]
    method: str
    question: Question
    targets: Any
    output: Tensor | None
    losses: Tensor
    reference_losses: Tensor | None = None
    expected: dict[str, Tensor] = field(default_factory=dict)
    class_names: Sequence[str] | None = None
    absorbed: dict[str, Tensor] = field(default_factory=dict)
    of: Of = "units"

    def __getitem__(self, layer: str) -> Tensor:
        if layer not in self.units:
            raise KeyError(unknown("layer", layer, [*self.units]))
        return self.units[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self.units)

    def __len__(self) -> int:
        return len(self.units)

    def per_unit(self, layer: str) -> Tensor:
        """``[U]`` blame summed over samples (one number per position or element for those)."""
        return self[layer].sum(0).flatten()

    def per_sample(self, layer: str) -> Tensor:
        """``[N]`` blame summed over the units of a layer."""
        return self[layer].flatten(1).sum(1)

    def per_class(self, layer: str) -> Tensor:
        """``[C, U]`` blame summed over the samples of each true class.

        Raises:
            ValueError: if the targets are not class indices.
        """
        values, targets = self[layer].flatten(1), self._classes()
        out = values.new_zeros(self._n_classes(), values.shape[1])
        judged = self._judged()
        return out.index_add_(0, targets[judged], values[judged])

    def per_pair(self, layer: str, true: int, predicted: int) -> Tensor:
        """``[U]`` blame summed over the samples of one true class predicted as another.

        Raises:
            ValueError: if the targets are not class indices or the output has no classes.
        """
        chosen = (self._classes() == true) & (self.predictions() == predicted)
        return self[layer][chosen].sum(0).flatten()

    def samples(self, layer: str, unit: int | tuple[int, ...], k: int = 10) -> Table:
        """The ``k`` samples that drive a unit's blame; see :func:`torchbp.blame.drivers`."""
        return drivers(self, layer, unit, k)

    def predictions(self) -> Tensor:
        """``[N]`` predicted classes.

        Raises:
            ValueError: if the output is not ``[N, C]``.
        """
        if self.output is None or self.output.dim() != 2:
            raise ValueError("predictions: the output is not of shape [N, C]")
        return self.output.argmax(1)

    def confusions(self) -> Table:
        """Pairs of true and predicted class that were confused, worst total loss first."""
        true, predicted = self._classes(), self.predictions()
        wrong = self._judged() & (true != predicted)
        pairs, where = torch.unique(
            torch.stack([true[wrong], predicted[wrong]], 1), dim=0, return_inverse=True
        )
        losses = self.losses.new_zeros(len(pairs)).index_add_(0, where, self.losses[wrong])
        counts = torch.bincount(where, minlength=len(pairs))
        rows = [
            (self.class_name(int(pairs[i, 0])), self.class_name(int(pairs[i, 1])),
             int(counts[i]), float(losses[i]))
            for i in losses.argsort(descending=True).tolist()
        ]  # fmt: skip
        return Table(("true", "predicted", "samples", "loss"), rows, title="confusions")

    @property
    def residual(self) -> dict[str, float]:
        """Per complete cut: largest error of conservation over samples, relative.

        ``max |Σ blame + absorbed - (L - L0)| / max(|L - L0|)``; empty for methods that do not
        allocate.
        """
        out = {}
        for layer, expected in self.expected.items():
            error = (self.per_sample(layer) + self.absorbed.get(layer, 0) - expected).abs().max()
            scale = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
            out[layer] = float(error / scale)
        return out

    def conservation(self) -> Table:
        """One row per complete cut: the sum, what it should be, what was absorbed, the residual.

        Sums run over samples; the residual is the worst sample's, as :attr:`residual` has it.
        """
        residual = self.residual
        rows = []
        for layer, expected in self.expected.items():
            absorbed = self.absorbed.get(layer)
            taken = 0.0 if absorbed is None else float(absorbed.sum())
            blame = float(self[layer].sum())
            rows.append((layer, blame, taken, float(expected.sum()), residual[layer]))
        columns = ("layer", "blame", "absorbed", "expected", "residual")
        title = f"conservation at complete cuts ({self.method}: {self.question})"
        return Table(columns, rows, title=title, signed=("blame", "absorbed", "expected"))

    def check(self, tolerance: float | None = None) -> Blame:
        """Make sure that nothing was lost at any complete cut.

        Args:
            tolerance: largest relative residual to accept; by default 1e-9 in float64, 1e-4 in
                float32 and 5e-2 below. Methods that approximate an integral (``conductance``,
                ``layer_ig``) are conserved to their quadrature's error only: say how much of it
                is fine.

        Returns:
            Itself, so that a call can be chained.

        Raises:
            ValueError: if the method does not allocate, or no layer is a complete cut: there is
                nothing to check.
            RuntimeError: naming the layers at which blame does not sum to what it should.
        """
        if not self.expected:
            raise ValueError(
                f"check: method {self.method!r} answers {self.question}, or no layer here is a "
                "complete cut between input and loss: there is no sum to conserve"
            )
        if tolerance is None:
            tolerance = default_tolerance(self.losses.dtype)
        # Written so that NaN fails.
        broken = [(n, r) for n, r in self.residual.items() if not r <= tolerance]
        if broken:
            said = ", ".join(f"{name!r} by {r:.2e}" for name, r in broken)
            raise RuntimeError(
                f"check: method {self.method!r} is not conserved within {tolerance:.1e} (relative) "
                f"at layer {said}"
            )
        return self

    def __repr__(self) -> str:
        layers = ", ".join(f"{n}: {tuple(v.shape)}" for n, v in self.units.items())
        return f"Blame(method={self.method!r}, question={self.question!r}, {layers})"

    def _classes(self) -> Tensor:
        if not has_classes(self.targets):
            raise ValueError("per class: the targets are not class indices of shape [N]")
        return self.targets

    def _judged(self) -> Tensor:
        """``[N]`` whether the target is a class, and not an index that the loss ignores."""
        return (self._classes() >= 0) & (self._classes() < self._n_classes())

    def _n_classes(self) -> int:
        if self.output is not None and self.output.dim() == 2:
            return self.output.shape[1]
        return max(int(self._classes().max()) + 1, 0)

    def layer_names(self) -> Iterator[str]:
        """Layers, in the order of the forward pass."""
        return iter(self.units)

    def unit_classes(self, layer: str) -> Tensor | None:
        """``[C, U]`` blame per true class; ``None`` where the targets are not classes."""
        return self.per_class(layer) if has_classes(self.targets) else None
