"""Gated linear units, ``value * act(gate)``, and their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .reference_common import check_alike, check_dtype, check_same, up
from .reference_elementwise import ACTIVATIONS
from .table import add, batch_first

GATES = tuple(name for name in ACTIVATIONS if name != "leaky_relu")
"""The activations that a gate may have: those without a setting."""


def _check(value: Tensor, gate: Tensor | None, act: str) -> None:
    check_dtype(value, "value")
    if act not in GATES:
        raise RuntimeError(f"act: expected one of {', '.join(GATES)}, got {act}")
    if gate is not None:
        check_same(gate, "gate", value, "value")
    elif value.dim() == 0 or value.shape[-1] % 2:
        raise RuntimeError(
            f"value: expected a last dim of even size to halve, got shape {tuple(value.shape)}"
        )


def _check_gradient(grad_output: Tensor, value: Tensor, gate: Tensor | None) -> None:
    shape = list(value.shape)
    if gate is None:
        shape[-1] //= 2
    if list(grad_output.shape) != shape:
        raise RuntimeError(
            f"grad_output: expected the shape of the result, {tuple(shape)}, got "
            f"{tuple(grad_output.shape)}"
        )
    check_alike(grad_output, "grad_output", value, "value")


def _factors(value: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    if gate is not None:
        return up(value), up(gate)
    a, b = up(value).chunk(2, -1)
    return a, b


def _empty_result(value: Tensor, gate: Tensor | None) -> Tensor:
    if gate is not None:
        return torch.empty_like(value)
    return value.new_empty((*value.shape[:-1], value.shape[-1] // 2))


def _empty_gradients(value: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    if gate is not None:
        return torch.empty_like(value), torch.empty_like(value)
    return torch.empty_like(value, memory_format=torch.contiguous_format), value.new_empty(0)


def _reference(value: Tensor, gate: Tensor | None, act: str) -> Tensor:
    _check(value, gate, act)
    a, b = _factors(value, gate)
    return _empty_result(value, gate).copy_(a * ACTIVATIONS[act][0](b, 0.0))


def _reference_backward(
    grad_output: Tensor, value: Tensor, gate: Tensor | None, act: str
) -> tuple[Tensor, Tensor]:
    _check(value, gate, act)
    _check_gradient(grad_output, value, gate)
    forward, backward = ACTIVATIONS[act]
    (a, b), g = _factors(value, gate), up(grad_output)
    of_value, of_gate = g * forward(b, 0.0), backward(g * a, b, 0.0)
    results = _empty_gradients(value, gate)
    if gate is None:
        results[0].copy_(torch.cat([of_value, of_gate], -1))
    else:
        results[0].copy_(of_value)
        results[1].copy_(of_gate)
    return results


def _fake(value: Tensor, gate: Tensor | None, act: str) -> Tensor:
    _check(value, gate, act)
    return _empty_result(value, gate)


def _fake_backward(
    grad_output: Tensor, value: Tensor, gate: Tensor | None, act: str
) -> tuple[Tensor, Tensor]:
    _check(value, gate, act)
    _check_gradient(grad_output, value, gate)
    return _empty_gradients(value, gate)


def _vmap(
    info: Any, in_dims: Sequence[int | None], value: Tensor, gate: Tensor | None, act: str
) -> tuple[Tensor, int]:
    batch = info.batch_size
    gate = None if gate is None else batch_first(gate, in_dims[1], batch)
    return _gated(batch_first(value, in_dims[0], batch), gate, act), 0


def _vmap_backward(
    info: Any,
    in_dims: Sequence[int | None],
    grad_output: Tensor,
    value: Tensor,
    gate: Tensor | None,
    act: str,
) -> tuple[tuple[Tensor, Tensor], tuple[int, int | None]]:
    batch = info.batch_size
    grad_output = batch_first(grad_output, in_dims[0], batch)
    value = batch_first(value, in_dims[1], batch)
    if gate is None:
        return _gated_backward(grad_output, value, None, act), (0, None)
    return _gated_backward(grad_output, value, batch_first(gate, in_dims[2], batch), act), (0, 0)


_gated = add("gated(Tensor value, Tensor? gate, str act) -> Tensor", _reference, _fake, _vmap)
_gated_backward = add(
    "gated_backward(Tensor grad_output, Tensor value, Tensor? gate, str act) -> (Tensor, Tensor)",
    _reference_backward,
    _fake_backward,
    _vmap_backward,
)


def gated(value: Tensor, gate: Tensor | None = None, act: str = "silu") -> Tensor:
    """Compute ``value * act(gate)`` in one pass (Dauphin et al., 2017; Shazeer, 2020).

    Args:
        value: Any shape; float32, float64, bfloat16 or float16. Halves of one tensor along its
            last dim are read where they are.
        gate: Shape, dtype and device of ``value``. None takes both from ``value``, whose last dim
            holds first the value and then the gate, as for `torch.nn.functional.glu`.
        act: ``identity``, ``relu``, ``gelu``, ``gelu_tanh``, ``silu``, ``tanh`` or ``sigmoid``.

    Returns:
        Shape and dtype of ``value``, strides as of ``torch.empty_like(value)``; half of the last
        dim, and contiguous, without a gate.

    Raises:
        RuntimeError: An argument is not as described.
    """
    return _gated(value, gate, act)


def gated_backward(
    grad_output: Tensor, value: Tensor, gate: Tensor | None = None, act: str = "silu"
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of `gated` in one pass, from its inputs.

    Args:
        grad_output: The gradient of the result; its shape, and dtype and device of ``value``.
        value: As given to `gated`.
        gate: As given to `gated`.
        act: As given to `gated`.

    Returns:
        ``grad_value`` and ``grad_gate``, with strides as of ``torch.empty_like(value)``. Without a
        gate both are in the first, contiguous and shaped like ``value``; the second has shape
        ``[0]``.

    Raises:
        RuntimeError: An argument is not as described.
    """
    return _gated_backward(grad_output, value, gate, act)
