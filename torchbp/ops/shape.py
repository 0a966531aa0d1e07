"""Operations that only rearrange."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchbp.ops.linear_map import LinearMap
from torchbp.ops.registry import Maker, Sample, register, sample
from torchbp.ops.relevance import routes


class Flatten(LinearMap):
    """Dimensions ``start`` to ``end`` become one; backward and secant restore them.

    The result is a copy: torch forbids writing into a view that a custom function returned, and a
    flattened tensor followed by an in-place activation is common.
    """

    relevance = classmethod(routes)

    @staticmethod
    def forward(x: Tensor, start: int, end: int) -> Tensor:
        return torch.flatten(x, start, end).clone()

    @staticmethod
    def transposed(g: Tensor, shape: torch.Size, settings: Sequence[Any]) -> Tensor:
        return g.reshape(shape)


def _flatten_samples(make: Maker) -> Iterator[Sample]:
    yield sample(make(2, 3, 2))
    yield sample(make(2, 3, 2, 2), 1)
    yield sample(make(2, 3, 2, 2), start_dim=1, end_dim=-2)
    yield sample(make(3, 4), 1)
    yield sample(make())
    yield sample(make(0, 3, 2), 1)


@register(torch.flatten, replaces=[Tensor.flatten], modules=[nn.Flatten], samples=_flatten_samples)
def flatten(input: Tensor, start_dim: int = 0, end_dim: int = -1) -> Tensor:
    """Make one dimension of several, as :func:`torch.flatten`, but always as a copy.

    Args:
        input: any shape.
        start_dim: the first dimension to join.
        end_dim: the last dimension to join.

    Returns:
        ``input`` with dimensions ``start_dim`` to ``end_dim`` in one.
    """
    return Flatten.call(input, start_dim, end_dim)


class Unflatten(LinearMap):
    """One dimension becomes several; backward and secant join them. The result is a copy."""

    relevance = classmethod(routes)

    @staticmethod
    def forward(x: Tensor, dim: Any, sizes: Any) -> Tensor:
        return x.unflatten(dim, sizes).clone()

    @staticmethod
    def transposed(g: Tensor, shape: torch.Size, settings: Sequence[Any]) -> Tensor:
        return g.reshape(shape)


def _unflatten_samples(make: Maker) -> Iterator[Sample]:
    yield sample(make(2, 6), 1, (2, 3))
    yield sample(make(2, 6, 2), dim=-2, sizes=[3, -1])
    yield sample(make(0, 4), 1, (2, 2))


@register(
    torch.unflatten, replaces=[Tensor.unflatten], modules=[nn.Unflatten], samples=_unflatten_samples
)
def unflatten(input: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    """Make several dimensions of one, as :func:`torch.unflatten`, but always as a copy.

    Args:
        input: any shape.
        dim: the dimension to take apart.
        sizes: what it becomes; one of them may be -1.

    Returns:
        ``input`` with ``sizes`` in place of dimension ``dim``.
    """
    return Unflatten.call(input, dim, tuple(sizes))


class PixelShuffle(LinearMap):
    """Channels become blocks of pixels (Shi et al. 2016); backward and secant undo it."""

    relevance = classmethod(routes)

    @staticmethod
    def forward(x: Tensor, factor: int) -> Tensor:
        return F.pixel_shuffle(x, factor)

    @staticmethod
    def transposed(g: Tensor, shape: torch.Size, settings: Sequence[Any]) -> Tensor:
        return _undone(F.pixel_unshuffle, g, shape, settings[0])


class PixelUnshuffle(LinearMap):
    """Blocks of pixels become channels; backward and secant undo it."""

    relevance = classmethod(routes)

    @staticmethod
    def forward(x: Tensor, factor: int) -> Tensor:
        return F.pixel_unshuffle(x, factor)

    @staticmethod
    def transposed(g: Tensor, shape: torch.Size, settings: Sequence[Any]) -> Tensor:
        return _undone(F.pixel_shuffle, g, shape, settings[0])


def _undone(inverse: Any, g: Tensor, shape: torch.Size, factor: int) -> Tensor:
    # torch gives the two shuffles of an empty tensor the wrong shape.
    return inverse(g, factor) if g.numel() else g.reshape(shape)


class ChannelShuffle(LinearMap):
    """``(groups, channels per group)`` transposed (Zhang et al. 2018); backward transposes back."""

    relevance = classmethod(routes)

    @staticmethod
    def forward(x: Tensor, groups: int) -> Tensor:
        y = F.channel_shuffle(x, groups)
        return y if x.numel() else y.clone()  # torch hands an empty tensor on as it is

    @staticmethod
    def transposed(g: Tensor, shape: torch.Size, settings: Sequence[Any]) -> Tensor:
        batch, channels, *places = shape
        apart = g.reshape(batch, channels // settings[0], settings[0], *places)
        return apart.transpose(1, 2).reshape(shape)


def _shuffle_samples(make: Maker) -> Iterator[Sample]:
    yield sample(make(2, 4, 2, 1), 2)
    yield sample(make(9, 1, 2), 3)


def _unshuffle_samples(make: Maker) -> Iterator[Sample]:
    yield sample(make(2, 1, 4, 2), 2)
    yield sample(make(2, 3, 6), 3)


def _channel_samples(make: Maker) -> Iterator[Sample]:
    yield sample(make(2, 6, 2, 1), 2)
    yield sample(make(1, 6, 3), 3)
    yield sample(make(0, 4, 2, 2), 2)


@register(F.pixel_shuffle, modules=[nn.PixelShuffle], samples=_shuffle_samples)
def pixel_shuffle(input: Tensor, upscale_factor: int) -> Tensor:
    """Spread channels over space, as :func:`torch.nn.functional.pixel_shuffle`.

    Args:
        input: ``(*, C r², H, W)``.
        upscale_factor: r.

    Returns:
        ``(*, C, H r, W r)``.
    """
    return PixelShuffle.call(input, upscale_factor)


@register(F.pixel_unshuffle, modules=[nn.PixelUnshuffle], samples=_unshuffle_samples)
def pixel_unshuffle(input: Tensor, downscale_factor: int) -> Tensor:
    """Gather space into channels, as :func:`torch.nn.functional.pixel_unshuffle`.

    Args:
        input: ``(*, C, H r, W r)``.
        downscale_factor: r.

    Returns:
        ``(*, C r², H, W)``.
    """
    return PixelUnshuffle.call(input, downscale_factor)


@register(
    F.channel_shuffle,
    replaces=[torch.native_channel_shuffle],
    modules=[nn.ChannelShuffle],
    samples=_channel_samples,
)
def channel_shuffle(input: Tensor, groups: int) -> Tensor:
    """Interleave groups of channels, as :func:`torch.nn.functional.channel_shuffle`.

    Args:
        input: ``(N, C, *)``, C divisible by ``groups``.
        groups: how many.

    Returns:
        The same shape.
    """
    return ChannelShuffle.call(input, groups)
