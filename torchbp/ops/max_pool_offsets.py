"""Max pooling that saves a byte per window: the eager path of :mod:`torchbp.ops.max_pool`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._C import _is_any_autocast_enabled

from torchbp import kernels
from torchbp.kernels.max_pool import positions
from torchbp.ops.base import is_ordinary
from torchbp.ops.elementwise import can_fuse
from torchbp.ops.planes import put

Sizes = tuple[int, ...]


class MaxPoolOffsets(torch.autograd.Function):
    """Max pooling whose positions nobody asked for: it keeps tap numbers within the windows.

    Backward is that of :class:`torchbp.ops.max_pool.Selection`: ``∂x[i] = Σ g`` over the windows
    whose maximum is i.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: Any, ceil_mode: bool) -> Tensor:
        kernel, stride, padding, dilation = settings
        y, offsets = kernels.max_pool(x, kernel, stride, padding, dilation, ceil_mode)
        ctx.save_for_backward(offsets)
        ctx.shape, ctx.settings = x.shape, settings
        return y

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (offsets,) = ctx.saved_tensors
        shape, settings = ctx.shape, ctx.settings
        dims = len(settings[0])
        if not torch.is_grad_enabled() and can_fuse(grad_output):
            grad = kernels.max_pool_backward(grad_output, offsets, shape, *settings)
        else:
            grad = put(grad_output, positions(offsets, shape[-dims:], *settings), shape, dims)
        return grad, None, None


# Below that many elements torch's own pooling is faster, which the op calls.
_MANY = 1 << 14


def max_pool_values(
    x: Tensor,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    ceil_mode: bool,
    dims: int,
) -> Tensor | None:
    """The maxima, or ``None`` where only torch's own pooling will do (or says what is wrong).

    Tapes, subclasses, transforms, compilers and autocast's list get the op instead, which has all
    derivatives.

    Args:
        x: ``([N,] C, *size)``.
        kernel_size: size of the window.
        stride: distance of windows; ``kernel_size`` if ``None`` or empty.
        padding: implicit minus infinity on both sides.
        dilation: distance of elements within a window.
        ceil_mode: let windows start that do not fit whole.
        dims: how many dimensions of x are pooled.
    """
    if not isinstance(x, Tensor) or not can_fuse(x) or not is_ordinary(x):
        return None
    # Along channels, and for few elements, torch's own pooling is faster.
    if x.is_cpu and not (x.is_contiguous() and x.numel() >= _MANY):
        return None
    if dims == 3 and _is_any_autocast_enabled():  # 3d alone is on a list
        return None
    try:
        settings: Any = _settings(
            x.shape,
            *(
                value if isinstance(value, int) or value is None else tuple(value)
                for value in (kernel_size, stride, padding, dilation)
            ),
            dims,
        )
    except TypeError:  # torch says why
        return None
    if settings is None:
        return None
    if torch.is_grad_enabled():
        y: Tensor = MaxPoolOffsets.apply(x, settings, bool(ceil_mode))
        return y
    kernel, step, before, spacing = settings
    return kernels.max_pool(x, kernel, step, before, spacing, bool(ceil_mode))[0]


@lru_cache(maxsize=1024)
def _settings(
    shape: torch.Size, kernel: Any, stride: Any, padding: Any, dilation: Any, dims: int
) -> tuple[Sizes, ...] | None:
    """Each setting with a number per dimension; ``None`` where the kernel does not take them."""
    if len(shape) not in (dims + 1, dims + 2) or 0 in shape:
        return None
    step = kernel if stride is None or stride == () else stride
    each = [_each(value, dims) for value in (kernel, step, padding, dilation)]
    for values, least in zip(each, (1, 1, 0, 1), strict=True):
        if len(values) != dims or any(type(v) is not int or v < least for v in values):
            return None
    for n, k, p, d in zip(shape[-dims:], each[0], each[2], each[3], strict=True):
        if 2 * p > k or n + 2 * p <= d * (k - 1):
            return None
    return tuple(each)


def _each(value: int | Sequence[int], dims: int) -> Sizes:
    if isinstance(value, int):
        return (value,) * dims
    return tuple(value) * dims if len(value) == 1 else tuple(value)
