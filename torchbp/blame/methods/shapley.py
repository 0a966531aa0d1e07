"""``shapley``: every unit's mean effect on the loss over all orders of switching units on."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from torchbp.blame.activations import reference_activations, seed_of
from torchbp.blame.capture import Call
from torchbp.blame.methods.ablation import player_masks_shape
from torchbp.blame.methods.base import Method, Result
from torchbp.blame.methods.paths import first_pass
from torchbp.blame.problem import Problem
from torchbp.blame.rerun import losses_again, rerun

#: Numbers in the coalitions that are written down at once.
_MASKS = 1 << 20


def shapley(problem: Problem) -> Result:
    """``v(S + unit) - v(S)``, averaged over permutations; ``v(S)`` is the loss with only ``S`` on.

    The players are those of one layer; those that are off are zero, or what
    :func:`torchbp.blame.activations.reference_activations` makes of the baseline (Shapley 1953;
    sampled by permutations, Castro et al. 2009). Permutations come in antithetic pairs, each
    followed by its reverse (Mitchell et al. 2022): exact already where units interact in pairs
    only. Within a permutation the effects telescope, so that blame sums to ``expected[layer] = L -
    L(layer off)``, however few there are. That is the layer's own sum: its reference is the layer
    off, not an input, and differs from layer to layer.

    Options: ``n_permutations`` (100), reverses included; ``seed`` (0) of the permutations and of
    the baseline ``"resample"``.

    Raises:
        TypeError: if an option is no integer.
        ValueError: for less than one permutation, or a baseline that does not fit.
    """
    permutations = problem.count_option("n_permutations", 100)
    seed = seed_of(problem)
    run, step = first_pass(problem)
    references = reference_activations(problem, run)
    values, expected = {}, {}
    with torch.no_grad():
        for name, call in run.calls.items():
            game = _Game(problem, name, call, references[name], step)
            off = game.losses(torch.zeros(1, game.players, dtype=torch.bool))[0]
            on = run.losses.detach()
            values[name] = _sampled(game, on, off, permutations, seed)
            expected[name] = on - off
    return Result(values, run, expected)


class _Game:
    """The losses of a layer's coalitions, ``step`` of them in one pass."""

    def __init__(
        self, problem: Problem, name: str, call: Call, reference: Tensor | None, step: int
    ) -> None:
        activation = call.output.detach()
        off = torch.zeros_like(activation) if reference is None else reference
        self._off = off[:, None] if activation.dim() == 1 else off
        self.activation = activation[:, None] if activation.dim() == 1 else activation
        self.shape = player_masks_shape(self.activation, call, problem.of)
        self.players = math.prod(self.shape)
        self._problem, self._rest = problem, rerun(problem, name, call)
        self._own, self._step = activation.shape[1:], step

    def losses(self, on: Tensor) -> Tensor:
        """``[coalitions, N]`` losses, where ``on [coalitions, players]`` says who plays."""
        return torch.cat([self._chunk(part) for part in on.split(self._step)])

    def _chunk(self, on: Tensor) -> Tensor:
        keep = on.to(self.activation.device).view(len(on), 1, *self.shape)
        rows = torch.where(keep, self.activation, self._off).reshape(-1, *self._own)
        return losses_again(self._problem, self._rest(rows, len(on)), len(on))


def _sampled(game: _Game, on: Tensor, off: Tensor, permutations: int, seed: int) -> Tensor:
    """``[N, players]`` mean effect of joining, over permutations."""
    total = on.new_zeros(game.players, len(on))
    for order in _orders(game.players, permutations, seed):
        total.index_add_(0, order.to(on.device), _effects(game, order, on, off))
    return (total / permutations).T


def _orders(players: int, permutations: int, seed: int) -> Iterator[Tensor]:
    """Random orders of the players, each followed by its reverse."""
    generator = torch.Generator().manual_seed(seed)
    for k in range(permutations):
        if k % 2 == 0:
            order = torch.randperm(players, generator=generator)
        yield order if k % 2 == 0 else order.flip(0)


def _effects(game: _Game, order: Tensor, on: Tensor, off: Tensor) -> Tensor:
    """``[players, N]``: what each player of an order changes when it joins those before it."""
    joined = order.argsort()  # at which place a player comes
    places = torch.arange(1, game.players)
    parts = places.split(max(1, _MASKS // game.players)) if len(places) else ()
    partly = [game.losses(joined < part[:, None]) for part in parts]
    return torch.cat([off[None], *partly, on[None]]).diff(dim=0)


SHAPLEY = Method("shapley", "allocation", shapley, ("n_permutations", "seed"))
