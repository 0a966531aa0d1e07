"""Elementwise kernels: bias and activation, gated linear units, dropout, activations alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import torchbp.functional as B

Call = Callable[[], object]
Case = tuple[str, str, Call, Call, int]
"""Name, size, ours, eager's composition (forward and backward each), bytes a pass must move."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
GATES = {"GLU": "sigmoid", "SwiGLU": "silu", "GEGLU": "gelu", "GEGLU tanh": "gelu_tanh",
         "ReGLU": "relu", "bilinear": "identity"}  # fmt: skip
ALONE = (
    "relu", "relu6", "leaky_relu", "elu", "gelu", "silu", "mish", "tanh", "sigmoid", "softplus",
    "hardtanh", "hardswish", "hardsigmoid",
)  # fmt: skip


def _step(function: Callable[..., Tensor], leaves: tuple[Tensor, ...], error: Tensor) -> Call:
    def call() -> object:
        return torch.autograd.grad(function(*leaves), leaves, error)

    return call


def _gated(act: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    f = ACTIVATIONS[act]
    return lambda a, b: B.gated(a, b, act), lambda a, b: a * f(b)


def _halved(act: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    f = ACTIVATIONS[act]

    def composed(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return a * f(b)

    return lambda x: B.gated(x, None, act), composed


def _biased(act: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    f = ACTIVATIONS[act]
    return lambda x, b: B.bias_act(x, b, act), lambda x, b: f(x + b)


def cases(shape: tuple[int, int], dtype: torch.dtype) -> Iterator[Case]:
    """Forward and backward of every elementwise kernel.

    Args:
        shape: rows and columns of the result.
        dtype: of all tensors.
    """
    rows, columns = shape
    torch.manual_seed(0)

    def leaf(*size: int) -> Tensor:
        return torch.randn(size).to(dtype).requires_grad_()

    x, y, bias, error = leaf(*shape), leaf(*shape), leaf(columns), leaf(*shape).detach()
    size, full = f"{rows}x{columns}", rows * columns * error.element_size()

    def case(
        name: str,
        pair: tuple[Callable[..., Tensor], Callable[..., Tensor]],
        leaves: tuple[Tensor, ...],
        passes: int,
    ) -> Case:
        ours, eager = (_step(function, leaves, error) for function in pair)
        return name, size, ours, eager, passes * full

    for act in ACTIVATIONS:
        yield case(f"bias + {act}", _biased(act), (x, bias), 5)
    for name, act in GATES.items():
        yield case(name, _gated(act), (x, y), 8)
    packed = leaf(rows, 2 * columns)
    yield case("SwiGLU of halves", _halved("silu"), (packed,), 8)
    yield case("F.glu", (B.glu, F.glu), (packed,), 8)
    yield case("dropout 0.1", (lambda t: B.dropout(t, 0.1), lambda t: F.dropout(t, 0.1)), (x,), 4)
    for name in ALONE:
        yield case(name, (getattr(B, name), getattr(F, name)), (x,), 5)
