"""Sequences of unequal length, cut into time steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Parts = Sequence[Tensor]


class Steps(NamedTuple):
    """How the rows of a packed sequence divide into time steps, in the order of computation.

    Attributes:
        sizes: number of sequences in each step, never growing.
        reverse: whether the last step is computed first.
    """

    sizes: tuple[int, ...]
    reverse: bool

    def split(self, rows: Tensor) -> Parts:
        """The rows of each step, first computed first."""
        parts = rows.split(self.sizes)
        return parts[::-1] if self.reverse else parts

    def join(self, parts: Parts) -> Tensor:
        """The inverse of :meth:`split`."""
        return torch.cat(tuple(parts[::-1] if self.reverse else parts))

    def before(self, rows: Tensor, initial: Tensor) -> Tensor:
        """The state that each step starts from, given the states after each step."""
        parts = [*self.split(rows)]
        earlier = [initial, *parts[:-1]]
        return self.join([fit(e, p, initial) for e, p in zip(earlier, parts, strict=True)])


def fit(state: Tensor, like: Tensor, fill: Tensor | None = None) -> Tensor:
    """The rows of ``state`` that ``like`` has; new rows come from ``fill``, or are zeros."""
    have, want = state.shape[0], like.shape[0]
    if have >= want:
        return state if have == want else state[:want]
    more = state.new_zeros(want - have, *state.shape[1:]) if fill is None else fill[have:want]
    return torch.cat([state, more])


def exchange(back: Tensor, arriving: Tensor, left: list[Tensor]) -> Tensor:
    """Going back a step: sequences that start there move to ``left``, those that end there join."""
    have, want = back.shape[0], arriving.shape[0]
    if have > want:
        left.append(back[want:])
        return back[:want]
    return back if have == want else torch.cat([back, arriving[have:]])


def initial_of(back: Tensor, left: list[Tensor]) -> Tensor:
    """What arrives at the initial states: the first step's share, then what was left later."""
    return torch.cat([back, *left[::-1]]) if left else back


def steps_of(x: Tensor, sizes: tuple[int, ...] | None, direction: int) -> Steps:
    """The steps of a padded ``(T, N, F)`` or, with ``sizes``, a packed ``(rows, F)`` input."""
    return Steps(sizes or (x.shape[1],) * x.shape[0], direction == 1)
