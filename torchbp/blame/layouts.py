"""Which dimension of a tensor runs over samples: found by running a smaller batch, not guessed.

Attention works on ``[T, N, E]``, flattened tokens are ``[N T, E]``, and N may equal T or E. Run
once more with another number of samples, the dimension that changes is the samples'. Where samples
share it with positions, the errors that one sample's loss sends back tell which rows are its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from torchbp.blame.uses import Use
from torchbp.ops.sample_factors import Layout


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
        rows = error.movedim(dim, 0).flatten(1).ne(0).any(1).nonzero()[:, 0]
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
        dim, repeats = found
        if repeats == 1:
            return Layout(dim, self.n)
        if position is not None:
            raise UnclearError
        errors = {sample: self._errors(sample)[self.use.first] for sample in (0, self.k - 1)}
        return Layout(dim, self.n, samples_inside(errors, dim, self.k))

    def couples(self) -> bool:
        """Whether the loss of the first sample depends on other samples' rows here."""
        try:
            found = self.of_output()
        except UnclearError:
            return False
        error = self._errors(0)[self.use.first]
        if found is None or found[1] != 1 or error is None:
            return False
        others = error.narrow(found[0], 1, self.k - 1)
        # NaN and infinity spread to all samples and say nothing.
        return bool(others.ne(0).any()) and bool(torch.isfinite(error).all())

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
