"""A linear layer and the cross-entropy of its logits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from torchbp.ops.cross_entropy import cross_entropy
from torchbp.ops.linear import linear
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
) -> Tensor:
    """Cross-entropy of linear logits, as :func:`torch.nn.functional.linear_cross_entropy`.

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
        options: how torch cuts the batch into chunks to save memory; taken, and without effect:
            the logits are held whole.

    Returns:
        A scalar, or the row losses for ``reduction="none"``.

    Raises:
        RuntimeError: if the shapes do not fit, or if ``ignore_index`` comes with probabilities.
    """
    _check_shapes(input, linear_weight, linear_bias)
    classes, *places = linear_weight.shape[:-1]
    shape = (*input.shape[:-1], classes, *places)
    if target.shape == shape and ignore_index is not None:
        raise RuntimeError("linear_cross_entropy: probabilities as targets rule out ignore_index")
    if places:
        rows = math.prod(places, start=classes)
        linear_weight = linear_weight.reshape(rows, linear_weight.shape[-1])
        linear_bias = None if linear_bias is None else linear_bias.reshape(rows)
    logits = linear(input, linear_weight, linear_bias)
    return cross_entropy(
        logits.reshape(shape) if places else logits,
        target,
        weight,
        ignore_index=-100 if ignore_index is None else ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


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
