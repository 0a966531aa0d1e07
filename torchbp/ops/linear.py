"""Fully connected layers and residual addition."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchbp import kernels
from torchbp.ops.arithmetic import MatMul
from torchbp.ops.base import (
    PLAIN,
    Op,
    add_tangents,
    can_use_kernel,
    cast,
    midpoint,
    sum_to,
)
from torchbp.ops.registry import Maker, Sample, register, sample
from torchbp.ops.relevance import Rule, quotient, weighted
from torchbp.ops.sample_factors import Factors, Outer, Rows


class Linear(Op):
    """``y = x Wᵀ + b``.

    Backward: ``∂x = g W``, ``∂W = gᵀ x``, ``∂b = Σ g`` (sums over every leading dimension).
    Secant: the map is bilinear in (x, W), so each factor is weighted by the other's midpoint;
    with equal weights in both runs this is the transpose. LRP: the rule asked for.
    """

    autocast = {"cpu": "low", "cuda": "low"}
    relevance = classmethod(weighted)

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        if x.is_complex():
            x, weight = x.conj(), weight.conj()
        rows = _rows(grad_output)
        if _multiplies(grad_output, x, weight):
            grads = kernels.linear_backward(
                rows, _rows(x), weight, needs_x, needs_weight, needs_bias
            )
            of_x = grads[0] if needs_x else None
            return (
                of_x if of_x is None or x.dim() == 2 else of_x.view(x.shape),
                grads[1] if needs_weight else None,
                grads[2] if needs_bias else None,
            )
        of_x = rows.mm(weight) if needs_x else None
        return (
            of_x if of_x is None or x.dim() == 2 else of_x.view(x.shape),
            rows.t().mm(_rows(x)) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )

    @staticmethod
    def jvp(ctx: Any, tx: Tensor | None, tw: Tensor | None, tb: Tensor | None) -> Tensor | None:
        x, weight = ctx.saved_tensors
        out = add_tangents(
            None if tx is None else F.linear(tx, weight),
            None if tw is None else F.linear(x, tw),
        )
        if tb is None:
            return out
        return tb.expand(*x.shape[:-1], -1).clone() if out is None else out + tb

    @staticmethod
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        (x, weight, bias), (x0, weight0, _) = args, args0
        rows = _rows(multiplier)
        return (
            rows.mm(midpoint(weight, weight0)).view(x.shape),
            rows.t().mm(_rows(midpoint(x, x0))) if weight.requires_grad else None,
            rows.sum(0) if bias is not None and bias.requires_grad else None,
        )

    @staticmethod
    def sample_factors(grad_output: Tensor, args: tuple[Any, ...], output: Any) -> Factors:
        x, _, bias = args
        of_bias = None if bias is None else Rows(grad_output, bias.shape, bias)
        return None, Outer(grad_output, x), of_bias


def _multiplies(grad_output: Tensor, x: Tensor, weight: Tensor) -> bool:
    """Whether the compiled product takes these."""
    return (
        can_use_kernel(grad_output, x)
        and x.dtype in (torch.float32, torch.float64)
        and weight.dtype is x.dtype
        and type(weight) in PLAIN
    )


def _rows(tensor: Tensor) -> Tensor:
    """All leading dimensions as one."""
    if tensor.dim() == 2:
        return tensor
    *leading, features = tensor.shape
    # The row count is spelled out: reshape(-1, 0) would be ambiguous.
    return tensor.reshape(math.prod(leading), features)


def _linear_samples(make: Maker) -> Iterator[Sample]:
    yield sample(make(3, 5), make(4, 5), make(4))
    yield sample(make(2, 3, 5), make(4, 5), make(4))
    yield sample(make(2, 2, 3, 5), make(4, 5))
    yield sample(make(5), make(4, 5), make(4))
    yield sample(make(2, 5), make(5))
    yield sample(make(0, 5), make(4, 5), make(4))


@register(F.linear, modules=[nn.Linear], samples=_linear_samples)
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``input Wᵀ + bias``, as :func:`torch.nn.functional.linear`.

    Args:
        input: ``(*, in_features)``.
        weight: ``(out_features, in_features)``, or ``(in_features,)`` for one output.
        bias: ``(out_features,)`` or ``None``.

    Returns:
        ``(*, out_features)``, without the last dimension where the weight has only one.
    """
    if bias is None and isinstance(weight, Tensor) and weight.dim() == 1:
        return MatMul.call(input, weight)
    return Linear.call(input, weight, bias)


