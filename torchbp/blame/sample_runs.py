"""The runs behind per-sample gradients: one of the batch, one of a few of its samples."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from torchbp.blame.capture import cuda_devices
from torchbp.blame.layouts import Pairing, UnclearError, smaller_batch
from torchbp.blame.parts import OneByOne, Replayed, SentBack, added, only_looks
from torchbp.blame.problem import Problem
from torchbp.blame.uses import Use, UseTape, mark_samples, mark_weights
from torchbp.ops.sample_factors import Factor, Factors

#: What is sent back to the outputs of a use.
Errors = Sequence[Tensor | None]


@dataclass
class Found:
    """What the runs found.

    Attributes:
        losses: ``[N]``, un-averaged.
        output: what the model returned, detached; ``None`` if it is no container torch knows.
        factors: by parameter, what its gradients are made of.
        unused: the parameters that the loss does not depend on, detached.
        coupled: whether a sample's loss depends on other samples.
    """

    losses: Tensor
    output: Any
    factors: dict[str, Factor]
    unused: dict[str, Tensor]
    coupled: bool


@dataclass
class _Part:
    """Where a parameter has a part in a use: which use, which argument, what stood there."""

    use: int
    position: int
    reached: Tensor


class SampleRuns:
    """Runs a problem and finds what every parameter's per-sample gradients are made of.

    Args:
        problem: the model and its inputs; its session must be open where it is run.
        names: of the parameters.
    """

    def __init__(self, problem: Problem, names: list[str]) -> None:
        self.problem, self.names = problem, names
        self._random = torch.get_rng_state()
        tensors = [*problem.model.parameters(), *problem.model.buffers()]
        self._random_on = {d: torch.cuda.get_rng_state(d) for d in cuda_devices(tensors)}

    def gradients(self) -> Found:
        """Run, and find what every parameter's gradients are made of."""
        leaves, tape = self._leaves(), UseTape()
        with tape:
            output, losses = self._losses(leaves)
        edges = [edge for use in tape.uses for edge in use.outputs]
        found = _grads(losses.sum(), [*edges, *leaves.values()])
        errors = [found[use.first : use.first + len(use.outputs)] for use in tape.uses]
        direct = dict(zip(leaves, found[len(edges) :], strict=True))
        pairings = self._pairings(tape.uses, leaves, losses)
        coupled = any(pairing.couples() for pairing in pairings or ())
        said = any(isinstance(m, _BatchNorm) and m.training for m in self.problem.model.modules())
        if coupled and not said:  # a batch norm in training mode is named by the session
            warnings.warn(
                "sample_gradients: the model makes the loss of a sample depend on other samples: "
                "what is given as its gradient is its share of the batch's",
                UserWarning,
                stacklevel=4,
            )
        parts = _parts(leaves, tape.uses, errors)
        maker = None
        if pairings is not None:
            scaled = self._scaled(losses, tape, edges) if tape.reorders and not coupled else None
            maker = _Maker(pairings, errors, scaled)
        factors: dict[str, Factor] = {}
        for name, leaf in leaves.items():
            # A gradient at the parameter itself has come by a way the tape has not seen.
            seen = direct[name] is None
            if seen and not parts[name]:
                continue
            factor = maker.factor(leaf, parts[name]) if seen and maker else None
            factors[name] = factor or OneByOne(self._again(name), len(losses), leaf)
        unused = {name: leaf.detach() for name, leaf in leaves.items() if name not in factors}
        return Found(losses.detach(), _detached(output), factors, unused, coupled)

    def _leaves(self) -> dict[str, Tensor]:
        own = self.problem.fresh_state()
        return {name: mark_weights(own[name]) for name in self.names}

    def _losses(
        self, leaves: Mapping[str, Tensor], rows: Tensor | None = None, n: int = 0
    ) -> tuple[Any, Tensor]:
        """Output and losses of the batch, or of some rows of its ``n``."""
        problem = self.problem

        def fed(value: Any) -> Any:
            # A copy: what was asked for may be made later, from tensors of the user's.
            value = value.detach().clone() if isinstance(value, Tensor) else value
            return value if rows is None else _cut(value, rows, n)

        args, kwargs, targets = (
            mark_samples(pytree.tree_map(fed, value))
            for value in (problem.args, problem.kwargs, problem.targets)
        )
        torch.set_rng_state(self._random)
        for device, random in self._random_on.items():
            torch.cuda.set_rng_state(random, device)
        # The leaves themselves and no copies, so that they are recognised.
        state = {**problem.fresh_state(), **leaves}
        output = functional_call(problem.model, state, args, kwargs)
        return output, problem.head.per_sample(output, targets)

    def _pairings(
        self, uses: list[Use], leaves: Mapping[str, Tensor], losses: Tensor
    ) -> list[Pairing] | None:
        """Every use beside the same use in a smaller batch; ``None`` if that cannot be run."""
        n, tape = len(losses), UseTape()
        rows = smaller_batch(n, losses.device)
        try:
            with tape:
                _, small = self._losses(leaves, rows, n)
        except Exception:
            return None  # a model that takes no other batch than the one it got, and may say so
        same = [(a.func, a.spec) for a in uses] == [(b.func, b.spec) for b in tape.uses]
        if not same or len(small) != len(rows):
            return None
        edges = [edge for use in tape.uses for edge in use.outputs]
        found: dict[int, Errors] = {}

        def errors(sample: int) -> Errors:
            if sample not in found:
                found[sample] = _grads(small[sample], edges)
            return found[sample]

        return [
            Pairing(use, other, n, len(rows), errors)
            for use, other in zip(uses, tape.uses, strict=True)
        ]

    @staticmethod
    def _scaled(losses: Tensor, tape: UseTape, edges: list[Any]) -> tuple[Tensor, list[Errors]]:
        """A scale for every loss, and the errors that scaled losses send back to every use."""
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(len(losses), generator=generator)
        scales = (1 + 2 * order / len(losses)).to(losses)
        found = _grads((losses * scales).sum(), edges)
        return scales, [found[use.first : use.first + len(use.outputs)] for use in tape.uses]

    def _again(self, name: str) -> Callable[[], tuple[Tensor, Tensor]]:
        was = self._condition()

        def run() -> tuple[Tensor, Tensor]:
            if was != self._condition():
                raise RuntimeError(
                    "sample_gradients: parameters, buffers, inputs or the model's mode have "
                    f"changed since the gradients were taken, and {name!r} needs a run anew"
                )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the user was warned when they were taken
                with self.problem.session(), UseTape(cut=False):
                    leaf = self._leaves()[name]
                    _, losses = self._losses({name: leaf})
            return losses, leaf

        return run

    def _condition(self) -> list[int]:
        """What a run anew depends on: by versions, and whether modules are in training mode."""
        model, problem = self.problem.model, self.problem
        given = pytree.tree_leaves((problem.args, problem.kwargs, problem.targets))
        tensors = (*model.parameters(), *model.buffers(), *given)
        versions = [t._version for t in tensors if isinstance(t, Tensor) and not t.is_inference()]
        return versions + [m.training for m in model.modules()]


