"""A linear layer and the cross-entropy of its logits, which never exist all at once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchbp.ops.base import wide
from torchbp.ops.cross_entropy import cross_entropy
from torchbp.ops.linear import linear
from torchbp.ops.linear_cross_entropy_chunks import (
    Chunked,
    Settings,
    can_chunk,
    cast_for_chunks,
    chunk_rows,
    composed,
)
from torchbp.ops.loss import check_reduction
from torchbp.ops.registry import Maker, Sample, register, sample


def _samples(make: Maker) -> Iterator[Sample]:
    yield sample(make(4, 2), make(3, 2), make.integers(3, 4))
    yield sample(make(2), make(3, 2), make.integers(3), linear_bias=make(3), label_smoothing=0.2)
    for reduction in ("none", "sum", "mean"):
        yield sample(
            make(2, 3),
            make(4, 2, 3),
            make.integers(4, 2, 2),
            linear_bias=make(4, 2),
            weight=make.constant(4, positive=True),
            ignore_index=1,
            reduction=reduction,
        )
        yield sample(
            make(5, 2),
            make(3, 2),
            make.integers(3, 5),
            linear_bias=make(3),
            weight=make.constant(3, positive=True),
            ignore_index=1,
            label_smoothing=0.1,
            reduction=reduction,
        )
    yield sample(make(2, 3), make(4, 3), make(2, 4))
    yield sample(make(0, 2), make(3, 2), make.integers(3, 0), reduction="sum")


@register(
    F.linear_cross_entropy,
    modules=[nn.LinearCrossEntropyLoss],
    samples=_samples,
)
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
) -> Tensor:
    """Cross-entropy of linear logits, as :func:`torch.nn.functional.linear_cross_entropy`.

    With class indices, a two-dimensional weight and more logits than ``CHUNK_BYTES``, losses and
    gradients are computed chunk by chunk, and the logits never exist as a whole; see
    :class:`Chunked`. Probabilities, losses at several places, ``torch.compile``, ``torch.func``
    transforms, forward mode and modes such as the secant tape go through the two ops it is made
    of. So do logits that fit into one chunk.

    Args:
        input: ``(N, D)`` or ``(D,)``.
        linear_weight: ``(C, D)``, or ``(C, d1, ..., D)`` for a loss at several places.
        target: class indices, shape of the logits ``(N, C, d1, ...)`` without C, or probabilities
            of their shape.
        linear_bias: shape of ``linear_weight`` without D.
        weight: ``(C,)``, a weight of each class.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        ignore_index: rows with this class index do not count; -100 unless given.
        label_smoothing: in [0, 1].
        options: a :class:`torch.nn.LinearCrossEntropyOptions`; its ``batch_chunk_size`` is the
            number of rows of a chunk. All else it says is about torch's own implementation: here
            a graph may always be retained, and short dtypes add up in float32.
        z_loss: ``ζ``; the loss of a row grows by ``w_y ζ lse(z)²``, which keeps the logits near
            zero (Chowdhery et al. 2022). Not in torch.

    Returns:
        A scalar, or the row losses for ``reduction="none"``.

    Raises:
        RuntimeError: if the shapes do not fit, or if ``ignore_index`` comes with probabilities.
        IndexError: on the CPU, if a class is out of range.
    """
    _check_shapes(input, linear_weight, linear_bias)
    classes, *places = linear_weight.shape[:-1]
    shape = (*input.shape[:-1], classes, *places)
    if target.shape == shape and ignore_index is not None:
        raise RuntimeError("linear_cross_entropy: probabilities as targets rule out ignore_index")
    ignore = -100 if ignore_index is None else ignore_index
    settings = _settings(input, reduction, ignore, label_smoothing, z_loss)
    arguments = input, linear_weight, linear_bias, target, weight
    if not places and input.dim() == 2:
        rows = chunk_rows(input, classes, options)
        if rows < input.shape[0] and can_chunk(*arguments, settings):
            settings = settings._replace(chunk_rows=rows)
            try:
                return Chunked.apply(*cast_for_chunks(*arguments), settings)[0]
            except RuntimeError:
                _refuse_classes(input, target, classes, ignore)
                raise
    if not places:
        return composed(*arguments, settings)[0]
    if z_loss:
        raise RuntimeError("linear_cross_entropy: z_loss takes a linear_weight of two dimensions")
    rows = math.prod(places, start=classes)
    linear_weight = linear_weight.reshape(rows, linear_weight.shape[-1])
    linear_bias = None if linear_bias is None else linear_bias.reshape(rows)
    return cross_entropy(
        linear(input, linear_weight, linear_bias).reshape(shape),
        target,
        weight,
        ignore_index=ignore,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


def _refuse_classes(input: Tensor, target: Tensor, classes: int, ignore: int) -> None:
    """Torch's own error for a class that is not there."""
    nothing = input.new_zeros(()).expand(input.shape[0], classes)
    F.nll_loss(nothing, target, ignore_index=ignore, reduction="none")