class Add(Op):
    """``y = a + alpha * b`` with broadcasting: the residual connection.

    Backward: each branch receives the error (times alpha), summed over broadcast dimensions.
    Secant: the same, for the map is linear; the branches are two edges of a cut.
    LRP: each branch in proportion to what it gives (the epsilon rule of Bach et al. 2015).
    """

    @staticmethod
    def forward(a: Tensor, b: Tensor, alpha: float) -> Tensor:
        return torch.add(a, b, alpha=alpha)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, b, ctx.alpha = inputs
        ctx.shapes = a.shape, b.shape
        ctx.dtypes = a.dtype, b.dtype
        ctx.alike = a.shape == b.shape and a.dtype == b.dtype

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        alpha = ctx.alpha.conjugate() if isinstance(ctx.alpha, complex) else ctx.alpha
        if ctx.alike:
            return grad_output, _scaled(grad_output, alpha), None
        (shape_a, shape_b), (dtype_a, dtype_b) = ctx.shapes, ctx.dtypes
        needs_a, needs_b, _ = ctx.needs_input_grad
        return (
            cast(sum_to(grad_output, shape_a), dtype_a) if needs_a else None,
            cast(sum_to(_scaled(grad_output, alpha), shape_b), dtype_b) if needs_b else None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, ta: Tensor | None, tb: Tensor | None, _: Any) -> Tensor | None:
        shape = torch.broadcast_shapes(*ctx.shapes)
        out = add_tangents(ta, None if tb is None else _scaled(tb, ctx.alpha))
        # A tangent may neither alias an input's tangent nor miss the broadcast.
        return None if out is None else out.expand(shape).clone()

    @staticmethod
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        a, b, alpha = args
        return sum_to(multiplier, a.shape), sum_to(_scaled(multiplier, alpha), b.shape), None

    @staticmethod
    def sample_factors(grad_output: Tensor, args: tuple[Any, ...], output: Any) -> Factors:
        a, b, alpha = args
        scaled = _scaled(grad_output, alpha)
        return Rows(grad_output, a.shape, a), Rows(scaled, b.shape, b), None

    @classmethod
    def relevance(
        cls, relevance: Tensor, rule: Rule, args: tuple[Any, ...], output: Any
    ) -> tuple[Tensor | None, ...]:
        a, b, alpha = args
        per_output = quotient(relevance, output, rule.epsilon)
        of_a, of_b = a * per_output, b * _scaled(per_output, alpha)
        return sum_to(of_a, a.shape), sum_to(of_b, b.shape), None


def _scaled(tensor: Tensor, alpha: complex) -> Tensor:
    return tensor if alpha == 1 else tensor * alpha


def _add_samples(make: Maker) -> Iterator[Sample]:
    yield sample(make(3, 4), make(3, 4))
    yield sample(make(2, 3, 4), make(4), alpha=0.5)
    yield sample(make(3, 1), make(1, 4), alpha=2)
    yield sample(make(3, 4), 0.1)
    yield sample(make(0, 4), make(4))


@register(torch.add, samples=_add_samples)
def add(input: Tensor, other: Tensor | float, *, alpha: float = 1) -> Tensor:
    """``input + alpha * other``, as :func:`torch.add` of two tensors (broadcasting).

    Args:
        input: any shape.
        other: a shape that broadcasts with ``input``, or a number.
        alpha: factor of ``other``.

    Returns:
        The sum, in the broadcast shape.
    """
    if not isinstance(other, Tensor):
        # In the tensor's dtype, for a tensor without dimensions would be rounded to the default.
        keeps = input.is_complex() or (input.is_floating_point() and not isinstance(other, complex))
        dtype = input.dtype if keeps else None
        other = torch.full((), other, dtype=dtype, device=input.device)
    return Add.call(input, other, alpha)
