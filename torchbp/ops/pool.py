"""Pooling."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchbp.ops.base import Op, wide
from torchbp.ops.conv import Pair, pair
from torchbp.ops.registry import Maker, Sample, register, sample

Size = int | Sequence[int]


class MaxPool2d(Op):
    """``y = max`` over each window; the second output holds the position of each maximum.

    Backward: g goes to the maximum, ``∂x[i] = Σ g`` over the windows whose maximum is i.
    Secant: a window whose maximum moves from i₀ to i splits its multiplier between both routes,
    ``λ`` to i and ``1 - λ`` to i₀ with ``λ = a / (a + b)``, ``a = x[i] - x[i₀] >= 0`` and
    ``b = x₀[i₀] - x₀[i] >= 0``: the only split in [0, 1] that gives ``y - y₀`` exactly.
    """

    @staticmethod
    def forward(
        x: Tensor, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
    ) -> tuple[Tensor, Tensor]:
        return F.max_pool2d_with_indices(x, kernel_size, stride, padding, dilation, ceil_mode)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        indices = output[1]
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(indices)
        ctx.save_for_forward(indices)
        ctx.shape = inputs[0].shape

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * 6
        (indices,) = ctx.saved_tensors
        return _scatter(grad_output, indices, ctx.shape), *_CONSTANTS

    @staticmethod
    def jvp(ctx: Any, tx: Tensor | None, *_: Any) -> tuple[Tensor | None, None]:
        (indices,) = ctx.saved_tensors
        return None if tx is None else _pick(tx, indices), None

    @staticmethod
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        x, x0 = args[0], args0[0]
        (y, indices), (y0, indices0) = output, output0
        a, b = y - _pick(x, indices0), y0 - _pick(x0, indices)
        total = a + b
        share = torch.where(total > 0, a / total, 0.5)
        routed = _scatter(multiplier * share, indices, x.shape)
        return routed + _scatter(multiplier * (1 - share), indices0, x.shape), *_CONSTANTS


_CONSTANTS = (None,) * 5


def _pick(x: Tensor, indices: Tensor) -> Tensor:
    """The elements of each plane that ``indices`` names."""
    *leading, height, width = x.shape
    planes = x.reshape(*leading, height * width)
    positions = indices.reshape(*leading, math.prod(indices.shape[-2:]))
    return planes.gather(-1, positions).reshape(indices.shape)


def _scatter(values: Tensor, indices: Tensor, shape: torch.Size) -> Tensor:
    """The transpose of :func:`_pick`: a plane takes the sum of what is sent to each position."""
    *leading, height, width = shape
    count = math.prod(indices.shape[-2:])
    planes = values.new_zeros((*leading, height * width))
    positions, values = indices.reshape(*leading, count), values.reshape(*leading, count)
    return planes.scatter_add(-1, positions, values).reshape(shape)


def _averaging(start: Tensor, end: Tensor, size: int, divisor: Tensor, like: Tensor) -> Tensor:
    """``[n_out, size]``: row i holds ``1 / divisor_i`` from ``start_i`` to ``end_i``."""
    at = torch.arange(size, device=like.device)
    inside = (at >= start[:, None]) & (at < end[:, None])
    return inside.to(like.dtype) / divisor[:, None].to(like.dtype)


def _spread(grad: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``A_hᵀ g A_w``, in float32 at least, as torch accumulates it."""
    return (rows.mT @ grad.to(rows.dtype) @ columns).to(grad.dtype)


