"""What all elementwise operations share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, is_grad_enabled
from torch._C import _are_functorch_transforms_active
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.overrides import has_torch_function

from torchbp import kernels
from torchbp.kernels import registration
from torchbp.kernels.reference import ELEMENTWISE
from torchbp.kernels.reference_common import DTYPES
from torchbp.ops.base import PLAIN, Op, vanishes, wide
from torchbp.ops.relevance import passes

_FUSED_DEVICES = (
    frozenset({"cpu", "cuda"} if kernels.status()["cuda"] else {"cpu"})
    if kernels.HAS_EXT
    else frozenset()
)


class Elementwise(Op):
    """``y = f(x)``, element by element; everything follows from ``tangent``.

    A subclass gives ``forward(x, *settings)`` and, in differentiable torch, ``tangent``. From these
    come backward, jvp and the secant ``(f(x) - f(x₀)) / (x - x₀)``. Where the gap is so small that
    the quotient would lose more digits than it shows, the derivative at the midpoint stands in:
    its error is of third order in the gap, below the rounding of f.

    Attributes:
        fused: name of the function in :func:`torchbp.kernels.elementwise_backward`, if the kernel
            reads what ``keep`` keeps and takes the settings, which are numbers.
        call_: like ``call``, but writes the result into its first argument, which it returns.
    """

    fused: ClassVar[str | None] = None
    relevance = classmethod(passes)
    call_: ClassVar[Callable[..., Tensor]]

    @staticmethod
    def tangent(v: Tensor, kept: Tensor, *settings: Any) -> Tensor:
        """``v f'(x)``, from what ``keep`` keeps."""
        raise NotImplementedError

    @staticmethod
    def keep(x: Tensor, y: Tensor, *settings: Any) -> Tensor:
        """The tensor ``tangent`` needs: the input, or the output where that is enough."""
        return x

    @classmethod
    def overwrite(cls, x: Tensor, *settings: Any) -> Tensor:
        """Forward, written into ``x``: torch's own function for it, where there is one."""
        result: Tensor = x.copy_(cls.forward(x, *settings))
        return result

    @staticmethod
    def branch(x: Tensor, *settings: Any) -> Tensor | None:
        """Which smooth piece of f each element is on; ``None`` if f is smooth throughout."""
        return None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Build the derivatives, then the op's ``call``."""
        methods = {
            "setup_context": _setup_context(cls.keep),
            "backward": _backward(cls.tangent, cls.fused),
            "jvp": _jvp(cls.tangent),
            "secant": _secant(cls),
        }
        for name, method in methods.items():
            if name not in vars(cls):
                setattr(cls, name, staticmethod(method))
        super().__init_subclass__(**kwargs)
        cls.call_ = staticmethod(_in_place_door(cls))


def _in_place_door(op: type[Elementwise]) -> Callable[..., Tensor]:
    class InPlace(torch.autograd.Function):
        """Where the op keeps its input, ``before`` is a copy of it, else ``None``."""

        @staticmethod
        def forward(ctx: Any, x: Tensor, before: Tensor | None, *settings: Any) -> Tensor:
            op.overwrite(x, *settings)
            ctx.mark_dirty(x)
            ctx.copied, ctx.settings = before is not None, settings
            ctx.save_for_backward(x if before is None else before)
            return x

        @staticmethod
        def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
            grads = op.backward(ctx, grad_output)
            grad, *rest = grads if isinstance(grads, tuple) else (grads,)
            return (None, grad, *rest) if ctx.copied else (grad, None, *rest)

    call, keep = op.call, op.keep

    def call_(x: Tensor, *settings: Any) -> Tensor:
        keeps_input: Any = keep(True, False, *settings)  # type: ignore[arg-type]
        if has_torch_function((x,)):  # a tape keeps the op's arguments: it gets a copy
            return x.copy_(call(x.clone(), *settings))
        if is_compiling() or _are_functorch_transforms_active() or forward_ad._current_level >= 0:
            return x.copy_(call(x.clone() if keeps_input else x, *settings))
        if not torch.is_grad_enabled() or not x.requires_grad:
            return op.overwrite(x, *settings)
        if (x if x._base is None else x._base).is_leaf:
            x.copy_(x)  # torch's own error for it, before anything has changed
        result: Tensor = InPlace.apply(x, x.clone() if keeps_input else None, *settings)
        return result

    return call_


def _setup_context(keep: Callable[..., Tensor]) -> Callable[..., None]:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, *settings = inputs
        kept = keep(x, output, *settings)
        ctx.save_for_backward(kept)
        ctx.save_for_forward(kept)
        ctx.settings = settings

    return setup_context


def _backward(tangent: Callable[..., Tensor], fused: str | None) -> Callable[..., Any]:
    kernel = registration.elementwise_backward
    number = list(ELEMENTWISE).index(fused) if fused else -1

    def backward(ctx: Any, grad_output: Tensor) -> Any:
        (kept,) = ctx.saved_tensors
        settings = ctx.settings
        if fused and not is_grad_enabled() and can_fuse(kept, grad_output):
            a, b = (*settings, 0.0, 0.0)[:2] if settings else (0.0, 0.0)
            grad_input = kernel(grad_output, kept, number, a, b)
        else:
            # f has real coefficients, so conj(f'(x)) = f'(conj(x)).
            grad_input = tangent_of(tangent, grad_output, kept.conj(), settings)
        return (grad_input, *(None for _ in settings)) if settings else grad_input

    return backward


def _jvp(tangent: Callable[..., Tensor]) -> Callable[..., Tensor | None]:
    def jvp(ctx: Any, tx: Tensor | None, *_: Any) -> Tensor | None:
        (kept,) = ctx.saved_tensors
        return None if tx is None else tangent_of(tangent, tx, kept, ctx.settings)

    return jvp


def _secant(op: type[Elementwise]) -> Callable[..., tuple[Tensor | None, ...]]:
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        (x, *settings), x0 = args, args0[0]
        gap = (x - x0).masked_fill(x == x0, 0)  # of equal infinities, too
        small = vanishes(gap, 1 + x.abs())
        side = op.branch(x, *settings)
        if side is not None:
            small &= (side == op.branch(x0, *settings)) | (gap == 0)
        middle = (x + x0) / 2
        kept = op.keep(middle, op.forward(middle, *settings), *settings)
        quotient = (output - output0) / gap.masked_fill(small, 1)
        m = torch.where(small, op.tangent(multiplier, kept, *settings), multiplier * quotient)
        return (m, *(None for _ in settings))

    return secant


def can_fuse(*tensors: Tensor) -> bool:
    """Whether the compiled kernels take these tensors, which are on one device."""
    dtype = tensors[0].dtype
    if dtype not in DTYPES or tensors[0].device.type not in _FUSED_DEVICES or is_compiling():
        return False
    for tensor in tensors:  # this is called every time, and all() takes three times as long
        if tensor.dtype is not dtype or type(tensor) not in PLAIN:
            return False
    return True


def tangent_of(
    tangent: Callable[..., Tensor], v: Tensor, kept: Tensor, settings: Sequence[Any]
) -> Tensor:
    """``tangent`` in the precision torch computes it in: float32 for the short dtypes."""
    full = wide(kept)
    result = tangent(wide(v), full, *settings)
    return result if full is kept else result.to(kept.dtype)


def in_place(input: Tensor, result: Tensor) -> Tensor:
    """Write ``result`` into ``input``, as torch's in-place functions do, and return ``input``."""
    return input.copy_(result)
