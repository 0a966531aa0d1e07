"""Blame of single weights, exact for every sample and never held for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from torchbp.blame.arguments import check_count
from torchbp.blame.capture import unknown
from torchbp.blame.definitions import Question
from torchbp.blame.sample_gradients import MEMORY, SampleGradients, sample_gradients
from torchbp.blame.summary import Summary
from torchbp.tables import Table

Score = Literal["signed", "absolute"]


class WeightBlame(Summary, Mapping[str, Tensor]):
    """How much every weight contributes to the loss of a batch, to first order.

    A mapping from parameter name to ``w Σ_n g_n``, of the parameter's shape, in units of the
    un-averaged loss: positive where the weight raises the loss (a culprit), negative where it
    lowers it (a helper). It estimates what setting the weight to zero would save. Everything else
    is computed when asked for.

    A row of weights that a norm follows (batch, layer or group norm) has a signed sum of zero,
    whatever it does, because the norm undoes a common factor: there look at :meth:`absolute`, or at
    single weights.

    Attributes:
        gradients: the per-sample gradients behind it.
        weights: the parameters as they were, by name.
        targets: as given.
        unused: parameters that the loss does not depend on; their blame is zero.
        class_names: names of the classes, where given.
    """

    method = "taylor"
    question: Question = "removal"

    def __init__(
        self,
        gradients: SampleGradients,
        weights: dict[str, Tensor],
        targets: Any,
        class_names: Sequence[str] | None,
        memory: int,
    ) -> None:
        self.gradients, self.weights, self.targets = gradients, weights, targets
        self.unused, self.class_names, self._memory = gradients.unused, class_names, memory
        self._signed: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._signed:
            signed = self.gradients.total(self._known(name)).mul_(self.weights[name])
            if not bool(torch.isfinite(signed).all()):
                raise FloatingPointError(f"parameter {name!r}: its blame holds NaN or infinity")
            self._signed[name] = signed
        return self._signed[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def _known(self, name: str) -> str:
        if name not in self.weights:
            raise KeyError(unknown("parameter", str(name), [*self.weights]))
        return name

    def signed(self, name: str) -> Tensor:
        """``w Σ_n g_n``, of the parameter's shape."""
        return self[name]

    def absolute(self, name: str) -> Tensor:
        """``Σ_n |w g_n|``: how much a weight moves the samples' losses, up or down."""
        if self._known(name) in self.unused:
            return torch.zeros_like(self.weights[name])
        found = self.gradients.factor(name).absolute(self._memory)
        return found.mul_(self.weights[name]).abs_()

    def square(self, name: str) -> Tensor:
        """``Σ_n g_n²``, the gradient's second moment (the empirical Fisher's diagonal)."""
        if self._known(name) in self.unused:
            return torch.zeros_like(self.weights[name])
        return self.gradients.factor(name).square(self._memory)

    def per_class(self, name: str, classes: Sequence[int] | None = None) -> Tensor:
        """``[C, *shape]``: signed blame, summed over the samples of each true class.

        Args:
            name: of the parameter.
            classes: only these; all if ``None``.

        Raises:
            ValueError: if the targets are not class indices, a class is out of range, or the result
                would be larger than the memory budget: ask for some classes then, or for
                :meth:`unit_classes`.
        """
        labels, count = self._labels()
        wanted = [*range(count)] if classes is None else [*classes]
        for c in wanted:
            if not isinstance(c, int) or not 0 <= c < count:
                raise ValueError(f"classes: expected indices in [0, {count}), got {c!r}")
        weight = self.weights[self._known(name)]
        size = len(wanted) * weight.numel() * weight.element_size()
        if size > self._memory:
            raise ValueError(
                f"per_class: {name!r} takes {size} bytes for {len(wanted)} classes, more than the "
                f"memory budget of {self._memory}; ask for some classes, or for unit_classes"
            )
        return self._by_class(name, labels, wanted)

    def _by_class(self, name: str, labels: Tensor, wanted: Sequence[int]) -> Tensor:
        weight = self.weights[name]
        if name in self.unused:
            return weight.new_zeros(len(wanted), *weight.shape)
        place = torch.full_like(labels, len(wanted))  # all other classes, and ignored samples
        for i, c in enumerate(wanted):
            place[labels == c] = i
        grouped = self.gradients.factor(name).grouped(place, len(wanted) + 1, self._memory)
        return grouped[:-1].mul_(weight)

    def _labels(self) -> tuple[Tensor, int]:
        targets, output = self.targets, self.gradients.output
        is_index = isinstance(targets, Tensor) and not targets.is_floating_point()
        if not is_index or targets.shape != self.gradients.losses.shape:
            raise ValueError("per_class: the targets are not one class index for each sample")
        if isinstance(output, Tensor) and output.dim() == 2:
            return targets, output.shape[1]
        return targets, int(targets.max()) + 1

    def layer_names(self) -> Iterable[str]:
        """The parameters, in the model's order."""
        return self.weights

    def per_unit(self, layer: str) -> Tensor:
        """``[U]``: signed blame of each row (dimension 0) of a parameter: the units it leads to."""
        signed = self[layer]
        return signed.reshape(len(signed), -1).sum(1) if signed.dim() else signed.reshape(1)

    def unit_classes(self, layer: str) -> Tensor | None:
        """``[C, U]``: the same by true class; ``None`` where targets are no class indices."""
        try:
            labels, count = self._labels()
        except ValueError:
            return None
        weight = self.weights[self._known(layer)]
        step = max(1, self._memory // max(1, 2 * weight.numel() * weight.element_size()) - 1)
        parts = []
        for start in range(0, count, step):
            wanted = range(start, min(start + step, count))
            found = self._by_class(layer, labels, wanted)
            rows = weight.shape[0] if weight.dim() else 1
            parts.append(found.reshape(len(wanted), rows, -1).sum(2))
        return torch.cat(parts)

    def top(self, k: int = 10, layer: str | None = None, by: Score = "signed") -> Table:
        """The ``k`` weights with the highest blame.

        Args:
            k: how many rows.
            layer: only this parameter's weights; all parameters' if ``None``.
            by: ``"signed"``: the worst culprits; ``"absolute"``: the most influential.

        Returns:
            Columns: parameter, index of the weight, its value, and its blame.

        Raises:
            ValueError: for another ``by``, or if ``k`` is not a positive integer.
        """
        if by not in get_args(Score):
            raise ValueError(f"by: expected 'signed' or 'absolute', got {by!r}")
        check_count("k", k)
        found: list[tuple[float, str, int]] = []
        for name in [self._known(layer)] if layer is not None else self.weights:
            values = (self[name] if by == "signed" else self.absolute(name)).flatten()
            best = values.topk(min(k, values.numel()))
            pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
            found += [(value, name, i) for value, i in pairs]
        rows = []
        for value, name, i in sorted(found, key=lambda row: -row[0])[:k]:
            weight = self.weights[name]
            index = torch.unravel_index(torch.tensor(i), weight.shape)
            label = ", ".join(str(int(d)) for d in index)
            rows.append((name, f"[{label}]", float(weight.flatten()[i]), value))
        columns = ("parameter", "weight", "value", "blame" if by == "signed" else "absolute")
        signed = ["blame"] if by == "signed" else []
        title = f"top weights ({self.method}: {self.question})"
        return Table(columns, rows, title=title, signed=signed)

    def __repr__(self) -> str:
        count = sum(w.numel() for w in self.weights.values())
        return (
            f"WeightBlame({len(self)} parameters, {count} weights, {len(self.gradients)} samples)"
        )


def weight_blame(
    model: nn.Module,
    inputs: Any,
    targets: Any,
    loss_fn: Any,
    parameters: Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
    memory: int = MEMORY,
) -> WeightBlame:
    """Blame of every weight: gradient times weight, with absolute values taken sample by sample.

    ``Σ_n |w g_n|`` costs one matrix product more than the gradient for linear layers without
    positions (``|δ|ᵀ|x|``), and gradients made for a few samples at a time elsewhere: by positions
    it would only be an upper bound. Uses of one parameter (tied, shared) are added before absolute
    values are taken. The sum over a row, with the bias, is the first-order blame of the
    preactivation (Tanaka et al. 2020).

    Args:
        model: the model, in the mode (``eval()``, usually) in which it shall be judged.
        inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs; dimension 0
            runs over the ``N`` samples.
        targets: as ``loss_fn`` takes them.
        loss_fn: ``loss_fn(output, targets)``, with any reduction.
        parameters: names; all if ``None``, also those that do not require gradients.
        class_names: names of the classes, for tables.
        memory: bytes that gradients made at a time, and tables by class, may take.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: for an unknown parameter (close names are suggested), an empty batch, wrong
            targets, or a loss that is not one per sample.
        FloatingPointError: if a loss is NaN or infinite.
    """
    gradients = sample_gradients(model, inputs, targets, loss_fn, parameters, memory)
    if not bool(torch.isfinite(gradients.losses).all()):
        raise FloatingPointError("loss: it holds NaN or infinity")
    own = dict(model.named_parameters())
    names = [n for n in own if n in gradients.names or n in gradients.unused]
    weights = {name: own[name].detach().clone() for name in names}
    kept = targets.detach() if isinstance(targets, Tensor) else targets
    return WeightBlame(gradients, weights, kept, class_names, memory)
