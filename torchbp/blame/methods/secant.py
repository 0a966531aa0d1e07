"""``secant``: how ``L(x) - L(x0)`` is shared among units, exactly, at every cut."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchbp.blame.capture import per_unit
from torchbp.blame.methods.base import Method, Result, error_signals
from torchbp.blame.problem import Problem, Run
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
    baseline = _baseline(problem)
    tape = SecantTape()
    before = first = problem.run(_point(problem, baseline, 0), mode=tape)
    values: dict[str, Tensor] = {}
    for k in range(1, problem.n_steps + 1):
        run = problem.run(_point(problem, baseline, k), mode=tape)
        calls = [*run.calls.values()]
        multipliers = error_signals(run.losses.sum(), calls, retain_graph=k == problem.n_steps)
        for (name, call), m in zip(run.calls.items(), multipliers, strict=True):
            gap = call.output.detach() - before.calls[name].output.detach()
            share = per_unit(m * gap, call.unit_dim)
            values[name] = values[name] + share if name in values else share
        before = run
    change = (before.losses - first.losses).detach()
    expected = {name: change for name in values if _is_cut(before, name)}
    return Result(values, before, expected, first.losses.detach())


def _baseline(problem: Problem) -> tuple[Any, ...]:
    given = problem.baseline
    if problem.kwargs:
        raise ValueError("method 'secant' takes positional inputs only (a tensor or a tuple)")
    inputs = problem.args
    given = given if isinstance(given, tuple) else (given,) * len(inputs)
    if len(given) != len(inputs):
        raise ValueError(f"baseline: expected {len(inputs)} tensors, got {len(given)}")
    return tuple(_one_baseline(x, x0, problem.n_steps) for x, x0 in zip(inputs, given, strict=True))


def _one_baseline(x: Any, x0: Any, n_steps: int) -> Any:
    if not isinstance(x, Tensor):
        return x
    if x0 is None:
        return torch.zeros_like(x) if x.is_floating_point() else x
    x0 = torch.as_tensor(x0, dtype=x.dtype, device=x.device)
    try:
        x0 = x0.expand_as(x)
    except RuntimeError:
        raise ValueError(
            f"baseline: expected a shape that expands to the input's {tuple(x.shape)}, "
            f"got {tuple(x0.shape)}"
        ) from None
    if not x.is_floating_point() and n_steps > 1:
        raise ValueError(
            "baseline: integer inputs have no points between baseline and input; use n_steps=1"
        )
    return x0


def _point(problem: Problem, baseline: tuple[Any, ...], k: int) -> tuple[Any, ...]:
    """The inputs ``k / n_steps`` of the way from the baseline; the ends are exact."""
    if k in (0, problem.n_steps):
        return problem.args if k else baseline
    w = k / problem.n_steps
    return tuple(
        x0 + (x - x0) * w if isinstance(x, Tensor) and x.is_floating_point() else x
        for x, x0 in zip(problem.args, baseline, strict=True)
    )


def _is_cut(run: Run, name: str) -> bool:
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
