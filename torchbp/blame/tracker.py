"""Blame live in the training backward: who is to blame, at every step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from torchbp.blame.arguments import check_count, check_model
from torchbp.blame.capture import (
    NO_LAYER,
    first_tensor,
    input_name,
    leaves,
    named_layers,
    unknown,
)
from torchbp.blame.definitions import LossHead, one_term_reason
from torchbp.blame.error_scale import candidates, fit
from torchbp.blame.frame import Frame
from torchbp.blame.ledger import Layout, SampleLedger, UnitSums, add_up, merged, sample_ids
from torchbp.blame.methods import METHODS
from torchbp.blame.report import Report
from torchbp.blame.settle import Step, settle
from torchbp.blame.watch import Entry, Pending, Watch

LIVE_METHODS = ("gradient", "taylor", "link")


class BlameTracker:
    """Keeps, from every training backward, each unit's part of the loss.

    Use it as a context manager around the training loop and call :meth:`step` once after every
    ``loss.backward()``, before ``optimizer.step()`` or ``zero_grad()``. Works on torch.nn,
    converted and user modules alike, through hooks that are gone when the block ends. A mean
    reduction, gradient accumulation and AMP scaling are undone; see
    :mod:`torchbp.blame.error_scale`.

    Args:
        model: the model that is trained.
        writer: a ``torch.utils.tensorboard.SummaryWriter`` of yours to write frames to, or
            ``None``.
        method: ``"gradient"``, ``"taylor"`` or ``"link"``.
        every: track one step in this many.
        log_every: write to ``writer`` once in this many steps, the tracked steps since the last
            time added up; as often as ``every`` if ``None``.
        layers: names or modules; ``None`` for the hidden units of each cut, as
            :func:`torchbp.attribute` chooses them.
        loss_fn: the loss, where it is not cross-entropy, squared error or binary cross-entropy
            with default settings (those are recognised).
        output_fn: takes what the model returns and gives the tensor the loss is computed from;
            needed only where that is not the model's first floating tensor.
        class_names: names of the classes, for tables.

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: for an unknown method or layer, or ``every < 1``.
    """

    def __init__(
        self,
        model: nn.Module,
        writer: Any = None,
        method: str = "link",
        every: int = 1,
        log_every: int | None = None,
        layers: Sequence[str | nn.Module] | str | None = None,
        loss_fn: Any = None,
        output_fn: Callable[[Any], Tensor] | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        check_model(model)
        if method not in LIVE_METHODS:
            if method in METHODS:
                raise ValueError(
                    f"method: {method!r} needs more than the training backward; use "
                    f"torchbp.attribute, or one of {', '.join(LIVE_METHODS)} here"
                )
            raise ValueError(unknown("method", str(method), LIVE_METHODS))
        log_every = every if log_every is None else log_every
        for argument, value in (("every", every), ("log_every", log_every)):
            check_count(argument, value)
        self.model, self.method, self.every, self.log_every = model, method, every, log_every
        self.class_names = class_names
        self.steps = 0
        modules = leaves(model) if layers in (None, "all") else named_layers(model, layers or ())
        modules.pop(input_name(model), None)
        if not modules:
            raise ValueError("model: it has no module that could be tracked")
        self._watch = Watch(
            model, modules, layers is None, method == "gradient", output_fn or first_tensor
        )
        self._heads = None if loss_fn is None else [LossHead.of(loss_fn)]
        self._last: tuple[UnitSums, int, tuple[str, ...]] | None = None
        self._sums: list[UnitSums] = []
        self._window: list[UnitSums] = []  # since the last frame was written
        self._bad: set[str] = set()
        self._samples: SampleLedger | None = None
        self._reported: set[str] = set()
        self._logger = _logger(writer)

    def __enter__(self) -> BlameTracker:
        if self._watch.active:
            raise RuntimeError("BlameTracker: already entered")
        self._watch.attach()
        self._watch.live, self._watch.step = self.steps % self.every == 0, self.steps
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._watch.detach()
        if self._logger is not None:
            self._log(self.steps - 1)
            self._logger.close()

    def step(self, loss: Tensor, targets: Tensor, samples: Any = None) -> None:
        """Settle the blame of the backward pass that just ran.

        Args:
            loss: the scalar that ``backward()`` was called on.
            targets: the targets it was computed with, as the loss takes them.
            samples: ``[N]`` positions of the samples in the data set (non-negative integers), for
                blame per sample; optional.

        Raises:
            RuntimeError: without a forward, or before ``backward``, or after two of them, or
                outside the ``with`` block.
            TypeError: if an argument is of the wrong type.
            ValueError: if the loss does not require grad, or targets or samples do not fit.
        """
        if not self._watch.active:
            raise RuntimeError("tracker.step: the tracker is not active; use `with BlameTracker`")
        pending, live, now = self._watch.take(), self._watch.live, self.steps
        self.steps += 1
        self._watch.live, self._watch.step = self.steps % self.every == 0, self.steps
        _check_loss(loss, pending)
        if not live:
            return
        _check_backward(pending)
        with torch.no_grad():
            self._resolve(pending, now, loss, targets, samples)

    def _resolve(
        self, pending: Pending, now: int, loss: Tensor, targets: Tensor, samples: Any
    ) -> None:
        output, error = pending.outputs[0]
        samples = None if samples is None else sample_ids(samples, len(output))
        heads = self._heads or candidates(output, targets)
        head, scale, losses = fit(heads, output, error, targets, loss.detach())
        if self._heads is None and (len(heads) == 1 or bool(error.any())):
            self._heads = [head]
        if self.method == "link":
            self._check_link(head, output, targets)
        step = Step(head, scale, losses, float(losses.sum()), targets, output)
        if not math.isfinite(scale) or not math.isfinite(step.total):
            self._report_nonfinite(pending.entries, now, whole_step=True)
        else:
            self._settle(step, pending.entries, now, samples)

    def _check_link(self, head: LossHead, output: Tensor, targets: Tensor) -> None:
        reason = one_term_reason(head, output, targets)
        if reason is not None:
            raise ValueError(
                f"method 'link' needs one loss term per sample, but {reason}; use "
                "BlameTracker(method='taylor')"
            )

    def _settle(self, step: Step, entries: list[Entry], now: int, samples: Tensor | None) -> None:
        sums, per_sample = settle(step, entries, self.method, self._first_order(entries))
        bad: list[str] = []
        if not math.isfinite(float(sums.rows.sum())):
            bad = self._report_nonfinite(entries, now)
            good = [e for e in entries if e.name not in bad]
            if not good:
                return
            sums, per_sample = settle(step, good, self.method, self._first_order(good))
        if samples is not None:
            self._samples = self._samples or SampleLedger()
            predictions = None if step.labels is None else step.output.argmax(1)
            self._samples.add(
                samples, step.losses, sums.layout.names, per_sample, step.labels, predictions
            )
        self._last = sums, now, tuple(bad)
        add_up(self._sums, sums)
        if self._logger is not None:
            add_up(self._window, sums)
            self._bad.update(bad)
            if now % self.log_every < self.every:
                self._log(now)

    def _first_order(self, entries: list[Entry]) -> frozenset[str]:
        """Layers that `link` must leave at first order.

        It divides by the sample's own probability of error; above a batch norm in training mode
        the error signal of a well-fitted sample is mostly that of others.
        """
        coupled = self._watch.coupled if self.method == "link" else frozenset()
        if coupled:
            names = [repr(e.name) for e in entries if e.name in coupled]
            self._warn_once(
                "coupled",
                f"batch norm in training mode mixes samples behind {', '.join(names)}: method "
                "'link' keeps these layers at first order (taylor)",
                UserWarning,
            )
        return coupled

    def _log(self, now: int) -> None:
        if not self._window:
            return
        frame = merged(self._window).frame(now, self.method, self.class_names)
        frame.nonfinite = tuple(self._bad)
        self._window, self._bad = [], set()
        self._logger.log(frame)

    def _report_nonfinite(
        self, entries: list[Entry], now: int, whole_step: bool = False
    ) -> list[str]:
        bad = []
        for e in entries:
            what = [
                text
                for text, row in (("activation", 1), ("error signal", 2))
                if not bool(torch.isfinite(e.stats[row]).all())
            ]
            if what or not bool(torch.isfinite(e.contribution).all()):
                bad.append(e.name)
                self._warn_once(
                    e.name,
                    f"layer {e.name!r}, step {now}: NaN or infinity in its "
                    f"{' and '.join(what) or 'blame'}; the step is left out of its blame",
                )
        if whole_step:
            self._warn_once(
                "", f"step {now}: the loss is NaN or infinite; the step is left out of the blame"
            )
        return bad

    def _warn_once(self, key: str, text: str, kind: type[Warning] = RuntimeWarning) -> None:
        if key not in self._reported:
            self._reported.add(key)
            warnings.warn(f"BlameTracker: {text}", kind, stacklevel=6)

    # ---- afterwards ---------------------------------------------------------------------------

    @property
    def frame(self) -> Frame | None:
        """The last tracked step's statistics; ``None`` before the first."""
        if self._last is None:
            return None
        sums, step, bad = self._last
        return replace(sums.frame(step, self.method, self.class_names), nonfinite=bad)

    def report(self) -> Report:
        """Everything tracked so far, added up.

        Raises:
            RuntimeError: if no step was tracked yet.
        """
        if not self._sums:
            raise RuntimeError("tracker.report: no step was tracked yet")
        frame = merged(self._sums).frame(self.steps - 1, self.method, self.class_names)
        return Report(frame, METHODS[self.method].question, self._samples)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to resume: sums, sample ledger, step; tensors and plain values."""
        return {
            "steps": self.steps,
            "method": self.method,
            "sums": [
                vars(s.copy()) | {"layout": (s.layout.names, s.layout.sizes)} for s in self._sums
            ],
            "samples": None if self._samples is None else self._samples.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where :meth:`state_dict` left off.

        Raises:
            ValueError: if the state was made with another method.
        """
        if state["method"] != self.method:
            raise ValueError(
                f"state: it was made with method {state['method']!r}, this tracker has "
                f"{self.method!r}"
            )
        self.steps = state["steps"]
        self._sums = [
            UnitSums(**{**s, "layout": Layout(*map(tuple, s["layout"]))}).copy()
            for s in state["sums"]
        ]
        if state["samples"] is not None:
            self._samples = SampleLedger()
            self._samples.load_state_dict(state["samples"])


def _check_loss(loss: Any, pending: Pending) -> None:
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss: expected a scalar tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"loss: expected a scalar, got shape {tuple(loss.shape)}")
    if not loss.requires_grad:
        raise ValueError("loss: it does not require grad; pass the loss backward() was called "
                         "on, not a detached copy")  # fmt: skip
    if pending.forwards == 0:
        raise RuntimeError("tracker.step: the model was not called since the last step")


def _check_backward(pending: Pending) -> None:
    if pending.outputs and not pending.entries:
        raise ValueError(NO_LAYER)
    if not pending.outputs:
        raise RuntimeError(
            "tracker.step: no error signal reached the model's output; call loss.backward() "
            "first (and step once after each backward)"
        )
    if len(pending.outputs) > 1:
        raise RuntimeError(
            f"tracker.step: {len(pending.outputs)} backward passes since the last step; call "
            "it once after each"
        )


def _logger(writer: Any) -> Any:
    if writer is None:
        return None
    # Imported here: blame does not depend on logging, only this convenience does.
    from torchbp.logging import BlameLogger

    return BlameLogger(writer)
