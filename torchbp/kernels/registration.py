"""Schemas, fake and vmap rules of the first kernels, and their registration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .table import add, batch_first, vmap_one_by_one


def _fake_bias_act(x: Tensor, bias: Tensor | None, act: str, alpha: float) -> Tensor:
    reference.check_bias_act(x, bias, act)
    return reference.like_input(x, bias)


def _fake_bias_act_backward(
    grad_output: Tensor, x: Tensor, bias: Tensor | None, act: str, alpha: float
) -> tuple[Tensor, Tensor]:
    reference.check_bias_act(x, bias, act)
    reference.check_same(grad_output, "grad_output", x, "x")
    return reference.like_input(x, bias), x.new_empty(0 if bias is None else x.shape[-1])


def _fake_blame_reduce(
    activation: Tensor, error: Tensor, unit_dim: int, gradient: bool
) -> tuple[Tensor, Tensor]:
    dim = reference.check_blame_reduce(activation, error, unit_dim)
    dtype = reference.sums_dtype(activation)
    samples, units = activation.shape[0], activation.shape[dim]
    return (
        activation.new_empty((samples, units), dtype=dtype),
        activation.new_empty((3, units), dtype=dtype),
    )


def _fake_blame_reduce_into(
    activation: Tensor,
    error: Tensor,
    unit_dim: int,
    gradient: bool,
    contribution: Tensor,
    stats: Tensor,
) -> None:
    reference.check_blame_reduce_into(activation, error, unit_dim, contribution, stats)


def _fake_blame_settle(
    contributions: Sequence[Tensor],
    stats: Sequence[Tensor],
    losses: Tensor,
    labels: Tensor | None,
    n_classes: int,
    scale: float,
    kinds: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    reference.check_blame_settle(contributions, stats, losses, labels, n_classes, scale, kinds)
    units = sum(c.shape[1] for c in contributions)
    return (
        losses.new_empty((6, units)),
        losses.new_empty((0 if labels is None else n_classes, units)),
        losses.new_empty((len(losses), len(contributions))),
    )


def _fake_conv_grad_weight(
    grad_output: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    settings = kernel, stride, padding, dilation, groups
    return x.new_empty(reference.check_conv_grad_weight(grad_output, x, *settings))


def _fake_elementwise_backward(
    grad_output: Tensor, kept: Tensor, function: int, a: float, b: float
) -> Tensor:
    reference.check_elementwise_backward(grad_output, kept, function)
    return torch.empty_like(kept)


def _fake_softmax_backward(grad_output: Tensor, output: Tensor, logarithm: bool) -> Tensor:
    reference.check_same(grad_output, "grad_output", output, "output")
    return torch.empty_like(output, memory_format=torch.contiguous_format)


def _fake_layer_norm_backward(
    grad_output: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    dims: int,
) -> tuple[Tensor, Tensor, Tensor]:
    reference.check_layer_norm(grad_output, x, mean, rstd, weight, dims)
    shape = x.shape[x.dim() - dims :]
    of_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    return of_x, rstd.new_empty(shape), rstd.new_empty(shape)


def _fake_batch_norm_backward(
    grad_output: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    reference.check_batch_norm(grad_output, x, mean, rstd, weight, training)
    channels = x.shape[1]
    return reference.like_channels(x), rstd.new_empty(channels), rstd.new_empty(channels)


def _batched_preactivation(
    batch: int, x: Tensor, x_dim: int | None, bias: Tensor, bias_dim: int | None
) -> Tensor:
    """``x + bias``, batch first, where the bias may differ from one batch entry to the next."""
    x, bias = batch_first(x, x_dim, batch), batch_first(bias, bias_dim, batch)
    return x + bias.view(batch, *[1] * (x.dim() - 2), -1)


def _vmap_bias_act(
    info: Any,
    in_dims: Sequence[int | None],
    x: Tensor,
    bias: Tensor | None,
    act: str,
    alpha: float,
) -> tuple[Tensor, int]:
    op = torch.ops.torchbp.bias_act.default
    if bias is not None and in_dims[1] is not None:
        z = _batched_preactivation(info.batch_size, x, in_dims[0], bias, in_dims[1])
        return op(z, None, act, alpha), 0
    return op(batch_first(x, in_dims[0], info.batch_size), bias, act, alpha), 0


def _vmap_bias_act_backward(
    info: Any,
    in_dims: Sequence[int | None],
    grad_output: Tensor,
    x: Tensor,
    bias: Tensor | None,
    act: str,
    alpha: float,
) -> tuple[tuple[Tensor, Tensor], tuple[int, int | None]]:
    op = torch.ops.torchbp.bias_act_backward.default
    batch = info.batch_size
    grad_output = batch_first(grad_output, in_dims[0], batch)
    if bias is None:
        x = batch_first(x, in_dims[1], batch)
        return op(grad_output, x, None, act, alpha), (0, None)
    z = _batched_preactivation(batch, x, in_dims[1], bias, in_dims[2])
    grad_input, _ = op(grad_output, z, None, act, alpha)
    grad_bias = reference.up(grad_input).sum_to_size(batch, *[1] * (z.dim() - 2), z.shape[-1])
    return (grad_input, grad_bias.reshape(batch, -1).to(x.dtype)), (0, 0)


def _vmap_elementwise_backward(
    info: Any,
    in_dims: Sequence[int | None],
    grad_output: Tensor,
    kept: Tensor,
    function: int,
    a: float,
    b: float,
) -> tuple[Tensor, int]:
    grad_output = batch_first(grad_output, in_dims[0], info.batch_size)
    kept = batch_first(kept, in_dims[1], info.batch_size)
    return torch.ops.torchbp.elementwise_backward.default(grad_output, kept, function, a, b), 0


def _vmap_softmax_backward(
    info: Any, in_dims: Sequence[int | None], grad_output: Tensor, output: Tensor, logarithm: bool
) -> tuple[Tensor, int]:
    pair = [
        batch_first(grad_output, in_dims[0], info.batch_size),
        batch_first(output, in_dims[1], info.batch_size),
    ]
    # A scalar is a row of its own, and a batch of them is none.
    rows = [t[..., None] if t.dim() == 1 else t for t in pair]
    result = torch.ops.torchbp.softmax_backward.default(*rows, logarithm)
    return result.reshape(pair[1].shape), 0


batch_norm_backward = add(
    "batch_norm_backward(Tensor grad_output, Tensor x, Tensor mean, Tensor rstd, Tensor? weight,"
    " bool training) -> (Tensor, Tensor, Tensor)",
    reference.batch_norm_backward,
    _fake_batch_norm_backward,
    vmap_one_by_one("batch_norm_backward"),
)
bias_act = add(
    "bias_act(Tensor x, Tensor? bias, str act, float alpha) -> Tensor",
    reference.bias_act,
    _fake_bias_act,
    _vmap_bias_act,
)
bias_act_backward = add(
    "bias_act_backward(Tensor grad_output, Tensor x, Tensor? bias, str act, float alpha)"
    " -> (Tensor, Tensor)",
    reference.bias_act_backward,
    _fake_bias_act_backward,
    _vmap_bias_act_backward,
)
blame_reduce = add(
    "blame_reduce(Tensor activation, Tensor error, int unit_dim, bool gradient)"
    " -> (Tensor, Tensor)",
    reference.blame_reduce,
    _fake_blame_reduce,
    vmap_one_by_one("blame_reduce"),
)
blame_reduce_into = add(
    "blame_reduce_into(Tensor activation, Tensor error, int unit_dim, bool gradient,"
    " Tensor(a!) contribution, Tensor(b!) stats) -> ()",
    reference.blame_reduce_into,
    _fake_blame_reduce_into,
)
blame_settle = add(
    "blame_settle(Tensor[] contributions, Tensor[] stats, Tensor losses, Tensor? labels,"
    " int n_classes, float scale, int[] kinds) -> (Tensor, Tensor, Tensor)",
    reference.blame_settle,
    _fake_blame_settle,
)
conv_grad_weight = add(
    "conv_grad_weight(Tensor grad_output, Tensor x, int[] kernel, int[] stride, int[] padding,"
    " int[] dilation, int groups) -> Tensor",
    reference.conv_grad_weight,
    _fake_conv_grad_weight,
    vmap_one_by_one("conv_grad_weight"),
)
elementwise_backward = add(
    "elementwise_backward(Tensor grad_output, Tensor kept, int function, float a, float b)"
    " -> Tensor",
    reference.elementwise_backward,
    _fake_elementwise_backward,
    _vmap_elementwise_backward,
)
layer_norm_backward = add(
    "layer_norm_backward(Tensor grad_output, Tensor x, Tensor? mean, Tensor rstd, Tensor? weight,"
    " int dims) -> (Tensor, Tensor, Tensor)",
    reference.layer_norm_backward,
    _fake_layer_norm_backward,
    vmap_one_by_one("layer_norm_backward"),
)
softmax_backward = add(
    "softmax_backward(Tensor grad_output, Tensor output, bool logarithm) -> Tensor",
    reference.softmax_backward,
    _fake_softmax_backward,
    _vmap_softmax_backward,
)
