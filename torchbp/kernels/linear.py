"""The gradients of a linear layer in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference_common import check_alike
from .table import add, vmap_one_by_one


def _check(grad_output: Tensor, x: Tensor, weight: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.float64):
        raise RuntimeError(f"x: expected float32 or float64, got {x.dtype}")
    check_alike(grad_output, "grad_output", x, "x")
    check_alike(weight, "weight", x, "x")
    if x.dim() != 2:
        raise RuntimeError(f"x: expected 2 dims, got {x.dim()}")
    if weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise RuntimeError(f"weight: expected {x.shape[1]} columns, as x has")
    expected = x.shape[0], weight.shape[0]
    if grad_output.shape != expected:
        raise RuntimeError(f"grad_output: expected {expected[0]} x {expected[1]}")


def _reference(
    grad_output: Tensor, x: Tensor, weight: Tensor, of_x: bool, of_weight: bool, of_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _check(grad_output, x, weight)
    return (
        grad_output.mm(weight) if of_x else x.new_empty(0, x.shape[1]),
        grad_output.t().mm(x) if of_weight else x.new_empty(0, x.shape[1]),
        grad_output.sum(0) if of_bias else x.new_empty(0),
    )


def _fake(
    grad_output: Tensor, x: Tensor, weight: Tensor, of_x: bool, of_weight: bool, of_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _check(grad_output, x, weight)
    rows, outputs = grad_output.shape
    return (
        x.new_empty(rows if of_x else 0, x.shape[1]),
        x.new_empty(outputs if of_weight else 0, x.shape[1]),
        x.new_empty(outputs if of_bias else 0),
    )


_op = add(
    "linear_backward(Tensor grad_output, Tensor x, Tensor weight, bool of_x, bool of_weight,"
    " bool of_bias) -> (Tensor, Tensor, Tensor)",
    _reference,
    _fake,
    vmap_one_by_one("linear_backward"),
)


def linear_backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    of_x: bool = True,
    of_weight: bool = True,
    of_bias: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of ``x Wᵀ + b``: ``g W``, ``gᵀ x`` and the sum of ``g`` over rows.

    Compiled for the CPU; every other device gets the PyTorch reference.

    Args:
        grad_output: ``[N, O]``, dtype and device of ``x``.
        x: ``[N, I]``; float32 or float64.
        weight: ``[O, I]``, dtype and device of ``x``.
        of_x: Compute the gradient of ``x``.
        of_weight: Compute that of the weight.
        of_bias: Compute that of the bias.

    Returns:
        The gradients of ``x``, ``weight`` and the bias (``[O]``), contiguous; those not asked for
        have no rows. Every element adds up its products in one order, 256 at a time, whatever the
        number of threads.

    Raises:
        RuntimeError: An argument is not as described.
    """
    return _op(grad_output, x, weight, of_x, of_weight, of_bias)
