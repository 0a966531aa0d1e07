"""What the losses share: terms, their reduction, and mean slopes between two runs.

A loss is a number of terms, one per element or one per row, and a reduction of them. The op of a
loss says how a term changes with each of its tensors; the rest follows from that here.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, is_grad_enabled
from torch.compiler import is_compiling

from torchbp.ops.base import Op, add_tangents, sum_to, vanishes, wide
from torchbp.ops.pointwise import EDGES_PASS

FROM_THE_HEAD = "relevance starts from the loss head's secant"


class Loss(Op):
    """``reduction(l(t_1, ..., t_k))``, with broadcasting.

    The arguments of a subclass are ``(*tensors, *settings, reduction)``. It gives ``forward`` and

    * ``slope(i, v, *tensors, *settings)``: ``v ∂l/∂t_i`` in differentiable torch, ``None`` where
      torch has no derivative either; with ``i=None`` those of all tensors, if that is cheaper than
      one after the other (``together``);
    * ``average(now, ref, *settings)``: for each tensor a mean slope ``a_i`` between two runs, with
      ``Σ a_i (t_i - t0_i) = l - l0``.

    Both see short dtypes as float32.

    Attributes:
        tensors: how many leading arguments are tensors or ``None``.
        shaping: how many of them broadcast against each other to the shape of the terms; all of
            them unless said.
        by_row: the last dimension of the terms is summed before the reduction.
        together: ``slope`` is asked for all tensors at once where several need a gradient.
    """

    autocast = {"cpu": "fp32", "cuda": "fp32"}
    no_relevance = FROM_THE_HEAD
    tensors: ClassVar[int] = 2
    shaping: ClassVar[int | None] = None
    by_row: ClassVar[bool] = False
    together: ClassVar[bool] = False

    @staticmethod
    def slope(i: Any, v: Tensor, *args: Any) -> Any:
        """``v`` times the derivative of a term by tensor ``i``; see the class."""
        raise NotImplementedError

    @staticmethod
    def average(
        now: tuple[Any, ...], ref: tuple[Any, ...], *settings: Any
    ) -> tuple[Tensor | None, ...]:
        """Mean slopes between two runs; see the class."""
        raise NotImplementedError

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Build the derivatives, then the op's ``call``."""
        shaping = cls.tensors if cls.shaping is None else cls.shaping
        layout = cls.tensors, shaping, cls.by_row
        methods = {
            "setup_context": _setup_context(cls.tensors),
            "backward": _backward(cls.slope, cls.together, *layout),
            "jvp": _jvp(cls.slope, *layout),
            "secant": _secant(cls.average, *layout),
        }
        for name, method in methods.items():
            setattr(cls, name, staticmethod(method))
        super().__init_subclass__(**kwargs)


def _setup_context(count: int) -> Callable[..., None]:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        tensors = inputs[:count]
        ctx.settings, ctx.reduction = inputs[count:-1], inputs[-1]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.dtype = output.dtype

    return setup_context


def _backward(
    slope: Callable[..., Any], together: bool, count: int, shaping: int, by_row: bool
) -> Callable[..., Any]:
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        given = ctx.saved_tensors
        tensors = _widened(given)
        shape = _terms_shape(tensors[:shaping])
        v = per_term(grad_output, shape, ctx.reduction, by_row)
        grads: list[Tensor | None] = [None] * (count + len(ctx.settings) + 1)
        needed = [i for i in range(shaping) if ctx.needs_input_grad[i]]
        several = together and len(needed) > 1
        slopes = slope(None, v, *tensors, *ctx.settings) if several else None
        for i in needed:
            grad = slopes[i] if slopes else slope(i, v, *tensors, *ctx.settings)
            grads[i] = _like(grad, shape, given[i])
        return tuple(grads)

    return backward


def _jvp(
    slope: Callable[..., Any], count: int, shaping: int, by_row: bool
) -> Callable[..., Tensor | None]:
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor | None:
        tensors = _widened(ctx.saved_tensors)
        shape = _terms_shape(tensors[:shaping])
        terms = add_tangents(
            *(
                slope(i, t.conj().expand(shape), *tensors, *ctx.settings)
                for i, t in enumerate(tangents[:shaping])
                if t is not None
            )
        )
        if terms is None:
            return None
        terms = torch.real(terms)  # of complex numbers: Re(conj(slope) t)
        return reduced(terms.sum(-1) if by_row else terms, ctx.reduction).to(ctx.dtype)

    return jvp


def _secant(
    average: Callable[..., tuple[Tensor | None, ...]], count: int, shaping: int, by_row: bool
) -> Callable[..., tuple[Tensor | None, ...]]:
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        now, ref = _widened(args[:count]), _widened(args0[:count])
        shape = _terms_shape(now[:shaping])
        v = per_term(multiplier, shape, args[-1], by_row)
        means = average(now, ref, *args[count:-1])
        multipliers = [
            None if a is None else _like(a * v, shape, arg)
            for a, arg in zip(means, args, strict=False)
        ]
        return *multipliers, *(None,) * (len(args) - len(multipliers))

    return secant


