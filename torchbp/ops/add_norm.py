"""Dropout, residual and norm in one: what stands between the blocks of a transformer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _is_any_autocast_enabled

from torchbp import kernels
from torchbp.kernels.add_norm import noise_of
from torchbp.ops.base import is_ordinary, wide
from torchbp.ops.dropout import _keeps_all, dropout
from torchbp.ops.dropout_draws import _bits, _kept
from torchbp.ops.layer_norm import layer_norm, rms_norm
from torchbp.ops.norm import (
    Moments,
    as_parameter,
    can_normalise,
    of_dtype,
    sum_over,
    tangent,
)
from torchbp.ops.registry import Maker, Sample, register, sample


class AddNorm(torch.autograd.Function):
    """``s = x ⊙ noise + residual`` and ``y = norm(s)``, each pass over memory made once.

    Backward: with ``g`` what reaches ``s`` through the norm (see
    :class:`torchbp.ops.layer_norm.LayerNorm`) and from elsewhere, ``∂residual = g`` and
    ``∂x = g ⊙ noise``. Saved are ``s``, its statistics and one bit of the noise for each element.

    Only eager calls on ordinary tensors come here; all others, those of the secant and relevance
    tapes among them, see the parts, each of which is an op with rules of its own.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        bits: Tensor | None,
        p: float,
        weight: Tensor | None,
        bias: Tensor | None,
        dims: int,
        centre: bool,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        y, total, mean, rstd = kernels.add_norm(
            x, residual, bits, p, weight, bias, dims, centre, eps
        )
        ctx.save_for_backward(total, mean if centre else None, rstd, weight, bias, bits)
        ctx.p, ctx.dims, ctx.eps = p, dims, eps
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_sum: Tensor | None) -> tuple[Any, ...]:
        total, mean, rstd, weight, bias, bits = ctx.saved_tensors
        if grad is None:
            of_weight = of_bias = None
            of_sum = grad_sum
            branch = of_sum if bits is None or of_sum is None else _drop(of_sum, bits, ctx.p)
        elif torch.is_grad_enabled():
            of_sum, of_weight, of_bias = _through_norm(ctx, grad)
            of_sum = of_sum if grad_sum is None else of_sum + grad_sum
            branch = of_sum if bits is None else _drop(of_sum, bits, ctx.p)
        else:
            branch, of_sum, of_weight, of_bias = kernels.add_norm_backward(
                grad, grad_sum, total, mean, rstd, as_parameter(weight, total), bits, ctx.p,
                ctx.dims,
            )  # fmt: skip
            branch = of_sum if bits is None else branch
        needs_x, needs_residual, _, _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        return (
            branch if needs_x else None,
            of_sum if needs_residual else None,
            None,
            None,
            of_dtype(of_weight, weight) if needs_weight and of_weight is not None else None,
            of_dtype(of_bias, bias) if needs_bias and of_bias is not None else None,
            *(None,) * 3,
        )


def _drop(grad: Tensor, bits: Tensor, p: float) -> Tensor:
    return grad * noise_of(bits, p, grad)


def _through_norm(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What reaches the sum, weight and bias, in differentiable torch."""
    total, mean, _, weight, bias, _ = ctx.saved_tensors
    others = tuple(range(total.dim() - ctx.dims))
    over = tuple(range(total.dim() - ctx.dims, total.dim()))
    moments = Moments(wide(total), over, ctx.eps, centre=mean is not None)
    xhat, g = moments.normalised, wide(grad)
    through = g if weight is None else g * wide(weight)
    of_sum = tangent(through, xhat, moments.rstd, over, centre=mean is not None)
    return (
        of_sum.to(total.dtype),
        None if weight is None else sum_over(g * xhat, others, weight),
        None if bias is None else sum_over(g, others, bias),
    )


def _fuses(
    x: Tensor, residual: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None
) -> bool:
    if not is_ordinary(x, residual, weight, bias) or _is_any_autocast_enabled() or not x.numel():
        return False
    return x.shape == residual.shape and can_normalise(x, shape, residual, weight, bias)


def _row_major_bits(x: Tensor, p: float) -> Tensor:
    return _bits(x, p) if x.is_contiguous() else kernels.dropout_bits(_kept(x, p))


def _composed(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = None,
    norm: str = "layer",
    p: float = 0.0,
    training: bool = True,
) -> tuple[Tensor, Tensor]:
    total = F.dropout(input, p, training) + residual
    if norm == "layer":
        eps = 1e-5 if eps is None else eps
        return F.layer_norm(total, normalized_shape, weight, bias, eps), total
    y = F.rms_norm(total, normalized_shape, weight, eps)
    return y if bias is None else y + bias, total


def _samples(make: Maker) -> Iterator[Sample]:
    yield sample(make(3, 5), make(3, 5), (5,), make(5), make(5))
    yield sample(make(2, 3, 4), make(2, 3, 4), (3, 4), make(3, 4), norm="rms", eps=1e-3)
    yield sample(make(2, 3, 4), make(2, 3, 4), (4,), p=0.3)
    yield sample(make(4, 6), make(4, 6), (6,), make(6), make(6), norm="rms", p=0.5)
    yield sample(make(4, 6), make(4, 6), (6,), make(6), p=0.5, training=False)
    yield sample(make(0, 4), make(0, 4), (4,), make(4), make(4))


@register(_composed, samples=_samples)
def add_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = None,
    norm: str = "layer",
    p: float = 0.0,
    training: bool = True,
) -> tuple[Tensor, Tensor]:
    """Normalise ``dropout(input) + residual``: in one pass over memory, and one in backward.

    Args:
        input: the branch, ``(*, *normalized_shape)``.
        residual: of the shape of ``input``.
        normalized_shape: sizes of the dimensions to normalise over.
        weight: scale of that shape, or ``None``.
        bias: shift of that shape, or ``None``.
        eps: added to the variance; ``None`` is ``1e-5`` for layer norm, and for RMS norm that of
            :func:`rms_norm`.
        norm: ``layer`` (Ba et al. 2016) or ``rms`` (Zhang & Sennrich 2019).
        p: probability that dropout zeroes an element of ``input``, drawn as
            :func:`torch.nn.functional.dropout` draws it with the same seed.
        training: without it, nothing is dropped.

    Returns:
        The norm of the sum, and the sum, which a block that normalises its input adds to later.
        The sum is torch's to the bit.

    Raises:
        ValueError: ``norm`` is unknown, or ``p`` is not between 0 and 1.
        RuntimeError: if the shapes do not fit.
    """
    if norm not in ("layer", "rms"):
        raise ValueError(f"add_norm: norm must be layer or rms, but got {norm!r}")
    shape, keeps = tuple(normalized_shape), _keeps_all(input, p, training)
    if (keeps or p < 1) and _fuses(input, residual, shape, weight, bias):
        if eps is None:
            float32 = torch.float32 if input.dtype != torch.float64 else torch.float64
            eps = 1e-5 if norm == "layer" else torch.finfo(float32).eps
        bits = None if keeps else _row_major_bits(input, p)
        y, total = AddNorm.apply(
            input, residual, bits, 0.0 if keeps else p, weight, bias, len(shape), norm == "layer",
            eps,
        )  # fmt: skip
        return y, total
    total = dropout(input, p, training) + residual
    if norm == "layer":
        return layer_norm(total, shape, weight, bias, 1e-5 if eps is None else eps), total
    y = rms_norm(total, shape, weight, eps)
    return y if bias is None else y + bias, total
