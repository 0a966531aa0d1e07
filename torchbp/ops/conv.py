"""Convolution."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchbp.ops.base import Op, add_tangents, midpoint
from torchbp.ops.registry import Maker, Sample, register, sample

Pair = tuple[int, int]


class Conv2d(Op):
    """``y[n, o] = b[o] + Σ_c W[o, c] ⋆ x[n, c]``, the cross-correlation ⋆ over two dimensions.

    Backward: ``∂x`` is the transposed convolution of g with W; ``∂W[o, c] = Σ_n g[n, o] ⋆ x[n, c]``
    is again a convolution, with samples in the place of channels, g as the kernel, and stride and
    dilation exchanged; ``∂b`` sums g over samples and positions.
    Secant: the map is bilinear in (x, W), so each factor is weighted by the other's midpoint.
    """

    autocast = {"cpu": "low", "cuda": "low"}

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Pair,
        padding: str | Pair,
        dilation: Pair,
        groups: int,
    ) -> Tensor:
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, *ctx.settings = inputs
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        return (
            _grad_input(grad_output, weight.conj(), x.shape, *ctx.settings) if needs_x else None,
            _grad_weight(grad_output, x.conj(), weight.shape, *ctx.settings)
            if needs_weight
            else None,
            _sum_positions(grad_output) if needs_bias else None,
            *_CONSTANTS,
        )

    @staticmethod
    def jvp(
        ctx: Any, tx: Tensor | None, tw: Tensor | None, tb: Tensor | None, *_: Any
    ) -> Tensor | None:
        x, weight = ctx.saved_tensors
        if tx is None and tw is None and tb is not None:
            tx = torch.zeros_like(x)  # only for the shape of the result
        out = add_tangents(
            None if tx is None else F.conv2d(tx, weight, None, *ctx.settings),
            None if tw is None else F.conv2d(x, tw, None, *ctx.settings),
        )
        return out if out is None or tb is None else out + tb[:, None, None]

    @staticmethod
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        (x, weight, bias, *settings), (x0, weight0, *_) = args, args0
        return (
            _grad_input(multiplier, midpoint(weight, weight0), x.shape, *settings),
            _grad_weight(multiplier, midpoint(x, x0), weight.shape, *settings),
            None if bias is None else _sum_positions(multiplier),
            *_CONSTANTS,
        )


_CONSTANTS = (None, None, None, None)  # stride, padding, dilation, groups


def pair(value: int | Sequence[int]) -> Pair:
    """``value`` for height and width; a single number means both, also in a sequence."""
    if isinstance(value, int):
        return value, value
    values = tuple(value)  # of any other length: left for torch to refuse
    return values * 2 if len(values) == 1 else values  # type: ignore[return-value]


def _symmetric(padding: str | Pair, kernel: Pair, dilation: Pair) -> tuple[Pair, Pair]:
    """Padding on both sides, and what "same" adds at the far end when the total is odd."""
    if padding == "valid":
        return (0, 0), (0, 0)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return (total[0] // 2, total[1] // 2), (total[0] % 2, total[1] % 2)
    return padding, (0, 0)  # type: ignore[return-value]


def _grad_input(
    grad_output: Tensor,
    weight: Tensor,
    shape: torch.Size,
    stride: Pair,
    padding: str | Pair,
    dilation: Pair,
    groups: int,
) -> Tensor:
    kernel = (weight.shape[-2], weight.shape[-1])
    pad, extra = _symmetric(padding, kernel, dilation)
    # Rows at the far end that no window reached: the transposed convolution adds them back.
    left_over = [
        shape[i] + extra[i] + 2 * pad[i] - dilation[i] * (kernel[i] - 1) - 1
        - (grad_output.shape[i] - 1) * stride[i]
        for i in (-2, -1)
    ]  # fmt: skip
    grad = F.conv_transpose2d(grad_output, weight, None, stride, pad, left_over, groups, dilation)
    return _crop(grad, shape[-2], shape[-1])


def _grad_weight(
    grad_output: Tensor,
    x: Tensor,
    shape: torch.Size,
    stride: Pair,
    padding: str | Pair,
    dilation: Pair,
    groups: int,
) -> Tensor:
    if x.dim() == 3:
        x, grad_output = x.unsqueeze(0), grad_output.unsqueeze(0)
    n, _, height, width = x.shape
    outputs, per_group, *kernel = shape
    if n == 0:  # a sum of nothing, as a product so that it has a graph
        return (grad_output.reshape(outputs, 0) @ x.reshape(0, shape[1:].numel())).reshape(shape)
    pad, extra = _symmetric(padding, (kernel[0], kernel[1]), dilation)
    if any(extra):
        x, height, width = F.pad(x, (0, extra[1], 0, extra[0])), height + extra[0], width + extra[1]
    # Samples become the channels that are summed over; channels of a group become the batch.
    x = x.reshape(n, groups, per_group, height, width).permute(2, 1, 0, 3, 4)
    x = x.reshape(per_group, groups * n, height, width)
    grad = F.conv2d(x, grad_output.transpose(0, 1), None, dilation, pad, stride, groups)
    # Where the stride leaves rows of x over, the result has taps beyond the kernel.
    return _crop(grad, kernel[0], kernel[1]).transpose(0, 1)


def _crop(tensor: Tensor, height: int, width: int) -> Tensor:
    if tensor.shape[-2:] == (height, width):
        return tensor
    return tensor.narrow(-2, 0, height).narrow(-1, 0, width)


def _sum_positions(tensor: Tensor) -> Tensor:
    return tensor.sum((-2, -1) if tensor.dim() == 3 else (0, 2, 3))


def _samples(make: Maker) -> Iterator[Sample]:
    yield sample(make(2, 2, 4, 3), make(3, 2, 3, 2), make(3), padding=1)
    yield sample(make(1, 2, 6, 5), make(2, 2, 3, 2), stride=(2, 3))
    yield sample(make(1, 4, 3, 3), make(4, 2, 2, 2), make(4), groups=2)
    yield sample(make(2, 2, 4, 3), make(4, 1, 2, 2), padding=(1, 0), groups=2)
    yield sample(make(1, 1, 6, 5), make(2, 1, 2, 3), dilation=(2, 1), stride=2, padding=1)
    yield sample(make(2, 1, 3, 4), make(2, 1, 2, 3), make(2), padding="same")
    yield sample(make(1, 1, 4, 4), make(2, 1, 2, 4), padding="same", dilation=(3, 1))
    yield sample(make(1, 1, 3, 4), make(2, 1, 2, 2), padding="valid")
    yield sample(make(2, 4, 3), make(2, 2, 3, 2), make(2), padding=1)
    yield sample(make(0, 2, 4, 3), make(3, 2, 2, 2), make(3))


@register(F.conv2d, modules=[nn.Conv2d], samples=_samples)
def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: str | int | Pair = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
) -> Tensor:
    """Two-dimensional convolution, as :func:`torch.nn.functional.conv2d`.

    Args:
        input: ``(N, in_channels, H, W)`` or ``(in_channels, H, W)``.
        weight: ``(out_channels, in_channels / groups, kH, kW)``.
        bias: ``(out_channels,)`` or ``None``.
        stride: of the window, one number or (height, width).
        padding: zeros on both sides, one number or (height, width); or ``"valid"``, ``"same"``.
        dilation: spacing of the kernel's taps, one number or (height, width).
        groups: how many blocks of channels are convolved apart.

    Returns:
        ``(N, out_channels, H', W')``, without N if the input had none.
    """
    return Conv2d.call(
        input,
        weight,
        bias,
        pair(stride),
        padding if isinstance(padding, str) else pair(padding),
        pair(dilation),
        groups,
    )
