"""Why the loss changed from one step of a training to the next, and through whom."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from torchbp.blame.arguments import check_count
from torchbp.blame.capture import unknown
from torchbp.blame.checkpoints import checkpoint_blame
from torchbp.blame.probe import Probe, loss_value, snapshot
from torchbp.blame.state import differing, state_between
from torchbp.blame.step_change import BUFFERS, StepChange, largest, layer_of, per_unit, total_of
from torchbp.ops.base import wide
from torchbp.tables import Table

RULES = ("simpson", "secant")
#: Simpson's rule stops halving its intervals here, whatever is left unaccounted for.
_MOST_INTERVALS = 32

Shares = dict[str, Tensor]


class LossChange:
    r"""Loss change allocation: shares each step's change of the loss among the parameters.

    On a fixed probe batch, ``L(θ_{t+1}) - L(θ_t)`` is split into one share per weight, so that the
    shares add up; over units, layers and steps they are sums. Two rules:

    * ``"simpson"``: ``Δθ_i ∫ ∂L/∂θ_i`` along the straight line between the two (Lan et al. 2019),
      by Simpson's rule, intervals halved until what is not accounted for is within ``tolerance``.
      Any model and loss.
    * ``"secant"``: the secants of all ops between the two, exact whatever the size of the step; one
      pair of forward passes and one backward
      (:func:`torchbp.blame.checkpoints.checkpoint_blame`). Models whose ops have secant rules, and
      losses that are a sum or mean over samples.

    What is not accounted for is on record for every step. The model is judged in evaluation mode;
    buffers that a step changes (running statistics) get a share of their own: with ``"simpson"``
    the parameters go first and the buffers after them. Nothing of the model is touched. Memory: two
    copies of the parameters between steps, about six while a step is settled, and a few numbers per
    layer and step.

    Args:
        model: the model that is trained.
        inputs: the probe batch: a tensor, a tuple of positional inputs, or a dict of keywords.
        targets: its targets.
        loss_fn: ``loss_fn(output, targets)``; a mean is taken where it gives several numbers.
        rule: ``"simpson"`` or ``"secant"``.
        tolerance: for ``"simpson"``: largest part that may stay unaccounted for, relative to the
            change of the loss or to the parameters' shares, whichever is larger.
        every: settle one step in this many, for all since the last.

    Attributes:
        steps: a :class:`StepChange` for every settled step.
        shares: per parameter, every weight's share added up over the steps. A tied parameter counts
            under its first name.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: for an unknown rule, ``tolerance <= 0``, ``every < 1``, or an empty batch.

    Example::

        with LossChange(model, x_probe, y_probe, F.cross_entropy) as change:
            for x, y in loader:
                F.cross_entropy(model(x), y).backward()
                optimizer.step(); optimizer.zero_grad()
                change.step()
        print(change.report())
        print(change.jump())
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        targets: Any,
        loss_fn: Any,
        rule: str = "simpson",
        tolerance: float = 1e-2,
        every: int = 1,
    ) -> None:
        if rule not in RULES:
            raise ValueError(unknown("rule", str(rule), RULES))
        if not callable(loss_fn):
            raise TypeError(f"loss_fn: expected a callable (output, targets), got {loss_fn!r}")
        if not tolerance > 0:
            raise ValueError(f"tolerance: expected a number > 0, got {tolerance!r}")
        check_count("every", every)
        self.model, self.rule, self.tolerance, self.every = model, rule, tolerance, every
        self._batch = inputs, targets, loss_fn
        self._probe = Probe(
            model, inputs, lambda output: loss_value(loss_fn, output, targets), whole=True
        )
        self.steps: list[StepChange] = []
        self.shares: Shares = {}
        self._count, self._settled, self._warned = 0, 0, False
        self._last: tuple[Shares, Shares, float] | None = None

    def __enter__(self) -> LossChange:
        parameters, buffers = snapshot(self.model)
        self._last = parameters, buffers, self._probe.loss({**parameters, **buffers})
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None and self._count > self._settled:
            self._settle()
        self._last = None

    def step(self) -> None:
        """Settle the step of the optimizer that was just taken.

        Raises:
            RuntimeError: outside the ``with`` block, or if parameters or buffers came, went or
                changed shape since the step before.
            NotImplementedError: with ``"secant"``, naming a function that has no rule.
        """
        if self._last is None:
            raise RuntimeError("LossChange.step: it is not active; use `with LossChange(...)`")
        self._count += 1
        if self._count - self._settled >= self.every:
            self._settle()

    # ---- one step -----------------------------------------------------------------------------

    def _settle(self) -> None:
        assert self._last is not None
        parameters, buffers, before = self._last
        new, new_buffers = snapshot(self.model)
        _refuse_others({**parameters, **buffers}, {**new, **new_buffers})
        after = self._probe.loss({**new, **new_buffers})
        self._last, self._settled = (new, new_buffers, after), self._count
        if not (math.isfinite(before) and math.isfinite(after)):
            self._refuse_nonfinite(before, after, new)
            return
        rounding = 8 * max(abs(before), abs(after)) * _eps(parameters)
        if self.rule == "secant":
            copies = {n: b.clone() for n, b in new_buffers.items()}  # a forward may write into them
            ends = {**parameters, **buffers}, {**new, **copies}
            shares = self._secant(*ends, before, after)
            running = sum(total_of(shares.pop(n)) for n in new_buffers if n in shares)
            evaluations = 1
        else:
            ahead = after
            if differing(buffers, new_buffers):
                ahead = self._probe.loss({**new, **buffers})
            running = after - ahead
            shares, evaluations = self._simpson(parameters, new, buffers, ahead - before, rounding)
        found = self._record(before, after, shares, running, evaluations)
        if not abs(found.residual) <= self._allowed(found.change, found.layers.values(), rounding):
            self._warn(
                f"{found.residual:.2e} of a change of {found.change:+.2e} are not accounted for, "
                "more than the tolerance; `residual` of every step says how much"
            )

    def _secant(self, start: Shares, end: Shares, before: float, after: float) -> Shares:
        with self._probe.session():
            blame = checkpoint_blame(self.model, *self._batch, start, end)
        # From un-averaged losses, added up, to the loss as the user takes it.
        totals = float(blame.reference_losses.sum()), float(blame.losses.sum())
        loss, total = max(zip((before, after), totals, strict=True), key=lambda pair: abs(pair[1]))
        scale = loss / total if total else 1 / len(blame.losses)
        return {name: share * scale for name, share in blame.items()}

    def _simpson(
        self, before: Shares, after: Shares, buffers: Shares, change: float, rounding: float
    ) -> tuple[Shares, int]:
        """Shares along the straight line, buffers held as they were before."""
        moved = differing(before, after)
        start, end = {**before, **buffers}, {**after, **buffers}
        gaps = {name: after[name] - before[name] for name in moved}

        def slopes(points: Sequence[float]) -> Shares:
            total: Shares = {}
            for w in points:
                state = state_between(start, end, w, moved)
                for name, g in self._probe.gradient(state, moved)[1].items():
                    part = g * (gaps[name] / len(points))
                    total[name] = total[name] + part if name in total else part
            return total

        def closes(totals: Sequence[float]) -> bool:
            allowed = self._allowed(change, totals, rounding)
            return abs(change - sum(totals)) <= allowed

        return integrate(slopes, closes) if moved else ({}, 0)

    def _allowed(self, change: float, totals: Iterable[float], rounding: float) -> float:
        """How much may stay unaccounted for."""
        return self.tolerance * max(abs(change), sum(map(abs, totals))) + rounding

    def _record(
        self, before: float, after: float, shares: Shares, buffers: float, evaluations: int
    ) -> StepChange:
        assert self._last is not None
        layers = dict.fromkeys(map(layer_of, self._last[0]), 0.0)
        for name, share in shares.items():
            layers[layer_of(name)] += total_of(share)
            total = wide(share)
            self.shares[name] = self.shares[name] + total if name in self.shares else total
        sign = -1.0 if after < before else 1.0
        units = largest(per_unit(self.model, shares), sign)
        found = StepChange(
            step=self._count - 1,
            before=before,
            after=after,
            layers=layers,
            buffers=buffers,
            residual=after - before - sum(layers.values()) - buffers,
            evaluations=evaluations,
            units=tuple((name, index[0], value) for name, index, value in units),
            weights=tuple(largest(shares, sign)),
        )
        self.steps.append(found)
        return found

    def _refuse_nonfinite(self, before: float, after: float, parameters: Shares) -> None:
        nan = math.nan
        self.steps.append(StepChange(self._count - 1, before, after, {}, nan, nan, 0))
        bad = [n for n, p in parameters.items() if not bool(torch.isfinite(p).all())]
        where = f", with NaN or infinity in {', '.join(bad[:3])}" if bad else ""
        self._warn(f"the loss is {after:.4g} after {before:.4g}{where}; the step has no shares")

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            text = f"LossChange: step {self._count - 1}: {text}"
            warnings.warn(text, RuntimeWarning, stacklevel=4)

    # ---- afterwards ---------------------------------------------------------------------------

    def per_unit(self, layer: str) -> Tensor:
        """``[U]`` shares of a layer's units over all settled steps, their biases included.

        Units are rows of weights: outputs of a linear or convolution layer, channels of a norm,
        entries of an embedding, hidden units of a recurrent layer (``name.l0``).

        Raises:
            KeyError: for an unknown layer, or one whose parameters never moved.
        """
        found = per_unit(self.model, self.shares)
        if layer not in found:
            raise KeyError(unknown("layer", layer, [*found]))
        return found[layer]

    def report(self) -> Table:
        """One row per layer: its share over all steps, what it raised and what it lowered."""
        self._need_steps()
        rows = []
        known = [s for s in self.steps if s.layers]
        for name in dict.fromkeys(n for s in known for n in s.layers):
            rows.append((name, *_up_and_down([s.layers.get(name, 0.0) for s in known])))
        if any(s.buffers for s in known):
            rows.append((BUFFERS, *_up_and_down([s.buffers for s in known])))
        rows.append(("(not accounted for)", *_up_and_down([s.residual for s in known])))
        first, last = self.steps[0], self.steps[-1]
        title = (
            f"change of the loss by layer ({self.rule}), steps 0 to {last.step}: "
            f"{first.before:.4g} -> {last.after:.4g}"
        )
        columns = ("layer", "change", "raised", "lowered")
        return Table(columns, rows, title=title, signed=columns[1:])

    def jump(self, step: int | None = None) -> StepChange:
        """Why the loss jumped: the step with the largest increase, or the given one.

        With ``every`` above 1, the steps that were settled together.

        Raises:
            RuntimeError: if no step was settled yet.
            ValueError: for a step that was not settled.
        """
        self._need_steps()
        if step is None:
            return max(self.steps, key=lambda s: s.change if s.layers else -math.inf)
        if not isinstance(step, int) or not 0 <= step <= self.steps[-1].step:
            raise ValueError(f"step: expected 0 to {self.steps[-1].step}, got {step!r}")
        return next(s for s in self.steps if s.step >= step)

    def _need_steps(self) -> None:
        if not self.steps:
            raise RuntimeError("LossChange: no step was settled yet")