def _widened(tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
    return tuple(None if t is None else wide(t) for t in tensors)


def _terms_shape(tensors: Sequence[Tensor | None]) -> Sequence[int]:
    first, *others = (t.shape for t in tensors if t is not None)
    if all(shape == first for shape in others):
        return first
    return torch.broadcast_shapes(first, *others)


def _like(values: Tensor | None, shape: Sequence[int], tensor: Tensor) -> Tensor | None:
    """What reaches a tensor that was broadcast to the shape of the terms."""
    if values is None:
        return None
    if values.shape != shape:
        values = values.expand(shape)
    return sum_to(values, tensor.shape).to(tensor.dtype)


def per_term(
    multiplier: Tensor, shape: Sequence[int], reduction: str, by_row: bool = False
) -> Tensor:
    """The multiplier of every term, given that of the reduced loss."""
    multiplier = wide(multiplier)
    if reduction == "none":
        return multiplier.unsqueeze(-1) if by_row else multiplier
    if reduction == "mean":
        return multiplier / math.prod(shape[:-1] if by_row else shape)
    return multiplier


def reduced(terms: Tensor, reduction: str) -> Tensor:
    """The terms, their mean or their sum."""
    if reduction == "none":
        return terms
    return terms.mean() if reduction == "mean" else terms.sum()


def onto(buffer: Tensor, method: str, *args: Any) -> Tensor:
    """``buffer.method(*args)``, written into the buffer where nobody can notice.

    Args:
        buffer: a tensor that was just made, of the shape and dtype of the result.
        method: name of a method that has an in-place twin.
        *args: its arguments.
    """
    if is_grad_enabled() or is_compiling():
        return cast(Tensor, getattr(buffer, method)(*args))
    try:
        return cast(Tensor, getattr(buffer, method + "_")(*args))
    except RuntimeError:  # under vmap the buffer may lack the dimension of the batch
        return cast(Tensor, getattr(buffer, method)(*args))


def mean_slope(
    f: Callable[[Tensor], Tensor],
    slope: Callable[[Tensor], Tensor],
    x: Tensor,
    x0: Tensor,
    same: Tensor | None = None,
) -> Tensor:
    """``(f(x) - f(x0)) / (x - x0)``, element by element, finite where the gap vanishes.

    Where the quotient would lose more digits than it shows, the slope at the midpoint stands in.

    Args:
        f: the function.
        slope: its derivative.
        x: where one run is.
        x0: where the other is, same shape.
        same: whether both are on one smooth piece of f; ``None`` if f is smooth throughout.
    """
    gap = x - x0
    small = vanishes(gap, 1 + x.abs())
    if same is not None:
        small &= same | (gap == 0)
    quotient = (f(x) - f(x0)) / gap.masked_fill(small, 1)
    return torch.where(small, slope((x + x0) / 2), quotient)


def rises(h: Tensor, at_zero: bool = EDGES_PASS) -> Tensor:
    """Where ``max(0, h)`` has the slope one."""
    return h >= 0 if at_zero else h > 0


def relu_slope(h: Tensor, h0: Tensor, at_zero: bool = EDGES_PASS) -> Tensor:
    """Mean slope of ``max(0, h)`` between two runs."""
    on, on0 = rises(h, at_zero), rises(h0, at_zero)
    quotient = (h.clamp(min=0) - h0.clamp(min=0)) / (h - h0).masked_fill(on == on0, 1)
    return torch.where(on == on0, on.to(h.dtype), quotient)


def legacy_reduction(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    """``reduction``, or what its older names and flags meant; those come with a warning."""
    flags = size_average is not None or reduce is not None
    if not flags and reduction != "elementwise_mean":
        return reduction
    if not is_compiling():  # warnings cannot be traced
        older = "size_average and reduce are" if flags else "reduction='elementwise_mean' is"
        warnings.warn(f"{older} superseded by reduction='none', 'mean' or 'sum'", stacklevel=3)
    if reduce is not None and not reduce:
        return "none"
    return "mean" if size_average is None or size_average else "sum"


def check_reduction(function: str, reduction: str) -> None:
    """Refuse an unknown reduction.

    Raises:
        ValueError: if it is neither none, mean nor sum.
    """
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{function}: reduction must be none, mean or sum, got {reduction!r}")


def refuse_gradient(function: str, name: str, tensor: Tensor | None) -> None:
    """Refuse an argument that requires a gradient where torch does not differentiate it either.

    Raises:
        RuntimeError: if the tensor requires a gradient.
    """
    if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"{function}: argument {name!r} must not require a gradient here; detach it"
        )


def warn_of_broadcast(function: str, input: Tensor, target: Tensor) -> None:
    """Warn, as torch does, where target and input differ in size."""
    if target.size() != input.size() and not is_compiling():
        warnings.warn(
            f"{function}: target is {tuple(target.shape)}, input {tuple(input.shape)}; they will "
            "be broadcast against each other, which is seldom meant",
            stacklevel=3,
        )
