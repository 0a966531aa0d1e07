"""Gated linear units: one half of a tensor, or another tensor, scales what passes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchbp import kernels
from torchbp.ops.arithmetic import halves
from torchbp.ops.base import Op, add_tangents, midpoint
from torchbp.ops.bias_act import _ACTIVATIONS, _FORWARD
from torchbp.ops.bias_act import _bias_act_tangent as activation_tangent
from torchbp.ops.elementwise import can_fuse
from torchbp.ops.registry import Maker, Sample, register, sample
from torchbp.ops.relevance import Rule


def _tangent(v: Tensor, gate: Tensor, activation: str) -> Tensor:
    """``v f'(gate)``."""
    return activation_tangent(v, gate, activation, 0.0)


def _gradients(g: Tensor, value: Tensor, gate: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return g * _FORWARD[activation](gate), _tangent(g * value, gate, activation)


def _secant(
    m: Tensor, values: tuple[Tensor, Tensor], gates: tuple[Tensor, Tensor], activation: str
) -> tuple[Tensor, Tensor]:
    """Each factor weighted by the other's midpoint, composed with the secant of f."""
    (gate, gate0), op = gates, _ACTIVATIONS[activation]
    f, f0 = op.forward(gate), op.forward(gate0)
    of_gate = op.secant(m * midpoint(*values), (gate,), (gate0,), f, f0)[0]
    assert of_gate is not None
    return m * midpoint(f, f0), of_gate


class Gated(Op):
    """``y = a f(b)``; without b, a and b are the halves of the first argument's last dimension.

    Source: Dauphin et al., 2017 (f = σ), Shazeer, 2020 (all others).
    Backward: ``∂a = g f(b)``, ``∂b = g a f'(b)``. Secant: each factor weighted by the other's
    midpoint, composed with the secant of f. Relevance: all of it to a; the gate b scales what
    passes and gets none (Arras et al., 2017). With f the identity neither is a gate, and each gets
    a half (Achtibat et al., 2024).
    """

    @staticmethod
    def forward(value: Tensor, gate: Tensor | None, activation: str) -> Tensor:
        if can_fuse(value) if gate is None else can_fuse(value, gate):
            return kernels.gated(value, gate, activation)
        a, b = _factors(value, gate)
        return a * _FORWARD[activation](b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        value, gate, ctx.activation = inputs
        ctx.save_for_backward(value, gate)
        ctx.save_for_forward(value, gate)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        value, gate = ctx.saved_tensors
        needs_value, needs_gate, _ = ctx.needs_input_grad
        if not torch.is_grad_enabled() and can_fuse(value, grad_output):
            of_value, of_gate = kernels.gated_backward(grad_output, value, gate, ctx.activation)
        else:
            of_value, of_gate = _gradients(grad_output, *_factors(value, gate), ctx.activation)
            if gate is None:
                of_value = torch.cat([of_value, of_gate], -1)
        return of_value if needs_value else None, of_gate if needs_gate else None, None

    @staticmethod
    def jvp(ctx: Any, ta: Tensor | None, tb: Tensor | None, _: Any) -> Tensor | None:
        value, gate = ctx.saved_tensors
        if gate is None and ta is not None:
            ta, tb = ta.chunk(2, -1)
        a, b = _factors(value, gate)
        return add_tangents(
            None if ta is None else ta * _FORWARD[ctx.activation](b),
            None if tb is None else _tangent(tb * a, b, ctx.activation),
        )

    @staticmethod
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        (value, gate, activation), (value0, gate0, _) = args, args0
        (a, b), (a0, b0) = _factors(value, gate), _factors(value0, gate0)
        of_a, of_b = _secant(multiplier, (a, a0), (b, b0), activation)
        return (torch.cat([of_a, of_b], -1), None, None) if gate is None else (of_a, of_b, None)

    @classmethod
    def relevance(
        cls, relevance: Tensor, rule: Rule, args: tuple[Any, ...], output: Any
    ) -> tuple[Tensor | None, ...]:
        value, gate, activation = args
        of_a, of_b = relevance, torch.zeros_like(relevance)
        if activation == "identity":
            of_a, of_b = (t for t in halves(relevance, *_factors(value, gate)) if t is not None)
        return (torch.cat([of_a, of_b], -1), None, None) if gate is None else (of_a, of_b, None)


def _factors(value: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    if gate is not None:
        return value, gate
    a, b = value.chunk(2, -1)
    return a, b


class GLU(Op):
    """``y = a σ(b)`` with the halves a and b of x along one dimension (Dauphin et al., 2017).

    Derivatives, secant and relevance: those of :class:`Gated`.
    """

    @staticmethod
    def forward(x: Tensor, dim: int) -> Tensor:
        return F.glu(x, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.dim = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        if not torch.is_grad_enabled() and can_fuse(x, grad_output):
            # Whatever comes after the halved dimension makes rows with it, halves side by side.
            rows = math.prod(x.shape[: ctx.dim % x.dim()])
            matrix, g = (t.reshape(rows, t.numel() // max(rows, 1)) for t in (x, grad_output))
            return kernels.gated_backward(g, matrix, None, "sigmoid")[0].view(x.shape), None
        return torch.cat(_gradients(grad_output, *x.chunk(2, ctx.dim), "sigmoid"), ctx.dim), None

    @staticmethod
    def jvp(ctx: Any, tx: Tensor | None, _: Any) -> Tensor | None:
        if tx is None:
            return None
        (a, b), (ta, tb) = (t.chunk(2, ctx.dim) for t in (ctx.saved_tensors[0], tx))
        return ta * torch.sigmoid(b) + _tangent(tb * a, b, "sigmoid")

    @staticmethod
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        dim = args[1]
        (a, b), (a0, b0) = args[0].chunk(2, dim), args0[0].chunk(2, dim)
        return torch.cat(_secant(multiplier, (a, a0), (b, b0), "sigmoid"), dim), None

    @classmethod
    def relevance(
        cls, relevance: Tensor, rule: Rule, args: tuple[Any, ...], output: Any
    ) -> tuple[Tensor | None, ...]:
        return torch.cat([relevance, torch.zeros_like(relevance)], args[1]), None


def _glu_samples(make: Maker) -> Iterator[Sample]:
    yield sample(make(3, 4))
    yield sample(make(4, 3), dim=0)
    yield sample(make(2, 6, 2), dim=-2)
    yield sample(make(0, 4))


@register(F.glu, modules=[nn.GLU], samples=_glu_samples)
def glu(input: Tensor, dim: int = -1) -> Tensor:
    """``a σ(b)`` with the halves of ``input``, as :func:`torch.nn.functional.glu`.

    Args:
        input: any shape whose size along ``dim`` is even.
        dim: the dimension to halve.

    Returns:
        The shape of ``input`` with half the size along ``dim``.

    Raises:
        RuntimeError: the size along ``dim`` is odd, or ``input`` is a scalar.
    """
    return GLU.call(input, dim)


def _composed(input: Tensor, gate: Tensor | None = None, activation: str = "silu") -> Tensor:
    a, b = _factors(input, gate)
    return a * _FORWARD[activation](b)


def _gated_samples(make: Maker) -> Iterator[Sample]:
    for activation in kernels.GATES:
        yield sample(make(3, 4), make(3, 4), activation)
        yield sample(make(2, 3, 6), activation=activation)
    yield sample(make(0, 4))
    yield sample(make(), make(), "gelu")


@register(_composed, samples=_gated_samples)
def gated(input: Tensor, gate: Tensor | None = None, activation: str = "silu") -> Tensor:
    """``input * act(gate)`` in one pass, forward and backward, which saves the inputs alone.

    SwiGLU with ``silu``, GEGLU with ``gelu`` or ``gelu_tanh``, ReGLU with ``relu``, the bilinear
    layer with ``identity`` (Shazeer, 2020) and GLU with ``sigmoid`` (Dauphin et al., 2017).

    Args:
        input: ``(*, features)``, or ``(*, 2 features)`` without a gate: first what is scaled, then
            the gate, as for :func:`torch.nn.functional.glu`.
        gate: the shape and dtype of ``input``.
        activation: ``identity``, ``relu``, ``gelu``, ``gelu_tanh``, ``silu``, ``tanh`` or
            ``sigmoid``.

    Returns:
        ``(*, features)``.

    Raises:
        ValueError: the activation is unknown, the shapes or dtypes differ, or there is no gate and
            the last dimension is odd.
    """
    if activation not in kernels.GATES:
        raise ValueError(
            f"gated: activation must be one of {', '.join(kernels.GATES)}, but got {activation!r}"
        )
    if gate is None:
        if input.dim() == 0 or input.shape[-1] % 2:
            raise ValueError(
                "gated: without a gate the last dimension must be even, but got shape "
                f"{tuple(input.shape)}"
            )
    elif gate.shape != input.shape or gate.dtype != input.dtype:
        raise ValueError(
            f"gated: gate must be like input, {tuple(input.shape)} of {input.dtype}, but got "
            f"{tuple(gate.shape)} of {gate.dtype}"
        )
    return Gated.call(input, gate, activation)
