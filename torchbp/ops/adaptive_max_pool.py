"""Max pooling over as many windows as asked for, evenly spread or drawn at random."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchbp.ops.max_pool import Selection, Size
from torchbp.ops.registry import Maker, Sample, register, sample

#: Size of an output; ``None`` keeps the input's.
Sizes = int | None | Sequence[int | None]


class AdaptiveMaxPool1d(Selection):
    """``y = max`` over the window ``[⌊i n/m⌋, ⌈(i+1) n/m⌉)`` of output i of m."""

    dims = 1

    @staticmethod
    def forward(x: Tensor, output_size: Any) -> tuple[Tensor, Tensor]:
        return F.adaptive_max_pool1d_with_indices(x, output_size)


class AdaptiveMaxPool2d(Selection):
    """:class:`AdaptiveMaxPool1d` along two dimensions."""

    dims = 2

    @staticmethod
    def forward(x: Tensor, output_size: Any) -> tuple[Tensor, Tensor]:
        return F.adaptive_max_pool2d_with_indices(x, output_size)


class AdaptiveMaxPool3d(Selection):
    """:class:`AdaptiveMaxPool1d` along three dimensions."""

    dims = 3
    autocast = {"cpu": "fp32"}

    @staticmethod
    def forward(x: Tensor, output_size: Any) -> tuple[Tensor, Tensor]:
        return F.adaptive_max_pool3d_with_indices(x, output_size)


class FractionalMaxPool2d(Selection):
    """``y = max`` over windows that a random number per plane and axis places (Graham, 2014).

    The numbers are drawn outside and count as constants.
    Secant: exact where both runs drew the same numbers, as the secant tape makes them.
    """

    dims = 2
    autocast = {"cpu": "fp32"}

    @staticmethod
    def forward(
        x: Tensor, random: Tensor, kernel_size: Any, output_size: Any
    ) -> tuple[Tensor, Tensor]:
        return F.fractional_max_pool2d_with_indices(
            x, kernel_size, output_size, _random_samples=random
        )


class FractionalMaxPool3d(Selection):
    """:class:`FractionalMaxPool2d` along three dimensions."""

    dims = 3
    autocast = {"cpu": "fp32"}

    @staticmethod
    def forward(
        x: Tensor, random: Tensor, kernel_size: Any, output_size: Any
    ) -> tuple[Tensor, Tensor]:
        return F.fractional_max_pool3d_with_indices(
            x, kernel_size, output_size, _random_samples=random
        )


def _adaptive(planes: int, none: bool = True) -> Callable[[Maker], Iterator[Sample]]:
    def samples(make: Maker) -> Iterator[Sample]:
        yield sample(make(2, 2, *(5, 4, 2)[:planes]), 2)
        yield sample(make(2, *(5, 4, 3)[:planes]), (3, 2, 1)[:planes])
        if none:
            yield sample(make(1, 2, *(5, 4, 2)[:planes]), (None, 3, 2)[:planes])
        yield sample(make(1, 1, *(2, 3, 2)[:planes]), (4, 5, 3)[:planes])
        yield sample(make(0, 2, *(4, 4, 4)[:planes]), 2)

    return samples


@register(F.adaptive_max_pool1d, modules=[nn.AdaptiveMaxPool1d],
          samples=_adaptive(1, none=False))  # fmt: skip
def adaptive_max_pool1d(
    input: Tensor, output_size: Size, return_indices: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`adaptive_max_pool2d` of ``([N,] C, L)``; ``output_size`` may not be ``None``."""
    both = AdaptiveMaxPool1d.call(input, output_size)
    return both if return_indices else both[0]


