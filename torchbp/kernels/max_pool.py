"""Max pooling that remembers which element of its window each maximum is, in one byte."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference_common import check_dtype, up
from .table import add, vmap_one_by_one

Sizes = Sequence[int]

#: Windows of so many elements at most are numbered in a byte, larger ones in an int32.
MOST_SHORT_TAPS = 256

_POOL: dict[int, Callable[..., tuple[Tensor, Tensor]]] = {
    1: F.max_pool1d_with_indices,
    2: F.max_pool2d_with_indices,
    3: F.max_pool3d_with_indices,
}


def max_pool(
    x: Tensor,
    kernel: Sizes,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    ceil_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    """Pool, and say which element of its window each maximum is.

    The values are bitwise those of :func:`torch.nn.functional.max_pool2d`, also as to which of
    equal elements is taken (the first) and what becomes of NaN (the last one wins). Compiled for
    the CPU and CUDA; every other device gets the PyTorch reference.

    Args:
        x: Shape ``[N, C, *size]`` or ``[C, *size]`` with one to three dimensions in ``size``;
            float32, float64, bfloat16 or float16. Contiguous and channels-last tensors are read
            where they are.
        kernel: The size of a window, a number for each dimension; as all other settings.
        stride: From one window to the next.
        padding: How many minus infinities stand on both sides; at most half of ``kernel``.
        dilation: From one element of a window to the next.
        ceil_mode: Let windows start that do not fit whole.

    Returns:
        The maxima, ``[N, C, *out]`` in the dtype and memory format of ``x``, and their tap
        numbers, of the same shape: in a window of 3 x 3, the element in row i and column j is
        number 3 i + j. The dtype is uint8 for windows of 256 elements or fewer, else int32. That
        is an eighth of the room that the positions torch saves take.

    Raises:
        RuntimeError: An argument is not as described, or a plane has no room for a window.
    """
    return _forward(x, kernel, stride, padding, dilation, ceil_mode)


def max_pool_backward(
    grad_output: Tensor,
    offsets: Tensor,
    shape: Sizes,
    kernel: Sizes,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
) -> Tensor:
    """Compute the gradient of `max_pool`.

    Every element collects what the windows whose maximum it is received, in the order of the
    windows: nothing is scattered, so that the result does not depend on the number of threads.
    Compiled for the CPU and CUDA; every other device gets the PyTorch reference.

    Args:
        grad_output: The gradient of the maxima, ``[N, C, *out]``.
        offsets: The tap numbers that `max_pool` returned.
        shape: That of the input.
        kernel: As for `max_pool`, like all other settings.
        stride: From one window to the next.
        padding: How many elements stand on both sides.
        dilation: From one element of a window to the next.

    Returns:
        The gradient of the input, of shape ``shape``, in the dtype of ``grad_output`` and the
        memory format of ``offsets``. Sums are kept in float32 at least.

    Raises:
        RuntimeError: An argument is not as described.
    """
    return _backward(grad_output, offsets, shape, kernel, stride, padding, dilation)


def positions(
    offsets: Tensor,
    size: Sizes,
    kernel: Sizes,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
) -> Tensor:
    """Positions in the plane, as torch's pooling returns them, of tap numbers.

    Args:
        offsets: Tap numbers, ``[*, *out]``.
        size: Of a plane of the input.
        kernel: As for `max_pool`, like all other settings.
        stride: From one window to the next.
        padding: How many elements stand on both sides.
        dilation: From one element of a window to the next.

    Returns:
        An int64 tensor of the shape of ``offsets``.
    """
    dims, rest = len(kernel), offsets.long()
    position, row = torch.zeros_like(rest), 1
    for d in reversed(range(dims)):
        tap = rest % kernel[d]
        rest = rest // kernel[d]
        window = torch.arange(offsets.shape[d - dims], device=offsets.device)
        start = (window * stride[d] - padding[d]).reshape(-1, *(1,) * (dims - 1 - d))
        position = position + row * (start + tap * dilation[d])
        row *= size[d]
    return position


def _taps(
    indices: Tensor, size: Sizes, kernel: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes
) -> Tensor:
    """The reverse of :func:`positions`."""
    dims, rest = len(kernel), indices
    tap, inner = torch.zeros_like(indices), 1
    for d in reversed(range(dims)):
        window = torch.arange(indices.shape[d - dims], device=indices.device)
        start = (window * stride[d] - padding[d]).reshape(-1, *(1,) * (dims - 1 - d))
        tap = tap + inner * ((rest % size[d] - start) // dilation[d])
        rest = rest // size[d]
        inner *= kernel[d]
    return tap.to(_dtype(kernel))


def _dtype(kernel: Sizes) -> torch.dtype:
    return torch.uint8 if math.prod(kernel) <= MOST_SHORT_TAPS else torch.int32


def _windows(size: int, kernel: int, stride: int, padding: int, dilation: int) -> tuple[int, int]:
    """How many windows there are along a dimension, without and with ``ceil_mode``."""
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    if room < 0:
        return 0, 0
    last = -(-room // stride)  # may begin in the padding, where torch has none
    return room // stride + 1, last + (last * stride < size + padding)


def _check(rank: int, kernel: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes) -> None:
    dims = len(kernel)
    if not 1 <= dims <= 3:
        raise RuntimeError(f"kernel: expected 1 to 3 numbers, got {dims}")
    if rank not in (dims + 1, dims + 2):
        raise RuntimeError(f"x: expected {dims + 1} or {dims + 2} dims, got {rank}")
    settings = {"kernel": (kernel, 1), "stride": (stride, 1), "padding": (padding, 0)}
    for name, (values, least) in {**settings, "dilation": (dilation, 1)}.items():
        if len(values) != dims or any(value < least for value in values):
            raise RuntimeError(f"{name}: expected {dims} numbers from {least} on")
    if any(2 * p > k for p, k in zip(padding, kernel, strict=True)):
        raise RuntimeError("padding: expected at most half of the kernel")


def _reference(
    x: Tensor,
    kernel: Sizes,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    ceil_mode: bool,
) -> tuple[Tensor, Tensor]:
    """Reference of `max_pool`, and its fake: torch's own pooling, its positions renumbered."""
    check_dtype(x, "x")
    _check(x.dim(), kernel, stride, padding, dilation)
    dims = len(kernel)
    for n, k, p, d in zip(x.shape[-dims:], kernel, padding, dilation, strict=True):
        if n + 2 * p <= d * (k - 1):
            raise RuntimeError(f"x: expected room for a window, got {n} elements")
    settings = kernel, stride, padding, dilation
    y, indices = _POOL[dims](x, *settings, ceil_mode)
    return y, _taps(indices, x.shape[-dims:], *settings)


