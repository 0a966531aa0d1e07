"""Average pooling over windows of a given size, or over as many windows as asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchbp.ops.adaptive_max_pool import Sizes
from torchbp.ops.base import wide
from torchbp.ops.linear_map import LinearMap
from torchbp.ops.max_pool import Size
from torchbp.ops.registry import Maker, Sample, register, sample
from torchbp.ops.relevance import proportional

Along = Callable[[Tensor], Tensor]


class AvgPool(LinearMap):
    """``y = Σ x / divisor`` over each window.

    Backward and secant (the map is linear): each element receives ``Σ g / divisor`` over the
    windows it is in, one axis after the other.
    LRP: in proportion to each element's contribution, as in a linear layer with equal weights
    (Montavon et al. 2019).
    """

    relevance = classmethod(proportional)

    @staticmethod
    def transposed(g: Tensor, shape: torch.Size, settings: Sequence[Any]) -> Tensor:
        kernel, stride, padding, _, include_pad, override = settings
        first = len(shape) - len(kernel)
        spread: list[Along] = []
        counts: list[int | Tensor] = []
        for axis, k, s, p in zip(range(first, len(shape)), kernel, stride, padding, strict=True):
            n, m = shape[axis], g.shape[axis]
            if not (k == s and p == 0 and m * k == n):
                spread.append(partial(_overlapping, axis=axis, n=n, k=k, s=s, p=p))
            counts.append(1 if override else _window_sizes(n, m, k, s, p, include_pad, g))
        return _handed_out(_divided(g, [override or 1, *counts]), spread, shape, g.dtype)


class AvgPool1d(AvgPool):
    """:class:`AvgPool` of ``(*, C, L)``; it has no ``divisor_override``."""

    @staticmethod
    def forward(x: Tensor, *settings: Any) -> Tensor:
        return F.avg_pool1d(x, *settings[:-1])


class AvgPool2d(AvgPool):
    """:class:`AvgPool` of ``(*, C, H, W)``."""

    @staticmethod
    def forward(x: Tensor, *settings: Any) -> Tensor:
        return F.avg_pool2d(x, *settings)


class AvgPool3d(AvgPool):
    """:class:`AvgPool` of ``(*, C, D, H, W)``."""

    autocast = {"cpu": "fp32"}

    @staticmethod
    def forward(x: Tensor, *settings: Any) -> Tensor:
        return F.avg_pool3d(x, *settings)


class AdaptiveAvgPool(LinearMap):
    """Mean over the window ``[⌊i n/m⌋, ⌈(i+1) n/m⌉)`` of output i of m, along the last axes.

    Backward, secant and LRP as for :class:`AvgPool`.
    """

    relevance = classmethod(proportional)

    @staticmethod
    def forward(x: Tensor, output_size: Any, dims: int) -> Tensor:
        return _ADAPTIVE[dims](x, output_size)

    @staticmethod
    def transposed(g: Tensor, shape: torch.Size, settings: Sequence[Any]) -> Tensor:
        spread: list[Along] = []
        counts: list[int | Tensor] = []
        for axis in range(len(shape) - settings[1], len(shape)):
            n, m = shape[axis], g.shape[axis]
            if m and n % m == 0:
                counts.append(n // m)
            else:
                spread.append(partial(_uneven, axis=axis, n=n))
                i = torch.arange(m, device=g.device)
                counts.append(-(-(i + 1) * n // max(m, 1)) - i * n // max(m, 1))
        return _handed_out(_divided(g, counts), spread, shape, g.dtype)


class AdaptiveAvgPool3d(AdaptiveAvgPool):
    """:class:`AdaptiveAvgPool` along three axes, which PyTorch's autocast lists."""

    autocast = {"cpu": "fp32"}

    @staticmethod
    def forward(x: Tensor, output_size: Any, dims: int) -> Tensor:
        return F.adaptive_avg_pool3d(x, output_size)


_ADAPTIVE: dict[int, Callable[..., Tensor]] = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d}


def _window_sizes(
    n: int, m: int, k: int, s: int, p: int, include_pad: bool, g: Tensor
) -> int | Tensor:
    """What an average divides by along one axis: one number if all windows agree."""
    beyond = (m - 1) * s + k - p  # where the last window ends if it is not cut
    if beyond <= n + p if include_pad else p == 0 and beyond <= n:
        return k
    start = torch.arange(m, device=g.device) * s - p
    end = (start + k).clamp(max=n + p)
    return end - start if include_pad else end.clamp(max=n) - start.clamp(min=0)


