"""Bias and activation in one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from torchbp import kernels
from torchbp.ops.activation import GELU, GELUTanh, Sigmoid, SiLU, Tanh
from torchbp.ops.activation_pieces import LeakyReLU, ReLU
from torchbp.ops.base import Op, add_tangents, sum_to
from torchbp.ops.elementwise import Elementwise, can_fuse, tangent_of
from torchbp.ops.registry import Maker, Sample, register, sample
from torchbp.ops.relevance import Rule, quotient


class Identity(Elementwise):
    """``y = x``: what :class:`BiasAct` applies when asked for no activation."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def tangent(v: Tensor, kept: Tensor) -> Tensor:
        return v


_ACTIVATIONS: dict[str, type[Elementwise]] = {
    "identity": Identity, "relu": ReLU, "leaky_relu": LeakyReLU, "gelu": GELU,
    "gelu_tanh": GELUTanh, "silu": SiLU, "tanh": Tanh, "sigmoid": Sigmoid,
}  # fmt: skip
_FORWARD = {name: op.forward for name, op in _ACTIVATIONS.items()}
_TANGENT = {name: op.tangent for name, op in _ACTIVATIONS.items()}
_KEEP = {name: op.keep for name, op in _ACTIVATIONS.items()}


class BiasAct(Op):
    """``y = f(x + b)`` with ``b`` along the last dimension, in one kernel.

    Backward: ``∂x = g f'(x + b)``, ``∂b = Σ ∂x`` over every other dimension. Secant: that of f at
    the sum, passed on to both summands. Relevance: f passes it; x takes its share of the sum.
    """

    @staticmethod
    def forward(x: Tensor, bias: Tensor, activation: str, slope: float) -> Tensor:
        if can_fuse(x, bias):
            return kernels.bias_act(x, bias, activation, slope)
        return _FORWARD[activation](x + bias, *_settings(activation, slope))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, bias, ctx.activation, ctx.slope = inputs
        ctx.save_for_backward(x, bias)
        ctx.save_for_forward(x, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, bias = ctx.saved_tensors
        needs_x, needs_bias = ctx.needs_input_grad[:2]
        if not torch.is_grad_enabled() and can_fuse(x, bias, grad_output):
            grads = kernels.bias_act_backward(grad_output, x, bias, ctx.activation, ctx.slope)
            return grads[0] if needs_x else None, grads[1] if needs_bias else None, None, None
        grad = _bias_act_tangent(grad_output, x + bias, ctx.activation, ctx.slope)
        return (
            grad if needs_x else None,
            sum_to(grad, bias.shape) if needs_bias else None,
            None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, tx: Tensor | None, tb: Tensor | None, *_: Any) -> Tensor | None:
        x, bias = ctx.saved_tensors
        t = add_tangents(tx, tb)
        if t is None:
            return None
        return _bias_act_tangent(t.expand(x.shape), x + bias, ctx.activation, ctx.slope).clone()

    @staticmethod
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        (x, bias, activation, slope), (x0, bias0, *_) = args, args0
        settings = _settings(activation, slope)
        m = _ACTIVATIONS[activation].secant(
            multiplier, (x + bias, *settings), (x0 + bias0, *settings), output, output0
        )[0]
        return m, None if m is None else sum_to(m, bias.shape), None, None

    @classmethod
    def relevance(
        cls, relevance: Tensor, rule: Rule, args: tuple[Any, ...], output: Any
    ) -> tuple[Tensor | None, ...]:
        x, bias, *_ = args
        return x * quotient(relevance, x + bias, rule.epsilon), None, None, None


def _settings(activation: str, slope: float) -> list[Any]:
    return [slope] if activation == "leaky_relu" else []


def _bias_act_tangent(v: Tensor, pre: Tensor, activation: str, slope: float) -> Tensor:
    settings = _settings(activation, slope)
    kept = _KEEP[activation](pre, _FORWARD[activation](pre, *settings), *settings)
    return tangent_of(_TANGENT[activation], v, kept, settings)


def _composed_bias_act(
    input: Tensor, bias: Tensor, activation: str = "relu", negative_slope: float = 0.01
) -> Tensor:
    return _FORWARD[activation](input + bias, *_settings(activation, negative_slope))


def _bias_act_samples(make: Maker) -> Iterator[Sample]:
    for activation in _ACTIVATIONS:
        yield sample(make(3, 4), make(4), activation)
    yield sample(make(2, 3, 4), make(4), "leaky_relu", 0.3)
    yield sample(make(0, 4), make(4))


@register(_composed_bias_act, samples=_bias_act_samples)
def bias_act(
    input: Tensor, bias: Tensor, activation: str = "relu", negative_slope: float = 0.01
) -> Tensor:
    """``act(input + bias)`` in one kernel where the extension is there.

    Args:
        input: ``(*, features)``.
        bias: ``(features,)``.
        activation: ``identity``, ``relu``, ``leaky_relu``, ``gelu``, ``gelu_tanh``, ``silu``,
            ``tanh`` or ``sigmoid``.
        negative_slope: the slope of ``leaky_relu`` below zero.

    Returns:
        The shape of ``input``.

    Raises:
        ValueError: the activation is unknown, or ``bias`` does not fit the last dimension.
    """
    if activation not in _ACTIVATIONS:
        raise ValueError(
            f"bias_act: activation must be one of {', '.join(_ACTIVATIONS)}, but got {activation!r}"
        )
    if bias.shape != input.shape[-1:]:
        raise ValueError(
            f"bias_act: bias must have shape {tuple(input.shape[-1:])}, the last dimension of "
            f"input, but got {tuple(bias.shape)}"
        )
    return BiasAct.call(input, bias, activation, negative_slope)