def _reference_backward(
    grad_output: Tensor,
    offsets: Tensor,
    shape: Sizes,
    kernel: Sizes,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
) -> Tensor:
    """Reference of `max_pool_backward`."""
    grad = _fake_backward(grad_output, offsets, shape, kernel, stride, padding, dilation)
    dims = len(kernel)
    at = positions(offsets, shape[-dims:], kernel, stride, padding, dilation).flatten(-dims)
    planes = up(grad_output).new_zeros((*shape[:-dims], math.prod(shape[-dims:])))
    planes.scatter_add_(-1, at, up(grad_output).flatten(-dims))
    return grad.copy_(planes.reshape(tuple(shape)))


def _fake_backward(
    grad_output: Tensor,
    offsets: Tensor,
    shape: Sizes,
    kernel: Sizes,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
) -> Tensor:
    check_dtype(grad_output, "grad_output")
    _check(len(shape), kernel, stride, padding, dilation)
    if offsets.shape != grad_output.shape:
        raise RuntimeError("offsets: expected the shape of grad_output")
    if offsets.device != grad_output.device:
        raise RuntimeError("offsets: expected the device of grad_output")
    if offsets.dtype != _dtype(kernel):
        raise RuntimeError(f"offsets: expected {_dtype(kernel)}, got {offsets.dtype}")
    planes = len(shape) - len(kernel)
    if grad_output.dim() != len(shape) or grad_output.shape[:planes] != torch.Size(shape[:planes]):
        raise RuntimeError("grad_output: expected the samples and channels of shape")
    settings = zip(shape[planes:], kernel, stride, padding, dilation, strict=True)
    for dim, (size, each) in enumerate(zip(grad_output.shape[planes:], settings, strict=True)):
        counts = _windows(*each)
        if size not in counts:
            raise RuntimeError(
                f"grad_output: expected {counts[0]} windows along dim {planes + dim}, got {size}"
            )
    if not _channels_last(offsets, len(kernel)):
        return grad_output.new_empty(tuple(shape))
    return grad_output.new_empty((shape[0], *shape[2:], shape[1])).movedim(-1, 1)


def _channels_last(t: Tensor, dims: int) -> bool:
    """Whether torch takes the tensor for channels last; as in max_pool_check.h."""
    if t.dim() != dims + 2 or t.stride(1) == 0:
        return False
    order = [(t.shape[d], t.stride(d)) for d in (1, *range(dims + 1, 1, -1))]
    if dims == 1:  # is pooled as two, the height being 1
        order.append((1, t.shape[2] * t.stride(2)))
    least = 0
    for size, stride in order:
        if size == 0 or stride < least:
            return False
        least = stride * max(size, 1)
    return least != t.stride(1) and t.shape[0] > 0 and t.stride(0) >= least


_forward = add(
    "max_pool(Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation,"
    " bool ceil_mode) -> (Tensor, Tensor)",
    _reference,
    _reference,
    vmap_one_by_one("max_pool"),
)
_backward = add(
    "max_pool_backward(Tensor grad_output, Tensor offsets, int[] shape, int[] kernel,"
    " int[] stride, int[] padding, int[] dilation) -> Tensor",
    _reference_backward,
    _fake_backward,
    vmap_one_by_one("max_pool_backward"),
)
