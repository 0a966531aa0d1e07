"""Negative log-likelihood of class indices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchbp.ops.base import Op, wide
from torchbp.ops.cross_entropy import class_dim, index_rows
from torchbp.ops.loss import FROM_THE_HEAD, legacy_reduction, refuse_gradient
from torchbp.ops.registry import Maker, Sample, register, sample


class NLL(Op):
    """``l_n = -w_{y_n} x_{n, y_n}``, zero where ``y_n`` is ignored; the mean divides by ``Σ w``.

    Backward: ``-w_{y_n}`` at ``y_n``. The loss is linear in x, so the secant is the same.
    """

    autocast = {"cpu": "fp32", "cuda": "fp32"}
    no_relevance = FROM_THE_HEAD

    @staticmethod
    def forward(
        x: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str
    ) -> Tensor:
        return F.nll_loss(x, target, weight, ignore_index=ignore_index, reduction=reduction)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, target, weight, *ctx.options = inputs
        ctx.shape, ctx.in_dtype, ctx.out_dtype = x.shape, x.dtype, output.dtype
        ctx.save_for_backward(target, weight)
        ctx.save_for_forward(target, weight)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        target, weight = ctx.saved_tensors
        grad = _transposed(grad_output, ctx.shape, target, weight, *ctx.options)
        return grad.to(ctx.in_dtype), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tx: Tensor, *_: Any) -> Tensor:
        target, weight = ctx.saved_tensors
        (ignore, reduction), tx, dim = ctx.options, wide(tx), class_dim(tx)
        part = "mean" if reduction == "mean" else "sum"
        index, _scale, hit = index_rows(tx.new_ones(()), target, weight, ignore, part, dim)
        rows = -(tx.gather(dim, index) * hit).squeeze(dim)
        return (rows if reduction == "none" else rows.sum()).to(ctx.out_dtype)

    @staticmethod
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        x, *rest = args
        return _transposed(multiplier, x.shape, *rest).to(x.dtype), None, None, None, None


def _transposed(
    multiplier: Tensor,
    shape: torch.Size,
    target: Tensor,
    weight: Tensor | None,
    ignore: int,
    reduction: str,
) -> Tensor:
    dim = 1 if len(shape) > 1 else 0
    index, _, hit = index_rows(multiplier, target, weight, ignore, reduction, dim)
    return hit.new_zeros(shape).scatter_(dim, index, -hit)


def _nll_samples(make: Maker) -> Iterator[Sample]:
    yield sample(make(4, 3), make.integers(3, 4))
    yield sample(make(3), make.integers(3))
    ignoring = torch.tensor([[1, 0], [2, 1]], device=make.device)
    weight = make.constant(3, positive=True)
    for reduction in ("none", "sum", "mean"):
        yield sample(make(2, 3, 2), ignoring, weight, ignore_index=1, reduction=reduction)
    yield sample(make(2, 3, 2, 2), make.integers(3, 2, 2, 2))
    yield sample(make(0, 3), make.integers(3, 0), reduction="sum")


@register(
    F.nll_loss,
    modules=[nn.NLLLoss, nn.NLLLoss2d],
    samples=_nll_samples,
)
def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Negative log-likelihood, as :func:`torch.nn.functional.nll_loss`.

    Args:
        input: log-probabilities ``(C,)``, ``(N, C)`` or ``(N, C, d1, ...)``.
        target: class indices, shape of ``input`` without ``C``.
        weight: ``(C,)``, a factor of each class; not differentiable.
        size_average: superseded by ``reduction``.
        ignore_index: rows with this class index do not count.
        reduce: superseded by ``reduction``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    Returns:
        A scalar, or the row losses for ``reduction="none"``.

    Raises:
        RuntimeError: if the shapes do not fit, or ``weight`` requires a gradient.
        ValueError: if the batches differ in size, or for an unknown reduction.
        IndexError: if a class index is out of range.
    """
    refuse_gradient("nll_loss", "weight", weight)
    reduction = legacy_reduction(size_average, reduce, reduction)
    return NLL.call(input, target, weight, ignore_index, reduction)
