"""Which classes are confused at what cost: the loss split over pairs of classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchbp.blame.arguments import as_arguments, check_count
from torchbp.blame.definitions import LossHead
from torchbp.blame.frame import class_name
from torchbp.blame.problem import Problem
from torchbp.blame.reference import input_reference
from torchbp.ops.base import wide
from torchbp.ops.softmax import sato_vartia
from torchbp.tables import Table


@dataclass(repr=False, eq=False)
class ClassBlame:
    """The loss of every sample, split over the classes that rival its own.

    Attributes:
        matrix: ``[C, C]``, the blame confusion matrix: row ``k``, column ``c`` is the loss of
            samples of class ``k`` that class ``c`` is to blame for. It sums to ``L - L'``; its
            diagonal is zero, because a class does not rival itself.
        pairs: ``[rows, C]``, the same for every loss term (sample, or token of a sample).
        labels: ``[rows]`` true classes; -1 where the loss ignores the term.
        losses: ``[N]`` un-averaged losses.
        reference_losses: ``[N]`` losses at the reference prediction.
        class_names: names of the classes, where given.
    """

    matrix: Tensor
    pairs: Tensor
    labels: Tensor
    losses: Tensor
    reference_losses: Tensor
    class_names: Sequence[str] | None = None

    @property
    def residual(self) -> float:
        """``|Σ matrix - (L - L')|`` relative to ``Σ |l - l'|``."""
        change = self.losses - self.reference_losses
        scale = change.abs().sum().clamp(min=torch.finfo(change.dtype).tiny)
        return float((self.matrix.sum() - change.sum()).abs() / scale)

    def top(self, k: int = 10) -> Table:
        """The ``k`` pairs that raise the loss most: samples of one class drawn to another."""
        check_count("k", k)
        classes = len(self.matrix)
        rivals = self.matrix.clone().fill_diagonal_(-torch.inf).flatten()
        best = rivals.topk(min(k, classes * (classes - 1)))
        rows = [
            (self._name(i // classes), self._name(i % classes), value)
            for value, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        return Table(("true", "rival", "blame"), rows, title="top class blame", signed=["blame"])

    def to_table(self) -> Table:
        """The whole matrix: one row per true class, one column per rival."""
        names = [self._name(c) for c in range(len(self.matrix))]
        rows = [(name, *row) for name, row in zip(names, self.matrix.tolist(), strict=True)]
        return Table(("true \\ rival", *names), rows, title="blame confusion matrix", signed=names)

    def _name(self, index: int) -> str:
        return class_name(self.class_names, index)

    def __repr__(self) -> str:
        classes, rows = len(self.matrix), len(self.pairs)
        return f"ClassBlame({classes} classes, {rows} loss terms, residual={self.residual:.1e})"

    def __str__(self) -> str:
        return f"{self.to_table()}\n\n{self.top()}"

    def _repr_html_(self) -> str:
        return self.to_table()._repr_html_() + self.top()._repr_html_()


def class_blame(
    model: nn.Module,
    inputs: Any,
    targets: Tensor,
    loss_fn: Any,
    baseline: Any = "uniform",
    class_names: Sequence[str] | None = None,
) -> ClassBlame:
    """Split cross-entropy over pairs of true class and rival, exactly.

    With ``q`` the Sato-Vartia distribution between prediction and reference, the rival ``c`` of a
    sample of class ``y`` is to blame for ``q_c [(z_c - z_y) - (z'_c - z'_y)]``: what it gained on
    the true class since the reference. Over all rivals that is ``l - l'``, because
    ``m = q - onehot(y)`` sums to zero. Adding a constant to all logits changes nothing.

    Args:
        model: the model.
        inputs: as :func:`torchbp.attribute` takes them.
        targets: ``[N]`` (or ``[N, ...]``, one per token) class indices.
        loss_fn: cross-entropy, with any reduction, class weights or ``ignore_index``.
        baseline: the reference prediction: ``"uniform"``; ``"prior"``, the frequencies of the
            targets' classes; or a baseline input, as :func:`torchbp.attribute` takes it.
        class_names: names of the classes, for tables.

    Raises:
        ValueError: if the loss is not cross-entropy with class indices and without smoothing.
    """
    args, kwargs = as_arguments(inputs)
    given = None if isinstance(baseline, str) else baseline
    head = LossHead.of(loss_fn)
    problem = Problem(model, args, kwargs, targets, head, "all", given)
    with problem.session(), torch.no_grad():
        output = problem.call(args, kwargs)
        losses = head.per_sample(output, targets)
        _refuse_other_losses(head, targets)
        if baseline == "uniform":
            reference = torch.zeros_like(output)
        elif baseline == "prior":
            reference = log_prior(head, output, targets).expand_as(output)
        elif isinstance(baseline, str):
            raise ValueError(f"baseline: expected 'uniform', 'prior' or inputs, got {baseline!r}")
        else:
            reference = problem.run(input_reference(problem)).output
        reference_losses = head.per_sample(reference, targets)
        pairs, labels = _pairs(head, output, reference, targets)
        matrix = pairs.new_zeros(pairs.shape[1], pairs.shape[1])
        matrix.index_add_(0, labels.clamp(min=0), pairs)
    return ClassBlame(matrix, pairs, labels, losses, reference_losses, class_names)


def log_prior(head: LossHead, output: Tensor, targets: Tensor) -> Tensor:
    """Logits of the targets' class frequencies, shaped to broadcast against ``output``.

    A class that no target is of counts as half a sample: its logit would be minus infinity.
    """
    counted = targets[targets != head.settings.get("ignore_index", -100)]
    counts = torch.bincount(counted, minlength=output.shape[1]).to(output.dtype)
    prior = counts.clamp(min=0.5).log()
    return (prior - prior.logsumexp(0)).view(1, -1, *[1] * (output.dim() - 2))


def _refuse_other_losses(head: LossHead, targets: Any) -> None:
    if head.kind != "cross_entropy" or targets.is_floating_point():
        raise ValueError(
            "of='classes' needs cross-entropy (torch.nn.functional.cross_entropy or its module) "
            "with class indices as targets"
        )
    if head.settings.get("label_smoothing"):
        raise ValueError(
            "of='classes': with label smoothing every class is partly the true one; there are no "
            "pairs of true class and rival"
        )


def _pairs(head: LossHead, z: Tensor, z0: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """``[rows, C]`` blame of every rival in every loss term, and the terms' true classes."""
    classes = z.shape[1]
    z, z0 = (wide(v).movedim(1, -1).reshape(-1, classes) for v in (z, z0))
    labels = targets.flatten()
    ignored = labels == head.settings.get("ignore_index", -100)
    index = labels.masked_fill(ignored, 0)[:, None]
    gain = (z - z.gather(1, index)) - (z0 - z0.gather(1, index))
    weight = head.settings.get("weight")
    scale = z.new_ones(len(labels)) if weight is None else weight.to(z.dtype)[index[:, 0]]
    scale = scale.masked_fill(ignored, 0)
    return sato_vartia(z, z0, 1) * gain * scale[:, None], labels.masked_fill(ignored, -1)
