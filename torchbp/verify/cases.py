"""One call to verify, taken apart: what is differentiated, and everything else."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchbp.ops.base import Op
from torchbp.ops.registry import Entry, Maker

Function = Callable[..., Any]
Tensors = tuple[Tensor, ...]


class NotApplicable(Exception):
    """Raised by a property that cannot be asked of a case; the message says why."""


@dataclass(frozen=True)
class Case:
    """A function together with the arguments of one call.

    Attributes:
        function: what is verified.
        twin: a function that gives the expected values, or ``None``.
        leaves: args and kwargs, flattened.
        spec: how to unflatten them.
        positions: which leaves are differentiated.
        copies: whether the function writes into its arguments, so that it must get copies.
        random: whether the function draws random numbers, so that every call must be seeded.
        batched: which leaves share the leading dimension of the first data argument.
    """

    function: Function
    twin: Function | None
    leaves: tuple[Any, ...]
    spec: Any
    positions: tuple[int, ...]
    copies: bool = False
    random: bool = False
    batched: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        function: Function,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        twin: Function | None = None,
        n_parameters: int = 0,
    ) -> Case:
        """Take a call apart and try it once.

        Floating and complex tensors are differentiated: those that require a gradient, or all of
        them if none does. The first ``n_parameters`` leaves are parameters, the others data.

        Raises:
            TypeError: if the function returns no floating tensor.
            ValueError: if there is nothing to differentiate.
        """
        leaves, spec = pytree.tree_flatten((tuple(args), kwargs))
        able = [i for i, leaf in enumerate(leaves) if _differentiable(leaf)]
        wanted = [i for i in able if leaves[i].requires_grad] or able
        if not wanted:
            raise ValueError("check: no argument is a floating tensor, nothing to differentiate")
        case = cls(
            function,
            twin,
            tuple(x.detach() if isinstance(x, Tensor) else x for x in leaves),
            spec,
            tuple(wanted),
            batched=_batched(leaves, n_parameters),
        )
        return case._probed()

    def _probed(self) -> Case:
        copies = tuple(x.clone() if isinstance(x, Tensor) else x for x in self.leaves)
        tensors = [x for x in copies if isinstance(x, Tensor)]
        versions = [x._version for x in tensors]
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            state = torch.get_rng_state()
            outputs = _tensors(self._invoke(self.function, copies))
            random = not torch.equal(state, torch.get_rng_state())
        if not outputs:
            raise TypeError("check: the function returned no tensor")
        if not any(map(_differentiable, outputs)):
            raise TypeError("check: the function returned no floating tensor")
        written = [x._version for x in tensors] != versions
        return replace(self, copies=written, random=random)

    @property
    def inputs(self) -> Tensors:
        """The differentiated arguments, recording gradients."""
        return tuple(self.leaves[i].detach().requires_grad_() for i in self.positions)

    def _invoke(self, function: Function, leaves: Sequence[Any]) -> Any:
        args, kwargs = pytree.tree_unflatten(list(leaves), self.spec)
        return function(*args, **kwargs)

    def call(self, *inputs: Tensor, function: Function | None = None) -> Tensors:
        """Call the function (or another one) with other differentiated arguments.

        Returns:
            Every tensor among the outputs.
        """
        leaves = list(self.leaves)
        for position, value in zip(self.positions, inputs, strict=True):
            leaves[position] = value
        if self.copies:
            leaves = [x.clone() if isinstance(x, Tensor) else x for x in leaves]
        function = function or self.function
        if not self.random:
            return _tensors(self._invoke(function, leaves))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return _tensors(self._invoke(function, leaves))

    def differentiable(self, *inputs: Tensor) -> Tensors:
        """Like :meth:`call`, without integer and boolean outputs."""
        return tuple(out for out in self.call(*inputs) if _differentiable(out))

    def with_inputs(self, inputs: Sequence[Tensor]) -> Case:
        """The case with other differentiated arguments."""
        leaves = list(self.leaves)
        for position, value in zip(self.positions, inputs, strict=True):
            leaves[position] = value.detach()
        return replace(self, leaves=tuple(leaves))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Case:
        """The case with every tensor argument changed."""
        return replace(
            self, leaves=tuple(change(x) if isinstance(x, Tensor) else x for x in self.leaves)
        )

    def to(self, dtype: torch.dtype) -> Case:
        """The case with its float64 (complex128) arguments in another precision."""
        return self.mapped(lambda x: x.to(dtype) if x.dtype == torch.float64 else x)

    def emptied(self) -> Case:
        """The case with an empty batch: the leading dimension of the data has size zero."""
        if not self.batched:
            raise NotApplicable("the first argument has no leading dimension to empty")
        return replace(
            self,
            leaves=tuple(x[:0] if i in self.batched else x for i, x in enumerate(self.leaves)),
        )


def of_entry(entry: Entry) -> Iterator[Case]:
    """A registered function on each of its samples that has something to differentiate."""
    for sample in entry.samples(Maker()):
        try:
            yield Case.of(entry.functional, sample.args, sample.kwargs, entry.twin)
        except ValueError:
            continue


class _Stateless:
    """A module as a function of its parameters; buffers start afresh in every call."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.buffers = dict(module.named_buffers())

    def __call__(self, parameters: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        state = {**parameters, **{name: b.clone() for name, b in self.buffers.items()}}
        return torch.func.functional_call(self.module, state, args, kwargs)


def foreign(subject: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Case:
    """The case of anyone's module, ``autograd.Function`` or function, in float64.

    Raises:
        TypeError: if ``subject`` is none of these.
    """
    args, kwargs = pytree.tree_map_only(Tensor, _double, (tuple(args), kwargs))
    if isinstance(subject, nn.Module):
        module = copy.deepcopy(subject).double()
        parameters = {name: p.detach() for name, p in module.named_parameters()}
        for name, parameter in module.named_parameters():
            parameters[name].requires_grad_(parameter.requires_grad)
        data = [a for a in pytree.tree_leaves((args, kwargs)) if _differentiable(a)]
        if not any(a.requires_grad for a in data):
            for tensor in data:
                tensor.requires_grad_()
        return Case.of(
            _Stateless(module), (parameters, *args), kwargs, n_parameters=len(parameters)
        )
    return Case.of(_callable(subject), args, kwargs)


def _callable(subject: Any) -> Function:
    if isinstance(subject, type) and issubclass(subject, torch.autograd.Function):
        if issubclass(subject, Op):
            return subject.call
        # Dynamo takes a plain function, not the bound method of a class.
        return lambda *args: subject.apply(*args)
    if isinstance(subject, type) or not callable(subject):
        raise TypeError(
            "check: expected a function, an nn.Module or an autograd.Function subclass, "
            f"got {subject!r}"
        )
    return subject


def _double(tensor: Tensor) -> Tensor:
    if not _differentiable(tensor):
        return tensor
    dtype = torch.complex128 if tensor.is_complex() else torch.float64
    return tensor.detach().clone().to(dtype).requires_grad_(tensor.requires_grad)


def _differentiable(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def _tensors(outputs: Any) -> Tensors:
    return tuple(x for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor))


def _batched(leaves: Sequence[Any], n_parameters: int) -> tuple[int, ...]:
    sizes = {
        i: x.shape[0]
        for i, x in enumerate(leaves)
        if i >= n_parameters and isinstance(x, Tensor) and x.dim()
    }
    first = next(iter(sizes.values()), None)
    return tuple(i for i, size in sizes.items() if size == first)


@dataclass(frozen=True)
class Outcome:
    """Values of one call and its gradients."""

    outputs: Tensors
    grads: Tensors


def outcome(
    case: Case,
    function: Function | None = None,
    inputs: Tensors | None = None,
    change: Callable[[Tensor], Tensor] = lambda cotangent: cotangent,
    context: AbstractContextManager[Any] | None = None,
) -> Outcome:
    """Values, and the gradients for fixed random errors of the outputs.

    Args:
        case: the call.
        function: called in place of the case's own.
        inputs: in place of the case's own.
        change: applied to the errors before backward.
        context: entered for the forward call only.
    """
    inputs = case.inputs if inputs is None else inputs
    with context or nullcontext():
        outputs = case.call(*inputs, function=function)
    return Outcome(tuple(o.detach() for o in outputs), gradients(outputs, inputs, change))


def gradients(
    outputs: Tensors,
    inputs: Tensors,
    change: Callable[[Tensor], Tensor] = lambda cotangent: cotangent,
) -> Tensors:
    """Gradients for fixed random errors; zeros where an input is not used."""
    recorded = [out for out in outputs if out.requires_grad]
    if not recorded:
        return tuple(torch.zeros_like(x) for x in inputs)
    errors = [change(cotangent(out, i)) for i, out in enumerate(recorded)]
    grads = torch.autograd.grad(recorded, inputs, errors, allow_unused=True)
    pairs = zip(grads, inputs, strict=True)
    return tuple(torch.zeros_like(x) if g is None else g for g, x in pairs)


def cotangent(like: Tensor, seed: int = 0) -> Tensor:
    """A random error for an output, equal for equal shapes and rounded to its dtype."""
    generator = torch.Generator().manual_seed(1 + seed)
    dtype = torch.complex128 if like.is_complex() else torch.float64
    draw = torch.randn(like.shape, dtype=dtype, generator=generator)
    return draw.to(like.device, like.dtype)


def variation(tensor: Tensor, seed: int) -> Tensor:
    """The tensor with every element scaled by a random factor: signs and zeros stay."""
    generator = torch.Generator().manual_seed(101 + seed)
    draw = torch.randn(tensor.shape, dtype=torch.float64, generator=generator)
    return tensor.detach() * (draw / 2).exp().to(tensor.device, tensor.dtype)
