"""What all maps that are linear in one tensor share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchbp.ops.base import Op


class LinearMap(Op):
    """``y = A x`` with a matrix that only settings determine; everything follows from ``Aᵀ``.

    A subclass gives ``forward(x, *settings)`` and, in differentiable torch, ``transposed``. From
    these come backward and secant (``∂x = Aᵀ g``: the difference of two runs is ``A (x - x₀)``)
    and jvp (``A t``).
    """

    @staticmethod
    def transposed(g: Tensor, shape: torch.Size, settings: Sequence[Any]) -> Tensor:
        """``Aᵀ g``, in the input's ``shape``."""
        raise NotImplementedError

    @staticmethod
    def applied(tx: Tensor, *settings: Any) -> Tensor:
        """``A t``; by default ``forward``, which may add a constant in a map that is affine."""
        raise NotImplementedError

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Build the derivatives, then the op's ``call``."""
        if "applied" not in vars(cls):
            cls.applied = staticmethod(cls.forward)  # type: ignore[method-assign]
        methods: dict[str, Callable[..., Any]] = {
            "setup_context": _setup_context,
            "backward": _backward(cls.transposed),
            "jvp": _jvp(cls.applied),
            "secant": _secant(cls.transposed),
        }
        for name, method in methods.items():
            setattr(cls, name, staticmethod(method))
        super().__init_subclass__(**kwargs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *ctx.settings = inputs
    ctx.shape = x.shape


def _backward(transposed: Callable[..., Tensor]) -> Callable[..., tuple[Tensor | None, ...]]:
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        settings = ctx.settings
        return transposed(grad_output, ctx.shape, settings), *(None,) * len(settings)

    return backward


def _jvp(applied: Callable[..., Tensor]) -> Callable[..., Tensor | None]:
    def jvp(ctx: Any, tx: Tensor | None, *_: Any) -> Tensor | None:
        return None if tx is None else applied(tx, *ctx.settings)

    return jvp


def _secant(transposed: Callable[..., Tensor]) -> Callable[..., tuple[Tensor | None, ...]]:
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        x, *settings = args
        return transposed(multiplier, x.shape, settings), *(None,) * len(settings)

    return secant
