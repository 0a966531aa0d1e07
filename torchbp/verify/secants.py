"""Properties of the secants of every op that a function calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from torchbp.ops.base import Op
from torchbp.verify.cases import Case, NotApplicable, cotangent, variation
from torchbp.verify.properties import near

CONSERVED = 1e-12
STEP, LIMIT = 1e-6, 1e-3


@dataclass(frozen=True)
class OpCall:
    """One call of an op: which, on what, with what result."""

    op: type[Op]
    args: tuple[Any, ...]
    output: Any


class _Recorder(TorchFunctionMode):
    """Notes every op that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[OpCall] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        op = getattr(func, "op", None)  # operators of torch.ops have one too, which is no type
        if isinstance(op, type):
            self.calls.append(OpCall(op, args, output))
        return output


def record(case: Case) -> list[OpCall]:
    """Every op that the case calls.

    Raises:
        NotApplicable: if it calls none.
    """
    with _Recorder() as recorder:
        case.call(*case.inputs)
    if not recorder.calls:
        raise NotApplicable("calls no torchbp op, so there is no secant")
    return recorder.calls


def conservation(case: Case, reference: Case) -> None:
    """Contributions of the arguments sum to the change of the output, for any two runs."""
    first_only = case.with_inputs([reference.inputs[0], *case.inputs[1:]])
    for other in (reference, first_only):
        for call, call0 in _pairs(case, other):
            _conserved(call, call0)


def _conserved(call: OpCall, call0: OpCall) -> None:
    errors = _errors(call.output)
    multipliers = _secant(call, call0, errors)
    outputs, outputs0 = map(pytree.tree_leaves, (call.output, call0.output))
    after = _terms(pytree.tree_leaves(errors), outputs, outputs0)
    before = _terms(multipliers, call.args, call0.args)
    total = after.abs().sum() + before.abs().sum()
    residual = (after.sum() - before.sum()).abs()
    if not residual <= CONSERVED * total:
        raise AssertionError(
            f"{call.op.__name__}: contributions sum to {before.sum():.6g}, the output changes by "
            f"{after.sum():.6g}; residual {residual / total:.1e} of the sum of absolute terms"
        )


def _terms(multipliers: Any, values: Any, values0: Any) -> Tensor:
    terms = [
        (m.detach() * (v - v0).detach()).flatten().double()
        for m, v, v0 in zip(multipliers, values, values0, strict=True)
        if m is not None and isinstance(v, Tensor)
    ]
    return torch.cat(terms) if terms else torch.zeros(0, dtype=torch.float64)


def limit(case: Case) -> None:
    """The secant becomes the backward pass as the two runs meet, and where they are equal."""
    close_by = case.with_inputs([x + STEP * _direction(x, i) for i, x in enumerate(case.inputs)])
    same = case.mapped(torch.clone)
    for other, tolerance in ((close_by, LIMIT), (same, 1e-9)):
        for call, call0 in _pairs(case, other):
            _tangent(call, call0, tolerance)


def _direction(x: Tensor, seed: int) -> Tensor:
    return cotangent(x.detach(), 31 + seed)


def _tangent(call: OpCall, call0: OpCall, tolerance: float) -> None:
    multipliers = _secant(call, call0, _errors(call.output))
    outputs = [o for o in pytree.tree_leaves(call.output) if isinstance(o, Tensor)]
    recorded = [o for o in outputs if o.requires_grad]
    errors = [cotangent(o, i) for i, o in enumerate(outputs) if o.requires_grad]
    for position, (arg, m) in enumerate(zip(call.args, multipliers, strict=True)):
        if not (isinstance(arg, Tensor) and arg.requires_grad and recorded):
            continue
        if m is None:
            raise AssertionError(f"{call.op.__name__}: argument {position} got no multiplier")
        options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        (grad,) = torch.autograd.grad(recorded, arg, errors, **options)
        what = f"{call.op.__name__}: multiplier of argument {position} is not the gradient"
        near(m.detach(), grad, f"{what} in the limit", tolerance)


def _pairs(case: Case, other: Case) -> list[tuple[OpCall, OpCall]]:
    calls, calls0 = record(case), record(other)
    if [c.op for c in calls] != [c.op for c in calls0]:
        raise NotApplicable("the two runs call different ops")
    for op in (c.op for c in calls if c.op.no_secant):
        raise NotApplicable(f"{op.__name__} has no secant: {op.no_secant}")
    return list(zip(calls, calls0, strict=True))


def _errors(output: Any) -> Any:
    """A random multiplier for every differentiable output, ``None`` for the others."""
    leaves, spec = pytree.tree_flatten(output)
    return pytree.tree_unflatten(
        [
            cotangent(o, i) if isinstance(o, Tensor) and o.requires_grad else None
            for i, o in enumerate(leaves)
        ],
        spec,
    )


def _secant(call: OpCall, call0: OpCall, errors: Any) -> tuple[Tensor | None, ...]:
    # Ops with several outputs differentiate the first alone; its multiplier is what they get.
    first = errors[0] if isinstance(errors, tuple) else errors
    with torch.no_grad():
        return call.op.secant(first, call.args, call0.args, call.output, call0.output)


def reference_of(case: Case) -> Case:
    """Another run of the same function, for functions that come with one example only."""
    return case.with_inputs([variation(x, i) for i, x in enumerate(case.inputs)])
