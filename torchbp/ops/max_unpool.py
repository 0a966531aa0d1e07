"""Max unpooling: what max pooling chose goes back to where it came from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchbp.ops.base import Op
from torchbp.ops.max_pool import Size
from torchbp.ops.planes import flat, pick
from torchbp.ops.registry import Maker, Sample, register, sample
from torchbp.ops.relevance import routes


class Unpool(Op):
    """Zeros, except that each element goes to the position in its plane that ``indices`` says.

    A subclass gives ``forward(x, indices, *settings)`` and how many of the last dimensions make a
    plane.

    Backward: ``∂x = g[indices]``. Where several elements go to one position the last one stays,
    but as in torch each of them receives the error.
    Secant: the same, for elements that stay only. Between runs whose positions differ there is
    none: an element that moves without changing would need an infinite multiplier.
    LRP: relevance returns from where the elements went, as max pooling's does.

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
            "jvp": _jvp(cls.forward),
            "secant": _secant(cls.dims),
        }
        for name, method in methods.items():
            setattr(cls, name, staticmethod(method))
        super().__init_subclass__(**kwargs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, indices, *ctx.settings = inputs
    ctx.save_for_backward(indices)
    ctx.save_for_forward(indices)


def _backward(dims: int) -> Callable[..., tuple[Tensor | None, ...]]:
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (indices,) = ctx.saved_tensors
        return pick(grad_output, indices, dims), None, *(None,) * len(ctx.settings)

    return backward


def _jvp(forward: Callable[..., Tensor]) -> Callable[..., Tensor | None]:
    def jvp(ctx: Any, tx: Tensor | None, *_: Any) -> Tensor | None:
        (indices,) = ctx.saved_tensors
        return None if tx is None else forward(tx, indices, *ctx.settings)

    return jvp


def _secant(dims: int) -> Callable[..., tuple[Tensor | None, ...]]:
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        indices, indices0 = args[1], args0[1]
        if not torch.equal(indices, indices0):
            raise NotImplementedError(
                "secant: max_unpool has no rule between runs whose maxima lie at different "
                "positions. Methods gradient, taylor, link, logits and ablation work with any "
                "function"
            )
        stays = _stays(indices, multiplier, dims)
        return pick(multiplier, indices, dims) * stays, *(None,) * (len(args) - 1)

    return secant


def _stays(indices: Tensor, output: Tensor, dims: int) -> Tensor:
    """Which elements no later one has overwritten."""
    positions = flat(indices, dims)
    order = torch.arange(positions.shape[-1], device=indices.device).expand(positions.shape)
    last = torch.zeros_like(flat(output, dims), dtype=torch.int64)
    last = last.scatter_reduce(-1, positions, order, "amax")
    return (last.gather(-1, positions) == order).reshape(indices.shape)


class MaxUnpool1d(Unpool):
    """Inverse of max pooling over ``(*, C, L)``; see :class:`Unpool`."""

    dims = 1
    autocast = {"cpu": "fp32"}

    @staticmethod
    def forward(x: Tensor, indices: Tensor, *settings: Any) -> Tensor:
        return F.max_unpool1d(x, indices, *settings)


class MaxUnpool2d(Unpool):
    """Inverse of max pooling over ``(*, C, H, W)``; see :class:`Unpool`."""

    dims = 2
    autocast = {"cpu": "fp32"}

    @staticmethod
    def forward(x: Tensor, indices: Tensor, *settings: Any) -> Tensor:
        return F.max_unpool2d(x, indices, *settings)


class MaxUnpool3d(Unpool):
    """Inverse of max pooling over ``(*, C, D, H, W)``; see :class:`Unpool`."""

    dims = 3
    autocast = {"cpu": "fp32"}

    @staticmethod
    def forward(x: Tensor, indices: Tensor, *settings: Any) -> Tensor:
        return F.max_unpool3d(x, indices, *settings)


def _samples(planes: int) -> Callable[[Maker], Iterator[Sample]]:
    def positions(make: Maker, batch: tuple[int, ...], size: tuple[int, ...], step: int) -> Tensor:
        """One position for each element, as pooling over disjoint windows finds them."""
        values = make.constant(*batch, *(n * step for n in size))
        return getattr(F, f"max_pool{planes}d")(values, step, return_indices=True)[1]

    def samples(make: Maker) -> Iterator[Sample]:
        size = (3, 2, 2)[:planes]
        yield sample(make(2, 2, *size), positions(make, (2, 2), size, 2), 2)
        yield sample(make(2, *size), positions(make, (2,), size, 2), 2, stride=[2] * planes)
        more = [n * 2 + 1 for n in size]
        yield sample(make(1, 2, *size), positions(make, (1, 2), size, 2), (2,) * planes,
                     output_size=more)  # fmt: skip
        yield sample(make(1, 1, *size), positions(make, (1, 1), size, 1), 3, 2, 1)

    return samples


@register(F.max_unpool1d, modules=[nn.MaxUnpool1d], samples=_samples(1))
def max_unpool1d(
    input: Tensor,
    indices: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    output_size: Sequence[int] | None = None,
) -> Tensor:
    """:func:`max_unpool2d` of ``([N,] C, L)``."""
    return MaxUnpool1d.call(input, indices, kernel_size, stride, padding, output_size)


@register(F.max_unpool2d, modules=[nn.MaxUnpool2d], samples=_samples(2))
def max_unpool2d(
    input: Tensor,
    indices: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    output_size: Sequence[int] | None = None,
) -> Tensor:
    """Put what max pooling chose back in its place, as :func:`torch.nn.functional.max_unpool2d`.

    Args:
        input: ``([N,] C, H, W)``.
        indices: position of each element in its plane of the output, as max pooling returns it.
        kernel_size: size of the pooling's window.
        stride: distance of windows; ``kernel_size`` if ``None``.
        padding: of the pooling.
        output_size: ``(H_out, W_out)`` or the whole shape, where several would do.

    Returns:
        ``([N,] C, H_out, W_out)``, zero where nothing is put.

    Raises:
        ValueError: if pooling could not have led from ``output_size`` to the input's.
        RuntimeError: if a position is out of range, or for settings that torch refuses.
    """
    return MaxUnpool2d.call(input, indices, kernel_size, stride, padding, output_size)


@register(F.max_unpool3d, modules=[nn.MaxUnpool3d], samples=_samples(3))
def max_unpool3d(
    input: Tensor,
    indices: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    output_size: Sequence[int] | None = None,
) -> Tensor:
    """:func:`max_unpool2d` of ``([N,] C, D, H, W)``."""
    return MaxUnpool3d.call(input, indices, kernel_size, stride, padding, output_size)
