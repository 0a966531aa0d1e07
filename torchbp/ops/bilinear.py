"""Bilinear layers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchbp.ops.arithmetic import halves
from torchbp.ops.base import Op, add_tangents, midpoint
from torchbp.ops.registry import Maker, Sample, register, sample
from torchbp.ops.relevance import Rule, quotient


class Bilinear(Op):
    """``y_k = x₁ᵀ W_k x₂ + b_k``.

    Backward: ``∂x₁ = Σ g_k W_k x₂``, ``∂x₂ = Σ g_k W_kᵀ x₁``, ``∂W_k = Σ g_k x₁ x₂ᵀ`` and
    ``∂b_k = Σ g_k``.
    Secant: of a product of three, averaged over all orders in which the factors can change
    (Shapley 1953): a factor's multiplier is the product of the other two, at their midpoints, plus
    a twelfth of the product of their differences. LRP: halves of the epsilon rule's share for x₁
    and x₂ (Achtibat et al. 2024).
    """

    # PyTorch promotes to the widest type here, which beside a float32 weight is float32.
    autocast = {"cuda": "fp32"}

    @staticmethod
    def forward(x1: Tensor, x2: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.bilinear(x1, x2, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x1, x2, weight, _ = inputs
        ctx.save_for_backward(x1, x2, weight)
        ctx.save_for_forward(x1, x2, weight)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        *needed, needs_bias = ctx.needs_input_grad
        x1, x2, weight = (t.conj() for t in ctx.saved_tensors)
        of_bias = _rows(grad_output).sum(0) if needs_bias else None
        return *_back(grad_output, x1, x2, weight, needed), of_bias

    @staticmethod
    def jvp(
        ctx: Any, t1: Tensor | None, t2: Tensor | None, tw: Tensor | None, tb: Tensor | None
    ) -> Tensor | None:
        x1, x2, weight = ctx.saved_tensors
        return add_tangents(
            None if t1 is None else F.bilinear(t1, x2, weight),
            None if t2 is None else F.bilinear(x1, t2, weight),
            None if tw is None else F.bilinear(x1, x2, tw),
            None if tb is None else tb.expand(*x1.shape[:-1], -1).clone(),
        )

    @staticmethod
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        (x1, x2, weight, bias), (x10, x20, weight0, _) = args, args0
        middles = midpoint(x1, x10), midpoint(x2, x20), midpoint(weight, weight0)
        middle: Any = _back(multiplier, *middles, needed=(True, True, True))
        gaps = x1 - x10, x2 - x20, weight - weight0
        corner: Any = _back(multiplier, *gaps, needed=(True, True, True))
        shares = tuple(m + c / 12 for m, c in zip(middle, corner, strict=True))
        return *shares, None if bias is None else _rows(multiplier).sum(0)

    @classmethod
    def relevance(
        cls, relevance: Tensor, rule: Rule, args: tuple[Any, ...], output: Any
    ) -> tuple[Tensor | None, ...]:
        x1, x2, weight, _ = args
        takes = halves(torch.ones(()), x1, x2)
        back = _back(quotient(relevance, output, rule.epsilon), x1, x2, weight, (True, True, False))
        shares = tuple(
            None if t is None or b is None else t * x * b
            for t, x, b in zip(takes, (x1, x2), back[:2], strict=True)
        )
        return *shares, None, None


def _rows(tensor: Tensor) -> Tensor:
    *leading, features = tensor.shape
    return tensor.reshape(math.prod(leading), features)


def _back(
    g: Tensor, x1: Tensor, x2: Tensor, weight: Tensor, needed: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What the error means to the three factors; only what is needed."""
    shape1, shape2 = x1.shape, x2.shape
    g, x1, x2 = _rows(g), _rows(x1), _rows(x2)
    count, (n_out, n1, n2) = len(g), weight.shape
    of_x1 = of_x2 = of_weight = None
    if needed[0] or needed[1]:
        forms = (g @ weight.reshape(n_out, n1 * n2)).reshape(count, n1, n2)
        of_x1 = (forms @ x2[:, :, None]).reshape(shape1) if needed[0] else None
        of_x2 = (x1[:, None, :] @ forms).reshape(shape2) if needed[1] else None
    if needed[2]:
        outer = (x1[:, :, None] * x2[:, None, :]).reshape(count, n1 * n2)
        of_weight = (g.mT @ outer).reshape(weight.shape)
    return of_x1, of_x2, of_weight


def _samples(make: Maker) -> Iterator[Sample]:
    yield sample(make(3, 2), make(3, 4), make(5, 2, 4), make(5))
    yield sample(make(2, 2, 3), make(2, 2, 2), make(2, 3, 2))
    yield sample(make(2), make(3), make(2, 2, 3), make(2))
    yield sample(make(0, 2), make(0, 3), make(2, 2, 3))


@register(F.bilinear, modules=[nn.Bilinear], samples=_samples)
def bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``input1ᵀ W input2 + b``, as :func:`torch.nn.functional.bilinear`.

    Args:
        input1: ``(*, in1_features)``.
        input2: ``(*, in2_features)``.
        weight: ``(out_features, in1_features, in2_features)``.
        bias: ``(out_features,)`` or ``None``.

    Returns:
        ``(*, out_features)``.

    Raises:
        RuntimeError: if the shapes do not go together.
    """
    return Bilinear.call(input1, input2, weight, bias)
