"""What a tracker tells at the end: units, classes and samples over a whole training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from torchbp.blame.capture import unknown
from torchbp.blame.definitions import Question
from torchbp.blame.frame import Frame
from torchbp.blame.ledger import SampleLedger
from torchbp.blame.summary import Summary
from torchbp.tables import Table


class Report(Summary):
    """Blame added up over the tracked steps.

    Attributes:
        frame: the sums per layer, as a :class:`~torchbp.blame.frame.Frame`.
        method: which method made them.
        question: what it answers.
        class_names: names of the classes, where given.
    """

    def __init__(self, frame: Frame, question: Question, samples: SampleLedger | None) -> None:
        self.frame, self.method, self.question = frame, frame.method, question
        self.class_names = frame.class_names
        self._samples = samples

    def layer_names(self) -> Iterable[str]:
        """Layers, in the order of the forward pass."""
        return self.frame.layers

    def per_unit(self, layer: str) -> Tensor:
        """``[U]`` blame summed over samples and steps."""
        return self._layer(layer).blame

    def unit_classes(self, layer: str) -> Tensor | None:
        """``[C, U]`` blame per true class; ``None`` where the targets are not classes."""
        return self._layer(layer).per_class

    def per_class(self, layer: str) -> Tensor:
        """``[C, U]`` blame per true class, summed over samples and steps.

        Raises:
            ValueError: if the targets were not class indices.
        """
        found = self._layer(layer).per_class
        if found is None:
            raise ValueError("per class: the targets were not class indices of shape [N]")
        return found

    @property
    def suspicion(self) -> Tensor:
        """``[n]`` suspicion of every sample id: its mean loss over the training; NaN if unseen.

        A mislabelled sample is learnt late or never, so its loss stays high while others' falls
        (the loss ledger; Pleiss et al. 2020 use the margin in the same way).

        Raises:
            ValueError: if no sample ids were given to ``tracker.step``.
        """
        return self._ledger().suspicion()

    def per_sample(self, layer: str) -> Tensor:
        """``[n]`` blame of a layer caused by every sample id, summed over units and steps."""
        blame = self._ledger().blame
        if layer not in blame:
            raise KeyError(unknown("layer", layer, [*blame]))
        return blame[layer]

    def suspects(self, k: int = 10) -> Table:
        """The ``k`` most suspicious samples: highest mean loss over the training.

        Columns: sample id, its label, the wrong class predicted last, mean loss, times seen.
        """
        ledger = self._ledger()
        score = torch.nan_to_num(ledger.suspicion(), nan=-torch.inf)
        best = score.topk(min(k, int((ledger.seen > 0).sum()))).indices.tolist()
        rows = [
            (i, self._class(ledger.label[i]), self._class(ledger.rival[i]), float(score[i]),
             int(ledger.seen[i]))
            for i in best
        ]  # fmt: skip
        columns = ("sample", "label", "model said", "mean loss", "seen")
        return Table(columns, rows, title="most suspicious samples")

    def _class(self, index: Tensor) -> str | None:
        return None if int(index) < 0 else self.class_name(int(index))

    def _layer(self, layer: str) -> Any:
        if layer not in self.frame.layers:
            raise KeyError(unknown("layer", layer, [*self.frame.layers]))
        return self.frame.layers[layer]

    def _ledger(self) -> SampleLedger:
        if self._samples is None:
            raise ValueError(
                "per sample: no sample ids were given; call tracker.step(loss, targets=y, "
                "samples=ids) with the samples' positions in the data set"
            )
        return self._samples

    def __repr__(self) -> str:
        layers = ", ".join(f"{n}: {tuple(v.blame.shape)}" for n, v in self.frame.layers.items())
        return f"Report(method={self.method!r}, samples={self.frame.samples}, {layers})"
