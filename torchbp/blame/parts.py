"""Per-sample gradients without a closed form, and sums of several forms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchbp.blame.layouts import Pairing, UnclearError
from torchbp.blame.uses import Use
from torchbp.ops.sample_factors import Factor, Outer

#: How far, relative to the largest element, a call on single samples may be from a call on all.
_TOLERANCE = 1e-4


class Replayed(Factor):
    """Any op's: called again on each sample alone.

    Args:
        pairing: the use.
        position: of the weight among the arguments.
        errors: at every output.

    Raises:
        UnclearError: if the op cannot be called on one sample, or treats samples together.
    """

    def __init__(self, pairing: Pairing, position: int, errors: Sequence[Tensor | None]) -> None:
        self._use, self._position, self._errors = pairing.use, position, errors
        self._arguments, self._outputs = pairing.slices()
        self.like = next(e for e in errors if e is not None)
        weight = self._use.leaves[position]
        self.samples = pairing.n
        self.shape = tuple(
            1 if self._arguments.get(position) == d else s for d, s in enumerate(weight.shape)
        )
        self._check(pairing)

    def tile(self, part: slice) -> Tensor:
        """``[n, *shape]``: the gradients of some samples."""
        rows = range(*part.indices(self.samples))
        if self._use.changed():
            raise RuntimeError(
                "sample_gradients: parameters have changed since the gradients were taken"
            )
        return torch.stack([self._alone(self._use, n, self._errors) for n in rows])

    def _alone(self, use: Use, n: int, errors: Sequence[Tensor | None]) -> Tensor:
        leaves = [
            t.narrow(self._arguments[i], n, 1) if i in self._arguments else t
            for i, t in enumerate(use.leaves)
        ]
        own = [
            None if e is None else e.narrow(d, n, 1)
            for e, d in zip(errors, self._outputs, strict=True)
        ]
        return _pulled(use, leaves, self._position, own)

    def _check(self, pairing: Pairing) -> None:
        """On the smaller batch: a sample's error through all of it, and through its own call."""
        use = pairing.small
        generator = torch.Generator().manual_seed(0)
        errors: list[Tensor | None] = []
        for shape in use.shapes:
            draw = torch.randn(shape, generator=generator, dtype=torch.float64)
            errors.append(draw.to(self.like))
        for n in range(pairing.k):
            masked: list[Tensor | None] = []
            for e, d in zip(errors, self._outputs, strict=True):
                assert e is not None
                keep = torch.zeros_like(e)
                keep.narrow(d, n, 1).copy_(e.narrow(d, n, 1))
                masked.append(keep)
            try:
                alone = self._alone(use, n, errors)
                whole = _pulled(use, use.leaves, self._position, masked)
            except (RuntimeError, IndexError, ValueError) as error:
                raise UnclearError from error
            dim = self._arguments.get(self._position)
            if dim is not None:
                whole = whole.narrow(dim, n, 1)
            if not bool((alone - whole).abs().amax() <= _TOLERANCE * whole.abs().amax()):
                raise UnclearError


def _pulled(use: Use, leaves: list[Any], position: int, errors: Sequence[Tensor | None]) -> Tensor:
    weight = leaves[position].detach().requires_grad_()
    with torch.enable_grad():
        outputs = use.call([*leaves[:position], weight, *leaves[position + 1 :]])
    came = [
        (o, e) for o, e in zip(outputs, errors, strict=True) if e is not None and o.requires_grad
    ]
    if not came:
        return torch.zeros_like(weight)
    (grad,) = torch.autograd.grad(
        [o for o, _ in came],
        weight,
        [e for _, e in came],
        allow_unused=True,
        materialize_grads=True,
    )
    return grad


def only_looks(use: Use, position: int) -> bool:
    """Whether a function has but a look at an argument: at its shape, or at its dtype."""
    if use.op is not None:
        return False
    weight = use.leaves[position].detach().requires_grad_()
    with torch.enable_grad():
        outputs = use.call([*use.leaves[:position], weight, *use.leaves[position + 1 :]])
    return not any(output.requires_grad for output in outputs)


