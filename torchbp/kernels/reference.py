"""The kernels in plain PyTorch: the definition that the compiled ones are tested against.

They serve every device that has no compiled kernel. Sums and intermediate values of ``bfloat16``
and ``float16`` tensors are kept in ``float32``, as the compiled kernels keep them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .reference_common import check_alike, check_dtype
from .reference_common import check_same as check_same
from .reference_common import sums_dtype as sums_dtype
from .reference_common import up as up
from .reference_conv import check_conv_grad_weight as check_conv_grad_weight
from .reference_conv import conv_grad_weight as conv_grad_weight
from .reference_elementwise import ACTIVATIONS as ACTIVATIONS
from .reference_elementwise import ELEMENTWISE as ELEMENTWISE
from .reference_elementwise import bias_act as bias_act
from .reference_elementwise import bias_act_backward as bias_act_backward
from .reference_elementwise import check_bias_act as check_bias_act
from .reference_elementwise import check_elementwise_backward as check_elementwise_backward
from .reference_elementwise import elementwise_backward as elementwise_backward
from .reference_elementwise import like_input as like_input
from .reference_elementwise import softmax_backward as softmax_backward


def check_blame_reduce(activation: Tensor, error: Tensor, unit_dim: int) -> int:
    """Raise RuntimeError where an argument of `blame_reduce` is not as documented.

    Returns:
        ``unit_dim`` counted from the front.
    """
    check_dtype(activation, "activation")
    dims = activation.dim()
    if dims < 2:
        raise RuntimeError(f"activation: expected samples and units, at least 2 dims, got {dims}")
    dim = unit_dim + dims if unit_dim < 0 else unit_dim
    if dim not in (1, dims - 1):
        raise RuntimeError(f"unit_dim: expected 1 or the last dim of {dims}, got {unit_dim}")
    check_same(error, "error", activation, "activation")
    return dim


def blame_reduce(
    activation: Tensor, error: Tensor, unit_dim: int, gradient: bool
) -> tuple[Tensor, Tensor]:
    """Reference of `torchbp.kernels.blame_reduce`; same arguments, result and errors."""
    dim = check_blame_reduce(activation, error, unit_dim)
    # Samples, units, positions; no position dim counts as one position.
    a = up(activation).movedim(dim, 1)[..., None].flatten(2)
    delta = up(error).movedim(dim, 1)[..., None].flatten(2)
    contribution = (delta if gradient else a * delta).sum(2)
    zeros = (a == 0).sum((0, 2)).to(a.dtype)
    return contribution, torch.stack([zeros, a.square().sum((0, 2)), delta.square().sum((0, 2))])


def check_blame_reduce_into(
    activation: Tensor,
    error: Tensor,
    unit_dim: int,
    contribution: Tensor,
    stats: Tensor,
) -> None:
    """Raise RuntimeError where an argument of `blame_reduce_into` is not as documented."""
    units = activation.shape[check_blame_reduce(activation, error, unit_dim)]
    dtype = sums_dtype(activation)
    for name, result, rows in (
        ("contribution", contribution, activation.shape[0]),
        ("stats", stats, 3),
    ):
        if result.shape != (rows, units):
            raise RuntimeError(f"{name}: expected shape [{rows}, {units}]")
        if result.dtype != dtype:
            raise RuntimeError(
                f"{name}: expected float64 for a float64 activation, float32 for others"
            )
        if result.device != activation.device:
            raise RuntimeError(f"{name}: expected the device of activation")
        if not result.is_contiguous():
            raise RuntimeError(f"{name}: expected a contiguous tensor to write into")


def blame_reduce_into(
    activation: Tensor,
    error: Tensor,
    unit_dim: int,
    gradient: bool,
    contribution: Tensor,
    stats: Tensor,
) -> None:
    """Reference of `torchbp.kernels.blame_reduce_into`; same arguments and errors."""
    check_blame_reduce_into(activation, error, unit_dim, contribution, stats)
    results = blame_reduce(activation, error, unit_dim, gradient)
    for result, value in zip((contribution, stats), results, strict=True):
        result.copy_(value)


# In the order of their numbers.
BLAME_KINDS = ("taylor", "log_odds", "squared")


def _check_one_per_sample(t: Tensor, name: str, samples: int) -> None:
    if t.dim() != 1 or t.shape[0] != samples:
        raise RuntimeError(
            f"{name}: expected one for each of {samples} samples, got shape {tuple(t.shape)}"
        )


def check_blame_settle(
    contributions: Sequence[Tensor],
    stats: Sequence[Tensor],
    losses: Tensor,
    labels: Tensor | None,
    n_classes: int,
    scale: float,
    kinds: Sequence[int],
) -> None:
    """Raise RuntimeError where an argument of `blame_settle` is not as documented."""
    if not contributions:
        raise RuntimeError("contributions: expected at least one layer, got none")
    first, layers = contributions[0], len(contributions)
    for name, given in (("stats", stats), ("kinds", kinds)):
        if len(given) != layers:
            raise RuntimeError(
                f"{name}: expected one for each of {layers} layers, got {len(given)}"
            )
    for c, s in zip(contributions, stats, strict=True):
        _check_settle_layer(c, s, first)
    samples = len(first)
    _check_one_per_sample(losses, "losses", samples)
    check_alike(losses, "losses", first, "the contributions")
    if labels is not None:
        _check_one_per_sample(labels, "labels", samples)
        if labels.dtype != torch.int64:
            raise RuntimeError(f"labels: expected int64, got {labels.dtype}")
        if labels.device != first.device:
            raise RuntimeError("labels: expected the device of the contributions")
    if n_classes < 0:
        raise RuntimeError(f"n_classes: expected 0 or more, got {n_classes}")
    if scale == 0:
        raise RuntimeError("scale: expected a number other than 0")
    for kind in kinds:
        if kind not in range(len(BLAME_KINDS)):
            raise RuntimeError(
                f"kinds: expected 0 (taylor), 1 (log_odds) or 2 (squared), got {kind}"
            )


def _check_settle_layer(contribution: Tensor, stats: Tensor, first: Tensor) -> None:
    if contribution.dtype not in (torch.float32, torch.float64):
        raise RuntimeError(f"contributions: expected float32 or float64, got {contribution.dtype}")
    if contribution.dim() != 2:
        raise RuntimeError(
            f"contributions: expected samples x units, got {contribution.dim()} dims"
        )
    check_alike(contribution, "contributions", first, "the first of them")
    samples, units = contribution.shape
    if samples != len(first):
        raise RuntimeError(
            f"contributions: expected {len(first)} samples, as the first has, got {samples}"
        )
    if stats.shape != (3, units):
        raise RuntimeError(f"stats: expected 3 x {units}, got shape {tuple(stats.shape)}")
    check_alike(stats, "stats", first, "the contributions")


def settled_blame(taylor: Tensor, losses: Tensor, kind: int) -> Tensor:
    """Blame ``[N, U]`` of one of `BLAME_KINDS`, from its first order and the losses ``[N]``."""
    loss = losses[:, None]
    if BLAME_KINDS[kind] == "taylor":
        return taylor
    if BLAME_KINDS[kind] == "squared":
        return torch.where(loss > 0, taylor - taylor * taylor / (4 * loss), taylor)
    r = -torch.expm1(-loss)
    gain = torch.where(r > 0, -taylor / r, 0 * taylor)
    blame = -torch.log1p(r * torch.expm1(gain.clamp(max=80)))
    # Where the first form overflows, or cancels. Both are of log(exp(-l) + r exp(gain)).
    far = (gain > 80) | ((gain < -4) & (loss > 4))
    blame = torch.where(far, -torch.logaddexp(-loss, r.log() + gain), blame)
    return torch.minimum(blame, loss)


def blame_settle(
    contributions: Sequence[Tensor],
    stats: Sequence[Tensor],
    losses: Tensor,
    labels: Tensor | None,
    n_classes: int,
    scale: float,
    kinds: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Reference of `blame_settle`; same results and errors, ``kinds`` are numbers."""
    check_blame_settle(contributions, stats, losses, labels, n_classes, scale, kinds)
    parts = [
        settled_blame(c * (1 / scale), losses, kind)
        for c, kind in zip(contributions, kinds, strict=True)
    ]
    blame = torch.cat(parts, 1)
    of_layers = torch.cat([*stats], 1)
    rows = torch.cat([
        torch.stack([blame.sum(0), blame.abs().sum(0), blame.square().sum(0)]),
        of_layers[:2],
        of_layers[2:] / scale**2,
    ])  # fmt: skip
    per_class = blame.new_zeros(0 if labels is None else n_classes, blame.shape[1])
    if labels is not None:
        # One row more takes the labels out of range.
        row = torch.where((labels >= 0) & (labels < n_classes), labels, n_classes)
        wide = blame.new_zeros(n_classes + 1, blame.shape[1]).index_add_(0, row, blame)
        per_class = wide[:n_classes].clone()
    return rows, per_class, torch.stack([part.sum(1) for part in parts], 1)


