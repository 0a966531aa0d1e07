"""A slow reference for ``secant``: per-op secants, written out plainly, over a ``torch.fx`` graph.

Nothing of torchbp is used. Two runs of the graph are interpreted, then multipliers walk back from
the loss; every op hands its multiplier on by the rule of its own.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

Values = dict[fx.Node, Any]


def shares(
    model: nn.Module, x: Tensor, x0: Tensor, targets: Tensor, n_steps: int
) -> dict[str, Tensor]:
    """``Σ_k m_k (a_k - a_{k-1})`` per element of the input and of every module's output."""
    graph = fx.symbolic_trace(model)
    points = [x0 + (x - x0) * (k / n_steps) for k in range(n_steps + 1)]
    runs = [interpret(graph, point) for point in points]
    found: dict[str, Tensor] = {}
    for before, now in itertools.pairwise(runs):
        multipliers = walk_back(graph, now, before, targets)
        seen: dict[str, int] = {}
        for node in graph.graph.nodes:
            if node.op not in ("placeholder", "call_module"):
                continue
            name = "input" if node.op == "placeholder" else str(node.target)
            seen[name] = seen.get(name, 0) + 1
            key = name if seen[name] == 1 else f"{name}#{seen[name]}"
            share = multipliers[node] * (now[node] - before[node])
            found[key] = found.get(key, 0) + share
    return found


def interpret(graph: fx.GraphModule, x: Tensor) -> Values:
    """Every node's value."""
    values: Values = {}
    modules = dict(graph.named_modules())
    with torch.no_grad():
        for node in graph.graph.nodes:
            args = fx.node.map_arg(node.args, lambda n: values[n])
            kwargs = fx.node.map_arg(node.kwargs, lambda n: values[n])
            if node.op == "placeholder":
                values[node] = x
            elif node.op == "get_attr":
                values[node] = operator.attrgetter(node.target)(graph)
            elif node.op == "call_module":
                values[node] = modules[node.target](*args, **kwargs)
            elif node.op == "call_method":
                values[node] = getattr(args[0], node.target)(*args[1:], **kwargs)
            elif node.op == "call_function":
                values[node] = node.target(*args, **kwargs)
            else:
                values[node] = args[0]
    return values


def walk_back(
    graph: fx.GraphModule, now: Values, before: Values, targets: Tensor
) -> dict[fx.Node, Any]:
    """Multipliers of every node, for the summed cross-entropy of the graph's output."""
    nodes = [*graph.graph.nodes]
    modules = dict(graph.named_modules())
    multipliers: dict[fx.Node, Any] = dict.fromkeys(nodes, 0)
    multipliers[nodes[-1]] = cross_entropy(now[nodes[-1]], before[nodes[-1]], targets)
    for node in reversed(nodes):
        m = multipliers[node]
        if node.op == "output":
            multipliers[node.args[0]] = m
            continue
        if not isinstance(now[node], Tensor) or isinstance(m, int):
            continue  # sizes and the like; what leads nowhere
        inputs = [n for n in node.all_input_nodes if isinstance(now[n], Tensor)]
        what = modules[node.target] if node.op == "call_module" else node.target
        if node.op in ("call_module", "call_function", "call_method"):
            received = rule(node, what)(m, [now[n] for n in inputs], [before[n] for n in inputs])
            for source, share in zip(inputs, received, strict=True):
                multipliers[source] = multipliers[source] + share
    return multipliers


def log_mean(p: Tensor, p0: Tensor) -> Tensor:
    return torch.where(p == p0, p, (p - p0) / (p / p0).log())


def cross_entropy(z: Tensor, z0: Tensor, targets: Tensor) -> Tensor:
    """Sato-Vartia: the normalised logarithmic means of both predictions, less the target."""
    q = log_mean(z.softmax(1), z0.softmax(1))
    return q / q.sum(1, keepdim=True) - F.one_hot(targets, z.shape[1]).movedim(-1, 1)


Rule = Callable[[Tensor, list[Tensor], list[Tensor]], list[Tensor]]