class TokenLosses(NamedTuple):
    """What :func:`linear_cross_entropy_rows` returns.

    Attributes:
        loss: the reduced loss, differentiable.
        losses: ``(N,)`` the loss of every row, zero where ignored; at least float32.
        log_odds: ``(N,)`` ``log(p_y / (1 - p_y))`` of the true class, infinite where ignored.
    """

    loss: Tensor
    losses: Tensor
    log_odds: Tensor


def linear_cross_entropy_rows(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
) -> TokenLosses:
    """:func:`linear_cross_entropy` with the losses and log-odds of the rows, from the same pass.

    Without weights, smoothing and z-loss ``l = softplus(-s)`` of the log-odds ``s``, which are what
    the blame method ``link`` is linear in. They keep their digits where ``l`` is next to zero.

    Args:
        input: ``(N, D)``; float32, float64, bfloat16 or float16.
        linear_weight: ``(C, D)``.
        target: ``(N,)``, int64 class indices.
        linear_bias: ``(C,)``.
        weight: ``(C,)``, a weight of each class.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``, of ``loss``.
        ignore_index: rows with this class index do not count.
        label_smoothing: in [0, 1].
        options: as for :func:`linear_cross_entropy`.
        z_loss: as for :func:`linear_cross_entropy`.

    Returns:
        The loss, and two tensors that are not differentiable.

    Raises:
        RuntimeError: if shapes or dtypes do not fit, or under a transform, a mode or
            ``torch.compile``, which only :func:`linear_cross_entropy` follows.
        ValueError: for an unknown reduction.
    """
    check_reduction("linear_cross_entropy_rows", reduction)
    _check_shapes(input, linear_weight, linear_bias)
    arguments = input, linear_weight, linear_bias, target, weight
    settings = _settings(input, reduction, ignore_index, label_smoothing, z_loss)
    if input.dim() != 2 or linear_weight.dim() != 2 or not can_chunk(*arguments, settings):
        raise RuntimeError(
            "linear_cross_entropy_rows: expected plain tensors, input (N, D), linear_weight (C, D) "
            f"and int64 classes, got {tuple(input.shape)}, {tuple(linear_weight.shape)} and "
            f"{target.dtype}; no transform, mode or torch.compile around it"
        )
    rows = chunk_rows(input, linear_weight.shape[0], options)
    loss, both = Chunked.apply(*cast_for_chunks(*arguments), settings._replace(chunk_rows=rows))
    return TokenLosses(loss, both[0], both[1])


def _settings(
    input: Tensor, reduction: str, ignore: int, smoothing: float, z_loss: float
) -> Settings:
    cast = torch.is_autocast_enabled(input.device.type) if input.device.type != "meta" else False
    dtype = wide(input[:0]).dtype if cast else input.dtype
    return Settings(reduction, ignore, smoothing, z_loss, 0, dtype, torch.is_grad_enabled())


def _check_shapes(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    name = "linear_cross_entropy"
    if input.dim() not in (1, 2) or weight.dim() < 2:
        raise RuntimeError(
            f"{name}: input must have one or two dimensions and linear_weight at least two, got "
            f"{input.dim()} and {weight.dim()}"
        )
    if input.shape[-1] != weight.shape[-1]:
        raise RuntimeError(
            f"{name}: the last dimensions of input and linear_weight must agree, got "
            f"{input.shape[-1]} and {weight.shape[-1]}"
        )
    if bias is not None and bias.shape != weight.shape[:-1]:
        raise RuntimeError(
            f"{name}: linear_bias must have shape {tuple(weight.shape[:-1])}, got "
            f"{tuple(bias.shape)}"
        )
    if weight.dim() > 2 and input.dim() == 1:
        raise RuntimeError(
            f"{name}: a linear_weight of shape {tuple(weight.shape)} needs a batch, got input of "
            f"shape {tuple(input.shape)}"
        )
