"""Which token is to blame for the loss at which other token: sequence losses, term by term."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchbp.blame.arguments import as_arguments, check_count
from torchbp.blame.capture import Call, unknown
from torchbp.blame.cuts import cuts_of
from torchbp.blame.definitions import LossHead, check_targets
from torchbp.blame.problem import Point, Problem, Run
from torchbp.blame.reference import input_reference
from torchbp.blame.tape import SecantTape
from torchbp.tables import Table

_METHODS = ("taylor", "secant")


@dataclass(repr=False, eq=False)
class TokenBlame:
    """Blame from every token of a layer to every term of a sequence's loss.

    Attributes:
        matrix: ``[N, T, S]``: what position ``s`` of the layer adds to the loss at position ``t``.
        layer: the layer's name; ``"input"`` for the model's input.
        method: ``"taylor"`` or ``"secant"``.
        losses: ``[N, T]`` loss terms.
        reference_losses: ``[N, T]`` at the reference, for ``secant``.
        complete: whether the layer is a complete cut, so that ``secant`` must be conserved there.
    """

    matrix: Tensor
    layer: str
    method: str
    losses: Tensor
    reference_losses: Tensor | None
    complete: bool

    @property
    def residual(self) -> float | None:
        """Largest ``|Σ_s matrix - (l_t - l'_t)|``, relative; ``None`` without conservation."""
        if self.reference_losses is None or not self.complete:
            return None
        change = self.losses - self.reference_losses
        error = (self.matrix.sum(2) - change).abs().max()
        return float(error / change.abs().max().clamp(min=torch.finfo(change.dtype).tiny))

    def top(self, k: int = 10, sample: int = 0, tokens: Sequence[str] | None = None) -> Table:
        """The ``k`` largest entries of one sample: who raises whose loss.

        Args:
            k: how many rows.
            sample: which sample.
            tokens: texts of the sample's tokens, for the table.
        """
        check_count("k", k)
        values = self.matrix[sample]
        best = values.flatten().topk(min(k, values.numel()))
        rows = [
            (_token(i % values.shape[1], tokens), _token(i // values.shape[1], tokens), value)
            for value, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        title = f"token blame at {self.layer!r}, sample {sample} ({self.method})"
        return Table(("from", "raises the loss at", "blame"), rows, title=title, signed=["blame"])

    def __repr__(self) -> str:
        shape = tuple(self.matrix.shape)
        return f"TokenBlame({self.method!r} at {self.layer!r}, matrix={shape})"


def _token(index: int, tokens: Sequence[str] | None) -> str:
    return str(index) if tokens is None else f"{index} {tokens[index]}"


class _Terms(LossHead):
    """A loss that is not added up over the positions of a sample."""

    def per_sample(self, output: Any, targets: Any) -> Tensor:
        """``[N, T]`` loss terms."""
        check_targets(self, output, targets)
        terms = (self.elementwise or self.loss_fn)(output, targets)
        if terms.dim() != 2:
            raise ValueError(
                "of='tokens' needs one loss per sample and position, [N, T]; the loss gave "
                f"{tuple(terms.shape)}. Use reduction='none', or a function that returns [N, T]"
            )
        return terms


def token_blame(
    model: nn.Module,
    inputs: Any,
    targets: Any,
    loss_fn: Any,
    layer: str | nn.Module = "input",
    method: str = "secant",
    baseline: Any = None,
) -> TokenBlame:
    """Token-to-token blame: one backward pass per loss term.

    Args:
        model: the model.
        inputs: as :func:`torchbp.attribute` takes them.
        targets: as ``loss_fn`` takes them.
        loss_fn: a loss with one term per sample and position (``[N, T]`` with
            ``reduction="none"``), such as cross-entropy over ``[N, C, T]``.
        layer: whose positions are blamed; for a model of integer tokens, its embedding. One call
            of a layer that runs several times (or one of several inputs) is ``"name#1"``,
            ``"name#2"``, and so on.
        method: ``"taylor"`` (activation times error signal) or ``"secant"`` (conserved: row ``t``
            sums to ``l_t - l'_t`` where the layer is a complete cut).
        baseline: reference input of ``secant``, as :func:`torchbp.attribute` takes it.

    Raises:
        ValueError: for another method, or a loss without terms per position.
    """
    if method not in _METHODS:
        raise ValueError(unknown("method", str(method), _METHODS))
    args, kwargs = as_arguments(inputs)
    known = LossHead.of(loss_fn)
    head = _Terms(known.loss_fn, known.kind, known.elementwise, known.settings)
    layer, _, number = layer.partition("#") if isinstance(layer, str) else (layer, "", "")
    problem = Problem(model, args, kwargs, targets, head, [layer], baseline, of="positions")
    with problem.session():
        if method == "taylor":
            return _solve(problem, problem.run(), None, method, number)
        tape = SecantTape()
        start: Point = input_reference(problem)
        before = problem.run(start, mode=tape)
        return _solve(problem, problem.run(mode=tape), before, method, number)


def _solve(problem: Problem, run: Run, before: Run | None, method: str, number: str) -> TokenBlame:
    known = {str(i): item for i, item in enumerate(run.calls.items(), 1)}
    if not number and len(known) == 1:
        number = "1"
    if number not in known:
        first = next(iter(run.calls))
        raise ValueError(
            f"layer: {first!r} is called {len(known)} times; expected one call of it, "
            f"'{first}#1' to '{first}#{len(known)}'"
        )
    name, call = known[number]
    reference = None if before is None else before.calls[name].output.detach()
    terms = run.losses.shape[1]
    rows = [
        _row(problem, call, run.losses[:, t].sum(), reference, keep=t + 1 < terms)
        for t in range(terms)
    ]
    return TokenBlame(
        torch.stack(rows, 1),
        name,
        method,
        run.losses.detach(),
        None if before is None else before.losses.detach(),
        name in cuts_of(run, before),
    )


def _row(
    problem: Problem, call: Call, loss: Tensor, reference: Tensor | None, keep: bool
) -> Tensor:
    (error,) = torch.autograd.grad(loss, call.output, retain_graph=keep, allow_unused=True)
    if error is None:
        error = torch.zeros_like(call.output)
    return problem.contribution(call, error, reference)
