"""Influence of training samples on other samples: over checkpoints, and during the training.

Signs are those of the whole project: positive influence means that training on a sample RAISED a
loss (a culprit). TracIn as published (Pruthi et al. 2020) has the opposite sign.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchbp.blame.arguments import check_model
from torchbp.blame.definitions import LossHead
from torchbp.blame.frame import class_name
from torchbp.blame.ledger import SampleLedger, sample_ids
from torchbp.blame.probe import Probe, evaluation, loss_value, snapshot
from torchbp.blame.sample_gradients import SampleGradients, sample_gradients
from torchbp.blame.samples import BATCH_SIZE, batches, has_classes, mean_gradient, ranked
from torchbp.tables import Table

Data = tuple[Any, Any]


def tracin(
    model: nn.Module,
    checkpoints: Iterable[Mapping[str, Tensor]],
    train: Data,
    test: Data,
    loss_fn: Any,
    learning_rates: float | Sequence[float],
    parameters: Sequence[str] | None = None,
    batch_size: int = BATCH_SIZE,
) -> Tensor:
    r"""``-Σ_c η_c ⟨g_n, g_m⟩``: what training on sample ``n`` did to the loss of sample ``m``.

    TracInCP (Pruthi et al. 2020), with the sign turned: negative where training on ``n`` lowered
    the loss of ``m`` (a proponent), positive where it raised it (an opponent, a culprit). It is the
    first-order effect of one step of plain SGD on the sample's own loss at every checkpoint.

    Args:
        model: the model; it stays as it is, a copy takes the checkpoints' parameters. Copies are in
            the model's mode (``eval()``, usually).
        checkpoints: state dicts with the model's names, in the order of ``learning_rates``. Files
            are for you to load, with ``torch.load(path, weights_only=True)``; a generator that does
            so keeps one in memory at a time.
        train: ``(inputs, targets)`` of ``N`` samples.
        test: ``(inputs, targets)`` of ``M`` samples. Their activations and error signals are held
            for one checkpoint at a time.
        loss_fn: ``loss_fn(output, targets)``, with any reduction; losses are un-averaged.
        learning_rates: one per checkpoint, or one for all.
        parameters: names of the parameters whose gradients count; all if ``None``.
        batch_size: how many training samples run at once.

    Returns:
        ``[N, M]``.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: for a checkpoint that does not fit the model, another number of learning rates
            than checkpoints, no checkpoint, or an empty batch.
    """
    total: Tensor | None = None
    for copied, rate in _restored(model, checkpoints, learning_rates):
        others = sample_gradients(copied, *test, loss_fn, parameters)
        parts = [
            part.gram(others) for part in _gradients(copied, train, loss_fn, parameters, batch_size)
        ]
        share = torch.cat(parts).mul_(-rate)
        total = share if total is None else total.add_(share)
    assert total is not None
    return total


def self_influence(
    model: nn.Module,
    checkpoints: Iterable[Mapping[str, Tensor]],
    train: Data,
    loss_fn: Any,
    learning_rates: float | Sequence[float],
    parameters: Sequence[str] | None = None,
    batch_size: int = BATCH_SIZE,
) -> Tensor:
    """``Σ_c η_c |g_n|²``: how much steps on a sample lowered its own loss (Pruthi et al. 2020).

    High where a sample has to be learnt by heart: rare, hard or wrongly labelled ones. Arguments
    and errors as for :func:`tracin`.

    Returns:
        ``[N]``, never negative.
    """
    total: Tensor | None = None
    for copied, rate in _restored(model, checkpoints, learning_rates):
        parts = [
            part.square_norms()
            for part in _gradients(copied, train, loss_fn, parameters, batch_size)
        ]
        share = torch.cat(parts).mul_(rate)
        total = share if total is None else total.add_(share)
    assert total is not None
    return total


def _gradients(
    model: nn.Module, data: Data, loss_fn: Any, parameters: Sequence[str] | None, size: int
) -> Iterator[SampleGradients]:
    for inputs, targets in batches(*data, size):
        yield sample_gradients(model, inputs, targets, loss_fn, parameters)


def _restored(
    model: nn.Module,
    checkpoints: Iterable[Mapping[str, Tensor]],
    learning_rates: float | Sequence[float],
) -> Iterator[tuple[nn.Module, float]]:
    """A copy of the model at every checkpoint, with its learning rate."""
    check_model(model)
    one = isinstance(learning_rates, (int, float))
    rates = [] if one else [float(r) for r in learning_rates]  # type: ignore[union-attr]
    copied, count = copy.deepcopy(model), 0
    for count, state in enumerate(checkpoints, 1):
        if not one and count > len(rates):
            raise ValueError(
                f"learning_rates: {len(rates)} of them, and more checkpoints than that"
            )
        if not isinstance(state, Mapping):
            raise TypeError(
                f"checkpoints[{count - 1}]: expected a state dict, got {type(state).__name__}"
            )
        try:
            copied.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"checkpoints[{count - 1}]: {error}") from None
        yield copied, float(learning_rates) if one else rates[count - 1]  # type: ignore[arg-type]
    if count == 0:
        raise ValueError("checkpoints: there is none")
    if not one and count < len(rates):
        raise ValueError(f"learning_rates: {len(rates)} of them for {count} checkpoints")


class InRunInfluence:
    r"""What every training sample does to the validation loss, added up while training.

    At each step, to first order, ``θ - η Σ_n w g_n`` changes the mean validation loss by
    ``-η w Σ_n ⟨g_n, g_val⟩``, and ``-η w ⟨g_n, g_val⟩`` is a sample's share (in-run data Shapley of
    first order; Wang et al. 2024). ``w`` is ``1 / N`` for a mean loss. Positive: the sample raised
    the validation loss.

    The update is additive in samples for plain SGD only. Momentum passes a sample's part on to
    later steps; counted at once, with ``η / (1 - momentum)``, it comes to the same. For Adam give
    the frozen preconditioner as ``learning_rate``: per parameter ``lr / (sqrt(v) + eps)``.

    Both gradients are taken in evaluation mode, so that samples of a batch are not coupled.

    Args:
        model: the model that is trained.
        validation: ``(inputs, targets)``.
        loss_fn: ``loss_fn(output, targets)``, with any reduction.
        parameters: names of the parameters whose gradients count; all if ``None``.
        class_names: names of the classes, for tables.
        batch_size: how many samples run at once.

    Example::

        influence = InRunInfluence(model, (x_val, y_val), F.cross_entropy)
        for ids, x, y in loader:
            influence.step(x, y, samples=ids, learning_rate=0.1)
            F.cross_entropy(model(x), y).backward()
            optimizer.step(); optimizer.zero_grad()
        print(influence.top(10))
    """

    def __init__(
        self,
        model: nn.Module,
        validation: Data,
        loss_fn: Any,
        parameters: Sequence[str] | None = None,
        class_names: Sequence[str] | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> None:
        check_model(model)
        self.model, self.validation, self.parameters = model, validation, parameters
        self.class_names, self.batch_size = class_names, batch_size
        self._head = LossHead.of(loss_fn)
        self._ledger = SampleLedger()

    def step(
        self,
        inputs: Any,
        targets: Any,
        samples: Any,
        learning_rate: float | Mapping[str, float | Tensor],
    ) -> Tensor:
        """Add the shares of one batch; call it before ``optimizer.step()``.

        Args:
            inputs: of the batch, as the model takes them.
            targets: of the batch.
            samples: ``[N]`` positions of the samples in the data set, non-negative integers.
            learning_rate: of this step; or by name of parameter, a number or a tensor of the
                parameter's shape.

        Returns:
            ``[N]`` shares of this step.

        Raises:
            ValueError: if ``samples`` do not fit the batch, or ``learning_rate`` misses a
                parameter.
        """
        with evaluation(self.model):
            gradients = sample_gradients(
                self.model, inputs, targets, self._head.loss_fn, self.parameters
            )
            ids = sample_ids(samples, len(gradients.losses))
            slope = mean_gradient(
                self.model, self.validation, self._head, gradients.names, self.batch_size
            )
            weight = self._weight(gradients, inputs, targets)
            share = -weight * gradients.dot(_scaled(slope, learning_rate))
        labels = targets if has_classes(targets) else None
        output = gradients.output
        predictions = output.argmax(1) if isinstance(output, Tensor) and output.dim() == 2 else None
        columns = share[:, None]
        self._ledger.add(ids, gradients.losses, ("influence",), columns, labels, predictions)
        return share

    def _weight(self, gradients: SampleGradients, inputs: Any, targets: Any) -> float:
        """``w``: the factor between the un-averaged losses' sum and the loss that is trained on."""
        total = float(gradients.losses.sum())

        def loss(output: Any) -> Tensor:
            return loss_value(self._head.loss_fn, output, targets)

        if gradients.output is None:  # a container that torch does not know
            parameters, buffers = snapshot(self.model)
            value = Probe(self.model, inputs, loss).loss({**parameters, **buffers})
        else:
            value = float(loss(gradients.output))
        return value / total if total else 1 / len(gradients.losses)

    @property
    def scores(self) -> Tensor:
        """``[n]`` influence of every sample id, added up; NaN for ids that never came."""
        known = self._ledger.blame.get("influence", self._ledger.loss)
        return known.masked_fill(self._ledger.seen == 0, float("nan"))

    def top(self, k: int = 10) -> Table:
        """The ``k`` samples that raised the validation loss most.

        Columns: sample id, its label, the wrong class predicted last, influence, times seen.

        Raises:
            ValueError: if ``k < 1``.
        """
        ledger, scores = self._ledger, self.scores
        rows = [
            (i, self._class(ledger.label[i]), self._class(ledger.rival[i]), float(scores[i]),
             int(ledger.seen[i]))
            for i in ranked(scores, k)
        ]  # fmt: skip
        columns = ("sample", "label", "model said", "influence", "seen")
        title = "training samples that raised the validation loss"
        return Table(columns, rows, title=title, signed=["influence"])

    def _class(self, index: Tensor) -> str | None:
        return None if int(index) < 0 else class_name(self.class_names, int(index))

    def state_dict(self) -> dict[str, Any]:
        """Tensors only."""
        return self._ledger.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._ledger.load_state_dict(state)


def _scaled(
    slope: Mapping[str, Tensor], rate: float | Mapping[str, float | Tensor]
) -> dict[str, Tensor]:
    if not isinstance(rate, Mapping):
        return {name: g * rate for name, g in slope.items()}
    missing = [name for name in slope if name not in rate]
    if missing:
        raise ValueError(f"learning_rate: it has no entry for parameter {missing[0]!r}")
    return {name: g * rate[name] for name, g in slope.items()}
