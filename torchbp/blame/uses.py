"""Every use that a model makes of its parameters, and the errors that come back to each.

A *use* is a call that takes something made of parameters alone and something made of samples: a
linear layer, the addition of a table of positions, a tied decoder. The gradient of a parameter is
the sum over its uses, so a sample's gradient follows from what went into each use and the error at
its output. At every use the graph is cut: the parameters' side is left out of the backward pass,
whose work is then that of the activations alone.

Parameters may reach a use transformed (chunks of one matrix, a weight normalisation, a transpose);
the graph of that transformation is kept, and per-sample gradients are sent back through it. What
no tape can see, such as a user's ``autograd.Function``, leaves a gradient at the parameter itself:
such a parameter is named, never forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks
from torch.utils import _pytree as pytree

from torchbp.blame.dispatch import SHAPED_LIKE, Tape, tensors_in
from torchbp.blame.kept import writes
from torchbp.ops.base import Op
from torchbp.ops.linear import add
from torchbp.ops.registry import BY_TORCH_FUNCTION

T = Tensor
_SIDE = "_torchbp_side"
_WEIGHTS, _SAMPLES = "weights", "samples"


def _plus(input: Any, other: Any, *, alpha: float = 1) -> Any:
    """A sum as the op that has a closed form; the tensor first."""
    return add(input, other, alpha=alpha)


def _affine(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    product = torch.mm(mat1, mat2)
    return torch.add(input * beta if beta != 1 else input, product, alpha=alpha)


def _minus(input: Any, other: Any, *, alpha: float = 1) -> Any:
    return add(input, other, alpha=-alpha) if isinstance(other, Tensor) else add(input, -other)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *settings: Any,
    **named: Any,
) -> Tensor:
    output = F.instance_norm(input, running_mean, running_var, None, None, *settings, **named)
    per_channel = (-1, *(1,) * (input.dim() - 2))
    if weight is not None:
        output = torch.mul(output, weight.view(per_channel))
    return output if bias is None else add(output, bias.view(per_channel))


#: Functions that mean an op with a closed form, and how to say so.
_MEANS: dict[Callable[..., Any], Callable[..., Any]] = {
    **dict.fromkeys((T.add, T.__add__, T.__radd__), _plus),
    **dict.fromkeys((torch.sub, torch.subtract, T.sub, T.__sub__), _minus),
    torch.addmm: _affine,
    T.addmm: _affine,
    F.instance_norm: _instance_norm,
}

#: The same for those that write the result into their first argument.
_WRITES: dict[Callable[..., Any], Callable[..., Any]] = {
    T.add_: _plus,
    T.__iadd__: _plus,
    T.sub_: _minus,
    T.__isub__: _minus,
}


#: Functions that may put the rows of samples into another order.
_REORDERS: set[Callable[..., Any]] = {
    *(torch.flip, torch.roll, torch.sort, torch.topk, torch.gather, torch.take_along_dim),
    *(T.flip, T.roll, T.sort, T.topk, T.gather, T.take_along_dim),
    *(torch.index_select, torch.index_copy, torch.index_add, torch.index_put, torch.scatter),
    *(T.index_select, T.index_copy, T.index_add, T.index_put, T.scatter, T.scatter_add),
    *(T.index_copy_, T.index_add_, T.index_put_, T.scatter_, T.scatter_add_, torch.scatter_add),
    *(torch.flipud, T.flipud, torch.masked_select, T.masked_select),
}
_INDEXES = {T.__getitem__, T.__setitem__}

#: Functions that look at the shape or dtype alone of all arguments but the first.
_LOOKS_ON = SHAPED_LIKE | {T.to}


def mark_samples(value: Any) -> Any:
    """The same tensors, as aliases that are known to hold data of samples."""

    def marked(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        setattr(tensor, _SIDE, _SAMPLES)
        return tensor

    return pytree.tree_map_only(Tensor, marked, value)


def mark_weights(tensor: Tensor) -> Tensor:
    """An alias of a parameter that can be differentiated by."""
    leaf = tensor.detach().requires_grad_()
    setattr(leaf, _SIDE, _WEIGHTS)
    return leaf


def _side(tensor: Tensor) -> str | None:
    side: str | None = getattr(tensor, _SIDE, None)
    if side is None and tensor.requires_grad:
        return _SAMPLES  # from a function that no mode sees: at least not made of weights alone
    return side if side == _SAMPLES or tensor.requires_grad else None


@dataclass
class Use:
    """One call with weights on one side and samples on the other.

    Attributes:
        func: the function, or an op's ``call``.
        leaves: its arguments, flattened and detached.
        spec: how to unflatten them; an op's are as they are.
        weights: by position among the leaves, what stood there before it was detached.
        outputs: the differentiable outputs' gradient edges.
        shapes: of those outputs.
        versions: by which a later change of an argument is noticed, and whether it is a constant.
        kept: the first output, detached, and its version.
        first: how many outputs of uses there were before it.
    """

    func: Callable[..., Any]
    leaves: list[Any]
    spec: Any
    weights: dict[int, Tensor]
    outputs: list[Any]
    shapes: list[torch.Size]
    versions: list[tuple[int, bool]]
    kept: tuple[Tensor, int]
    first: int

    @property
    def op(self) -> type[Op] | None:
        """The op, where it is one."""
        return getattr(self.func, "op", None)

    def call(self, leaves: list[Any]) -> list[Tensor]:
        """The differentiable outputs for other arguments."""
        args, kwargs = (leaves, {}) if self.op else pytree.tree_unflatten(leaves, self.spec)
        return _candidates(self.func(*args, **kwargs), self.op is not None)

    @property
    def output(self) -> Tensor | None:
        """The first output, unless something has written into it since."""
        output, version = self.kept
        return output if output._version == version else None

    def changed(self, constants: bool = True) -> bool:
        """Whether something has written into an argument since.

        Args:
            constants: count also those that are made of neither weights nor samples, such as the
                running statistics that a norm in training writes.
        """
        return any(
            t._version != version
            for t, (version, constant) in zip(self.leaves, self.versions, strict=True)
            if isinstance(t, Tensor) and (constants or not constant)
        )


class UseTape(Tape):
    """Records the uses of a run; enter it around the model and its loss.

    Activation checkpointing inside the model has no effect under the tape: what a use needs is
    kept anyway.

    Args:
        cut: whether to record and cut; otherwise the graph is torch's own.

    Attributes:
        uses: what was recorded.
        reorders: whether something ran that may have put samples into another order.
    """

    method = "sample_gradients"

    def __init__(self, cut: bool = True) -> None:
        super().__init__()
        self.uses: list[Use] = []
        self.reorders = False
        self._cut, self._count = cut, 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        with saved_tensors_hooks(_detached, _as_it_is):
            if not self._cut:
                return func(*args, **kwargs)
            looked = args[:1] if func in _LOOKS_ON else (args, kwargs)
            sides = {_side(t) for t in tensors_in(looked)}
            self.reorders |= _SAMPLES in sides and _may_reorder(func, args)
            meet = _WEIGHTS in sides and _SAMPLES in sides and torch.is_grad_enabled()
            output = self._meet(func, args, kwargs) if meet else func(*args, **kwargs)
        side = _SAMPLES if _SAMPLES in sides else _WEIGHTS if _WEIGHTS in sides else None
        if side is not None:
            for tensor in tensors_in(output):
                setattr(tensor, _SIDE, side)
            if side == _SAMPLES and output is None and args and isinstance(args[0], Tensor):
                setattr(args[0], _SIDE, side)  # __setitem__
        return output

    def _meet(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not hasattr(func, "op"):
            if func in _MEANS:
                with self:
                    return _MEANS[func](*args, **kwargs)
            if func in _WRITES:
                with self:
                    target, *rest = args
                    return target.copy_(_WRITES[func](target.clone(), *rest, **kwargs))
            entry = BY_TORCH_FUNCTION.get(func)
            if entry is not None and entry not in self._sending:
                return self._send(entry, func, args, kwargs)
            if hasattr(func, "__wrapped__"):
                with self:
                    return func.__wrapped__(*args, **kwargs)
        return self._use(func, args, kwargs)

    def _use(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        is_op = hasattr(func, "op")
        spec: Any = None
        given = list(args)
        if not is_op:
            given, spec = pytree.tree_flatten((args, kwargs))
        weights = {
            i: t for i, t in enumerate(given) if isinstance(t, Tensor) and _side(t) == _WEIGHTS
        }
        if writes(func):
            # Left in the graph as it is: the parameter will be found to have a gradient.
            return func(*args, **kwargs)
        before = [
            (t._version, _side(t) is None) if isinstance(t, Tensor) else (0, True) for t in given
        ]
        cut = [t.detach() if i in weights else t for i, t in enumerate(given)]
        if not is_op:
            args, kwargs = pytree.tree_unflatten(cut, spec)
        output = func(*(cut if is_op else args), **kwargs)
        output, differentiable = _differentiable(output, first_only=is_op)
        if differentiable:
            leaves = [t.detach() if isinstance(t, Tensor) else t for t in cut]
            self.uses.append(
                Use(
                    func,
                    leaves,
                    spec,
                    weights,
                    [get_gradient_edge(t) for t in differentiable],
                    [t.shape for t in differentiable],
                    before,
                    (differentiable[0].detach(), differentiable[0]._version),
                    self._count,
                )
            )
            self._count += len(differentiable)
        return output


def _may_reorder(func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    if func in _INDEXES:
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return not all(isinstance(i, (int, slice, type(None), type(...))) for i in index)
    return func in _REORDERS


def _detached(tensor: Tensor) -> Tensor:
    # An op may keep its own output: with its graph, that would be a cycle nobody frees.
    return tensor.detach()


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _differentiable(output: Any, first_only: bool) -> tuple[Any, list[Tensor]]:
    """The output and the tensors of it that errors shall come back to."""
    chosen = _candidates(output, first_only)
    idle = {id(t) for t in chosen if not t.requires_grad}
    if idle:
        # Nothing before it is differentiated. A sum gives it a node of its own, which even an
        # in-place operation that follows leaves in place.
        anchor = torch.zeros((), dtype=chosen[0].dtype, device=chosen[0].device)
        anchor.requires_grad_()
        output = pytree.tree_map_only(Tensor, lambda t: t + anchor if id(t) in idle else t, output)
        chosen = _candidates(output, first_only)
    return output, chosen


def _candidates(output: Any, first_only: bool) -> list[Tensor]:
    found = [t for t in tensors_in(output) if t.is_floating_point() or t.is_complex()]
    return found[:1] if first_only else found