def integrate(
    slopes: Callable[[Sequence[float]], Shares], closes: Callable[[Sequence[float]], bool]
) -> tuple[Shares, int]:
    """Composite Simpson's rule on [0, 1], intervals halved until the sum is as it should be.

    Args:
        slopes: mean over the given points of ``Δθ ∂L/∂θ``, per parameter.
        closes: whether the parameters' shares have the right sum.

    Returns:
        The shares, and how many points were evaluated.
    """
    trapezoid, points, n = slopes((0.0, 1.0)), 2, 1
    while True:
        middle = slopes([(k + 0.5) / n for k in range(n)])
        points += n
        shares = {name: (t + 2 * middle[name]) / 3 for name, t in trapezoid.items()}
        if closes([total_of(share) for share in shares.values()]) or n == _MOST_INTERVALS:
            return shares, points
        # Every point is used again: the next trapezoid rule has the old points and the new ones.
        trapezoid = {name: (t + middle[name]) / 2 for name, t in trapezoid.items()}
        n *= 2


def _refuse_others(before: Shares, after: Shares) -> None:
    """Refuse to compare states of different tensors."""
    odd = [
        name
        for name in {**before, **after}
        if name not in before or name not in after or before[name].shape != after[name].shape
    ]
    if odd:
        raise RuntimeError(
            f"LossChange: {', '.join(map(repr, odd[:3]))} {'and others ' * (len(odd) > 3)}came, "
            "went or changed shape since the step before; begin a new LossChange"
        )


def _eps(tensors: Shares) -> float:
    return max(
        (torch.finfo(t.dtype).eps for t in tensors.values() if t.is_floating_point()), default=0.0
    )


def _up_and_down(values: Sequence[float]) -> tuple[float, float, float]:
    up = sum(v for v in values if v > 0)
    down = sum(v for v in values if v < 0)
    return up + down, up, down
