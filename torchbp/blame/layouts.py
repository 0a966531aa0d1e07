"""Which dimension of a tensor runs over samples: found by running a smaller batch, not guessed.

Attention works on ``[T, N, E]``, flattened tokens are ``[N T, E]``, and N may equal T or E. Run
once more with another number of samples, the dimension that changes is the samples'. Where samples
share it with positions, the errors that one sample's loss sends back tell which rows are its own.
That the rows are in the batch's order is tested as well: errors must scale as the losses do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from torchbp.blame.uses import Use
from torchbp.ops.base import wide
from torchbp.ops.recurrent import RecurrentLayer
from torchbp.ops.sample_factors import Layout

#: How far, relative to the largest element of a row, its error may be from the scaled one.
_TOLERANCE = 1e-3


class UnclearError(Exception):
    """It cannot be told which part of a tensor belongs to which sample."""


def located(shape: Sequence[int], small: Sequence[int], n: int, k: int) -> tuple[int, int] | None:
    """The dimension that runs over samples and how many rows it has for each.

    Args:
        shape: of a tensor for n samples.
        small: of the same tensor for k samples.
        n: how many samples.
        k: how many in the smaller batch.

    Returns:
        ``(dim, repeats)``, or ``None`` if the tensor is the same for any number of samples.

    Raises:
        UnclearError: if the shapes differ otherwise.
    """
    if len(shape) != len(small):
        raise UnclearError
    moved = [d for d, (a, b) in enumerate(zip(shape, small, strict=True)) if a != b]
    if not moved:
        return None
    dim = moved[0]
    if len(moved) > 1 or shape[dim] % n or small[dim] % k or shape[dim] // n != small[dim] // k:
        raise UnclearError
    return dim, shape[dim] // n


def samples_inside(errors: Mapping[int, Tensor | None], dim: int, k: int) -> bool:
    """Whether, of samples and positions that share a dimension, samples vary fastest.

    Args:
        errors: of some samples' losses, for one tensor of the smaller batch.
        dim: the shared dimension.
        k: how many samples there are.

    Raises:
        UnclearError: if the errors fit both orders.
    """
    inside = outside = True
    for sample, error in errors.items():
        if error is None:
            continue
        rows = error.movedim(dim, 0).reshape(error.shape[dim], -1).ne(0).any(1).nonzero()[:, 0]
        repeats = error.shape[dim] // k
        inside = inside and bool((rows % k == sample).all())
        outside = outside and bool((rows // repeats == sample).all())
    if inside == outside:
        raise UnclearError
    return inside


class Pairing:
    """A use in the batch and in the smaller one: where its tensors keep the samples.

    Args:
        use: in the batch of ``n`` samples.
        small: the same in the smaller batch of ``k`` samples.
        n: how many samples.
        k: how many in the smaller batch.
        errors: what the loss of a sample of the smaller batch sends back to all uses' outputs.
    """

    def __init__(
        self,
        use: Use,
        small: Use,
        n: int,
        k: int,
        errors: Callable[[int], Sequence[Tensor | None]],
    ) -> None:
        self.use, self.small, self.n, self.k, self._errors = use, small, n, k, errors

    def of_leaf(self, position: int) -> tuple[int, int] | None:
        """Where the argument at that position keeps the samples."""
        a, b = self.use.leaves[position], self.small.leaves[position]
        return located(a.shape, b.shape, self.n, self.k)

    def of_output(self, which: int = 0) -> tuple[int, int] | None:
        """Where an output keeps the samples."""
        return located(self.use.shapes[which], self.small.shapes[which], self.n, self.k)

    def layout(self) -> Layout:
        """Of what the op makes its factors from.

        Raises:
            UnclearError: if it cannot be told.
        """
        position = None if self.use.op is None else self.use.op.samples_in
        found = self.of_output() if position is None else self.of_leaf(position)
        if found is None:
            raise UnclearError
        if position is not None and found[1] != 1:
            raise UnclearError
        return self._arranged(*found)

    def _arranged(self, dim: int, repeats: int, which: int = 0) -> Layout:
        if repeats == 1:
            return Layout(dim, self.n)
        at = self.use.first + which
        errors = {sample: self._errors(sample)[at] for sample in (0, self.k - 1)}
        return Layout(dim, self.n, samples_inside(errors, dim, self.k))

    def follows(
        self, errors: Sequence[Tensor | None], scaled: Sequence[Tensor | None], scales: Tensor
    ) -> bool:
        """Whether the rows at every output are those of the samples, in the batch's order.

        Args:
            errors: of the sum of all samples' losses, at the use's outputs.
            scaled: of the same sum with every loss times its scale.
            scales: ``[N]``.

        Raises:
            UnclearError: if it cannot be told where an output keeps the samples.
        """
        for which, (error, other) in enumerate(zip(errors, scaled, strict=True)):
            if error is None or other is None or not error.numel():
                continue
            rows, others = self._rows(error, which), self._rows(other, which)
            if rows is None or others is None:
                continue
            rows, others = wide(rows), wide(others)
            gap = (others - rows * scales[:, None]).abs().amax(1)
            tolerance = _TOLERANCE if error.element_size() >= 4 else 30 * _TOLERANCE
            if not bool((gap <= tolerance * rows.abs().amax(1)).all()):
                return False
        return True

    def _rows(self, error: Tensor, which: int) -> Tensor | None:
        """``[N, ...]``: an error at an output, cut into what should be the samples' parts."""
        op = self.use.op
        if op is not None and issubclass(op, RecurrentLayer):
            x, _, _, h0, c0, *_ = self.use.leaves
            states, cells = op.outputs(error, x, h0, c0)
            rows = self.layout().first(states).reshape(self.n, -1)
            # Cell states come as (directions, samples, features).
            return rows if cells is None else torch.cat([rows, *cells.unbind(0)], 1)
        found = self.of_output(which)
        if found is None:
            return None
        return self._arranged(*found, which).first(error).reshape(self.n, -1)

    def elsewhere(self) -> bool:
        """Whether the loss of the first sample depends on others' rows and not on its own."""
        own, others = self._of_first()
        return others and not own

    def couples(self) -> bool:
        """Whether the loss of the first sample depends on other samples' rows here."""
        return all(self._of_first())

    def _of_first(self) -> tuple[bool, bool]:
        """Whether the first sample's loss depends on its own row of the output, and on others."""
        try:
            found = self.of_output()
        except UnclearError:
            return False, False
        error = self._errors(0)[self.use.first]
        # NaN and infinity spread to all samples and say nothing.
        if found is None or found[1] != 1 or error is None or not torch.isfinite(error).all():
            return False, False
        own, others = error.split([1, self.k - 1], found[0])
        return bool(own.ne(0).any()), bool(others.ne(0).any())

    def slices(self) -> tuple[dict[int, int], list[int]]:
        """The samples' dimension of every argument that has one, and of every output.

        Raises:
            UnclearError: if a sample cannot be cut out of the call.
        """
        arguments = {}
        for i, (a, b) in enumerate(zip(self.use.leaves, self.small.leaves, strict=True)):
            if not isinstance(a, Tensor):
                if type(a) is not type(b) or a != b:
                    raise UnclearError
                continue
            found = self.of_leaf(i)
            if found is not None:
                arguments[i] = _alone(found)
        outputs = [_alone(self.of_output(i)) for i in range(len(self.use.shapes))]
        return arguments, outputs


def _alone(found: tuple[int, int] | None) -> int:
    if found is None or found[1] != 1:
        raise UnclearError
    return found[0]


def smaller_batch(n: int, device: torch.device) -> Tensor:
    """Which samples make the smaller batch: two, or three if the batch itself has two."""
    k = 3 if n == 2 else 2
    return torch.arange(k, device=device) % n
