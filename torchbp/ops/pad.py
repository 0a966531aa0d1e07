"""Padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchbp.ops.linear_map import LinearMap
from torchbp.ops.registry import Maker, Sample, register, sample
from torchbp.ops.relevance import routes


class ConstantPad(LinearMap):
    """A border of a constant; negative widths cut the border off.

    Backward and secant: the error without its border, zeros where the input was cut. LRP: what
    arrives at a border that is not zero stays there, as with a bias.
    """

    relevance = classmethod(routes)

    @staticmethod
    def forward(x: Tensor, widths: Sequence[int], value: float | None) -> Tensor:
        return F.pad(x, widths, "constant", value)

    @staticmethod
    def transposed(g: Tensor, shape: torch.Size, settings: Sequence[Any]) -> Tensor:
        return F.pad(g, [-width for width in settings[0]])

    @staticmethod
    def applied(tx: Tensor, *settings: Any) -> Tensor:
        return F.pad(tx, settings[0])


class ReflectPad3d(LinearMap):
    """A border that mirrors the input about its first and last element.

    Backward and secant: each border of the error is mirrored back and added.
    """

    relevance = classmethod(routes)

    @staticmethod
    def forward(x: Tensor, widths: Sequence[int]) -> Tensor:
        return F.pad(x, widths, "reflect")

    @staticmethod
    def transposed(g: Tensor, shape: torch.Size, settings: Sequence[Any]) -> Tensor:
        return _folded(_uncut(g, settings[0]), _axes(settings[0]), _fold_reflected)


class ReflectPad(ReflectPad3d):
    """:class:`ReflectPad3d` of one or two dimensions, which PyTorch's autocast lists."""

    autocast = {"cpu": "fp32"}


class ReplicatePad(LinearMap):
    """A border that repeats the first and last element.

    Backward and secant: the sum over each border of the error is added to the edge.
    """

    autocast = {"cpu": "fp32"}
    relevance = classmethod(routes)

    @staticmethod
    def forward(x: Tensor, widths: Sequence[int]) -> Tensor:
        return F.pad(x, widths, "replicate")

    @staticmethod
    def transposed(g: Tensor, shape: torch.Size, settings: Sequence[Any]) -> Tensor:
        return _folded(_uncut(g, settings[0]), _axes(settings[0]), _fold_replicated)


class CircularPad(LinearMap):
    """A border that continues with the opposite end; what is cut off is cut before that.

    Backward and secant: each border of the error is added at the opposite end.
    """

    relevance = classmethod(routes)

    @staticmethod
    def forward(x: Tensor, widths: Sequence[int]) -> Tensor:
        return F.pad(x, widths, "circular")

    @staticmethod
    def transposed(g: Tensor, shape: torch.Size, settings: Sequence[Any]) -> Tensor:
        return _uncut(_folded(g, _axes(settings[0]), _fold_circular), settings[0])


#: A dimension, and the widths of its borders.
Axis = tuple[int, int, int]

#: Adds a border to the middle: ``(middle, border, dim, before the middle or after it)``.
Fold = Callable[[Tensor, Tensor, int, bool], None]


def _axes(widths: Sequence[int]) -> list[Axis]:
    """The dimensions that have a border to add back."""
    pairs = zip(widths[::2], widths[1::2], strict=True)
    axes = [(-1 - i, max(left, 0), max(right, 0)) for i, (left, right) in enumerate(pairs)]
    return [axis for axis in axes if axis[1:] != (0, 0)]


def _uncut(g: Tensor, widths: Sequence[int]) -> Tensor:
    """Zeros where the input was cut off."""
    return F.pad(g, [max(-width, 0) for width in widths]) if min(widths, default=0) < 0 else g


