"""Every sample's gradient for every parameter, never held whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchbp.blame.arguments import as_arguments, check_model
from torchbp.blame.capture import unknown
from torchbp.blame.definitions import LossHead
from torchbp.blame.parts import OneByOne
from torchbp.blame.problem import Problem
from torchbp.blame.sample_runs import Found, SampleRuns
from torchbp.ops.base import wide
from torchbp.ops.sample_factors import Factor

#: Bytes that the gradients made at a time may take.
MEMORY = 1 << 28


class SampleGradients:
    """The gradient of every sample's un-averaged loss for every parameter, never held whole.

    What is held are the inputs of the layers and the errors at their outputs. Norms, inner products
    and sums follow from these, in closed form where there is one, otherwise from gradients made for
    a few samples at a time.

    Attributes:
        losses: ``[N]``, un-averaged.
        output: what the model returned, detached; ``None`` if it is no container torch knows.
        names: the parameters that the loss depends on; a tied one once, under its first name.
        unused: the parameters that it does not depend on: their gradients are zero.
        coupled: whether a sample's loss depends on other samples (batch norm in training mode).
            Then what is called a sample's gradient is its share of the batch's: the part that comes
            through its own row of every layer. The shares add up to the batch's gradient.
        one_by_one: the parameters with no faster way than one backward pass for each sample.
    """

    def __init__(self, found: Found, memory: int) -> None:
        self.losses, self.output, self.coupled = found.losses, found.output, found.coupled
        self.names, self.unused = tuple(found.factors), tuple(found.unused)
        self.one_by_one = tuple(n for n, f in found.factors.items() if isinstance(f, OneByOne))
        self._factors, self._zeros, self._memory = found.factors, found.unused, memory

    def __len__(self) -> int:
        return len(self.losses)

    def factor(self, name: str) -> Factor:
        """The parts that a parameter's gradients are made of.

        Raises:
            ValueError: if the loss does not depend on a parameter of that name.
        """
        if name not in self._factors:
            raise ValueError(unknown("name", name, self.names))
        return self._factors[name]

    def shape(self, name: str) -> torch.Size:
        """Of a parameter."""
        return torch.Size(
            self._zeros[name].shape if name in self._zeros else self.factor(name).shape
        )

    def tiles(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        """The gradients of a parameter, some samples at a time.

        Args:
            name: of the parameter.

        Yields:
            Which samples, and ``[n, *shape]``: as many as the memory budget allows, or one.
        """
        if name in self._zeros:
            zero = self._zeros[name]
            for n in range(len(self)):
                yield slice(n, n + 1), torch.zeros_like(zero)[None]
        else:
            yield from self.factor(name).tiles(self._memory)

    def _chosen(self, name: str | None) -> list[str]:
        if name in self._zeros:
            return []
        return [*self.names] if name is None else [name]

    def square_norms(self, name: str | None = None) -> Tensor:
        """``[N]``: ``|g_n|²``.

        Args:
            name: of one parameter; all of them if ``None``.
        """
        result = torch.zeros_like(wide(self.losses))
        for chosen in self._chosen(name):
            result += self.factor(chosen).square_norms(self._memory)
        return result

    def gram(self, other: SampleGradients | None = None, name: str | None = None) -> Tensor:
        """``[N, M]``: inner products ``<g_n, g'_m>``.

        Args:
            other: gradients of the same parameters on other samples, or at another checkpoint; the
                same ones if ``None``.
            name: of one parameter; all that both losses depend on if ``None``.

        Raises:
            ValueError: if a parameter has another shape in ``other``.
        """
        other = self if other is None else other
        result = wide(self.losses).new_zeros(len(self), len(other))
        for chosen in self._chosen(name):
            if chosen not in other._factors:
                if chosen not in other._zeros:
                    raise ValueError(unknown("other", chosen, other.names))
                continue
            mine, theirs = self.factor(chosen), other.factor(chosen)
            if mine.shape != theirs.shape:
                raise ValueError(
                    f"other: {chosen!r} has shape {theirs.shape} there and {mine.shape} here"
                )
            result += mine.gram(theirs, self._memory)
        return result

    def dot(self, direction: Mapping[str, Tensor]) -> Tensor:
        """``[N]``: ``<g_n, v>``, summed over the parameters that ``direction`` names.

        Args:
            direction: by name of the parameter, a tensor of its shape.

        Raises:
            ValueError: for a name that is none of the parameters, or another shape.
        """
        result = torch.zeros_like(wide(self.losses))
        for name, vector in direction.items():
            shape = self.shape(name)
            if vector.shape != shape:
                raise ValueError(
                    f"direction: {name!r} has shape {tuple(shape)}, got {tuple(vector.shape)}"
                )
            if name not in self._zeros:
                factor = self.factor(name)
                result += factor.dot(vector.detach().to(factor.like), self._memory)
        return result

    def total(self, name: str) -> Tensor:
        """The sum of a parameter's gradients over all samples, of its shape."""
        if name in self._zeros:
            return torch.zeros_like(self._zeros[name])
        return self.factor(name).total(self._memory)


def sample_gradients(
    model: nn.Module,
    inputs: Any,
    targets: Any,
    loss_fn: Any,
    parameters: Sequence[str] | None = None,
    memory: int = MEMORY,
) -> SampleGradients:
    """Take the gradients of every sample's loss, at the cost of about one training step.

    One forward pass on the batch and one on two of its samples, which tells where each layer keeps
    the samples; one backward pass through the activations alone, and a second one where indexing or
    sorting may have put the samples into another order. Exact for any model: whatever has no closed
    form is called again for single samples, and what even that cannot treat (parameters that a
    user's ``autograd.Function`` takes, or that see samples in another order) is differentiated
    sample by sample. Nothing of the model is changed. Parameters that do not require gradients are
    treated like all others: blame asks what raised the loss, not what will be trained.

    Args:
        model: the model, in the mode (``eval()``, usually) in which it shall be judged.
        inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs; dimension 0
            runs over the ``N`` samples.
        targets: as ``loss_fn`` takes them.
        loss_fn: ``loss_fn(output, targets)``, with any reduction.
        parameters: names, as ``model.named_parameters()`` gives them; all if ``None``.
        memory: bytes that gradients made at a time may take (one sample's at least).

    Returns:
        The gradients.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: for an unknown parameter (close names are suggested), an empty batch, wrong
            targets, or a loss that is not one per sample.
    """
    check_model(model)
    if not isinstance(memory, int) or memory < 1:
        raise ValueError(f"memory: expected a positive number of bytes, got {memory!r}")
    names = _names(model, parameters)
    args, kwargs = as_arguments(inputs)
    problem = Problem(model, args, kwargs, targets, LossHead.of(loss_fn))
    runs = SampleRuns(problem, names)
    with problem.session():
        found = runs.gradients()
    return SampleGradients(found, memory)


def _names(model: nn.Module, parameters: Sequence[str] | None) -> list[str]:
    # Every name of a tied parameter is understood; it goes by the first.
    every = dict(model.named_parameters(remove_duplicate=False))
    first = {id(p): n for n, p in model.named_parameters()}
    floating = [n for n, p in model.named_parameters() if p.is_floating_point() or p.is_complex()]
    if parameters is None:
        return floating
    if isinstance(parameters, str):
        parameters = [parameters]
    for name in parameters:
        if name not in every:
            raise ValueError(unknown("parameters", str(name), [*every]))
    return list(dict.fromkeys(first[id(every[name])] for name in parameters))
