"""Dropout."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchbp import kernels
from torchbp.ops.base import Op, is_ordinary
from torchbp.ops.dropout_draws import _bits, _noise, _scale, _unpacked
from torchbp.ops.elementwise import can_fuse, in_place
from torchbp.ops.registry import Maker, Sample, register, sample
from torchbp.ops.relevance import passes


class Dropout(Op):
    """``y = x ⊙ noise`` (Srivastava et al., 2014) with ``noise`` 0 or ``1 / (1 - p)``.

    The noise is drawn outside and counts as a constant, so that two runs can share it. It may be
    one number for each channel (Tompson et al., 2015). Backward and secant: ``∂x = g ⊙ noise``.
    """

    relevance = classmethod(passes)

    @staticmethod
    def forward(x: Tensor, noise: Tensor) -> Tensor:
        return x * noise

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, noise = inputs
        ctx.save_for_backward(noise)
        ctx.save_for_forward(noise)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (noise,) = ctx.saved_tensors
        return grad_output * noise, None

    @staticmethod
    def jvp(ctx: Any, tx: Tensor | None, _: Any) -> Tensor | None:
        (noise,) = ctx.saved_tensors
        return None if tx is None else tx * noise

    @staticmethod
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        noise, noise0 = args[1], args0[1]
        return multiplier * ((noise + noise0) / 2), None


class BitDropout(Op):
    """``y = x ⊙ scale bits``: :class:`Dropout` that keeps one bit for each element.

    x is contiguous; the bits, in its order, and the scale ``1 / (1 - p)`` are drawn outside and
    count as constants. Backward and secant: ``∂x = g ⊙ scale bits``.
    """

    relevance = classmethod(passes)

    @staticmethod
    def forward(x: Tensor, bits: Tensor, scale: float) -> Tensor:
        return kernels.dropout_apply(x, bits, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, bits, ctx.scale = inputs
        ctx.save_for_backward(bits)
        ctx.save_for_forward(bits)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (bits,) = ctx.saved_tensors
        if not torch.is_grad_enabled() and can_fuse(grad_output):
            return kernels.dropout_apply(grad_output, bits, ctx.scale), None, None
        return grad_output * _unpacked(grad_output, bits, ctx.scale), None, None

    @staticmethod
    def jvp(ctx: Any, tx: Tensor | None, *_: Any) -> Tensor | None:
        (bits,) = ctx.saved_tensors
        return None if tx is None else tx * _unpacked(tx, bits, ctx.scale)

    @staticmethod
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        noise, noise0 = (_unpacked(multiplier, bits, scale) for _, bits, scale in (args, args0))
        return multiplier * ((noise + noise0) / 2), None, None


def _keeps_all(x: Tensor, p: float, training: bool) -> bool:
    """Whether dropout returns its input as it is.

    Raises:
        ValueError: ``p`` is not between 0 and 1.
    """
    if p < 0.0 or p > 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    return p == 0 or not training or x.numel() == 0


def _drop(x: Tensor, p: float) -> Tensor:
    """Dropout of elements; with bits wherever nobody but autograd sees what is drawn."""
    if p == 1 or not can_fuse(x) or not is_ordinary(x):
        return Dropout.call(x, _noise(x, p))
    if not (x.requires_grad and torch.is_grad_enabled()):
        return F.dropout(x, p)
    scale = _scale(p, x.dtype)
    if x.is_contiguous():
        return BitDropout.call(x, _bits(x, p), scale)
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    if not x.permute(order).is_contiguous():
        return Dropout.call(x, _noise(x, p))
    back = [order.index(d) for d in range(x.dim())]
    return BitDropout.call(x.permute(order), _bits(x, p), scale).permute(back)


def _channel_noise(x: Tensor, p: float, batched: bool = True) -> Tensor:
    """Zeros and ones, one for each channel, drawn as torch's feature dropouts draw them."""
    kept = 2 if batched else 1
    if x.dim() < kept:
        raise RuntimeError(
            f"feature dropout: expected an input of at least 2 dimensions, but got {x.dim()}"
        )
    shape = [*x.shape[:kept], *[1] * (x.dim() - kept)]
    # Of x, so that under vmap with different randomness each batch entry gets its own.
    return x.new_empty(shape).bernoulli_(1 - p)


def _samples(make: Maker) -> Iterator[Sample]:
    yield sample(make(3, 4))
    yield sample(make(2, 3, 2), p=0.2)
    yield sample(make(3, 4), p=0.0)
    yield sample(make(3, 4), p=1.0)
    yield sample(make(3, 4), training=False)
    yield sample(make(0, 4))


