"""Norms of rows with what comes before them, a residual and dropout, in one pass."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import reference
from .dropout import flags_of
from .reference_common import check_dtype, check_same, up
from .table import add, vmap_one_by_one


def noise_of(bits: Tensor, p: float, like: Tensor) -> Tensor:
    """What dropout multiplies a tensor ``like`` this by: 0, or ``1 / (1 - p)`` where kept."""
    # As torch makes it, in the dtype of the tensor. With p = 1 nothing is kept.
    return flags_of(bits, like).to(like.dtype).div_(1 - p) if p < 1 else torch.zeros_like(like)


def _check_mask(mask: Tensor | None, x: Tensor) -> None:
    if mask is None:
        return
    count = -(-x.numel() // 8)
    if mask.dtype != torch.uint8:
        raise RuntimeError(f"mask: expected uint8, got {mask.dtype}")
    if mask.numel() != count:
        raise RuntimeError(f"mask: expected {count} bytes, got {mask.numel()}")
    if mask.device != x.device:
        raise RuntimeError("mask: expected the device of x")


def _check(
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    dims: int,
) -> None:
    check_dtype(x, "x")
    if not 0 < dims <= x.dim():
        raise RuntimeError(f"dims: expected 1 to {x.dim()}, got {dims}")
    if residual is not None:
        check_same(residual, "residual", x, "x")
    _check_mask(mask, x)
    if mask is not None and residual is None:
        raise RuntimeError("mask: expected a residual beside it")
    columns = math.prod(x.shape[-dims:])
    reference.check_parameter(weight, "weight", columns, x)
    reference.check_parameter(bias, "bias", columns, x)


def _reference(
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    p: float,
    weight: Tensor | None,
    bias: Tensor | None,
    dims: int,
    centre: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(x, residual, mask, weight, bias, dims)
    total = x
    if residual is not None:
        total = (x if mask is None else x * noise_of(mask, p, x)) + residual
    over, shape = tuple(range(x.dim() - dims, x.dim())), x.shape[-dims:]
    s = up(total)
    mean = s.mean(over, keepdim=True) if centre else s.new_empty(0)
    centred = s - mean if centre else s
    rstd = torch.rsqrt(centred.square().mean(over, keepdim=True) + eps)
    y = centred * rstd
    if weight is not None:
        y = y * up(weight).reshape(shape)
    if bias is not None:
        y = y + up(bias).reshape(shape)
    kept = x.new_empty(0) if residual is None else total.contiguous()
    return y.to(x.dtype).contiguous(), kept, mean, rstd


def _fake(
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    p: float,
    weight: Tensor | None,
    bias: Tensor | None,
    dims: int,
    centre: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(x, residual, mask, weight, bias, dims)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rstd = up(x.new_empty((*x.shape[:-dims], *[1] * dims)))
    kept = x.new_empty(0) if residual is None else torch.empty_like(y)
    return y, kept, torch.empty_like(rstd) if centre else rstd.new_empty(0), rstd


def _check_backward(
    grad_output: Tensor,
    grad_sum: Tensor | None,
    sum: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    dims: int,
) -> None:
    reference.check_layer_norm(grad_output, sum, mean, rstd, weight, dims)
    if grad_sum is not None:
        check_same(grad_sum, "grad_sum", sum, "x")
    _check_mask(mask, sum)


def _reference_backward(
    grad_output: Tensor,
    grad_sum: Tensor | None,
    sum: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    p: float,
    dims: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_backward(grad_output, grad_sum, sum, mean, rstd, weight, mask, dims)
    # The gradient of the norm is rounded once, together with what joins it.
    of_sum, of_weight, of_bias = reference.layer_norm_backward(
        up(grad_output), up(sum), mean, rstd, None if weight is None else up(weight), dims
    )
    if grad_sum is not None:
        of_sum = of_sum + up(grad_sum)
    of_sum = of_sum.to(sum.dtype)
    branch = sum.new_empty(0)
    if mask is not None:
        branch = of_sum * noise_of(mask, p, of_sum)
    return branch, of_sum, of_weight, of_bias


def _fake_backward(
    grad_output: Tensor,
    grad_sum: Tensor | None,
    sum: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    p: float,
    dims: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_backward(grad_output, grad_sum, sum, mean, rstd, weight, mask, dims)
    of_sum = torch.empty_like(sum, memory_format=torch.contiguous_format)
    branch = sum.new_empty(0) if mask is None else torch.empty_like(of_sum)
    shape = sum.shape[sum.dim() - dims :]
    return branch, of_sum, rstd.new_empty(shape), rstd.new_empty(shape)


_add_norm = add(
    "add_norm(Tensor x, Tensor? residual, Tensor? mask, float p, Tensor? weight, Tensor? bias,"
    " int dims, bool centre, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    _reference,
    _fake,
    vmap_one_by_one("add_norm"),
)
_add_norm_backward = add(
    "add_norm_backward(Tensor grad_output, Tensor? grad_sum, Tensor sum, Tensor? mean,"
    " Tensor rstd, Tensor? weight, Tensor? mask, float p, int dims)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _reference_backward,
    _fake_backward,
    vmap_one_by_one("add_norm_backward"),
)


def add_norm(
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    p: float,
    weight: Tensor | None,
    bias: Tensor | None,
    dims: int,
    centre: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalise the rows of ``dropout(x) + residual``, or of ``x``, in one pass over memory.

    With ``s`` the sum as it is stored, in the dtype of ``x``:
    ``y = (s - mean) rstd weight + bias`` and ``rstd = 1 / sqrt(mean((s - mean)²) + eps)`` (Ba et
    al. 2016); without the mean it is RMS norm (Zhang and Sennrich 2019).

    Args:
        x: Any shape; float32, float64, bfloat16 or float16.
        residual: Shape, dtype and device of ``x``; None normalises ``x`` itself.
        mask: One bit for each element of ``x``, set where dropout keeps it, as
            `torchbp.kernels.dropout_bits` packs them; None without dropout.
        p: The probability that dropout zeroes an element.
        weight: One value for each entry of a row, in the dtype of ``x`` or that of sums (float64
            for float64, float32 for all others); None for ones.
        bias: Likewise; None for zeros.
        dims: How many dims at the end make a row.
        centre: Subtract the mean.
        eps: Added to the variance.

    Returns:
        ``y``, contiguous, of the shape and dtype of ``x``; the sum likewise (shape ``[0]`` without
        a residual); the mean (shape ``[0]`` unless ``centre``) and ``rstd`` of every row, the dims
        of the rows kept with size 1, in the dtype of sums. None depends on the number of threads.

    Raises:
        RuntimeError: An argument is not as described.
    """
    results: tuple[Tensor, Tensor, Tensor, Tensor] = _add_norm(
        x, residual, mask, p, weight, bias, dims, centre, eps
    )
    return results


def add_norm_backward(
    grad_output: Tensor,
    grad_sum: Tensor | None,
    sum: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    p: float,
    dims: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of `add_norm` in one pass over memory.

    Args:
        grad_output: The gradient of ``y``; shape, dtype and device of ``sum``.
        grad_sum: The gradient that the sum has from elsewhere, likewise; None for zeros.
        sum: What was normalised.
        mean: As `add_norm` returned it; None for RMS norm.
        rstd: As `add_norm` returned it.
        weight: As given to `add_norm`.
        mask: As given to `add_norm`.
        p: As given to `add_norm`.
        dims: As given to `add_norm`.

    Returns:
        The gradient of the branch, ``x`` (shape ``[0]`` without a mask: it is that of the sum), and
        of the sum, both of the dtype of ``sum``, and the gradients of weight and bias, of the shape
        of a row and the dtype of ``rstd``. None depends on the number of threads.

    Raises:
        RuntimeError: An argument is not as described.
    """
    results: tuple[Tensor, Tensor, Tensor, Tensor] = _add_norm_backward(
        grad_output, grad_sum, sum, mean, rstd, weight, mask, p, dims
    )
    return results