class SentBack(Factor):
    """The gradients of a parameter that reached its use transformed.

    Args:
        factor: gradients of what reached the use.
        reached: that tensor, with its graph.
        parameter: a leaf of that graph.
        samples_in: the dimension of ``reached`` that runs over samples, if one does.
    """

    def __init__(
        self, factor: Factor, reached: Tensor, parameter: Tensor, samples_in: int | None
    ) -> None:
        self._factor, self._reached, self._parameter = factor, reached, parameter
        self._samples_in = samples_in
        self.samples, self.like, self.shape = factor.samples, factor.like, tuple(parameter.shape)

    def cost(self) -> int:
        """Numbers that a tile needs for one sample."""
        return self._factor.cost() + 2 * math.prod(self.shape)

    def tile(self, part: slice) -> Tensor:
        """``[n, *shape]``: the gradients of some samples."""
        rows = range(*part.indices(self.samples))
        gradients = self._factor.tile(part)
        return torch.stack(
            [self._back(self._placed(g, n)) for g, n in zip(gradients, rows, strict=True)]
        )

    def total(self, memory: int) -> Tensor:
        """``Σ_n g_n``."""
        if self._samples_in is not None:
            return super().total(memory)
        return self._back(self._factor.total(memory))

    def _placed(self, gradient: Tensor, n: int) -> Tensor:
        if self._samples_in is None:
            return gradient
        whole = torch.zeros_like(self._reached, memory_format=torch.contiguous_format)
        whole.narrow(self._samples_in, n, 1).copy_(gradient)
        return whole

    def _back(self, gradient: Tensor) -> Tensor:
        (result,) = torch.autograd.grad(
            self._reached,
            self._parameter,
            gradient.to(self._reached.dtype),
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        return result.to(self.like.dtype)


class OneByOne(Factor):
    """The definition: each sample's loss differentiated by itself, in a run made anew.

    Args:
        run: makes the losses and the parameter they depend on.
        samples: N.
        parameter: for its shape and dtype.
    """

    def __init__(
        self, run: Callable[[], tuple[Tensor, Tensor]], samples: int, parameter: Tensor
    ) -> None:
        self._run, self.samples = run, samples
        self.shape, self.like = tuple(parameter.shape), parameter.detach()

    def tile(self, part: slice) -> Tensor:
        """``[n, *shape]``: the gradients of some samples."""
        losses, parameter = self._run()
        return torch.stack([self._of(loss, parameter) for loss in losses[part]])

    def total(self, memory: int) -> Tensor:
        """``Σ_n g_n``."""
        losses, parameter = self._run()
        return self._of(losses.sum(), parameter)

    @staticmethod
    def _of(loss: Tensor, parameter: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(
            loss, parameter, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return grad


class Sum(Factor):
    """Of several uses of one parameter; a sample's gradients are added before anything else.

    Args:
        factors: of one shape.
    """

    def __init__(self, factors: Sequence[Factor]) -> None:
        self._factors = factors
        first = factors[0]
        self.shape, self.like, self.samples = first.shape, first.like, first.samples

    def cost(self) -> int:
        """Numbers that a tile needs for one sample."""
        return sum(f.cost() for f in self._factors)

    def tile(self, part: slice) -> Tensor:
        """``[n, *shape]``: the gradients of some samples."""
        return sum((f.tile(part) for f in self._factors[1:]), self._factors[0].tile(part))

    def dot(self, direction: Tensor, memory: int) -> Tensor:
        """``[N]``, ``<g_n, v>``."""
        return torch.stack([f.dot(direction, memory) for f in self._factors]).sum(0)

    def total(self, memory: int) -> Tensor:
        """``Σ_n g_n``."""
        first, *rest = self._factors
        return sum((f.total(memory) for f in rest), first.total(memory))

    def grouped(self, groups: Tensor, count: int, memory: int) -> Tensor:
        """``[count, *shape]``: sums over the samples of each group."""
        first, *rest = (f.grouped(groups, count, memory) for f in self._factors)
        return sum(rest, first)


def added(factors: Sequence[Factor]) -> Factor:
    """The sum of per-sample gradients; linear layers become one with more positions."""
    linear = [f for f in factors if type(f) is Outer]
    others = [f for f in factors if type(f) is not Outer]
    parts: list[Factor] = [Outer.joined(linear)] if len(linear) > 1 else [*linear]
    parts += others
    return parts[0] if len(parts) == 1 else Sum(parts)