def _divided(g: Tensor, counts: Sequence[int | Tensor]) -> Tensor:
    """``g`` over the product of counts along the last axes, in float32 at least."""
    divisor: Any = math.prod([c for c in counts if isinstance(c, int)])
    tensors = [(i, c) for i, c in enumerate(reversed(counts)) if isinstance(c, Tensor)]
    for i, count in tensors:
        divisor = divisor * count.reshape(-1, *(1,) * i)
    return wide(g) if isinstance(divisor, int) and divisor == 1 else wide(g) / divisor


def _handed_out(
    g: Tensor, spread: Sequence[Along], shape: torch.Size, dtype: torch.dtype
) -> Tensor:
    """Spread ``g`` along some axes and repeat it along the others, up to ``shape``."""
    for along in reversed(spread):  # the last axis first, while the others are still short
        g = along(g)
    return _repeated(g.to(dtype), shape)


def _repeated(g: Tensor, shape: torch.Size) -> Tensor:
    """Every element as often as its window is long, in one copy for all axes."""
    if g.shape == shape:
        return g
    split, grown = [], []
    for m, n in zip(g.shape, shape, strict=True):
        split += [m, 1]
        grown += [m, n // m if m else 1]
    return g.reshape(split).expand(grown).reshape(shape)


def _overlapping(g: Tensor, axis: int, n: int, k: int, s: int, p: int) -> Tensor:
    """Sum over the windows that each of ``n`` elements is in: windows of k, a step s apart.

    Blocks of s elements, the first of them p before the start, are in the same windows, except
    that the earliest of these ends within the block.
    """
    most = -(-k // s)  # windows that an element can be in
    blocks = g.shape[axis] + most - 1
    padded = _padded(g, axis, most - 1, most - 1)
    ending, *others = (padded.narrow(axis, i, blocks) for i in range(most))
    rest = sum(others[1:], others[0]) if others else torch.zeros_like(ending)
    left = k - (most - 1) * s
    parts = []
    for part, size in ((rest + ending, left), (rest, s - left)):
        sizes = (*(-1,) * (axis + 1), size, *(-1,) * (g.dim() - axis - 1))
        parts.append(part.unsqueeze(axis + 1).expand(sizes))
    whole = torch.cat(parts, axis + 1)
    whole = whole.reshape(*g.shape[:axis], blocks * s, *g.shape[axis + 1 :])
    return _padded(whole, axis, 0, max(0, p + n - blocks * s)).narrow(axis, p, n)


def _uneven(g: Tensor, axis: int, n: int) -> Tensor:
    """Sum over the adaptive windows that each of ``n`` elements is in."""
    m = g.shape[axis]
    if m == 0:
        return _padded(g, axis, 0, n)
    j = torch.arange(n, device=g.device)
    low, high = j * m // n, -(-(j + 1) * m // n) - 1  # the first and last window of element j
    which = None
    if m < n:
        # Then there are at most two: window i (number 2i) or i and i + 1 together (2i + 1).
        which, number = low + high, torch.arange(2 * m - 1, device=g.device)
        low, high = number // 2, (number + 1) // 2
    zero_ended = _padded(g, axis, 0, 1)
    at = [low + i for i in range(2 if m < n else -(-m // n) + 1)]
    terms = [zero_ended.index_select(axis, torch.where(i <= high, i, m)) for i in at]
    total = sum(terms[1:], terms[0])
    return total if which is None else total.index_select(axis, which)


def _padded(g: Tensor, axis: int, before: int, after: int) -> Tensor:
    if before == after == 0:
        return g
    return F.pad(g, (*(0, 0) * (g.dim() - 1 - axis), before, after))


def _samples(planes: int) -> Callable[[Maker], Iterator[Sample]]:
    def samples(make: Maker) -> Iterator[Sample]:
        size = (5, 4, 3)[:planes]
        yield sample(make(2, 2, *(4, 4, 2)[:planes]), 2)
        yield sample(make(2, *size), 3, stride=2, padding=1)
        yield sample(make(1, 2, *size), (3, 2, 2)[:planes], stride=(2, 1, 1)[:planes],
                     padding=(1, 0, 1)[:planes], ceil_mode=True)  # fmt: skip
        yield sample(make(1, 2, *size), 3, 2, 1, ceil_mode=True, count_include_pad=False)
        if planes > 1:
            yield sample(make(1, 2, *size), 2, divisor_override=3)
        yield sample(make(0, 2, *(4, 4, 2)[:planes]), 2)

    return samples


def each(value: Any, dims: int) -> tuple[int, ...]:
    """A number for each axis; a single one means all, also in a sequence."""
    if isinstance(value, int):
        return (value,) * dims
    values = tuple(value)
    return values * dims if len(values) == 1 else values


def _averaged(
    op: type[AvgPool],
    dims: int,
    input: Tensor,
    kernel_size: Size,
    stride: Size | None,
    padding: Size,
    *settings: Any,
) -> Tensor:
    kernel = each(kernel_size, dims)
    step = kernel if stride in (None, (), []) else each(stride, dims)
    return op.call(input, kernel, step, each(padding, dims), *settings)


@register(F.avg_pool1d, modules=[nn.AvgPool1d], samples=_samples(1))
def avg_pool1d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """:func:`avg_pool2d` of ``([N,] C, L)``, without ``divisor_override``."""
    return _averaged(
        AvgPool1d, 1, input, kernel_size, stride, padding, ceil_mode, count_include_pad, None
    )


@register(F.avg_pool2d, modules=[nn.AvgPool2d], samples=_samples(2))
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

    Raises:
        RuntimeError: for settings that torch refuses.
    """
    return _averaged(
        AvgPool2d, 2, input, kernel_size, stride, padding, ceil_mode, count_include_pad,
        divisor_override,
    )  # fmt: skip


@register(F.avg_pool3d, modules=[nn.AvgPool3d], samples=_samples(3))
def avg_pool3d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """:func:`avg_pool2d` of ``([N,] C, D, H, W)``."""
    return _averaged(
        AvgPool3d, 3, input, kernel_size, stride, padding, ceil_mode, count_include_pad,
        divisor_override,
    )  # fmt: skip


def _adaptive(planes: int, none: bool = True) -> Callable[[Maker], Iterator[Sample]]:
    def samples(make: Maker) -> Iterator[Sample]:
        yield sample(make(2, 2, *(4, 3, 2)[:planes]), 1)
        yield sample(make(2, 1, *(4, 6, 2)[:planes]), 2)
        yield sample(make(2, *(5, 4, 3)[:planes]), (3, 2, 1)[:planes])
        if none:
            yield sample(make(1, 2, *(5, 4, 2)[:planes]), (None, 3, 2)[:planes])
        yield sample(make(1, 1, *(2, 3, 2)[:planes]), (4, 5, 3)[:planes])
        yield sample(make(0, 2, *(4, 4, 4)[:planes]), 2)

    return samples


@register(F.adaptive_avg_pool1d, modules=[nn.AdaptiveAvgPool1d],
          samples=_adaptive(1, none=False))  # fmt: skip
def adaptive_avg_pool1d(input: Tensor, output_size: Size) -> Tensor:
    """:func:`adaptive_avg_pool2d` of ``([N,] C, L)``; ``output_size`` may not be ``None``."""
    return AdaptiveAvgPool.call(input, output_size, 1)


@register(F.adaptive_avg_pool2d, modules=[nn.AdaptiveAvgPool2d], samples=_adaptive(2))
def adaptive_avg_pool2d(input: Tensor, output_size: Sizes) -> Tensor:
    """Mean over so many windows, as :func:`torch.nn.functional.adaptive_avg_pool2d`.

    Args:
        input: ``([N,] C, H, W)``.
        output_size: ``(H_out, W_out)`` or one number; ``None`` keeps the input's size.

    Returns:
        ``([N,] C, H_out, W_out)``.

    Raises:
        RuntimeError: for settings that torch refuses.
    """
    return AdaptiveAvgPool.call(input, output_size, 2)


@register(F.adaptive_avg_pool3d, modules=[nn.AdaptiveAvgPool3d], samples=_adaptive(3))
def adaptive_avg_pool3d(input: Tensor, output_size: Sizes) -> Tensor:
    """:func:`adaptive_avg_pool2d` of ``([N,] C, D, H, W)``."""
    return AdaptiveAvgPool3d.call(input, output_size, 3)
