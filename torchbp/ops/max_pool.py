"""Max pooling over windows of a given size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchbp.ops.base import Op
from torchbp.ops.max_pool_offsets import max_pool_values
from torchbp.ops.planes import pick, put
from torchbp.ops.registry import Maker, Sample, register, sample
from torchbp.ops.relevance import routes

Size = int | Sequence[int]


class Selection(Op):
    """Each element of the output is one of the input's; the second output holds their positions.

    A subclass gives ``forward(x, *settings)`` and how many of the last dimensions make a plane;
    positions count through a plane. From these follow the derivatives:

    Backward: ``∂x[i] = Σ g`` over the windows whose maximum is i; as torch's, the first of equal
    elements, and the last NaN if there is one.
    Secant: a window whose maximum moves from i₀ to i splits its multiplier between both routes,
    ``λ`` to i and ``1 - λ`` to i₀ with ``λ = a / (a + b)``, ``a = x[i] - x[i₀] >= 0`` and
    ``b = x₀[i₀] - x₀[i] >= 0``: the only split in [0, 1] that gives ``y - y₀`` exactly.
    LRP: the winner takes all (Montavon et al. 2019).

    Attributes:
        dims: dimensions of a plane.
    """

    dims: ClassVar[int]
    relevance = classmethod(routes)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Build the derivatives, then the op's ``call``."""
        methods: dict[str, Callable[..., Any]] = {
            "setup_context": _setup_context,
            "backward": _backward(cls.dims),
            "jvp": _jvp(cls.dims),
            "secant": _secant(cls.dims),
        }
        for name, method in methods.items():
            setattr(cls, name, staticmethod(method))
        super().__init_subclass__(**kwargs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    indices = output[1]
    ctx.mark_non_differentiable(indices)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(indices)
    ctx.save_for_forward(indices)
    ctx.shape = inputs[0].shape
    ctx.constants = (None,) * (len(inputs) - 1)


def _backward(dims: int) -> Callable[..., tuple[Tensor | None, ...]]:
    def backward(ctx: Any, grad_output: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return None, *ctx.constants
        (indices,) = ctx.saved_tensors
        return put(grad_output, indices, ctx.shape, dims), *ctx.constants

    return backward


def _jvp(dims: int) -> Callable[..., tuple[Tensor | None, None]]:
    def jvp(ctx: Any, tx: Tensor | None, *_: Any) -> tuple[Tensor | None, None]:
        (indices,) = ctx.saved_tensors
        return None if tx is None else pick(tx, indices, dims), None

    return jvp


def _secant(dims: int) -> Callable[..., tuple[Tensor | None, ...]]:
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        x, x0 = args[0], args0[0]
        (y, indices), (y0, indices0) = output, output0
        a, b = y - pick(x, indices0, dims), y0 - pick(x0, indices, dims)
        # 0 / 0 where the maximum stays or ties: either route, or both, is right.
        share = (a / (a + b)).nan_to_num(0.5)
        routed = put(multiplier * share, indices, x.shape, dims)
        routed0 = put(multiplier * (1 - share), indices0, x.shape, dims)
        return routed + routed0, *(None,) * (len(args) - 1)

    return secant


class MaxPool1d(Selection):
    """``y = max`` over each window of ``(*, C, L)``; see :class:`Selection`."""

    dims = 1

    @staticmethod
    def forward(x: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
        return F.max_pool1d_with_indices(x, *settings)


class MaxPool2d(Selection):
    """``y = max`` over each window of ``(*, C, H, W)``; see :class:`Selection`."""

    dims = 2

    @staticmethod
    def forward(x: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
        return F.max_pool2d_with_indices(x, *settings)


class MaxPool3d(Selection):
    """``y = max`` over each window of ``(*, C, D, H, W)``; see :class:`Selection`."""

    dims = 3

    @staticmethod
    def forward(x: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
        return F.max_pool3d_with_indices(x, *settings)


class MaxPool3dAlone(MaxPool3d):
    """:class:`MaxPool3d` without positions, which alone is on a list of PyTorch's autocast."""

    autocast = {"cpu": "fp32"}


def _samples(planes: int, indices: bool) -> Callable[[Maker], Iterator[Sample]]:
    """Calls of max_pool with planes of that many dimensions."""

    def samples(make: Maker) -> Iterator[Sample]:
        more: dict[str, Any] = {"return_indices": True} if indices else {}
        long, short = ((5, 4, 3)[:planes], (4, 2, 2)[:planes])
        yield sample(make(2, 2, *long), 2, **more)
        yield sample(make(2, *long), 3, stride=2, padding=1)
        yield sample(make(1, 2, *long), (2, 3, 1)[:planes], stride=(2, 1, 1)[:planes],
                     ceil_mode=True)  # fmt: skip
        yield sample(make(1, 1, *long), 2, stride=[], dilation=2 if planes < 3 else (2, 1, 2))
        yield sample(make(0, 2, *short), 2, **more)

    return samples


@register(F.max_pool1d, replaces=[torch.max_pool1d], modules=[nn.MaxPool1d],
          samples=_samples(1, indices=True))  # fmt: skip
def max_pool1d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`max_pool2d` of ``([N,] C, L)``, as :func:`torch.nn.functional.max_pool1d`."""
    if not return_indices:
        y = max_pool_values(input, kernel_size, stride, padding, dilation, ceil_mode, 1)
        if y is not None:
            return y
    both = MaxPool1d.call(input, kernel_size, stride, padding, dilation, ceil_mode)
    return both if return_indices else both[0]


@register(F.max_pool2d, replaces=[torch.max_pool2d], modules=[nn.MaxPool2d],
          samples=_samples(2, indices=True))  # fmt: skip
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

    Raises:
        RuntimeError: for settings that torch refuses.
    """
    if not return_indices:
        y = max_pool_values(input, kernel_size, stride, padding, dilation, ceil_mode, 2)
        if y is not None:
            return y
    both = MaxPool2d.call(input, kernel_size, stride, padding, dilation, ceil_mode)
    return both if return_indices else both[0]


@register(F.max_pool3d, replaces=[torch.max_pool3d], modules=[nn.MaxPool3d],
          samples=_samples(3, indices=True))  # fmt: skip
def max_pool3d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`max_pool2d` of ``([N,] C, D, H, W)``, as :func:`torch.nn.functional.max_pool3d`."""
    if not return_indices:
        y = max_pool_values(input, kernel_size, stride, padding, dilation, ceil_mode, 3)
        if y is not None:
            return y
    op = MaxPool3d if return_indices else MaxPool3dAlone
    both = op.call(input, kernel_size, stride, padding, dilation, ceil_mode)
    return both if return_indices else both[0]


@register(F.max_pool1d_with_indices, replaces=[torch.max_pool1d_with_indices],
          samples=_samples(1, indices=False))  # fmt: skip
def max_pool1d_with_indices(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> tuple[Tensor, Tensor]:
    """:func:`max_pool1d` that returns the positions in any case."""
    return MaxPool1d.call(input, kernel_size, stride, padding, dilation, ceil_mode)


@register(F.max_pool2d_with_indices, samples=_samples(2, indices=False))
def max_pool2d_with_indices(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> tuple[Tensor, Tensor]:
    """:func:`max_pool2d` that returns the positions in any case."""
    return MaxPool2d.call(input, kernel_size, stride, padding, dilation, ceil_mode)


@register(F.max_pool3d_with_indices, samples=_samples(3, indices=False))
def max_pool3d_with_indices(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> tuple[Tensor, Tensor]:
    """:func:`max_pool3d` that returns the positions in any case."""
    return MaxPool3d.call(input, kernel_size, stride, padding, dilation, ceil_mode)