def _check_values(t: Tensor, name: str, count: int, x: Tensor) -> None:
    dtype = sums_dtype(x)
    if t.numel() != count:
        raise RuntimeError(f"{name}: expected {count} values, got {t.numel()}")
    if t.dtype != dtype:
        raise RuntimeError(f"{name}: expected {dtype}, got {t.dtype}")
    if t.device != x.device:
        raise RuntimeError(f"{name}: expected the device of x")


def check_parameter(t: Tensor | None, name: str, count: int, x: Tensor) -> None:
    """Raise RuntimeError unless it has ``count`` values, in the dtype of ``x`` or that of sums."""
    if t is None:
        return
    if t.dtype != x.dtype:
        _check_values(t, name, count, x)
        return
    if t.numel() != count:
        raise RuntimeError(f"{name}: expected {count} values, got {t.numel()}")
    check_alike(t, name, x, "x")


def check_layer_norm(
    grad_output: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    dims: int,
) -> None:
    """Raise RuntimeError where an argument of `layer_norm_backward` is not as documented."""
    check_dtype(x, "x")
    if not 0 < dims <= x.dim():
        raise RuntimeError(f"dims: expected 1 to {x.dim()}, got {dims}")
    check_same(grad_output, "grad_output", x, "x")
    rows, columns = math.prod(x.shape[:-dims]), math.prod(x.shape[-dims:])
    if mean is not None:
        _check_values(mean, "mean", rows, x)
    _check_values(rstd, "rstd", rows, x)
    check_parameter(weight, "weight", columns, x)


