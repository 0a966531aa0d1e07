"""``secant``: how ``L(x) - L(x0)`` is shared among units, exactly, at every cut."""

from __future__ import annotations

from torch import Tensor

from torchbp.blame.methods.base import Method, Result, error_signals
from torchbp.blame.problem import Problem, Run
from torchbp.blame.reference import between, input_reference
from torchbp.blame.tape import SecantTape


def secant(problem: Problem) -> Result:
    """``Σ_k m_k (a_k - a_{k-1})`` over ``n_steps`` segments from the baseline to the input.

    The multipliers ``m`` come from the secant rule of every op, so that each complete cut sums to
    ``L(x) - L(x0)`` to rounding, whatever the number of segments. One segment is DeepLIFT's
    rescale rule (Shrikumar et al. 2017) extended to every op and to the loss; many segments tend
    to conductance (Dhamdhere et al. 2018).

    Raises:
        ValueError: for a baseline of another shape, or integer inputs that cannot be interpolated.
        NotImplementedError: naming a function on the path that has no secant rule.
    """
    start, end = input_reference(problem), problem.point
    tape = SecantTape()
    before = first = problem.run(start, mode=tape)
    values: dict[str, Tensor] = {}
    for k in range(1, problem.n_steps + 1):
        run = problem.run(between(start, end, k / problem.n_steps), mode=tape)
        calls = [*run.calls.values()]
        multipliers = error_signals(run.losses.sum(), calls, retain_graph=k == problem.n_steps)
        for (name, call), m in zip(run.calls.items(), multipliers, strict=True):
            gap = call.output.detach() - before.calls[name].output.detach()
            share = problem.reduce(m * gap, call)
            values[name] = values[name] + share if name in values else share
        before = run
    change = (before.losses - first.losses).detach()
    expected = {name: change for name in values if is_cut(before, name)}
    return Result(values, before, expected, first.losses.detach())


def is_cut(run: Run, name: str) -> bool:
    """Whether every path from an input to the loss leads through the layer's output."""
    output = run.calls[name].output
    ends = {id(leaf) for leaf in run.sources if leaf is not output}
    if output.grad_fn is None:
        return not ends
    stop = output.grad_fn
    seen, stack = {stop}, [run.losses.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if id(getattr(node, "variable", None)) in ends:
            return False
        stack.extend(following for following, _ in node.next_functions)
    return True


SECANT = Method("secant", "allocation", secant)
