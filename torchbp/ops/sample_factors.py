"""Gradients of a weight for every sample apart, in the form in which one call of an op gives them.

A gradient is a sum of products of what comes in and what comes back, and these are held, never the
gradients themselves: norms, inner products and sums follow from the parts, or from gradients made
for a few samples at a time. An op says what its gradients are made of beside its secant::

    sample_factors(grad_output, args, output) -> tuple[Factor | None, ...]

one for each argument; ``None`` for what is no weight or has no closed form.

Sources: Goodfellow 2015 (norms of linear layers), Li et al. 2021 (ghost norms of sequences),
Rochette et al. 2019 (convolutions as products of windows).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from torchbp.ops.base import wide


@dataclass(frozen=True)
class Layout:
    """Which dimension of an op's output runs over samples.

    Attributes:
        dim: the dimension.
        samples: how many samples there are.
        inner: where positions share the dimension, whether samples vary fastest.
    """

    dim: int
    samples: int
    inner: bool = False

    def first(self, tensor: Tensor) -> Tensor:
        """``[N, ...]``: samples first; positions that shared the dimension stay in its place."""
        repeats = tensor.shape[self.dim] // self.samples
        if repeats == 1:
            return tensor.movedim(self.dim, 0)
        if self.inner:
            return tensor.unflatten(self.dim, (repeats, self.samples)).movedim(self.dim + 1, 0)
        return tensor.unflatten(self.dim, (self.samples, repeats)).movedim(self.dim, 0)


class Factor:
    """Per-sample gradients ``[N, *shape]`` that are made when asked for, some samples at a time.

    Attributes:
        shape: of the weight.
        samples: N.
        like: a tensor whose dtype and device the gradients have.
    """

    shape: tuple[int, ...]
    samples: int
    like: Tensor

    def arranged(self, layout: Layout) -> Factor | None:
        """The same, told where the samples are; ``None`` if the parts do not keep them apart."""
        raise NotImplementedError

    def tile(self, part: slice) -> Tensor:
        """``[n, *shape]``: the gradients of some samples."""
        raise NotImplementedError

    def cost(self) -> int:
        """Numbers that :meth:`tile` needs for one sample."""
        return 2 * math.prod(self.shape)

    def tiles(self, memory: int) -> Iterator[tuple[slice, Tensor]]:
        """All gradients, in tiles that ``memory`` bytes suffice for (or of one sample)."""
        step = max(1, memory // max(1, self.cost() * self.like.element_size()))
        for start in range(0, self.samples, step):
            part = slice(start, min(start + step, self.samples))
            yield part, self.tile(part)

    def _zeros(self, *shape: int) -> Tensor:
        return self.like.new_zeros(shape)

    def square_norms(self, memory: int) -> Tensor:
        """``[N]``, ``|g_n|²``."""
        parts = [_square_norms(tile) for _, tile in self.tiles(memory)]
        return torch.cat(parts) if parts else self._zeros(0)

    def gram(self, other: Factor, memory: int) -> Tensor:
        """``[N, M]``, ``<g_n, g'_m>``."""
        result = self._zeros(self.samples, other.samples)
        for rows, mine in self.tiles(memory // 2):
            for columns, theirs in other.tiles(memory // 2):
                result[rows, columns] = _flat(mine) @ _flat(theirs).mT
        return result

    def dot(self, direction: Tensor, memory: int) -> Tensor:
        """``[N]``, ``<g_n, v>``."""
        parts = [_flat(tile) @ direction.flatten() for _, tile in self.tiles(memory)]
        return torch.cat(parts) if parts else self._zeros(0)

    def total(self, memory: int) -> Tensor:
        """``Σ_n g_n``."""
        return sum((t.sum(0) for _, t in self.tiles(memory)), self._zeros(*self.shape))

    def absolute(self, memory: int) -> Tensor:
        """``Σ_n |g_n|``, element by element."""
        return sum((t.abs().sum(0) for _, t in self.tiles(memory)), self._zeros(*self.shape))

    def square(self, memory: int) -> Tensor:
        """``Σ_n g_n²``, element by element."""
        return sum((t.square().sum(0) for _, t in self.tiles(memory)), self._zeros(*self.shape))

    def grouped(self, groups: Tensor, count: int, memory: int) -> Tensor:
        """``[count, *shape]``: sums over the samples of each group; ``groups`` is ``[N]``."""
        result = self._zeros(count, *self.shape)
        for part, tile in self.tiles(memory):
            result.index_add_(0, groups[part], tile)
        return result


def _flat(tile: Tensor) -> Tensor:
    return tile.reshape(len(tile), -1)


def _square_norms(tile: Tensor) -> Tensor:
    return torch.linalg.vector_norm(_flat(tile), dim=1).square()


#: One for each argument of an op.
Factors = tuple[Factor | None, ...]


class Rows(Factor):
    """``g_n``: the values of sample n, summed over what the weight was broadcast along.

    Args:
        values: in the layout of the op's output, or without dimensions that are summed already.
        shape: that broadcasts with ``values``.
        weight: what has that many elements.
    """

    def __init__(self, values: Tensor, shape: Sequence[int], weight: Tensor) -> None:
        self.values, self.broadcast = wide(values), tuple(shape)
        self.shape, self.like = tuple(weight.shape), self.values

    def arranged(self, layout: Layout) -> Factor | None:
        full = (*(1,) * (self.values.dim() - len(self.broadcast)), *self.broadcast)
        if layout.dim >= self.values.dim() or full[layout.dim] != 1:
            return None
        self.samples = layout.samples
        self.values = layout.first(self.values)
        rest = [*full[: layout.dim], *full[layout.dim + 1 :]]
        if self.values.dim() - 1 > len(rest):
            rest.insert(layout.dim, 1)
        self.broadcast = tuple(rest)
        return self

    def tile(self, part: slice) -> Tensor:
        values = self.values[part]
        summed = values.sum_to_size(len(values), *self.broadcast)
        return summed.reshape(len(values), *self.shape)


def of_channels(values: Tensor, weight: Tensor | None) -> Rows | None:
    """:class:`Rows` of a weight with one element for each channel of ``(N, C, *)``."""
    if weight is None:
        return None
    return Rows(values, (weight.numel(), *(1,) * (values.dim() - 2)), weight)


class Outer(Factor):
    """``g_n = Σ_p e_np x_npᵀ``, a sum of outer products over positions.

    Args:
        errors: ``(*leading, O)``.
        inputs: ``(*leading, I)``; the leading dimensions are those of the op's output.
    """

    def __init__(self, errors: Tensor, inputs: Tensor) -> None:
        self.errors, self.inputs = wide(errors), wide(inputs)
        self.shape, self.like = (errors.shape[-1], inputs.shape[-1]), self.errors

    def arranged(self, layout: Layout) -> Factor | None:
        if layout.dim >= self.errors.dim() - 1:
            return None
        self.samples = layout.samples
        self.errors, self.inputs = (
            layout.first(t).reshape(layout.samples, -1, t.shape[-1])
            for t in (self.errors, self.inputs)
        )
        return self

    @staticmethod
    def joined(factors: Sequence[Outer]) -> Outer:
        """The sum of several, already arranged."""
        errors = torch.cat([f.errors for f in factors], 1)
        result = Outer(errors, torch.cat([f.inputs for f in factors], 1))
        result.samples = factors[0].samples
        return result

    @property
    def positions(self) -> int:
        """How many products are summed."""
        return self.errors.shape[1]

    def _flat(self) -> tuple[Tensor, Tensor]:
        return self.errors.flatten(0, 1), self.inputs.flatten(0, 1)

    def tile(self, part: slice) -> Tensor:
        return self.errors[part].mT @ self.inputs[part]

    def square_norms(self, memory: int) -> Tensor:
        if self.positions == 1:
            return _square_norms(self.errors) * _square_norms(self.inputs)
        if not fewer_products(self.positions, *self.shape):
            return super().square_norms(memory)
        step = max(1, memory // (3 * self.positions**2 * self.like.element_size()))
        pairs = zip(self.errors.split(step), self.inputs.split(step), strict=True)
        return torch.cat([ghost_norms(e.mT[:, None], x.mT[:, None]) for e, x in pairs])

    def gram(self, other: Factor, memory: int) -> Tensor:
        if isinstance(other, Outer) and self.positions == other.positions == 1:
            (e, x), (f, y) = self._flat(), other._flat()
            return (e @ f.mT) * (x @ y.mT)
        return super().gram(other, memory)

    def dot(self, direction: Tensor, memory: int) -> Tensor:
        errors, inputs = self._flat()
        return ((inputs @ direction.mT) * errors).view(self.samples, -1).sum(1)

    def total(self, memory: int) -> Tensor:
        errors, inputs = self._flat()
        return errors.mT @ inputs

    def absolute(self, memory: int) -> Tensor:
        if self.positions > 1:
            return super().absolute(memory)
        errors, inputs = self._flat()
        return errors.abs().mT @ inputs.abs()

    def square(self, memory: int) -> Tensor:
        if self.positions > 1:
            return super().square(memory)
        errors, inputs = self._flat()
        return errors.square().mT @ inputs.square()

    def grouped(self, groups: Tensor, count: int, memory: int) -> Tensor:
        result = self._zeros(count, *self.shape)
        for group in range(count):
            rows = (groups == group).nonzero()[:, 0]
            errors, inputs = self.errors[rows].flatten(0, 1), self.inputs[rows].flatten(0, 1)
            torch.mm(errors.mT, inputs, out=result[group])
        return result


def fewer_products(positions: int, fan_out: int, fan_in: int) -> bool:
    """Whether norms are cheaper by pairs of positions than by making the gradients."""
    return positions * (fan_out + fan_in) < fan_out * fan_in


def ghost_norms(errors: Tensor, inputs: Tensor) -> Tensor:
    """``Σ_pq <e_p, e_q> <x_p, x_q>`` of ``[n, groups, O, P]`` and ``[n, groups, I, P]``."""
    return ((errors.mT @ errors) * (inputs.mT @ inputs)).sum((1, 2, 3))


class Lookup(Factor):
    """A table's: the errors of the positions at which sample n looked a row up.

    Args:
        errors: ``(*leading, E)``.
        indices: ``(*leading)``.
        weight: ``(V, E)``.
        kept: which positions count, ``(*leading)``.
    """

    def __init__(self, errors: Tensor, indices: Tensor, weight: Tensor, kept: Tensor) -> None:
        self.errors = torch.where(kept[..., None], wide(errors), 0)
        self.indices = indices
        self.shape, self.like = tuple(weight.shape), self.errors

    def arranged(self, layout: Layout) -> Factor | None:
        if layout.dim >= self.indices.dim():
            return None
        self.samples = layout.samples
        self.errors = layout.first(self.errors).reshape(self.samples, -1, self.shape[1])
        self.indices = layout.first(self.indices).reshape(self.samples, -1)
        return self

    def _pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Summed errors of every (sample, row) that occurs, with the sample and the row."""
        owner = torch.arange(self.samples, device=self.like.device)[:, None] * self.shape[0]
        keys, where = (owner + self.indices).flatten().unique(return_inverse=True)
        summed = self._zeros(len(keys), self.shape[1])
        summed.index_add_(0, where, self.errors.flatten(0, 1))
        return summed, keys // self.shape[0], keys % self.shape[0]

    def tile(self, part: slice) -> Tensor:
        indices, errors = self.indices[part], self.errors[part]
        result = self._zeros(len(indices), *self.shape)
        return result.scatter_add_(1, indices[..., None].expand_as(errors), errors)

    def square_norms(self, memory: int) -> Tensor:
        summed, owner, _ = self._pairs()
        return self._zeros(self.samples).index_add_(0, owner, summed.square().sum(1))

    def gram(self, other: Factor, memory: int) -> Tensor:
        if not isinstance(other, Lookup):
            return super().gram(other, memory)
        # Rows that nobody looked up are zeros: leave them out of the table.
        both = torch.cat([self.indices.flatten(), other.indices.flatten()])
        rows, where = both.unique(return_inverse=True)
        mine, theirs = where.split([self.indices.numel(), other.indices.numel()])
        small = [
            _compact(f, w, len(rows)) for f, w in ((self, mine), (other, theirs))
        ]  # fmt: skip
        return Factor.gram(small[0], small[1], memory)

    def dot(self, direction: Tensor, memory: int) -> Tensor:
        return (F.embedding(self.indices, direction) * self.errors).sum((1, 2))

    def _scattered(self, values: Tensor, rows: Tensor) -> Tensor:
        return self._zeros(*self.shape).index_add_(0, rows, values)

    def total(self, memory: int) -> Tensor:
        return self._scattered(self.errors.flatten(0, 1), self.indices.flatten())

    def absolute(self, memory: int) -> Tensor:
        summed, _, rows = self._pairs()
        return self._scattered(summed.abs(), rows)

    def square(self, memory: int) -> Tensor:
        summed, _, rows = self._pairs()
        return self._scattered(summed.square(), rows)


def _compact(factor: Lookup, indices: Tensor, size: int) -> Lookup:
    small: Lookup = object.__new__(Lookup)
    small.errors, small.like, small.samples = factor.errors, factor.like, factor.samples
    small.indices, small.shape = indices.view_as(factor.indices), (size, factor.shape[1])
    return small
