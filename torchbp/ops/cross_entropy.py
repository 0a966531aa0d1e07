"""Cross-entropy between logits and class indices or probabilities."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchbp import kernels
from torchbp.ops.base import Op, is_plain, midpoint, wide
from torchbp.ops.elementwise import can_fuse
from torchbp.ops.loss import FROM_THE_HEAD, legacy_reduction, onto, refuse_gradient
from torchbp.ops.registry import Maker, Sample, register, sample
from torchbp.ops.softmax import sato_vartia

_MANY_CLASSES = 256
"""From here on forward is our kernel, too: below, torch's two passes cost no more."""


class CrossEntropy(Op):
    """``l_n = -Σ_c T_nc log softmax(z_n)_c`` with the effective targets ``T``.

    Class indices ``y``: ``T_nc = w_c ((1 - ε) [c = y_n] + ε / C)``, zero rows where ignored; the
    mean divides by ``Σ w_{y_n}``. Probabilities ``t``: ``T = w ((1 - ε) t + ε / C)``; the mean
    divides by the number of rows. ``ε`` is the label smoothing (Szegedy et al. 2016).

    Backward: ``∂z = p ΣT - T`` with ``p = softmax(z)``; ``∂t = -(1 - ε) w log p``;
    ``∂w = -Σ_n ((1 - ε) t + ε / C) log p``.
    Secant: ``m_z = q ΣT - T`` with the Sato-Vartia distribution ``q`` in place of ``p``; where
    targets or weights differ between the runs, the products ``w · t · log p`` are split by
    midpoints, one pair after the other.

    Nothing but the logits is kept: the kernel of the backward pass finds ``p`` in the cache. Up to
    255 classes the loss is bitwise torch's; from there on it is the kernel's, which reads the
    logits once, writes none, and differs from torch's by rounding.
    """

    autocast = {"cpu": "fp32", "cuda": "fp32"}
    no_relevance = FROM_THE_HEAD

    @staticmethod
    def forward(
        z: Tensor,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        reduction: str,
        smoothing: float,
    ) -> Tensor:
        if z.dim() > 0 and z.shape[class_dim(z)] >= _MANY_CLASSES:
            one_each = (
                target.shape == z.shape[:1] + z.shape[2:] if z.dim() > 1 else not target.dim()
            )
            rows = kernel_rows(z, target, weight) if one_each else None
            if rows is not None and reduction in kernels.REDUCTIONS and 0 <= smoothing <= 1:
                settings = weight, reduction, ignore_index, smoothing
                with contextlib.suppress(RuntimeError):  # torch says which class is not there
                    loss = kernels.cross_entropy(rows, target.reshape(-1), *settings)[0]
                    return loss.reshape(target.shape) if reduction == "none" else loss
        return F.cross_entropy(
            z,
            target,
            weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=smoothing,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        z, target, weight, *ctx.options = inputs
        ctx.save_for_backward(z, target, weight)
        ctx.save_for_forward(z, target, weight)
        ctx.dtype = output.dtype

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        z, target, weight = ctx.saved_tensors
        _, reduction, smoothing = ctx.options
        needs_z, needs_target, needs_weight, *_ = ctx.needs_input_grad
        grad_z = grad_target = grad_weight = None
        rows = None
        if needs_z and not torch.is_grad_enabled():
            rows = kernel_rows(z, target, weight)
        if rows is not None:
            grad_rows = _fused_gradient(grad_output, rows, target, weight, *ctx.options)
            grad_z = _as_logits(grad_rows, z)
        elif needs_z:
            p = wide(z).softmax(class_dim(z))
            grad_z = residual(p, grad_output, target, weight, *ctx.options).to(z.dtype)
        if needs_target or needs_weight:
            scale = _row_scale(grad_output, reduction, z)
            error = -wide(z).log_softmax(class_dim(z)) * scale
            if needs_target:
                weighted = error if weight is None else error * _per_class(weight, z)
                grad_target = (weighted * (1 - smoothing)).to(target.dtype)
            if needs_weight:
                smooth = _smooth(target, smoothing)
                grad_weight = _sum_to_classes(error * smooth).to(weight.dtype)
        return grad_z, grad_target, grad_weight, None, None, None

    @staticmethod
    def jvp(ctx: Any, tz: Tensor, tt: Tensor | None, tw: Tensor | None, *_: Any) -> Tensor:
        z, target, weight = ctx.saved_tensors
        ignore, reduction, smoothing = ctx.options
        dim, sums = class_dim(z), reduction != "none"
        p, one = wide(z).softmax(dim), wide(z).new_ones(())
        part = "mean" if reduction == "mean" else "sum"  # rows are summed below
        row = (residual(p, one, target, weight, ignore, part, smoothing) * tz).sum(dim)
        if target.is_floating_point() and tt is not None:
            change = tt * (1 - smoothing)
            if weight is not None and tw is not None:
                change = change * _per_class(weight, z)
                change = change + _smooth(target, smoothing) * _per_class(tw, z)
            error = wide(z).log_softmax(dim) * _row_scale(one, part, z)
            row = row - (change * error).sum(dim)
        return (row.sum() if sums else row).to(ctx.dtype)

    @staticmethod
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        z, target, weight, ignore, reduction, smoothing = args
        z0, target0, weight0, *_ = args0
        dim = class_dim(z)
        q = sato_vartia(z, z0, dim)
        if not target.is_floating_point():
            m_z = residual(q, multiplier, target, weight, ignore, reduction, smoothing)
            return m_z.to(z.dtype), None, None, None, None, None
        scale = _row_scale(multiplier, reduction, z)
        smooth, smooth0 = _smooth(target, smoothing), _smooth(target0, smoothing)
        error = midpoint(-wide(z).log_softmax(dim), -wide(z0).log_softmax(dim)) * scale
        m_target, m_weight, effective = error * (1 - smoothing), None, midpoint(smooth, smooth0)
        if weight is not None:
            m_target = m_target * _per_class(midpoint(weight, weight0), z)
            m_weight = _sum_to_classes(error * effective).to(weight.dtype)
            effective = midpoint(smooth * _per_class(weight, z), smooth0 * _per_class(weight0, z))
        m_z = (q * effective.sum(dim, keepdim=True) - effective) * scale
        return m_z.to(z.dtype), m_target.to(target.dtype), m_weight, None, None, None


def class_dim(z: Tensor) -> int:
    """The dimension of the classes: the second one, or the only one."""
    return 1 if z.dim() > 1 else 0


def kernel_rows(z: Tensor, target: Tensor, weight: Tensor | None) -> Tensor | None:
    """The logits as ``[N, C]``, if the kernels take them so without a copy; otherwise ``None``."""
    if target.dtype is not torch.int64 or not can_fuse(z) or not is_plain(target):
        return None
    if weight is not None and not can_fuse(z, weight):
        return None
    if z.dim() > 2:
        z = z.movedim(1, -1)
        z = z.flatten(0, -2) if z.is_contiguous() else z
    elif z.dim() == 1:
        z = z.unsqueeze(0)
    return z if z.dim() == 2 and z.shape[1] > 0 else None


def _as_logits(rows: Tensor, z: Tensor) -> Tensor:
    """Undo :func:`kernel_rows`."""
    if z.dim() > 2:
        return rows.view(z.movedim(1, -1).shape).movedim(-1, 1)
    return rows if z.dim() == 2 else rows.squeeze(0)


def _fused_gradient(
    grad_output: Tensor,
    rows: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore: int,
    reduction: str,
    smoothing: float,
) -> Tensor:
    g = wide(grad_output)
    if reduction == "none":
        g = g.reshape(-1)
    if target.dim() != 1:
        target = target.reshape(-1)
    return kernels.cross_entropy_backward(g, rows, target, weight, reduction, ignore, smoothing)


def _per_class(weight: Tensor, z: Tensor) -> Tensor:
    return weight.reshape(weight.shape[0], *[1] * (z.dim() - class_dim(z) - 1))


def _sum_to_classes(values: Tensor) -> Tensor:
    # A list of no dimensions would sum over all of them.
    others = [d for d in range(values.dim()) if d != class_dim(values)]
    return values.sum(others) if others else values


def _smooth(target: Tensor, smoothing: float) -> Tensor:
    target = wide(target)
    return target * (1 - smoothing) + smoothing / max(target.shape[class_dim(target)], 1)


def _row_count(z: Tensor) -> int:
    return math.prod(z.shape[:1] + z.shape[2:]) if z.dim() > 1 else 1


def _row_scale(multiplier: Tensor, reduction: str, z: Tensor) -> Tensor:
    """The multiplier of every row loss, ready to broadcast against the logits."""
    multiplier = wide(multiplier)
    if reduction == "none":
        return multiplier.unsqueeze(class_dim(z))
    return multiplier / _row_count(z) if reduction == "mean" else multiplier


def index_rows(
    multiplier: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore: int,
    reduction: str,
    dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of index targets, ready to broadcast against the logits.

    Args:
        multiplier: of the reduced loss.
        target: class indices, shape of the rows.
        weight: ``(C,)``, or ``None``.
        ignore: the class index that does not count.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        dim: where the classes are in the logits.

    Returns:
        A valid class index for every row; what its loss is multiplied by, zero where it is
        ignored; and that times the weight of its class.
    """
    target = target.long()  # torch takes bytes too, and compares before they wrap around
    ignored, scale = target == ignore, wide(multiplier)
    index = target.masked_fill(ignored, 0)
    own = None if weight is None else wide(weight)[index]
    if reduction == "mean":
        scale = scale / (
            (target != ignore).sum() if own is None else own.masked_fill(ignored, 0).sum()
        )
    # After the division: where every row is ignored, torch's gradients are zero, not nan.
    scale = scale.masked_fill(ignored, 0)
    index, scale = index.unsqueeze(dim), scale.unsqueeze(dim)
    return index, scale, scale if own is None else scale * own.unsqueeze(dim)


def residual(
    p: Tensor,
    multiplier: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore: int,
    reduction: str,
    smoothing: float,
) -> Tensor:
    """``p ΣT - T`` times the multipliers of the rows. Overwrites p where nobody can notice."""
    dim = class_dim(p)
    if target.is_floating_point():
        smooth = _smooth(target, smoothing)
        effective = smooth if weight is None else smooth * _per_class(weight, p)
        total = effective.sum(dim, keepdim=True)
        return onto(
            onto(onto(p, "mul", total), "sub", effective),
            "mul",
            _row_scale(multiplier, reduction, p),
        )
    # The few numbers per row are scaled, not the many per class.
    index, scale, hit = index_rows(multiplier, target, weight, ignore, reduction, dim)
    if not smoothing:
        return onto(p, "mul", hit).scatter_add_(dim, index, -hit)
    hit, share = hit * (1 - smoothing), scale * (smoothing / max(p.shape[dim], 1))
    spread = share if weight is None else share * _per_class(weight, p)
    total = hit + share * (p.shape[dim] if weight is None else weight.sum())
    return onto(onto(p, "mul", total), "sub", spread).scatter_add_(dim, index, -hit)


def _cross_entropy_samples(make: Maker) -> Iterator[Sample]:
    yield sample(make(4, 3), make.integers(3, 4))
    yield sample(make(3), make.integers(3), label_smoothing=0.2)
    ignoring = torch.tensor([[1, 0], [2, 1]], device=make.device)
    weight = make.constant(3, positive=True)
    for reduction in ("none", "sum", "mean"):
        yield sample(
            make(2, 3, 2),
            ignoring,
            weight,
            ignore_index=1,
            reduction=reduction,
            label_smoothing=0.1,
        )
    yield sample(make(2, 3, 2), make(2, 3, 2), make(3), label_smoothing=0.1)
    yield sample(make(2, 3), make(2, 3), reduction="none")
    yield sample(make(3), make(3), make.constant(3, positive=True), reduction="sum")
    yield sample(make(0, 3), make.integers(3, 0), reduction="sum")


@register(F.cross_entropy, modules=[nn.CrossEntropyLoss], samples=_cross_entropy_samples)
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy between logits and targets, as :func:`torch.nn.functional.cross_entropy`.

    Args:
        input: logits ``(C,)``, ``(N, C)`` or ``(N, C, d1, ...)``.
        target: class indices, shape of ``input`` without ``C``, or probabilities, shape of
            ``input``.
        weight: ``(C,)``, a weight of each class; differentiable with probability targets.
        size_average: superseded by ``reduction``.
        ignore_index: rows with this class index do not count.
        reduce: superseded by ``reduction``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        label_smoothing: in [0, 1].

    Returns:
        A scalar, or the row losses for ``reduction="none"``.

    Raises:
        RuntimeError: if ``weight`` requires a gradient with index targets.
    """
    if not target.is_floating_point():
        refuse_gradient("cross_entropy", "weight", weight)
    reduction = legacy_reduction(size_average, reduce, reduction)
    return CrossEntropy.call(input, target, weight, ignore_index, reduction, label_smoothing)