def _detached(output: Any) -> Any:
    kept = pytree.tree_map_only(Tensor, lambda t: t.detach(), output)
    plain = (Tensor, int, float, str, type(None))
    # An object that torch cannot look into would keep the graph.
    return kept if all(isinstance(v, plain) for v in pytree.tree_leaves(kept)) else None


def _cut(value: Any, rows: Tensor, n: int) -> Any:
    if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == n:
        return value.index_select(0, rows.to(value.device))
    return value


def _grads(loss: Tensor, by: list[Any]) -> Errors:
    if not by or not loss.requires_grad:
        return [None] * len(by)
    return torch.autograd.grad(loss, by, retain_graph=True, allow_unused=True)


def _parts(
    leaves: Mapping[str, Tensor], uses: list[Use], errors: Sequence[Errors]
) -> dict[str, list[_Part]]:
    """Every part that each parameter has in a use that the loss depends on."""
    found: dict[str, list[_Part]] = {name: [] for name in leaves}
    names = {id(leaf): name for name, leaf in leaves.items()}
    for i, use in enumerate(uses):
        if all(e is None for e in errors[i]):
            continue
        for position, reached in use.weights.items():
            if only_looks(use, position):
                continue
            if reached.is_leaf:
                reaching = [names[id(reached)]]
            else:
                by = torch.autograd.grad(
                    reached,
                    [*leaves.values()],
                    torch.zeros_like(reached),
                    retain_graph=True,
                    allow_unused=True,
                )
                reaching = [n for n, g in zip(leaves, by, strict=True) if g is not None]
            for name in reaching:
                found[name].append(_Part(i, position, reached))
    return found


class _Maker:
    """Makes the factors of the parameters from their parts."""

    def __init__(
        self,
        pairings: list[Pairing],
        errors: Sequence[Errors],
        scaled: tuple[Tensor, list[Errors]] | None,
    ) -> None:
        self._pairings, self._errors, self._scaled = pairings, errors, scaled
        self._closed: dict[int, Factors] = {}

    def factor(self, leaf: Tensor, parts: list[_Part]) -> Factor | None:
        """What a parameter's gradients are made of, or ``None`` if that is unclear."""
        try:
            return added([self._of(leaf, part) for part in parts])
        except UnclearError:
            return None

    def _of(self, leaf: Tensor, part: _Part) -> Factor:
        pairing, errors = self._pairings[part.use], self._errors[part.use]
        if pairing.use.changed(constants=False) or any(
            e is not None and e.is_complex() for e in errors
        ):
            raise UnclearError
        if pairing.elsewhere() or not self._follows(part.use):
            raise UnclearError
        of_samples = pairing.of_leaf(part.position)
        factor = None if of_samples else self._in_closed_form(part)
        if factor is None:
            if pairing.use.changed():
                raise UnclearError
            factor = Replayed(pairing, part.position, errors)
        if part.reached is leaf:
            return factor
        return SentBack(factor, part.reached, leaf, of_samples[0] if of_samples else None)

    def _follows(self, use: int) -> bool:
        if self._scaled is None:
            return True
        scales, scaled = self._scaled
        return self._pairings[use].follows(self._errors[use], scaled[use], scales)

    def _in_closed_form(self, part: _Part) -> Factor | None:
        pairing, use = self._pairings[part.use], self._pairings[part.use].use
        if use.op is None or use.op.sample_factors is None:
            return None
        if part.use not in self._closed:
            error = self._errors[part.use][0]
            with torch.no_grad():
                self._closed[part.use] = use.op.sample_factors(error, tuple(use.leaves), use.output)
        factor = self._closed[part.use][part.position]
        return None if factor is None else factor.arranged(pairing.layout())
