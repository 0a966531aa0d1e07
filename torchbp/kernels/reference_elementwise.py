"""Activations and softmax in plain PyTorch; see `torchbp.kernels.reference`."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .reference_common import check_alike, check_dtype, check_same, up


def _logistic_slope(z: Tensor) -> Tensor:
    """``s(z) (1 - s(z))`` by way of ``exp(-|z|)``, which does not cancel where s is close to 1."""
    e = torch.exp(-z.abs())
    return e / (1 + e).square()


def _normal_cdf(z: Tensor) -> Tensor:
    return 0.5 * torch.erfc(z * -math.sqrt(0.5))


def _normal_pdf(z: Tensor) -> Tensor:
    return torch.exp(-0.5 * z * z) * (1 / math.sqrt(2 * math.pi))


_TANH_SCALE = 2 * math.sqrt(2 / math.pi)


def _gelu_tanh_inner(z: Tensor) -> Tensor:
    """The ``w`` of ``gelu_tanh(z) = z s(w(z))`` (Hendrycks and Gimpel, 2016)."""
    return _TANH_SCALE * z * (1 + 0.044715 * z * z)


def _gelu_tanh_backward(g: Tensor, z: Tensor, alpha: float) -> Tensor:
    w = _gelu_tanh_inner(z)
    slope = _logistic_slope(w) * (_TANH_SCALE * (1 + 0.134145 * z * z))
    return g * (torch.sigmoid(w) + z * slope)


Forward = Callable[[Tensor, float], Tensor]
Backward = Callable[[Tensor, Tensor, float], Tensor]

# name -> (y from z, grad_z from grad_y and z)
ACTIVATIONS: dict[str, tuple[Forward, Backward]] = {
    "identity": (lambda z, alpha: z, lambda g, z, alpha: g),
    "relu": (
        lambda z, alpha: torch.relu(z),
        lambda g, z, alpha: torch.where(z <= 0, 0.0, g),
    ),
    "leaky_relu": (
        lambda z, alpha: torch.where(z > 0, z, alpha * z),
        lambda g, z, alpha: torch.where(z > 0, g, alpha * g),
    ),
    "gelu": (
        lambda z, alpha: z * _normal_cdf(z),
        lambda g, z, alpha: g * (_normal_cdf(z) + z * _normal_pdf(z)),
    ),
    "gelu_tanh": (
        lambda z, alpha: z * torch.sigmoid(_gelu_tanh_inner(z)),
        _gelu_tanh_backward,
    ),
    "silu": (
        lambda z, alpha: z * torch.sigmoid(z),
        lambda g, z, alpha: g * (torch.sigmoid(z) + z * _logistic_slope(z)),
    ),
    "tanh": (
        lambda z, alpha: torch.tanh(z),
        lambda g, z, alpha: g * (4 * _logistic_slope(2 * z)),
    ),
    "sigmoid": (
        lambda z, alpha: torch.sigmoid(z),
        lambda g, z, alpha: g * _logistic_slope(z),
    ),
}


def check_bias_act(x: Tensor, bias: Tensor | None, act: str) -> None:
    """Raise RuntimeError where an argument of `bias_act` is not as documented."""
    check_dtype(x, "x")
    if act not in ACTIVATIONS:
        raise RuntimeError(f"act: expected one of {', '.join(ACTIVATIONS)}, got {act}")
    if bias is None:
        return
    if x.dim() == 0 or bias.dim() != 1 or bias.shape[0] != x.shape[-1]:
        raise RuntimeError(
            "bias: expected one value for each entry of the last dim of x, got shapes "
            f"{tuple(bias.shape)} and {tuple(x.shape)}"
        )
    check_alike(bias, "bias", x, "x")


def like_input(x: Tensor, bias: Tensor | None) -> Tensor:
    """An empty tensor with the strides that `bias_act` gives its result."""
    if bias is None:
        return torch.empty_like(x)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _preactivation(x: Tensor, bias: Tensor | None) -> Tensor:
    return up(x) if bias is None else up(x) + up(bias)


def bias_act(x: Tensor, bias: Tensor | None, act: str, alpha: float) -> Tensor:
    """Reference of `torchbp.kernels.bias_act`; same arguments, result and errors."""
    check_bias_act(x, bias, act)
    y = ACTIVATIONS[act][0](_preactivation(x, bias), alpha)
    return like_input(x, bias).copy_(y)


def bias_act_backward(
    grad_output: Tensor, x: Tensor, bias: Tensor | None, act: str, alpha: float
) -> tuple[Tensor, Tensor]:
    """Reference of `torchbp.kernels.bias_act_backward`; same arguments, result and errors."""
    check_bias_act(x, bias, act)
    check_same(grad_output, "grad_output", x, "x")
    grad = ACTIVATIONS[act][1](up(grad_output), _preactivation(x, bias), alpha)
    grad_input = like_input(x, bias).copy_(grad)
    if bias is None:
        return grad_input, x.new_empty(0)
    return grad_input, grad.sum_to_size(bias.shape).to(x.dtype, copy=True)


def _mish_slope(x: Tensor) -> Tensor:
    """By way of ``exp(-|x|)``: ``tanh(log(1 + exp(x))) = n / d``, scaled by its square above 0."""
    e = torch.exp(-x.abs())
    n = torch.where(x < 0, e * (e + 2), 1 + 2 * e)
    d = torch.where(x < 0, n + 2, n + 2 * e * e)
    return n / d + x * torch.where(x < 0, e, e * e) * (4 * (1 + e) / d.square())


def _below(x: Tensor) -> Tensor:
    return torch.exp(x.clamp(max=0))


def _inside(g: Tensor, k: Tensor, low: float, high: float) -> Tensor:
    return g.masked_fill((k <= low) | (k >= high), 0)


_SELU_ALPHA, _SELU_SCALE = 1.6732632423543773, 1.0507009873554805

Tangent = Callable[[Tensor, Tensor, float, float], Tensor]

# name -> grad_x from grad_y, what the op keeps (x; y where said) and two settings.
# In the order of their numbers.
ELEMENTWISE: dict[str, Tangent] = {
    "relu": lambda g, k, a, b: g.masked_fill(k <= 0, 0),
    "leaky_relu": lambda g, k, a, b: torch.where(k > 0, g, a * g),
    "gelu": lambda g, k, a, b: ACTIVATIONS["gelu"][1](g, k, a),
    "gelu_tanh": lambda g, k, a, b: ACTIVATIONS["gelu_tanh"][1](g, k, a),
    "silu": lambda g, k, a, b: ACTIVATIONS["silu"][1](g, k, a),
    "tanh": lambda g, k, a, b: g * (1 - k * k),  # from y
    "sigmoid": lambda g, k, a, b: g * ((1 - k) * k),  # from y
    "softplus": lambda g, k, a, b: torch.where(k * a > b, g, g * torch.sigmoid(k * a)),
    "log_sigmoid": lambda g, k, a, b: g * torch.sigmoid(-k),
    "mish": lambda g, k, a, b: g * _mish_slope(k),
    "softsign": lambda g, k, a, b: g / (1 + k.abs()).square(),
    "tanhshrink": lambda g, k, a, b: g * torch.tanh(k).square(),
    "elu": lambda g, k, a, b: torch.where(k > 0, g, g * (a * _below(k))),
    "celu": lambda g, k, a, b: g * torch.exp(k.clamp(max=0) / a),
    "selu": lambda g, k, a, b: (
        g * torch.where(k > 0, _SELU_SCALE, _SELU_SCALE * _SELU_ALPHA * _below(k))
    ),
    "threshold": lambda g, k, a, b: g.masked_fill(k <= a, 0),
    "hardtanh": _inside,  # from y
    "hardsigmoid": lambda g, k, a, b: _inside(g / 6, k, -3, 3),
    "hardswish": lambda g, k, a, b: torch.where(k < 3, g * (k / 3 + 0.5), g).masked_fill(
        k <= -3, 0
    ),
    "hardshrink": lambda g, k, a, b: g.masked_fill((k >= -a) & (k <= a), 0),
    "softshrink": lambda g, k, a, b: g.masked_fill(k == 0, 0),  # from y
}
_TANGENTS = tuple(ELEMENTWISE.values())


def check_elementwise_backward(grad_output: Tensor, kept: Tensor, function: int) -> None:
    """Raise RuntimeError where an argument of `elementwise_backward` is not as documented."""
    if not 0 <= function < len(_TANGENTS):
        raise RuntimeError(f"function: expected a number below {len(_TANGENTS)}, got {function}")
    check_same(grad_output, "grad_output", kept, "kept")
    check_dtype(kept, "kept")


def elementwise_backward(
    grad_output: Tensor, kept: Tensor, function: int, a: float, b: float
) -> Tensor:
    """Reference of `torchbp.kernels.elementwise_backward`; same result and errors."""
    check_elementwise_backward(grad_output, kept, function)
    return torch.empty_like(kept).copy_(_TANGENTS[function](up(grad_output), up(kept), a, b))


def softmax_backward(grad_output: Tensor, output: Tensor, logarithm: bool) -> Tensor:
    """Reference of `torchbp.kernels.softmax_backward`; same arguments, result and errors."""
    check_same(grad_output, "grad_output", output, "output")
    check_dtype(output, "output")
    g, y = up(grad_output), up(output)
    dim = -1 if y.dim() else ()
    if logarithm:
        grad = g - torch.exp(y) * g.sum(dim, keepdim=True)
    else:
        grad = y * (g - (g * y).sum(dim, keepdim=True))
    return torch.empty_like(output, memory_format=torch.contiguous_format).copy_(grad)