def rule(node: fx.Node, what: Any) -> Rule:
    """Which rule a node has; linear maps of one tensor have their transpose."""
    if isinstance(what, ELEMENTWISE) or what in FUNCTIONS:
        f = what if callable(what) else getattr(torch, str(what))
        return lambda m, a, a0: [slope(f, a[0], a0[0]) * m]
    if isinstance(what, nn.LayerNorm):
        return lambda m, a, a0: [layer_norm(what, m, a[0], a0[0])]
    if isinstance(what, nn.MaxPool2d):
        return lambda m, a, a0: [max_pool(what, m, a[0], a0[0])]
    if isinstance(what, nn.Module):
        return lambda m, a, a0: [transposed(what, a[0], m)]
    if what is operator.add:
        return lambda m, a, a0: [m] * len(a)
    if what is operator.mul and len(node.all_input_nodes) == 2:
        return lambda m, a, a0: [m * (a[1] + a0[1]) / 2, m * (a[0] + a0[0]) / 2]
    if what in (operator.matmul, torch.matmul):
        return lambda m, a, a0: [
            m @ ((a[1] + a0[1]) / 2).transpose(-1, -2),
            ((a[0] + a0[0]) / 2).transpose(-1, -2) @ m,
        ]
    if what == "softmax":
        return lambda m, a, a0: [softmax(m, a[0], a0[0])]
    if what in (torch.cat, torch.stack):
        return lambda m, a, a0: joined(node, what, m, a)
    assert what in LINEAR, what

    def single(m: Tensor, a: list[Tensor], a0: list[Tensor]) -> list[Tensor]:
        def function(x: Tensor) -> Any:
            tensors = iter([x, *a[1:]])
            args = [next(tensors) if isinstance(v, fx.Node) else v for v in node.args]
            return what(*args) if callable(what) else getattr(args[0], what)(*args[1:])

        return [transposed(function, a[0], m), *map(torch.zeros_like, a[1:])]

    return single


ELEMENTWISE = (nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid)
FUNCTIONS = (torch.tanh, torch.sigmoid, torch.relu, F.gelu, F.silu)
LINEAR = (
    operator.getitem, operator.mul, operator.truediv, torch.flatten, "reshape", "transpose",
    "flatten", "mean", "masked_fill",
)  # fmt: skip


def slope(f: Callable[[Tensor], Tensor], v: Tensor, v0: Tensor) -> Tensor:
    return (f(v) - f(v0)) / (v - v0)


def transposed(function: Callable[[Tensor], Tensor], x: Tensor, m: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf, m)[0]


def joined(node: fx.Node, what: Any, m: Tensor, parts: list[Tensor]) -> list[Tensor]:
    dim = node.args[1] if len(node.args) > 1 else 0
    if what is torch.stack:
        return [*m.unbind(dim)]
    return [*m.split([p.shape[dim] for p in parts], dim)]


def softmax(m: Tensor, s: Tensor, s0: Tensor) -> Tensor:
    """``Δp_c = L_c (Δs_c - <q, Δs>)`` with the logarithmic means L and ``q = L / Σ L``."""
    p, p0 = s.softmax(-1), s0.softmax(-1)
    mean = torch.where(p > 0, log_mean(p, p0), 0.0)
    return mean * (m - (mean * m).sum(-1, keepdim=True) / mean.sum(-1, keepdim=True))


def layer_norm(norm: nn.LayerNorm, m: Tensor, x: Tensor, x0: Tensor) -> Tensor:
    """Centre, mean of squares, reciprocal root, product: each by its own secant."""
    c, c0 = x - x.mean(-1, keepdim=True), x0 - x0.mean(-1, keepdim=True)
    v, v0 = c.square().mean(-1, keepdim=True), c0.square().mean(-1, keepdim=True)
    r, r0 = (v + norm.eps).rsqrt(), (v0 + norm.eps).rsqrt()
    m = m * norm.weight.detach()
    of_r = (m * (c + c0) / 2).sum(-1, keepdim=True)
    of_v = of_r * (r - r0) / (v - v0)
    of_c = m * (r + r0) / 2 + of_v * (c + c0) / c.shape[-1]
    return of_c - of_c.mean(-1, keepdim=True)


def max_pool(pool: nn.MaxPool2d, m: Tensor, x: Tensor, x0: Tensor) -> Tensor:
    """Window by window: the winners of both runs share so that the difference is kept."""
    of_x, size = torch.zeros_like(x), int(pool.kernel_size)
    for n, c, i, j in itertools.product(*map(range, m.shape)):
        rows, columns = (slice(k * size, (k + 1) * size) for k in (i, j))
        window, window0 = (t[n, c, rows, columns].flatten() for t in (x, x0))
        win, win0 = int(window.argmax()), int(window0.argmax())
        rise, rise0 = window[win] - window[win0], window0[win0] - window0[win]
        share = float(rise / (rise + rise0)) if win != win0 else 1.0
        for winner, part in ((win, share), (win0, 1 - share)):
            row, column = divmod(winner, size)
            of_x[n, c, i * size + row, j * size + column] += m[n, c, i, j] * part
    return of_x