def layer_norm_backward(
    grad_output: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    dims: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Reference of `torchbp.kernels.layer_norm_backward`; same arguments, results and errors."""
    check_layer_norm(grad_output, x, mean, rstd, weight, dims)
    shape = x.shape[-dims:]
    rows, columns = rstd.numel(), math.prod(shape)
    g, r = up(grad_output).reshape(rows, columns), rstd.reshape(rows, 1)
    centred = up(x).reshape(rows, columns)
    if mean is not None:
        centred = centred - mean.reshape(rows, 1)
    xhat = centred * r
    v = g if weight is None else g * up(weight).reshape(columns)
    through = v - xhat * (v * xhat).mean(1, keepdim=True)
    if mean is not None:
        through = through - v.mean(1, keepdim=True)
    of_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    of_x.copy_((r * through).reshape(x.shape))
    return of_x, (g * xhat).sum(0).reshape(shape), g.sum(0).reshape(shape)


def check_batch_norm(
    grad_output: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    training: bool,
) -> None:
    """Raise RuntimeError where an argument of `batch_norm_backward` is not as documented."""
    check_dtype(x, "x")
    if x.dim() < 2:
        raise RuntimeError(f"x: expected samples and channels, at least 2 dims, got {x.dim()}")
    check_same(grad_output, "grad_output", x, "x")
    samples, channels = x.shape[:2]
    count = channels
    if mean.dim() == 2:
        if not training:
            raise RuntimeError("training: statistics of groups are those of the input")
        groups = mean.shape[1]
        if mean.shape[0] != samples or groups == 0 or channels % groups:
            raise RuntimeError(
                f"mean: expected samples x groups that divide the {channels} channels of {samples} "
                f"samples, got {mean.shape[0]} x {groups}"
            )
        if rstd.shape != mean.shape:
            raise RuntimeError("rstd: expected the shape of mean")
        count = samples * groups
    _check_values(mean, "mean", count, x)
    _check_values(rstd, "rstd", count, x)
    check_parameter(weight, "weight", channels, x)


def like_channels(x: Tensor) -> Tensor:
    """An empty tensor like ``x`` where that is contiguous or channels last; else contiguous."""
    if x.is_contiguous() or x.movedim(1, -1).is_contiguous():
        return torch.empty_like(x)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def batch_norm_backward(
    grad_output: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Reference of `torchbp.kernels.batch_norm_backward`; same arguments, results and errors."""
    check_batch_norm(grad_output, x, mean, rstd, weight, training)
    samples, channels = x.shape[:2]
    per_sample = mean.dim() == 2
    groups = mean.shape[1] if per_sample else channels
    shape = (samples, groups, channels // max(groups, 1), math.prod(x.shape[2:]))
    over = (2, 3) if per_sample else (0, 2, 3)
    g = up(grad_output).reshape(shape)
    mean, rstd = (t.reshape(samples if per_sample else 1, groups, 1, 1) for t in (mean, rstd))
    xhat = (up(x).reshape(shape) - mean) * rstd
    v = g if weight is None else g * up(weight).reshape(1, *shape[1:3], 1)
    through = v
    if training:
        product = (v * xhat).mean(over, keepdim=True)
        through = v - v.mean(over, keepdim=True) - xhat * product
    of_weight, of_bias = (t.sum((0, 3)).reshape(channels) for t in (g * xhat, g))
    return like_channels(x).copy_((rstd * through).reshape(x.shape)), of_weight, of_bias
