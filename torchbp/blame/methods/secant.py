"""``secant``: how ``L(x) - L(reference)`` is shared among units, exactly, at every cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from torchbp.blame.capture import Call
from torchbp.blame.classes import log_prior
from torchbp.blame.cut_off import without_cut_off
from torchbp.blame.cuts import cuts_of
from torchbp.blame.methods.base import Method, Result, gradients, left_at_cut
from torchbp.blame.problem import Point, Problem
from torchbp.blame.reference import Path, between, input_path, reference_path
from torchbp.blame.rerun import losses_again, rerun
from torchbp.blame.tape import SecantTape

#: References other than an input or a checkpoint.
REFERENCES = ("uniform", "prior", "layer")


def secant(problem: Problem) -> Result:
    """``Σ_k m_k (a_k - a_{k-1})`` over ``n_steps`` segments from the reference to the input.

    The multipliers ``m`` come from the secant rule of every op, so that each complete cut sums to
    ``L(x) - L(reference)`` to rounding, whatever the number of segments. One segment is DeepLIFT's
    rescale rule (Shrikumar et al. 2017) extended to every op and to the loss; many segments tend
    to conductance (Dhamdhere et al. 2018).

    ``baseline`` is one of:

    * inputs: zeros by default; for integer inputs zero embeddings (see
      :func:`torchbp.blame.reference.input_path`);
    * another checkpoint, a module or a state dict, on the same inputs: a unit's share is what the
      change of its activation did to the loss. What the changed parameters above a cut did is
      absorbed;
    * ``"uniform"`` or ``"prior"``: the loss is measured against that of a prediction of equal
      probabilities, or of the classes' frequencies (option ``prior``: ``[C]`` probabilities; by
      default the frequencies in the targets). Activations are measured against a zero input; what
      the model predicts there, against the reference prediction, is absorbed;
    * ``"layer"``: every layer against itself switched off, with the rest of the network as it is:
      ``expected[layer]`` is ``L - L(all units of the layer := 0)``.

    Raises:
        TypeError, ValueError: for a baseline that does not fit, by name.
        NotImplementedError: naming a function on the path that has no secant rule.
        RuntimeError: if the runs call different functions or take different masks.
    """
    reference = problem.baseline
    if problem.option("prior", None) is not None and reference != "prior":
        raise ValueError(f"prior: goes with baseline='prior', got baseline={reference!r}")
    if not isinstance(reference, str):
        return _along(problem, reference_path(problem))
    if reference == "layer":
        return _from_layers(problem)
    if reference in REFERENCES:
        return _along(problem, _prediction_path(problem))
    raise ValueError(
        f"baseline: expected {', '.join(map(repr, REFERENCES))}, inputs or a checkpoint, "
        f"got {reference!r}"
    )


def _along(problem: Problem, path: Path) -> Result:
    """Shares of all layers, from one run at every point of the path."""
    tape, n_steps = SecantTape(), problem.n_steps
    point = path.at(0)
    before = first = problem.run(point, mode=tape)
    shares: dict[str, Tensor] = {}
    absorbed: dict[str, Tensor] = {}
    cuts: set[str] = set()
    for k in range(1, n_steps + 1):
        last, point = point, path.at(k / n_steps)
        run = problem.run(point, mode=tape)
        cuts = cuts or cuts_of(run, None if path.changed else first)
        moved, gaps = _beside(path, last, point)
        calls = [*run.calls.values()]
        sought = [*(call.output for call in calls), *moved]
        signals = gradients(run.losses.sum(), sought, retain_graph=bool(path.changed))
        beside = [m * gap for m, gap in zip(signals[len(calls) :], gaps, strict=True)]
        for (name, call), m in zip(run.calls.items(), signals, strict=False):
            gap = call.output.detach() - before.calls[name].output.detach()
            _add(shares, name, problem.reduce(m * gap, call))
            if name in cuts and path.changed:
                total = torch.stack([part.sum() for part in beside]).sum()
                _add(absorbed, name, total - _below(call, m, moved, gaps))
            elif name in cuts and moved:
                _add(absorbed, name, beside[0].flatten(1).sum(1))
        before = run
    change = (before.losses - first.losses).detach()
    if path.changed:
        absorbed = {name: left_at_cut(a, change, shares[name]) for name, a in absorbed.items()}
    shares = without_cut_off(problem, before, shares)
    expected = {name: change for name in shares if name in cuts}
    return Result(shares, before, expected, first.losses.detach(), absorbed)


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value


def _beside(path: Path, last: Point, point: Point) -> tuple[list[Tensor], list[Tensor]]:
    """What moved beside the inputs, leaves of the run at ``point``, and by how much."""
    if point.shift is not None and last.shift is not None:
        return [point.shift], [(point.shift - last.shift).detach()]
    state, state0 = point.state or {}, last.state or {}
    moved = [state[name] for name in path.changed]
    return moved, [(state[name] - state0[name]).detach() for name in path.changed]


def _below(call: Call, m: Tensor, moved: Sequence[Tensor], gaps: Sequence[Tensor]) -> Tensor:
    """What parameters contributed through the layer's output, summed over the batch."""
    total = m.new_zeros(())
    if call.output.grad_fn is None:
        return total
    grads = torch.autograd.grad(call.output, moved, m, retain_graph=True, allow_unused=True)
    for grad, gap in zip(grads, gaps, strict=True):
        if grad is not None:
            total = total + (grad * gap).sum()
    return total