def _folded(g: Tensor, axes: Sequence[Axis], fold: Fold) -> Tensor:
    """The error of the input: along each axis the borders are added to what they repeat."""
    if not axes:
        return g.clone()
    for i, (dim, left, right) in enumerate(axes):
        size = g.shape[dim] - left - right
        middle = g.narrow(dim, left, size)
        if i == 0:
            middle = middle.clone()  # written into; the borders along other axes come with it
        if left:
            fold(middle, g.narrow(dim, 0, left), dim, True)
        if right:
            fold(middle, g.narrow(dim, left + size, right), dim, False)
        g = middle
    return g if len(axes) == 1 else g.clone()


def _fold_reflected(middle: Tensor, border: Tensor, dim: int, before: bool) -> None:
    width = border.shape[dim]
    start = 1 if before else middle.shape[dim] - 1 - width
    middle.narrow(dim, start, width).add_(border.flip(dim) if width > 1 else border)


def _fold_replicated(middle: Tensor, border: Tensor, dim: int, before: bool) -> None:
    start = 0 if before else middle.shape[dim] - 1
    edge = border.sum(dim, keepdim=True) if border.shape[dim] > 1 else border
    middle.narrow(dim, start, 1).add_(edge)


def _fold_circular(middle: Tensor, border: Tensor, dim: int, before: bool) -> None:
    width = border.shape[dim]
    start = middle.shape[dim] - width if before else 0
    middle.narrow(dim, start, width).add_(border)


def _samples(make: Maker) -> Iterator[Sample]:
    yield sample(make(2, 3), (1, 2))
    yield sample(make(2, 3, 2), (1, 0, -1, 1), "constant", 0.5)
    yield sample(make(3), (-1, -1))
    yield sample(make(1, 2, 4), (2, 1), "reflect")
    yield sample(make(1, 1, 3, 4), (2, 0, 1, 2), mode="reflect")
    yield sample(make(1, 2, 2, 3), (1, 1, 0, 1, 1, 0), mode="reflect")
    yield sample(make(2, 4), (-1, 2), mode="reflect")
    yield sample(make(1, 2, 3), (3, 1), "replicate")
    yield sample(make(1, 1, 2, 3), (1, 2, 2, 0), mode="replicate")
    yield sample(make(1, 2, 2, 2), (1, 1, 0, 1, 1, 0), mode="replicate")
    yield sample(make(1, 2, 3), (2, -1), mode="replicate")
    yield sample(make(1, 2, 3), (3, 1), "circular")
    yield sample(make(1, 1, 3, 2), (1, 2, 2, -1), mode="circular")
    yield sample(make(1, 1, 2, 2, 2), (1, 1, 0, 1, 1, 0), mode="circular")
    yield sample(make(0, 2, 3), (1, 1), mode="reflect")


_BY_MODE = {"replicate": ReplicatePad, "circular": CircularPad}


@register(
    F.pad,
    modules=[getattr(nn, f"{kind}Pad{d}d")
             for kind in ("Constant", "Zero", "Reflection", "Replication", "Circular")
             for d in (1, 2, 3)],
    samples=_samples,
)  # fmt: skip
def pad(
    input: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> Tensor:
    """Give the last dimensions a border, as :func:`torch.nn.functional.pad`.

    Args:
        input: any shape; for the modes other than ``"constant"`` what torch takes: the last one,
            two or three dimensions are padded, one or two dimensions stand before them.
        pad: widths before and after the last dimension, then those of the one before it, ...;
            negative ones cut off.
        mode: ``"constant"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        value: what a constant border is filled with; ``None`` for zero.

    Returns:
        The padded tensor.

    Raises:
        NotImplementedError: for a mode or a number of dimensions that torch does not pad.
        RuntimeError: if a border is wider than what it repeats.
    """
    widths = tuple(pad)
    if mode == "constant":
        return ConstantPad.call(input, widths, value)
    op: Any = ReflectPad if len(widths) < 6 else ReflectPad3d
    if mode != "reflect":
        op = _BY_MODE.get(mode)
    if value or op is None:
        return F.pad(input, widths, mode, value)  # torch's own error for it
    return op.call(input, widths)
