"""Integrals along a straight path: ``conductance``, ``layer_ig`` and ``internal_influence``.

Nodes, weights and conventions are Captum's, so that numbers can be compared with its
``LayerConductance``, ``LayerIntegratedGradients`` and ``InternalInfluence``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchbp.blame.capture import Call, unknown
from torchbp.blame.cut_off import without_cut_off
from torchbp.blame.cuts import cuts_of
from torchbp.blame.methods.base import Method, Result, error_signals, gradients
from torchbp.blame.problem import Point, Problem, Run
from torchbp.blame.reference import between, input_path, refuse_jumps
from torchbp.blame.rerun import can_be_repeated, losses_again, repeat_samples, rerun

#: Samples times points of the path in one pass, and the bytes it may keep for its way back: what
#: was fastest of 2^24 to 2^28 for an MLP, a CNN and a transformer. At least one point goes at a
#: time.
_ROWS = 1 << 11
_BYTES = 1 << 26

RULES = (
    "gausslegendre",
    "riemann_left",
    "riemann_right",
    "riemann_middle",
    "riemann_trapezoid",
)


def quadrature(rule: str, n: int) -> tuple[list[float], list[float]]:
    """Nodes in ``[0, 1]`` and weights of a rule with ``n`` nodes.

    Riemann sums give every node ``1 / n``. The trapezoid halves the first and the last and has its
    nodes ``1 / (n - 1)`` apart, as Captum's: its weights sum to ``(n - 1) / n``.

    Args:
        rule: one of :data:`RULES`.
        n: number of nodes; at least 2, and 1 for Gauss-Legendre.

    Raises:
        TypeError: if ``rule`` is no string.
        ValueError: for another rule, or too few nodes.
    """
    if not isinstance(rule, str):
        raise TypeError(f"rule: expected a string, got {type(rule).__name__}")
    if rule not in RULES:
        raise ValueError(unknown("rule", rule, RULES))
    if rule == "gausslegendre":
        x, w = np.polynomial.legendre.leggauss(n)
        return (0.5 * (1 + x)).tolist(), (0.5 * w).tolist()
    if n < 2:
        raise ValueError(f"n_steps: rule {rule!r} needs at least 2 nodes, got {n}")
    weights = np.full(n, 1 / n)
    if rule == "riemann_trapezoid":
        weights[[0, -1]] /= 2
        return np.linspace(0, 1, n).tolist(), weights.tolist()
    shift = {"riemann_left": 0.0, "riemann_middle": 0.5, "riemann_right": 1.0}[rule]
    return ((np.arange(n) + shift) / n).tolist(), weights.tolist()


def conductance(problem: Problem) -> Result:
    """``Σ_k δ(x_k) (a(x_{k+1}) - a(x_k))`` over ``n_steps + 1`` nodes ``x_k`` between the ends.

    The part of ``L(x) - L(x0)`` that flows through the unit while the input goes straight from the
    baseline to ``x`` (Dhamdhere et al. 2018), by left sums over the nodes, as Captum has it. One
    sweep over the nodes serves all layers. The path of integer inputs lies in their embeddings, see
    :func:`torchbp.blame.reference.input_path`. Option ``rule``: one of :data:`RULES`.

    Raises:
        TypeError, ValueError: for a baseline that does not fit, by name.
    """
    nodes, _ = quadrature(problem.option("rule", RULES[0]), problem.n_steps + 1)
    path, run, step = _path(problem)
    refuse_jumps(problem, *path)
    shares: dict[str, Tensor] = {}
    last: dict[str, tuple[Tensor, Tensor]] = {}
    for part, count in _sweep(problem, path, nodes, len(run.losses), step):
        errors = error_signals(part.losses.sum(), [*part.calls.values()])
        for (name, call), flat in zip(part.calls.items(), errors, strict=True):
            a, error = _by_node(call.output.detach(), count), _by_node(flat, count)
            share = shares.setdefault(name, torch.zeros_like(a[0]))
            for k in range(count):  # node by node, which stays in the processor's cache
                if name in last:
                    a_before, error_before = last[name]
                    share.addcmul_(a[k] - a_before, error_before)
                last[name] = a[k], error[k]
            last[name] = a[-1].clone(), error[-1].clone()  # views would keep the whole pass
    shares = without_cut_off(problem, run, shares)
    values = {name: problem.reduce(share, run.calls[name]) for name, share in shares.items()}
    first = _first(problem, path[0], run)
    change, cuts = (run.losses - first.losses).detach(), cuts_of(run, first)
    expected = {name: change for name in values if name in cuts}
    return Result(values, run, expected, first.losses.detach())


def internal_influence(problem: Problem) -> Result:
    """``Σ_k w_k δ(x_k)``: the error signal averaged from the baseline to the input.

    (Leino et al. 2018.) One sweep over the nodes serves all layers. Path and option ``rule`` as for
    :func:`conductance`.

    Raises:
        TypeError, ValueError: for a baseline that does not fit, by name.
    """
    nodes, weights = quadrature(problem.option("rule", RULES[0]), problem.n_steps)
    path, run, step = _path(problem)
    refuse_jumps(problem, *path)
    means: dict[str, Tensor] = {}
    done = 0
    for part, count in _sweep(problem, path, nodes, len(run.losses), step):
        errors = error_signals(part.losses.sum(), [*part.calls.values()])
        for name, flat in zip(part.calls, errors, strict=True):
            mean = _weighted(_by_node(flat, count), weights[done : done + count])
            means[name] = means[name] + mean if name in means else mean
        done += count
    means = without_cut_off(problem, run, means)
    values = {name: problem.reduce(mean, run.calls[name]) for name, mean in means.items()}
    first = _first(problem, path[0], run)
    return Result(values, run, reference_losses=first.losses.detach())


def layer_ig(problem: Problem) -> Result:
    """``(a - a0) Σ_k w_k δ(a0 + s_k (a - a0))``: integrated gradients from the layer on.

    (Sundararajan et al. 2017.) The path is straight in the layer's own output, from what the
    baseline makes of it to what the input does; the rest of the network sees the input throughout.
    So every layer has a path of its own, and a sum to keep even where other paths lead past it:
    ``expected[layer] = L - L(a := a0)``, which at a complete cut is ``L(x) - L(x0)``. Option
    ``rule``: one of :data:`RULES`.

    Raises:
        TypeError, ValueError: for a baseline that does not fit, by name.
    """
    nodes, weights = quadrature(problem.option("rule", RULES[0]), problem.n_steps)
    (start, _), run, step = _path(problem)
    first = _first(problem, start, run)
    shares, expected = {}, {}
    for name, call in run.calls.items():
        a0 = first.calls[name].output.detach()
        shares[name], off = _from_layer(problem, name, call, a0, nodes, weights, step)
        expected[name] = run.losses.detach() - off
    shares = without_cut_off(problem, run, shares)
    values = {name: problem.reduce(share, run.calls[name]) for name, share in shares.items()}
    expected = {name: expected[name] for name in values}
    return Result(values, run, expected, first.losses.detach())


def _from_layer(
    problem: Problem,
    name: str,
    call: Call,
    a0: Tensor,
    nodes: list[float],
    weights: list[float],
    step: int,
) -> tuple[Tensor, Tensor]:
    """Integrated gradients of one layer, like its output, and ``[N]`` losses at ``a0``."""
    rest = rerun(problem, name, call)
    gap = call.output.detach() - a0
    mean = torch.zeros_like(gap)
    for k in range(0, len(nodes), step):
        path = torch.cat([a0 + s * gap for s in nodes[k : k + step]]).requires_grad_()
        count = len(path) // len(gap)
        losses = losses_again(problem, rest(path, count), count)
        (error,) = gradients(losses.sum(), [path])
        mean += _weighted(_by_node(error, count), weights[k : k + step])
    with torch.no_grad():
        off = losses_again(problem, rest(a0, 1), 1)[0]
    return mean * gap, off


def first_pass(problem: Problem) -> tuple[Run, int]:
    """The forward pass on the input, and how many copies of its batch one pass may hold.

    One copy only, where samples are coupled or drawn at random (training mode), or where an input
    or target does not run over the samples in dimension 0: nobody can say how to repeat it.
    """
    held: dict[int, int] = {}

    def note(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        run = problem.run()
    for parameter in problem.model.parameters():  # needed once, however many copies there are
        held.pop(parameter.untyped_storage().data_ptr(), None)
    samples = len(run.losses)
    given = pytree.tree_leaves((problem.args, problem.kwargs, problem.targets))
    whole = any(isinstance(v, Tensor) and v.shape[:1] != (samples,) for v in given)
    if whole or not can_be_repeated(problem, run):
        return run, 1
    return run, max(1, min(_ROWS // samples, _BYTES // max(1, sum(held.values()))))


def _path(problem: Problem) -> tuple[tuple[Point, Point], Run, int]:
    """Where the path begins and ends, the pass at its end, and the copies a pass may hold."""
    run, step = first_pass(problem)
    start, end = input_path(problem, problem.baseline)
    pairs = zip(start.starts or (), end.starts or (), strict=True)
    if any(len(a) != len(run.losses) and not torch.equal(a0, a) for a0, a in pairs):
        step = 1  # something moves that does not run over the samples
    return (start, end), run, step


def _first(problem: Problem, start: Point, run: Run) -> Run:
    """The pass at the reference, which calls the layers that the input does."""
    first = problem.run(start)
    for name in run.calls:
        if name not in first.calls:
            raise ValueError(
                f"baseline: layer {name!r} is called on the input, but not at the reference"
            )
    return first


def _sweep(
    problem: Problem, path: tuple[Point, Point], nodes: list[float], samples: int, step: int
) -> Iterator[tuple[Run, int]]:
    """Forward passes over the nodes, ``step`` in one: the run, and how many nodes it holds."""
    for k in range(0, len(nodes), step):
        points = [path[1] if s == 1 else between(*path, s) for s in nodes[k : k + step]]
        yield problem.run(_together(points, problem.targets, samples)), len(points)


def _together(points: list[Point], targets: Any, samples: int) -> Point:
    """One point whose batch holds those of several points, one after the other."""
    if len(points) == 1:
        return points[0]

    def joined(*values: Any) -> Any:
        runs = isinstance(values[0], Tensor) and values[0].shape[:1] == (samples,)
        return torch.cat(values) if runs else repeat_samples(values[0], samples, len(values))

    starts = [p.starts for p in points if p.starts is not None]
    return Point(
        tuple(map(joined, *(p.args for p in points))),
        {name: joined(*(p.kwargs[name] for p in points)) for name in points[0].kwargs},
        starts=[*map(joined, *starts)] if starts else None,
        targets=repeat_samples(targets, samples, len(points)),
    )


def _by_node(values: Tensor, count: int) -> Tensor:
    """``[count * N, ...]`` as ``[count, N, ...]``."""
    return values.view(count, -1, *values.shape[1:])


def _weighted(values: Tensor, weights: list[float]) -> Tensor:
    """Sum over dimension 0, weighted."""
    return torch.tensordot(values.new_tensor(weights), values, 1)


CONDUCTANCE = Method("conductance", "allocation", conductance, ("rule",), n_steps=50)
INTERNAL_INFLUENCE = Method(
    "internal_influence", "sensitivity", internal_influence, ("rule",), n_steps=50
)
LAYER_IG = Method("layer_ig", "allocation", layer_ig, ("rule",), n_steps=50)