class AvgPool2d(Op):
    """``y = Σ x / divisor`` over each window: ``y = A_h x A_wᵀ`` with averaging matrices.

    Backward and secant (the map is linear): ``∂x = A_hᵀ g A_w``. With ``divisor_override`` the
    matrices hold ones and g is divided.
    """

    @staticmethod
    def forward(
        x: Tensor,
        kernel_size: Pair,
        stride: Pair,
        padding: Pair,
        ceil_mode: bool,
        count_include_pad: bool,
        divisor_override: int | None,
    ) -> Tensor:
        return F.avg_pool2d(
            x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, *ctx.settings = inputs
        ctx.shape = x.shape

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return AvgPool2d.transposed(grad_output, ctx.shape, ctx.settings), *(None,) * 6

    @staticmethod
    def jvp(ctx: Any, tx: Tensor | None, *_: Any) -> Tensor | None:
        return None if tx is None else F.avg_pool2d(tx, *ctx.settings)

    @staticmethod
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        x, *settings = args
        return AvgPool2d.transposed(multiplier, x.shape, settings), *(None,) * 6

    @staticmethod
    def transposed(grad: Tensor, shape: torch.Size, settings: Sequence[Any]) -> Tensor:
        """The transpose of the map, applied to ``grad``."""
        kernel, stride, padding, _, include_pad, override = settings
        like = wide(grad.new_empty(0))
        matrices = []
        for axis in (0, 1):
            size, n_out = shape[axis - 2], grad.shape[axis - 2]
            start = torch.arange(n_out, device=grad.device) * stride[axis] - padding[axis]
            end = (start + kernel[axis]).clamp(max=size + padding[axis])
            inner_start, inner_end = start.clamp(min=0), end.clamp(max=size)
            count = end - start if include_pad else inner_end - inner_start
            count = torch.ones_like(count) if override else count
            matrices.append(_averaging(inner_start, inner_end, size, count, like))
        return _spread(grad / override if override else grad, *matrices)


class AdaptiveAvgPool2d(Op):
    """Mean over the window ``[⌊i n/m⌋, ⌈(i+1) n/m⌉)`` of output i of m, along both axes.

    Backward and secant: ``∂x = A_hᵀ g A_w``; a single output cell spreads ``g / (H W)`` evenly.
    """

    @staticmethod
    def forward(x: Tensor, output_size: Any) -> Tensor:
        return F.adaptive_avg_pool2d(x, output_size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.output_size = inputs
        ctx.shape = x.shape

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return AdaptiveAvgPool2d.transposed(grad_output, ctx.shape), None

    @staticmethod
    def jvp(ctx: Any, tx: Tensor | None, _: Any) -> Tensor | None:
        return None if tx is None else F.adaptive_avg_pool2d(tx, ctx.output_size)

    @staticmethod
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        return AdaptiveAvgPool2d.transposed(multiplier, args[0].shape), None

    @staticmethod
    def transposed(grad: Tensor, shape: torch.Size) -> Tensor:
        """The transpose of the map, applied to ``grad``."""
        height, width = shape[-2:]
        if grad.shape[-2:] == (1, 1):
            return (grad / (height * width)).expand(shape)
        like = wide(grad.new_empty(0))
        matrices = []
        for axis in (0, 1):
            size, n_out = shape[axis - 2], grad.shape[axis - 2]
            i = torch.arange(n_out, device=grad.device)
            start = i * size // n_out
            end = ((i + 1) * size + n_out - 1) // n_out
            matrices.append(_averaging(start, end, size, end - start, like))
        return _spread(grad, *matrices)


def _max_samples(make: Maker) -> Iterator[Sample]:
    yield sample(make(2, 2, 4, 5), 2)
    yield sample(make(2, 5, 5), 3, stride=2, padding=1)
    yield sample(make(1, 2, 5, 5), (2, 3), stride=(2, 1), ceil_mode=True)
    yield sample(make(1, 1, 6, 5), 2, stride=1, dilation=2)
    yield sample(make(1, 2, 4, 4), 2, return_indices=True)
    yield sample(make(0, 2, 4, 4), 2)


@register(
    F.max_pool2d,
    replaces=[torch.max_pool2d],
    modules=[nn.MaxPool2d],
    samples=_max_samples,
)
def max_pool2d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Maximum over windows, as :func:`torch.nn.functional.max_pool2d`.

    Args:
        input: ``([N,] C, H, W)``.
        kernel_size: size of the window.
        stride: distance of windows; ``kernel_size`` if ``None``.
        padding: implicit minus infinity on both sides.
        dilation: distance of elements within a window.
        ceil_mode: let windows start that do not fit whole.
        return_indices: also return the position of each maximum in its plane.

    Returns:
        ``([N,] C, H_out, W_out)``, and the positions if asked for.
    """
    step = kernel_size if stride in (None, (), []) else stride
    output, indices = MaxPool2d.call(input, kernel_size, step, padding, dilation, ceil_mode)
    return (output, indices) if return_indices else output


def _avg_samples(make: Maker) -> Iterator[Sample]:
    yield sample(make(2, 2, 4, 4), 2)
    yield sample(make(2, 5, 5), 3, stride=2, padding=1)
    yield sample(make(1, 2, 5, 4), (3, 2), stride=(2, 1), padding=(1, 0), ceil_mode=True)
    yield sample(make(1, 2, 5, 5), 3, 2, 1, ceil_mode=True, count_include_pad=False)
    yield sample(make(1, 2, 4, 5), 2, divisor_override=3)
    yield sample(make(0, 2, 4, 4), 2)


@register(F.avg_pool2d, modules=[nn.AvgPool2d], samples=_avg_samples)
def avg_pool2d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Mean over windows, as :func:`torch.nn.functional.avg_pool2d`.

    Args:
        input: ``([N,] C, H, W)``.
        kernel_size: size of the window.
        stride: distance of windows; ``kernel_size`` if ``None``.
        padding: implicit zeros on both sides.
        ceil_mode: let windows start that do not fit whole.
        count_include_pad: count the zeros of the padding in the mean.
        divisor_override: divide by this instead of the size of the window.

    Returns:
        ``([N,] C, H_out, W_out)``.
    """
    if divisor_override == 0:
        raise RuntimeError("divisor must be not zero")
    kernel = pair(kernel_size)
    step = kernel if stride in (None, (), []) else pair(stride)
    return AvgPool2d.call(
        input, kernel, step, pair(padding), ceil_mode, count_include_pad, divisor_override
    )


def _adaptive_samples(make: Maker) -> Iterator[Sample]:
    yield sample(make(2, 2, 4, 3), 1)
    yield sample(make(2, 5, 4), (3, 2))
    yield sample(make(1, 2, 5, 4), (None, 3))
    yield sample(make(1, 1, 2, 3), (4, 5))
    yield sample(make(0, 2, 4, 4), 2)


@register(F.adaptive_avg_pool2d, modules=[nn.AdaptiveAvgPool2d], samples=_adaptive_samples)
def adaptive_avg_pool2d(input: Tensor, output_size: Any) -> Tensor:
    """Mean over as many windows as asked for, as torch.nn.functional.adaptive_avg_pool2d.

    Args:
        input: ``([N,] C, H, W)``.
        output_size: ``(H_out, W_out)`` or one number; ``None`` keeps the input's size.

    Returns:
        ``([N,] C, H_out, W_out)``.
    """
    return AdaptiveAvgPool2d.call(input, output_size)