def _prediction_path(problem: Problem) -> Path:
    """From a reference prediction, reached by a shift of the output at the zero input."""
    start, end = input_path(problem, None)
    output = problem.run(start).output
    if problem.head.kind != "cross_entropy":
        raise ValueError(
            f"baseline={problem.baseline!r}: a reference prediction needs cross-entropy "
            "(torch.nn.functional.cross_entropy or its module) of outputs [N, C, ...]"
        )
    logits = _prior(problem, output) if problem.baseline == "prior" else torch.zeros_like(output)
    gap = logits - output.detach()
    return Path(lambda w: replace(between(start, end, w), shift=(gap * (1 - w)).requires_grad_()))


def _prior(problem: Problem, output: Tensor) -> Tensor:
    given = problem.option("prior", None)
    if given is None:
        if problem.targets.is_floating_point():
            raise ValueError("prior: the targets are probabilities; give the classes' frequencies")
        return log_prior(problem.head, output, problem.targets).expand_as(output)
    prior = torch.as_tensor(given, dtype=output.dtype, device=output.device)
    if prior.shape != output.shape[1:2]:
        raise ValueError(
            f"prior: expected shape {tuple(output.shape[1:2])}, one probability per class, "
            f"got {tuple(prior.shape)}"
        )
    if not bool((torch.isfinite(prior) & (prior > 0)).all()):
        raise ValueError("prior: expected positive probabilities, for the loss must be finite")
    shape = (1, -1, *[1] * (output.dim() - 2))
    return (prior / prior.sum()).log().view(shape).expand_as(output)


def _from_layers(problem: Problem) -> Result:
    """Every layer against itself switched off, by running what follows it."""
    run = problem.run()
    shares: dict[str, Tensor] = {}
    expected = {}
    for name, call in run.calls.items():
        rest, tape = rerun(problem, name, call), SecantTape()
        off: Tensor | None = None
        for k in range(problem.n_steps + 1):
            activation = (call.output.detach() * (k / problem.n_steps)).requires_grad_()
            tape.next_run([name])
            with tape:
                losses = losses_again(problem, rest(activation, 1), 1)[0]
            tape.finish_run()
            if off is None:
                off = losses.detach()
                continue
            (m,) = gradients(losses.sum(), [activation])
            step = call.output.detach() / problem.n_steps
            _add(shares, name, problem.reduce(m * step, call))
        assert off is not None
        expected[name] = run.losses.detach() - off
    shares = without_cut_off(problem, run, shares)
    return Result(shares, run, {name: expected[name] for name in shares})


SECANT = Method("secant", "allocation", secant, ("prior",))
