"""Properties that any differentiable function can be asked about.

Each takes a :class:`Case` in float64 and returns silently, raises :class:`NotApplicable`, or raises
anything else, which is the finding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from torchbp.verify.cases import (
    Case,
    NotApplicable,
    Outcome,
    cotangent,
    outcome,
    variation,
)


def gradcheck(case: Case) -> None:
    """The backward pass equals finite differences."""
    torch.autograd.gradcheck(case.differentiable, case.inputs)


def gradgradcheck(case: Case) -> None:
    """The derivative of the backward pass equals its finite differences."""
    torch.autograd.gradgradcheck(case.differentiable, case.inputs)


def forward_mode(case: Case) -> None:
    """The jvp equals finite differences."""
    try:
        torch.autograd.gradcheck(
            case.differentiable, case.inputs, check_forward_ad=True, check_backward_ad=False
        )
    except NotImplementedError as error:  # absent, not wrong
        raise NotApplicable(f"has no forward mode: {short(error)}") from None


def forward_over_reverse(case: Case) -> None:
    """The jvp of the backward pass equals finite differences."""
    torch.autograd.gradgradcheck(
        case.differentiable,
        case.inputs,
        check_fwd_over_rev=True,
        check_rev_over_rev=False,
        check_undefined_grad=False,
    )


def vmap(case: Case) -> None:
    """Batching by ``torch.func.vmap`` and by ``is_grads_batched`` equals a loop."""
    inputs = tuple(x.detach() for x in case.inputs)
    batch = tuple(torch.stack([x, variation(x, i)]) for i, x in enumerate(inputs))
    everything = (0,) * len(inputs)
    _vmap_against_loop(case, batch, everything)
    if len(inputs) > 1:
        _vmap_against_loop(case, (batch[0], *inputs[1:]), (0, *[None] * (len(inputs) - 1)))
    _batched_errors(case)


def _vmap_against_loop(case: Case, batch: tuple[Tensor, ...], dims: tuple[int | None, ...]) -> None:
    rows = [
        tuple(x if d is None else x[n] for x, d in zip(batch, dims, strict=True)) for n in (0, 1)
    ]
    errors = [cotangent(out, i).conj() for i, out in enumerate(case.differentiable(*rows[0]))]

    def loss(*inputs: Tensor) -> Tensor:
        outputs = case.differentiable(*inputs)
        terms = [(out * error).sum() for out, error in zip(outputs, errors, strict=True)]
        total = sum(terms[1:], terms[0])
        return total.real if total.is_complex() else total

    def both(*inputs: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        gradient = torch.func.grad(loss, argnums=tuple(range(len(inputs))))
        return case.call(*inputs), gradient(*inputs)

    randomness = "same" if case.random else "error"
    got = torch.func.vmap(both, in_dims=dims, randomness=randomness)(*batch)
    expected = [outcome(case, inputs=tuple(x.clone().requires_grad_() for x in r)) for r in rows]
    close(Outcome(*got), _stacked(expected), "vmap", 1e-9)


def _stacked(outcomes: list[Outcome]) -> Outcome:
    return Outcome(
        tuple(map(torch.stack, zip(*(o.outputs for o in outcomes), strict=True))),
        tuple(map(torch.stack, zip(*(o.grads for o in outcomes), strict=True))),
    )


def _batched_errors(case: Case) -> None:
    inputs = case.inputs
    outputs = [out for out in case.call(*inputs) if out.requires_grad]
    if not outputs:
        return
    errors = [torch.stack([cotangent(out, seed) for seed in (0, 1)]) for out in outputs]
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    got = torch.autograd.grad(outputs, inputs, errors, is_grads_batched=True, **options)
    rows = [torch.autograd.grad(outputs, inputs, [e[n] for e in errors], **options) for n in (0, 1)]
    expected = tuple(map(torch.stack, zip(*rows, strict=True)))
    close(Outcome((), got), Outcome((), expected), "is_grads_batched", 1e-9)


def compiles(case: Case, backend: str) -> None:
    """``torch.compile(fullgraph=True)`` traces forward and backward and changes no value."""
    import torch._dynamo  # slow to import, and only needed here
    import torch._inductor.config

    torch._dynamo.reset()
    compiled = torch.compile(case.function, fullgraph=True, backend=backend, dynamic=False)
    try:
        # Inductor draws eager mode's random numbers only if it is told so.
        with torch._inductor.config.patch(fallback_random=True):
            got = outcome(case, function=compiled)
    finally:
        torch._dynamo.reset()
    close(got, outcome(case), f"compile ({backend})", 1e-9)


def strides(case: Case) -> None:
    """Memory layout of arguments and errors changes no value."""
    expected = outcome(case)
    close(outcome(case, change=_strided), expected, "errors with gaps in memory", 1e-9)
    close(outcome(case, change=_transposed), expected, "transposed errors", 1e-9)
    flat = outcome(case, change=lambda e: _expanded(e).contiguous())
    close(outcome(case, change=_expanded), flat, "expanded errors", 1e-9)
    if case.random:
        raise NotApplicable("sound for errors; random numbers follow the layout of the arguments")
    close(outcome(case.mapped(_strided)), expected, "arguments with gaps in memory", 1e-9)
    close(outcome(case.mapped(_transposed)), expected, "transposed arguments", 1e-9)
    dense = case.with_inputs([_expanded(x).contiguous() for x in case.inputs])
    wide = case.with_inputs([_expanded(x) for x in case.inputs])
    close(outcome(wide), outcome(dense), "expanded arguments", 1e-9)


def _strided(x: Tensor) -> Tensor:
    return torch.stack([torch.zeros_like(x), x.detach()], -1)[..., 1]


def _transposed(x: Tensor) -> Tensor:
    return x.detach().mT.contiguous().mT if x.dim() > 1 else x


def _expanded(x: Tensor) -> Tensor:
    return x.detach()[:1].expand_as(x) if x.dim() and x.shape[0] else x


def zero_size(case: Case) -> None:
    """An empty batch goes through forward and backward."""
    empty = case if any(x.numel() == 0 for x in case.inputs) else case.emptied()
    if case.twin is None:
        try:
            empty.call(*empty.inputs)
        except Exception as error:
            raise NotApplicable(f"refuses an empty leading dimension: {short(error)}") from None
        outcome(empty)
        return
    try:
        expected = outcome(empty, function=case.twin)
    except Exception as error:
        raise NotApplicable(f"torch's twin refuses it: {short(error)}") from None
    close(outcome(empty), expected, "empty batch", 1e-9)


def threads(case: Case) -> None:
    """The number of threads changes no bit, forward or backward."""
    expected = None
    for count in (1, 2, 3):
        with threads_set_to(count):
            got = outcome(case)
        if expected is not None:
            close(got, expected, f"{count} threads against 1", 0)
        expected = expected or got


@contextmanager
def threads_set_to(count: int) -> Iterator[None]:
    """Use this many threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def close(got: Outcome, expected: Outcome, what: str, tolerance: float) -> None:
    """Compare values and gradients, relative to the largest expected element or to one.

    Raises:
        AssertionError: naming the first tensor that differs.
    """
    for kind in ("outputs", "grads"):
        ours, theirs = getattr(got, kind), getattr(expected, kind)
        if len(ours) != len(theirs):
            raise AssertionError(f"{what}: {len(ours)} {kind}, expected {len(theirs)}")
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            near(a, b, f"{what}: {kind}[{i}] differs", tolerance)


def near(got: Tensor, expected: Tensor, what: str, tolerance: float) -> None:
    """Compare two tensors, relative to the largest expected element or to one.

    Raises:
        AssertionError: starting with ``what``.
    """
    finite = expected.detach().abs().to(torch.float64).nan_to_num(0, 0, 0)
    scale = max(1.0, finite.max().item()) if finite.numel() else 1.0
    try:
        torch.testing.assert_close(
            got, expected, rtol=0, atol=tolerance * scale, equal_nan=True, check_stride=False
        )
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from None


def short(error: BaseException) -> str:
    """Type and message of an exception in one paragraph of bounded length."""
    text = " ".join(str(error).split())
    # Where dynamo stopped says nothing of the op, and names files of this machine.
    text = text.partition("Developer debug context")[0].partition(" from user code:")[0].strip()
    return f"{type(error).__name__}: {text[:500]}" if text else type(error).__name__
