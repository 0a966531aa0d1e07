"""Which layers are complete cuts: every path from where blame begins to the loss leads through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchbp.blame.problem import Run


def cuts_of(run: Run, reference: Run | None = None) -> set[str]:
    """Names of the layers of a run that are complete cuts.

    Args:
        run: the pass on the input.
        reference: another pass. Sources that are the same in both (positions, say) have nothing to
            share out; paths that begin there do not count.
    """
    ends = run.sources
    if reference is not None:
        pairs = zip(ends, reference.sources, strict=True)
        ends = [leaf for leaf, leaf0 in pairs if not torch.equal(leaf, leaf0)]
    return complete_cuts(run.losses, {n: c.output for n, c in run.calls.items()}, ends)


def complete_cuts(
    losses: Tensor, outputs: Mapping[str, Tensor], ends: Sequence[Tensor]
) -> set[str]:
    """Names of the outputs that every path from an end to the losses leads through.

    One walk through the graph serves all outputs. Its nodes that lie on such a path are put in an
    order in which each comes before what it leads to; then a node is on every path exactly if no
    edge leads past it, from a node before to one behind it.

    Args:
        losses: what the paths lead to.
        outputs: candidates by name, tensors of the graph of ``losses``.
        ends: leaves where the paths begin. If none leads to the losses, nothing can be lost: then
            all outputs are complete cuts.
    """
    order = _towards(losses, ends)
    if not order:
        return {*outputs}
    position = {node: k for k, node in enumerate(order)}
    beginnings = {id(end) for end in ends}
    furthest = 0
    used: dict[Any, set[int]] = {}
    passed: dict[Any, bool] = {}
    for k, node in enumerate(order):
        passed[node] = furthest > k
        for following, number in node.next_functions:
            if following in position:
                furthest = max(furthest, position[following])
                used.setdefault(following, set()).add(number)
        if _leaf(node) in beginnings:
            furthest = len(order)
    return {
        name
        for name, output in outputs.items()
        if (node := _node(output, order)) in passed
        and not passed[node]
        and used.get(node, {output.output_nr}) == {output.output_nr}
    }


def _leaf(node: Any) -> int:
    """Identity of the leaf whose gradient the node accumulates."""
    return id(getattr(node, "variable", None))


def _node(output: Tensor, order: list[Any]) -> Any:
    if output.grad_fn is not None:
        return output.grad_fn
    return next((node for node in order if _leaf(node) == id(output)), None)


def _towards(losses: Tensor, ends: Sequence[Tensor]) -> list[Any]:
    """The nodes on paths from the losses to an end, each before those that it leads to."""
    beginnings = {id(end) for end in ends}
    leads: dict[Any, bool] = {}
    finished: list[Any] = []
    stack = [(losses.grad_fn, False)]
    while stack:
        node, done = stack.pop()
        if node is None or (node in leads and not done):
            continue
        following = [f for f, _ in node.next_functions if f is not None]
        if done:
            leads[node] = _leaf(node) in beginnings or any(leads[f] for f in following)
            if leads[node]:
                finished.append(node)
            continue
        leads[node] = False
        stack.append((node, True))
        stack += [(f, False) for f in following if f not in leads]
    return finished[::-1]