@register(F.dropout, modules=[nn.Dropout], samples=_samples)
def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Zero elements at random, as :func:`torch.nn.functional.dropout` with the same seed.

    Args:
        input: any shape.
        p: probability of an element to be zeroed.
        training: without it, ``input`` is returned as it is.
        inplace: write the result into ``input``.

    Returns:
        The shape of ``input``.

    Raises:
        ValueError: ``p`` is not between 0 and 1.
    """
    if _keeps_all(input, p, training):
        return input
    result = _drop(input, p)
    return in_place(input, result) if inplace else result


def _drop_channels(x: Tensor, p: float, training: bool, inplace: bool, batched: bool) -> Tensor:
    if _keeps_all(x, p, training):
        return x
    noise = _noise(x, p) if p == 1 else _channel_noise(x, p, batched).div_(1 - p)
    result = Dropout.call(x, noise)
    return in_place(x, result) if inplace else result


def _dropout1d_samples(make: Maker) -> Iterator[Sample]:
    yield sample(make(2, 3, 4))
    yield sample(make(3, 4), p=0.2)
    yield sample(make(2, 3, 4), p=1.0)


@register(F.dropout1d, modules=[nn.Dropout1d], samples=_dropout1d_samples)
def dropout1d(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    """Zero channels at random, as :func:`torch.nn.functional.dropout1d` with the same seed.

    Args:
        input: ``(N, C, L)`` or ``(C, L)``.
        p: probability of a channel to be zeroed.
        training: without it, ``input`` is returned as it is.
        inplace: write the result into ``input``.

    Returns:
        The shape of ``input``.

    Raises:
        ValueError: ``p`` is not between 0 and 1.
        RuntimeError: ``input`` has other than 2 or 3 dimensions.
    """
    if input.dim() not in (2, 3) and 0 <= p <= 1:
        raise RuntimeError(f"dropout1d: expected a 2D or 3D input, but got {input.dim()}D")
    return _drop_channels(input, p, training, inplace, input.dim() == 3)


def _dropout2d_samples(make: Maker) -> Iterator[Sample]:
    yield sample(make(2, 3, 2, 2))
    yield sample(make(2, 3, 1, 2), p=0.2)
    yield sample(make(2, 3, 1, 2), p=1.0)


@register(
    F.dropout2d,
    modules=[nn.Dropout2d],
    samples=_dropout2d_samples,
)
def dropout2d(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    """Zero channels at random, as :func:`torch.nn.functional.dropout2d` with the same seed.

    Args:
        input: ``(N, C, H, W)``. A 3D input counts as ``(N, C, L)``, with torch's warning.
        p: probability of a channel to be zeroed.
        training: without it, ``input`` is returned as it is.
        inplace: write the result into ``input``.

    Returns:
        The shape of ``input``.

    Raises:
        ValueError: ``p`` is not between 0 and 1.
        RuntimeError: ``input`` has fewer than 2 dimensions.
    """
    if input.dim() == 3:
        _warn("dropout2d: a 3D input counts as (N, C, L); use dropout1d for that")
    elif input.dim() != 4:
        _warn(f"dropout2d: expected a 4D input, but got {input.dim()}D; use dropout for that")
    return _drop_channels(input, p, training, inplace, batched=True)


def _dropout3d_samples(make: Maker) -> Iterator[Sample]:
    yield sample(make(2, 3, 1, 2, 2))
    yield sample(make(3, 1, 2, 2), p=0.2)
    yield sample(make(2, 3, 1, 1, 2), p=1.0)


@register(F.dropout3d, modules=[nn.Dropout3d], samples=_dropout3d_samples)
def dropout3d(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    """Zero channels at random, as :func:`torch.nn.functional.dropout3d` with the same seed.

    Args:
        input: ``(N, C, D, H, W)`` or ``(C, D, H, W)``.
        p: probability of a channel to be zeroed.
        training: without it, ``input`` is returned as it is.
        inplace: write the result into ``input``.

    Returns:
        The shape of ``input``.

    Raises:
        ValueError: ``p`` is not between 0 and 1.
    """
    if input.dim() not in (4, 5):
        _warn(f"dropout3d: expected a 4D or 5D input, but got {input.dim()}D; use dropout for that")
    return _drop_channels(input, p, training, inplace, input.dim() == 5)


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)