@register(F.adaptive_max_pool2d, modules=[nn.AdaptiveMaxPool2d], samples=_adaptive(2))
def adaptive_max_pool2d(
    input: Tensor, output_size: Sizes, return_indices: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Maximum over so many windows, as :func:`torch.nn.functional.adaptive_max_pool2d`.

    Args:
        input: ``([N,] C, H, W)``.
        output_size: ``(H_out, W_out)`` or one number; ``None`` keeps the input's size.
        return_indices: also return the position of each maximum in its plane.

    Returns:
        ``([N,] C, H_out, W_out)``, and the positions if asked for.

    Raises:
        RuntimeError: for settings that torch refuses.
    """
    both = AdaptiveMaxPool2d.call(input, output_size)
    return both if return_indices else both[0]


@register(F.adaptive_max_pool3d, modules=[nn.AdaptiveMaxPool3d], samples=_adaptive(3))
def adaptive_max_pool3d(
    input: Tensor, output_size: Sizes, return_indices: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`adaptive_max_pool2d` of ``([N,] C, D, H, W)``."""
    both = AdaptiveMaxPool3d.call(input, output_size)
    return both if return_indices else both[0]


@register(F.adaptive_max_pool1d_with_indices, replaces=[torch.adaptive_max_pool1d],
          samples=_adaptive(1, none=False))  # fmt: skip
def adaptive_max_pool1d_with_indices(
    input: Tensor, output_size: Size, return_indices: bool = False
) -> tuple[Tensor, Tensor]:
    """:func:`adaptive_max_pool1d` that returns the positions in any case."""
    return AdaptiveMaxPool1d.call(input, output_size)


@register(F.adaptive_max_pool2d_with_indices, samples=_adaptive(2))
def adaptive_max_pool2d_with_indices(
    input: Tensor, output_size: Sizes, return_indices: bool = False
) -> tuple[Tensor, Tensor]:
    """:func:`adaptive_max_pool2d` that returns the positions in any case."""
    return AdaptiveMaxPool2d.call(input, output_size)


@register(F.adaptive_max_pool3d_with_indices, samples=_adaptive(3))
def adaptive_max_pool3d_with_indices(
    input: Tensor, output_size: Sizes, return_indices: bool = False
) -> tuple[Tensor, Tensor]:
    """:func:`adaptive_max_pool3d` that returns the positions in any case."""
    return AdaptiveMaxPool3d.call(input, output_size)


def _fractional(
    op: type[Selection],
    name: str,
    dims: int,
    input: Tensor,
    kernel_size: Size,
    output_size: Size | None,
    output_ratio: float | Sequence[float] | None,
    random: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Settle the size of the output and draw the random numbers, as torch does both."""
    if output_size is None:
        if output_ratio is None:
            raise ValueError(f"{name}: give output_size or output_ratio")
        ratio = output_ratio if isinstance(output_ratio, Sequence) else (output_ratio,) * dims
        if len(ratio) != dims:
            raise ValueError(f"{name}: output_ratio must have {dims} numbers, got {output_ratio}")
        output_size = [int(n * r) for n, r in zip(input.shape[-dims:], ratio, strict=True)]
    if random is None:
        batch = input.shape[0] if input.dim() > dims + 1 else 1
        random = torch.rand(
            batch, input.shape[-dims - 1], dims, dtype=input.dtype, device=input.device
        )
    return op.call(input, random, kernel_size, output_size)


def _fractional_samples(planes: int) -> Callable[[Maker], Iterator[Sample]]:
    def samples(make: Maker) -> Iterator[Sample]:
        size = (5, 4, 4)[:planes]
        fixed = make.constant(1, 2, planes).sigmoid()
        yield sample(make(2, 2, *size), 2, output_size=2)
        yield sample(make(2, *size), 2, output_ratio=(0.5, 0.6, 0.7)[:planes])
        yield sample(make(1, 2, *size), (2, 1, 2)[:planes], (3, 2, 1)[:planes],
                     return_indices=True, _random_samples=fixed)  # fmt: skip

    return samples


@register(F.fractional_max_pool2d, modules=[nn.FractionalMaxPool2d],
          samples=_fractional_samples(2))  # fmt: skip
def fractional_max_pool2d(
    input: Tensor,
    kernel_size: Size,
    output_size: Size | None = None,
    output_ratio: float | Sequence[float] | None = None,
    return_indices: bool = False,
    _random_samples: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Maximum over windows at random, as :func:`torch.nn.functional.fractional_max_pool2d`.

    Args:
        input: ``([N,] C, H, W)``.
        kernel_size: size of the window.
        output_size: ``(H_out, W_out)`` or one number.
        output_ratio: the same in parts of the input's size, between 0 and 1.
        return_indices: also return the position of each maximum in its plane.
        _random_samples: ``(N, C, 2)`` in [0, 1) in place of random numbers.

    Returns:
        ``([N,] C, H_out, W_out)``, and the positions if asked for.

    Raises:
        ValueError: if neither size nor ratio is given, or the ratio has not two numbers.
        RuntimeError: for settings that torch refuses.
    """
    both = _fractional(
        FractionalMaxPool2d, "fractional_max_pool2d", 2, input, kernel_size, output_size,
        output_ratio, _random_samples,
    )  # fmt: skip
    return both if return_indices else both[0]


@register(F.fractional_max_pool3d, modules=[nn.FractionalMaxPool3d],
          samples=_fractional_samples(3))  # fmt: skip
def fractional_max_pool3d(
    input: Tensor,
    kernel_size: Size,
    output_size: Size | None = None,
    output_ratio: float | Sequence[float] | None = None,
    return_indices: bool = False,
    _random_samples: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`fractional_max_pool2d` of ``([N,] C, D, H, W)``."""
    both = _fractional(
        FractionalMaxPool3d, "fractional_max_pool3d", 3, input, kernel_size, output_size,
        output_ratio, _random_samples,
    )  # fmt: skip
    return both if return_indices else both[0]


@register(F.fractional_max_pool2d_with_indices, samples=_fractional_samples(2))
def fractional_max_pool2d_with_indices(
    input: Tensor,
    kernel_size: Size,
    output_size: Size | None = None,
    output_ratio: float | Sequence[float] | None = None,
    return_indices: bool = False,
    _random_samples: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`fractional_max_pool2d` that returns the positions in any case."""
    return _fractional(
        FractionalMaxPool2d, "fractional_max_pool2d", 2, input, kernel_size, output_size,
        output_ratio, _random_samples,
    )  # fmt: skip


@register(F.fractional_max_pool3d_with_indices, samples=_fractional_samples(3))
def fractional_max_pool3d_with_indices(
    input: Tensor,
    kernel_size: Size,
    output_size: Size | None = None,
    output_ratio: float | Sequence[float] | None = None,
    return_indices: bool = False,
    _random_samples: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`fractional_max_pool3d` that returns the positions in any case."""
    return _fractional(
        FractionalMaxPool3d, "fractional_max_pool3d", 3, input, kernel_size, output_size,
        output_ratio, _random_samples,
    )  # fmt: skip
