"""Recurrent layers on top of each other, from the arguments of ``torch.lstm`` and its like."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchbp.ops.dropout import dropout
from torchbp.ops.recurrent import N_WEIGHTS, RecurrentLayer
from torchbp.ops.registry import Maker, Sample, sample


class Settings(NamedTuple):
    """The arguments that follow the weights; torch's names."""

    has_biases: bool
    num_layers: int
    dropout: float
    train: bool
    bidirectional: bool
    batch_first: bool = False


def run_layers(op: type[RecurrentLayer], input: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """All layers of a recurrent network, as the torch function of that kind computes them.

    Args:
        op: one layer.
        input: ``(T, N, F)``, ``(N, T, F)`` with ``batch_first``, or packed ``(rows, F)``.
        *args: ``hx, params, *settings``, or ``batch_sizes, hx, params, *settings`` if packed.

    Returns:
        States of the last layer, final states, and final cell states if there are any.

    Raises:
        RuntimeError: if the initial states or weights are not as many as the layers need.
    """
    is_packed = not isinstance(args[2], bool)
    sizes = tuple(args[0].tolist()) if is_packed else None
    hx, params, *given = args[1:] if is_packed else args
    settings = Settings(*given)
    initial = (hx,) if isinstance(hx, Tensor) else tuple(hx)
    directions = 2 if settings.bidirectional else 1
    _check(initial, settings.num_layers * directions)
    projected = len(initial) == 2 and initial[0].shape[-1] != initial[1].shape[-1]
    weights = _five_each(params, settings, projected)
    x = input.transpose(0, 1) if settings.batch_first else input
    last = _last_rows(sizes, input.device) if sizes else None
    finals: list[Tensor] = []
    cells: list[Any] = []
    for layer in range(settings.num_layers):
        own = slice(layer * directions, (layer + 1) * directions)
        h0, c0 = (*(state[own] for state in initial), None)[:2]
        flat = [w for direction in weights[own] for w in direction]
        packed = op.call(x, sizes, torch.is_grad_enabled(), h0, c0, *flat)
        x, last_cells = op.outputs(packed, x, h0, c0)
        finals += _final(x, h0.shape[-1], last)
        cells.append(last_cells)
        if layer + 1 < settings.num_layers:
            x = dropout(x, settings.dropout, settings.train)
    output = x.transpose(0, 1) if settings.batch_first else x
    states = (output, torch.stack(finals))
    return states if len(initial) == 1 else (*states, torch.cat(cells))


def _check(initial: tuple[Tensor, ...], count: int) -> None:
    for state in initial:
        if state.dim() != 3 or state.shape[0] != count:
            raise RuntimeError(
                f"hx: expected initial states of shape ({count}, N, size), got {(*state.shape,)}"
            )


def _five_each(params: Any, settings: Settings, projected: bool) -> list[tuple[Any, ...]]:
    """The weights of each layer and direction, in the places that an op has for them."""
    count = settings.num_layers * (2 if settings.bidirectional else 1)
    each = 2 + 2 * settings.has_biases + projected
    if len(params) != count * each:
        raise RuntimeError(f"params: expected {count * each} weights, got {len(params)}")
    found = []
    for first in range(0, len(params), each):
        own = list(params[first : first + each])
        biases = own[2:4] if settings.has_biases else [None, None]
        found.append((*own[:2], *biases, own[-1] if projected else None))
    assert all(len(w) == N_WEIGHTS for w in found)
    return found


def in_dtype(dtype: torch.dtype, input: Tensor, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Input and further arguments in the dtype that autocast has torch's kernel compute in."""
    first = 0 if isinstance(args[2], bool) else 1
    hx, params = args[first : first + 2]
    states = hx.to(dtype) if isinstance(hx, Tensor) else [h.to(dtype) for h in hx]
    weights = [p.to(dtype) for p in params]
    return input.to(dtype), *args[:first], states, weights, *args[first + 2 :]


def _last_rows(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """The row of each packed sequence's last step."""
    starts = [0, *accumulate(sizes)]
    lengths = [sum(size > n for size in sizes) for n in range(sizes[0])]
    return torch.tensor([starts[t - 1] + n for n, t in enumerate(lengths)], device=device)


def _final(x: Tensor, width: int, last: Tensor | None) -> Iterator[Tensor]:
    """The final state of each direction, from the states after each step."""
    for d, part in enumerate(x.split(width, -1)):
        if last is None:
            yield part[0 if d else -1]
        else:
            yield part[: last.shape[0]] if d else part.index_select(0, last)


def layer_samples(make: Maker, gates: int, cell: bool, projection: bool) -> Iterator[Sample]:
    """Calls that cover layers, directions, biases, batch_first, packing and projection."""

    def states(count: int, n: int, p: int, h: int) -> Any:
        return [make(count, n, p), make(count, n, h)] if cell else make(count, n, p)

    def params(layers: int, d: int, f: int, p: int, h: int, biases: bool = True) -> list[Tensor]:
        found = []
        for layer in range(layers):
            for _ in range(d):
                found += [make(gates * h, d * p if layer else f), make(gates * h, p)]
                found += [make(gates * h), make(gates * h)] if biases else []
                found += [make(p, h)] if p != h else []
        return found

    def plain(layers: int, both: bool, first: bool, biases: bool = True) -> tuple[Any, ...]:
        return biases, layers, 0.0, False, both, first

    yield sample(make(3, 2, 3), states(1, 2, 2, 2), params(1, 1, 3, 2, 2), *plain(1, False, False))
    yield sample(make(2, 3, 1), states(4, 2, 2, 2), params(2, 2, 1, 2, 2, False),
                 *plain(2, True, True, False))  # fmt: skip
    yield sample(make(5, 2), torch.tensor([2, 2, 1]), states(2, 2, 2, 2), params(1, 2, 2, 2, 2),
                 *plain(1, True, False)[:-1])  # fmt: skip
    yield sample(make(2, 1, 2), states(2, 1, 2, 2), params(2, 1, 2, 2, 2),
                 True, 2, 0.5, True, False, False)  # fmt: skip
    yield sample(make(3, 0, 2), states(1, 0, 2, 2), params(1, 1, 2, 2, 2), *plain(1, False, False))
    if projection:
        yield sample(make(3, 2, 2), states(2, 2, 1, 2), params(1, 2, 2, 1, 2),
                     *plain(1, True, False))  # fmt: skip
