"""Blame of samples: which ones are hard, wrongly labelled or harmful, and which drive a unit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchbp.blame.arguments import as_arguments, check_count
from torchbp.blame.capture import unknown
from torchbp.blame.definitions import LossHead
from torchbp.blame.frame import class_name
from torchbp.blame.probe import Probe, snapshot
from torchbp.blame.sample_gradients import sample_gradients
from torchbp.tables import Table

if TYPE_CHECKING:
    from torchbp.blame.result import Blame

#: Samples whose activations and error signals are held at once.
BATCH_SIZE = 256

#: Scores of which a low value is the suspicious one.
_LOW_IS_SUSPICIOUS = frozenset({"margin"})


@dataclass(repr=False, eq=False)
class SampleBlame(Mapping[str, Tensor]):
    """Scores of every sample: a mapping from the score's name to ``[N]`` values.

    Scores that the loss does not define are not in the mapping, and their attribute is ``None``.

    Attributes:
        loss: un-averaged loss.
        gradient_norm: ``|g_n|``, the length of the sample's gradient (GraNd; Paul et al. 2021).
        el2n: ``|p - onehot(y)|``, the length of the error of the predicted probabilities (Paul et
            al. 2021); for cross-entropy with one prediction per sample.
        margin: ``z_y - max z_other``, negative where the answer is wrong (Pleiss et al. 2020); for
            cross-entropy with one class index per sample.
        influence: ``-⟨g_n, g_val⟩`` with ``g_val`` the gradient of the mean validation loss: by
            how much a step on this sample changes that loss, per unit of learning rate and to first
            order. Positive: training on the sample raises the validation loss (a culprit). Only
            where validation data was given.
        targets: as given.
        predictions: ``[N]`` predicted classes, where there are classes.
        class_names: names of the classes, where given.
    """

    loss: Tensor
    gradient_norm: Tensor
    el2n: Tensor | None
    margin: Tensor | None
    influence: Tensor | None
    targets: Any
    predictions: Tensor | None
    class_names: Sequence[str] | None = None

    @property
    def self_influence(self) -> Tensor:
        """``[N]``, ``|g_n|²``: how much a step on a sample lowers its own loss (Pruthi 2020)."""
        return self.gradient_norm.square()

    @property
    def _scores(self) -> dict[str, Tensor]:
        found = {
            "loss": self.loss,
            "gradient_norm": self.gradient_norm,
            "self_influence": self.self_influence,
            "el2n": self.el2n,
            "margin": self.margin,
            "influence": self.influence,
        }
        return {name: score for name, score in found.items() if score is not None}

    def __getitem__(self, score: str) -> Tensor:
        if score not in self._scores:
            raise KeyError(unknown("score", score, [*self._scores]))
        return self._scores[score]

    def __iter__(self) -> Iterator[str]:
        return iter(self._scores)

    def __len__(self) -> int:
        return len(self._scores)

    def suspects(self, k: int = 10, by: str = "loss") -> Table:
        """The ``k`` samples most likely to be wrongly labelled, most suspicious first.

        A model that has learnt a wrong label by heart no longer shows it: the mean loss over the
        training (``BlameTracker.report().suspects()``) finds more of them than any score of the
        trained model, and gradient inner products (``influence``) find the fewest; measured by
        ``python experiments/mislabelled.py``.

        Args:
            k: how many rows.
            by: the score to rank by; of ``margin`` the lowest are suspicious, of others the
                highest.

        Raises:
            ValueError: for an unknown score, or ``k < 1``.
        """
        title = f"most suspicious samples (by {by})"
        return self._ranked(k, by, by not in _LOW_IS_SUSPICIOUS, title)

    def top(self, k: int = 10, by: str = "loss") -> Table:
        """The ``k`` samples with the highest value of a score, with all their scores.

        Raises:
            ValueError: for an unknown score, or ``k < 1``.
        """
        return self._ranked(k, by, True, f"top samples by {by}")

    def to_table(self) -> Table:
        """One row per sample, in the order given."""
        return self._table(range(len(self.loss)), "samples")

    def to_pandas(self) -> Any:
        """The rows of :meth:`to_table` as a ``pandas.DataFrame``."""
        return self.to_table().to_pandas()

    def _ranked(self, k: int, by: str, descending: bool, title: str) -> Table:
        if by not in self:
            raise ValueError(unknown("by", by, [*self]))
        return self._table(ranked(self[by] if descending else -self[by], k), title)

    def _table(self, samples: Sequence[int], title: str) -> Table:
        scores = {name: score.tolist() for name, score in self._scores.items()}
        classes = {}
        if self.predictions is not None and has_classes(self.targets):
            classes = {"label": self.targets.tolist(), "model says": self.predictions.tolist()}
        rows = [
            (n, *(self._class(c[n]) for c in classes.values()), *(s[n] for s in scores.values()))
            for n in samples
        ]
        columns = ["sample", *classes, *scores]
        signed = ["influence"] if self.influence is not None else []
        return Table(columns, rows, title=title, signed=signed)

    def _class(self, index: int) -> str | None:
        return None if index < 0 else class_name(self.class_names, index)

    def __repr__(self) -> str:
        return f"SampleBlame({len(self.loss)} samples; {', '.join(self)})"

    def __str__(self) -> str:
        return str(self.suspects())

    def _repr_html_(self) -> str:
        return self.suspects()._repr_html_()


def sample_blame(
    model: nn.Module,
    inputs: Any,
    targets: Any,
    loss_fn: Any,
    validation: tuple[Any, Any] | None = None,
    parameters: Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
    batch_size: int = BATCH_SIZE,
) -> SampleBlame:
    """Loss, gradient norm, EL2N, margin and influence of every sample.

    No per-sample gradient is ever formed as a whole; nothing of the model changes.

    Args:
        model: the model, in the mode (``eval()``, usually) in which it shall be judged.
        inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs; dimension 0
            runs over the ``N`` samples.
        targets: as ``loss_fn`` takes them.
        loss_fn: ``loss_fn(output, targets)``, with any reduction; losses are un-averaged.
        validation: ``(inputs, targets)`` to measure influence on.
        parameters: names of the parameters whose gradients count; all that require grad if
            ``None``.
        class_names: names of the classes, for tables.
        batch_size: how many samples run at once.

    Returns:
        A :class:`SampleBlame`.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: for wrong targets, an empty batch, an unknown parameter, or a loss that is not a
            sum or mean over samples.
    """
    head = LossHead.of(loss_fn)
    direction: dict[str, Tensor] | None = None
    found: dict[str, list[Tensor]] = {}
    classes = head.kind == "cross_entropy" or has_classes(targets)
    for part, labels in batches(inputs, targets, batch_size):
        gradients = sample_gradients(model, part, labels, loss_fn, parameters)
        scores = {
            "loss": gradients.losses.detach(),
            "gradient_norm": gradients.square_norms().clamp(min=0).sqrt(),
            "el2n": el2n(head, gradients.output, labels),
            "margin": margin(head, gradients.output, labels),
            "predictions": _predictions(gradients.output) if classes else None,
        }
        if validation is not None:
            if direction is None:
                direction = mean_gradient(model, validation, head, gradients.names, batch_size)
            scores["influence"] = -gradients.dot(direction)
        for name, score in scores.items():
            if score is not None:
                found.setdefault(name, []).append(score)
    whole = {name: torch.cat(parts) for name, parts in found.items()}
    return SampleBlame(
        whole["loss"],
        whole["gradient_norm"],
        whole.get("el2n"),
        whole.get("margin"),
        whole.get("influence"),
        targets.detach() if isinstance(targets, Tensor) else targets,
        whole.get("predictions"),
        class_names,
    )


def drivers(blame: Blame, layer: str, unit: int | tuple[int, ...], k: int = 10) -> Table:
    """The ``k`` samples that drive a unit's blame: largest in absolute value first.

    Args:
        blame: the result of :func:`torchbp.attribute`.
        layer: the layer's name.
        unit: which of its units; a tuple of indices for blame of positions or elements.
        k: how many rows.

    Returns:
        Columns: sample, blame, share of the unit's absolute blame, loss; and label and prediction
        where there are classes.

    Raises:
        KeyError: for an unknown layer.
        IndexError: if the layer has no such unit.
        ValueError: if ``k < 1``.
    """
    index = unit if isinstance(unit, tuple) else (unit,)
    values = blame[layer]
    shape = tuple(values.shape[1:])
    inside = len(index) == len(shape) and all(
        -size <= i < size for i, size in zip(index, shape, strict=True)
    )
    if not inside:
        raise IndexError(f"unit: layer {layer!r} has units of shape {shape}, got {unit!r}")
    column = values
    for i in index:
        column = column.select(1, i)
    total = max(float(column.abs().sum()), 1e-300)
    classes = has_classes(blame.targets)
    guesses = _predictions(blame.output) if classes else None
    rows = []
    for n in ranked(column.abs(), k):
        row: list[object] = [n, float(column[n])]
        row += [f"{100 * abs(float(column[n])) / total:.1f} %", float(blame.losses[n])]
        if classes:
            row.append(blame.class_name(int(blame.targets[n])))
            row.append(None if guesses is None else blame.class_name(int(guesses[n])))
        rows.append(row)
    columns = ["sample", "blame", "share", "loss", *(["label", "model says"] if classes else [])]
    title = f"samples behind {layer}[{', '.join(map(str, index))}] ({blame.method})"
    return Table(columns, rows, title=title, signed=["blame"])


def el2n(head: LossHead, output: Any, targets: Any) -> Tensor | None:
    """``[N]``, ``|softmax(z) - target|`` (Paul et al. 2021); ``None`` where there are no classes.

    Samples whose target is ignored by the loss get NaN.
    """
    if head.kind != "cross_entropy" or output.dim() != 2:
        return None
    probabilities = output.detach().softmax(1)
    if targets.is_floating_point():
        return (probabilities - targets).norm(dim=1)
    labels = _counted(head, targets)
    error = probabilities.scatter_add(
        1, labels.clamp(min=0)[:, None], probabilities.new_full((len(labels), 1), -1.0)
    )
    return torch.where(labels >= 0, error.norm(dim=1), float("nan"))


def margin(head: LossHead, output: Any, targets: Any) -> Tensor | None:
    """``[N]``, ``z_y - max z_other`` (Pleiss et al. 2020); ``None`` without class indices.

    Samples whose target is ignored by the loss get NaN.
    """
    if head.kind != "cross_entropy" or output.dim() != 2 or targets.is_floating_point():
        return None
    return margins(output.detach(), _counted(head, targets))


def _counted(head: LossHead, targets: Tensor) -> Tensor:
    """Class indices, -1 where the loss ignores the sample."""
    return targets.masked_fill(targets == head.settings.get("ignore_index", -100), -1)


def margins(output: Tensor, targets: Tensor) -> Tensor:
    """``[N]``, ``z_y - max z_other`` from outputs ``[N, C]`` and class indices ``[N]``.

    Samples with a negative index get NaN.
    """
    own = targets.clamp(min=0)[:, None]
    rival = output.scatter(1, own, float("-inf")).amax(1)
    return torch.where(targets >= 0, output.gather(1, own)[:, 0] - rival, float("nan"))


def mean_gradient(
    model: nn.Module, data: tuple[Any, Any], head: LossHead, names: Sequence[str], batch_size: int
) -> dict[str, Tensor]:
    """Gradient of the mean un-averaged loss of ``data = (inputs, targets)``, in evaluation mode.

    Raises:
        TypeError: if ``data`` is not a pair.
    """
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        raise TypeError(f"validation: expected (inputs, targets), got {type(data).__name__}")
    parameters, buffers = snapshot(model)
    total: dict[str, Tensor] = {}
    count = 0
    for inputs, targets in batches(*data, batch_size):
        losses: list[Tensor] = []

        def objective(output: Any, targets: Any = targets, losses: Any = losses) -> Tensor:
            losses.append(head.per_sample(output, targets))
            return losses[-1].sum()

        gradient = Probe(model, inputs, objective).gradient({**parameters, **buffers}, names)[1]
        count += len(losses[-1])
        total = {n: total[n] + g if n in total else g for n, g in gradient.items()}
    return {n: g / count for n, g in total.items()}


def batches(inputs: Any, targets: Any, size: int) -> Iterator[tuple[Any, Any]]:
    """Cut inputs and targets along dimension 0.

    Raises:
        ValueError: for ``size < 1``.
    """
    check_count("batch_size", size)
    args, kwargs = as_arguments(inputs)
    n = next(v.shape[0] for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim())
    if n <= size:
        yield inputs, targets
        return
    for start in range(0, n, size):
        rows = slice(start, start + size)
        yield _rows(inputs, n, rows), _rows(targets, n, rows)


def _rows(value: Any, n: int, rows: slice) -> Any:
    """The given samples of everything whose dimension 0 runs over all ``n`` of them."""
    if isinstance(value, Tensor):
        return value[rows] if value.dim() > 0 and value.shape[0] == n else value
    if isinstance(value, Mapping):
        return {k: _rows(v, n, rows) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(_rows(v, n, rows) for v in value)
    return value


def ranked(score: Tensor, k: int) -> list[int]:
    """Positions of the ``k`` highest scores, highest first; NaN is never among them.

    Raises:
        ValueError: if ``k < 1``.
    """
    check_count("k", k)
    known = torch.nan_to_num(score, nan=float("-inf"))
    best = known.topk(min(k, int((~score.isnan()).sum())))
    return best.indices.tolist()


def has_classes(targets: Any) -> bool:
    """Whether targets are one class index per sample."""
    return isinstance(targets, Tensor) and not targets.is_floating_point() and targets.dim() == 1


def _predictions(output: Any) -> Tensor | None:
    if not isinstance(output, Tensor) or output.dim() != 2:
        return None
    return output.detach().argmax(1)
