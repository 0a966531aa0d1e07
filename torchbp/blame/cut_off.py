"""Layers that move the loss although no gradient tells: zero would be a wrong answer."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from torchbp.blame.capture import Call
from torchbp.blame.problem import Problem, Run
from torchbp.blame.rerun import losses_again, rerun
from torchbp.blame.source_line import outside_level

#: Autograd's nodes of functions that are constant piece by piece.
_STEPS = {f"{name}Backward0": name.lower() for name in ("Round", "Floor", "Ceil", "Trunc", "Sign")}


def without_cut_off(problem: Problem, run: Run, errors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out layers whose path to the loss is cut.

    An error signal of zero is right for a dead branch or dead units. It is wrong below a
    ``detach``, ``no_grad``, ``argmax`` or ``round``: there the layer's output moves the loss, but
    not by its derivative. Where all signals of a layer are zero and autograd's graph does not
    explain it, the rest of the network runs again with other outputs of that layer, and the losses
    tell.

    Args:
        problem: in a session.
        run: the pass that ``errors`` belong to.
        errors: by layer, anything that is zero where the error signal is.

    Returns:
        ``errors`` without those layers, after a warning that names them.

    Raises:
        ValueError: if the user asked for such a layer by name, or no other is left.
    """
    quiet = _all_zero(errors)
    if not quiet:
        return errors
    reached = _behind([run.losses.grad_fn])
    stepping = [node for node in reached if node.name() in _STEPS]
    steps, below = {_STEPS[node.name()] for node in stepping}, _behind(stepping)
    cut = [
        name
        for name in quiet
        if (_is_among(run.calls[name], below) or not _is_among(run.calls[name], reached))
        and _moves_the_loss(problem, name, run.calls[name])
    ]
    if not cut:
        return errors
    through = f"such as {', '.join(sorted(steps))}" if steps else "detach, no_grad, argmax, say"
    message = (
        f"layers: {', '.join(map(repr, cut))}: the output moves the loss, but not by a gradient: "
        f"something that cannot be differentiated stands between them ({through})"
    )
    if problem.layers not in (None, "all") or len(cut) == len(errors):
        raise ValueError(f"{message}. Method 'ablation' needs no gradient")
    warnings.warn(f"{message}. Left out of the result", UserWarning, stacklevel=outside_level())
    return {name: error for name, error in errors.items() if name not in cut}


def _all_zero(errors: dict[str, Tensor]) -> list[str]:
    if not errors:
        return []
    some = torch.stack([e.any() for e in errors.values()]).tolist()  # one wait for the device
    return [name for name, any_ in zip(errors, some, strict=True) if not any_]


def _behind(nodes: Iterable[Any]) -> set[Any]:
    """Autograd's nodes that lead to some nodes, and those themselves.

    Held as objects, for the identity of one that nobody holds is given to others.
    """
    seen: set[Any] = set()
    stack = [*nodes]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack.extend(following for following, _ in node.next_functions)
    return seen


def _is_among(call: Call, nodes: set[Any]) -> bool:
    """Whether one of the nodes is that of the call's output."""
    output = call.output
    if output.grad_fn is not None:
        return output.grad_fn in nodes
    return any(getattr(node, "variable", None) is output for node in nodes)


def _far_off(activation: Tensor) -> Iterator[Tensor]:
    """Outputs that differ from the layer's own in sign, size and order."""
    yield -1 - activation
    generator, size = torch.Generator().manual_seed(0), 1 + activation.abs().amax()
    for _ in range(2):
        yield 3 * size * torch.randn(activation.shape, generator=generator).to(activation)


def _moves_the_loss(problem: Problem, name: str, call: Call) -> bool:
    rest = rerun(problem, name, call)
    activation = call.output.detach()
    with torch.no_grad():
        losses, *others = (
            losses_again(problem, rest(value, 1), 1)
            for value in (activation, torch.zeros_like(activation), *_far_off(activation))
        )
    return any(not torch.allclose(losses, other, rtol=1e-5, atol=0) for other in others)
