"""The operators ``torch.ops.torchbp.*``: schemas, reference, shape and vmap rules.

The compiled extension brings the schemas and its CPU and CUDA kernels. Without it the schemas are
defined here, so that nobody else has to know which of the two is there.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import reference

# cpp/module.cpp states the same ones.
SCHEMAS = (
    "batch_norm_backward(Tensor grad_output, Tensor x, Tensor mean, Tensor rstd, Tensor? weight,"
    " bool training) -> (Tensor, Tensor, Tensor)",
    "bias_act(Tensor x, Tensor? bias, str act, float alpha) -> Tensor",
    "bias_act_backward(Tensor grad_output, Tensor x, Tensor? bias, str act, float alpha)"
    " -> (Tensor, Tensor)",
    "blame_reduce(Tensor activation, Tensor error, int unit_dim, bool gradient)"
    " -> (Tensor, Tensor)",
    "blame_settle(Tensor contribution, Tensor losses, Tensor? labels, int n_classes, float scale,"
    " int kind, int[] sizes) -> (Tensor, Tensor, Tensor)",
    "conv_grad_weight(Tensor grad_output, Tensor x, int[] kernel, int[] stride, int[] padding,"
    " int[] dilation, int groups) -> Tensor",
    "elementwise_backward(Tensor grad_output, Tensor kept, int function, float a, float b)"
    " -> Tensor",
    "layer_norm_backward(Tensor grad_output, Tensor x, Tensor? mean, Tensor rstd, Tensor? weight,"
    " int dims) -> (Tensor, Tensor, Tensor)",
    "softmax_backward(Tensor grad_output, Tensor output, bool logarithm) -> Tensor",
)

_libraries: list[torch.library.Library] = []  # an operator lives as long as its Library


def load() -> tuple[ModuleType | None, str]:
    """Register every operator.

    Returns:
        The compiled extension and "", or None and the reason why there is none.
    """
    extension, reason = _extension()
    if extension is None:
        definitions = torch.library.Library("torchbp", "DEF")
        for schema in SCHEMAS:
            definitions.define(schema, tags=torch.Tag.pt2_compliant_tag)
        _libraries.append(definitions)
    # For every backend without a kernel of its own.
    fallback = torch.library.Library("torchbp", "IMPL")
    for schema in SCHEMAS:
        name = schema.partition("(")[0]
        fallback.impl(name, getattr(reference, name), "CompositeExplicitAutograd")
    _libraries.append(fallback)
    for name, fake in (
        ("batch_norm_backward", _fake_batch_norm_backward),
        ("bias_act", _fake_bias_act),
        ("bias_act_backward", _fake_bias_act_backward),
        ("blame_reduce", _fake_blame_reduce),
        ("blame_settle", _fake_blame_settle),
        ("layer_norm_backward", _fake_layer_norm_backward),
        ("conv_grad_weight", _fake_conv_grad_weight),
        ("elementwise_backward", _fake_elementwise_backward),
        ("softmax_backward", _fake_softmax_backward),
    ):
        torch.library.register_fake(f"torchbp::{name}", fake)
    for name, rule in (
        ("bias_act", _vmap_bias_act),
        ("bias_act_backward", _vmap_bias_act_backward),
        ("blame_reduce", _vmap_blame_reduce),
        ("batch_norm_backward", _vmap_one_by_one(torch.ops.torchbp.batch_norm_backward)),
        ("layer_norm_backward", _vmap_one_by_one(torch.ops.torchbp.layer_norm_backward)),
        ("conv_grad_weight", _vmap_conv_grad_weight),
        ("elementwise_backward", _vmap_elementwise_backward),
        ("softmax_backward", _vmap_softmax_backward),
    ):
        torch.library.register_vmap(f"torchbp::{name}", rule)
    return extension, reason


def _extension() -> tuple[ModuleType | None, str]:
    if os.environ.get("TORCHBP_REFERENCE") == "1":
        return None, "TORCHBP_REFERENCE=1"
    try:
        return importlib.import_module("torchbp._C"), ""
    except ImportError as error:
        return None, str(error)


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
    dtype = torch.float64 if activation.dtype == torch.float64 else torch.float32
    samples, units = activation.shape[0], activation.shape[dim]
    return (
        activation.new_empty((samples, units), dtype=dtype),
        activation.new_empty((3, units), dtype=dtype),
    )


def _fake_blame_settle(
    contribution: Tensor,
    losses: Tensor,
    labels: Tensor | None,
    n_classes: int,
    scale: float,
    kind: int,
    sizes: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    reference.check_blame_settle(contribution, losses, labels, n_classes, scale, kind, sizes)
    samples, units = contribution.shape
    return (
        contribution.new_empty((3, units)),
        contribution.new_empty((0 if labels is None else n_classes, units)),
        contribution.new_empty((samples, len(sizes))),
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


def _vmap_one_by_one(op: Any) -> Any:
    """The rule that calls ``op``, which returns a tuple of tensors, for every batch entry."""

    def rule(info: Any, in_dims: Sequence[int | None], *args: Any) -> Any:
        calls = [
            op(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        results = tuple(torch.stack(parts) for parts in zip(*calls, strict=True))
        return results, (0,) * len(results)

    return rule


def _batch_first(t: Tensor, dim: int | None, batch: int) -> Tensor:
    return t.expand(batch, *t.shape) if dim is None else t.movedim(dim, 0)


def _batched_preactivation(
    batch: int, x: Tensor, x_dim: int | None, bias: Tensor, bias_dim: int | None
) -> Tensor:
    """``x + bias``, batch first, where the bias may differ from one batch entry to the next."""
    x, bias = _batch_first(x, x_dim, batch), _batch_first(bias, bias_dim, batch)
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
    return op(_batch_first(x, in_dims[0], info.batch_size), bias, act, alpha), 0


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
    grad_output = _batch_first(grad_output, in_dims[0], batch)
    if bias is None:
        x = _batch_first(x, in_dims[1], batch)
        return op(grad_output, x, None, act, alpha), (0, None)
    z = _batched_preactivation(batch, x, in_dims[1], bias, in_dims[2])
    grad_input, _ = op(grad_output, z, None, act, alpha)
    grad_bias = reference.up(grad_input).sum_to_size(batch, *[1] * (z.dim() - 2), z.shape[-1])
    return (grad_input, grad_bias.reshape(batch, -1).to(x.dtype)), (0, 0)


def _vmap_conv_grad_weight(
    info: Any, in_dims: Sequence[int | None], grad_output: Tensor, x: Tensor, *settings: Any
) -> tuple[Tensor, int]:
    op = torch.ops.torchbp.conv_grad_weight.default
    pairs = zip(
        _batch_first(grad_output, in_dims[0], info.batch_size).unbind(0),
        _batch_first(x, in_dims[1], info.batch_size).unbind(0),
        strict=True,
    )
    return torch.stack([op(g, x, *settings) for g, x in pairs]), 0


def _vmap_elementwise_backward(
    info: Any,
    in_dims: Sequence[int | None],
    grad_output: Tensor,
    kept: Tensor,
    function: int,
    a: float,
    b: float,
) -> tuple[Tensor, int]:
    grad_output = _batch_first(grad_output, in_dims[0], info.batch_size)
    kept = _batch_first(kept, in_dims[1], info.batch_size)
    return torch.ops.torchbp.elementwise_backward.default(grad_output, kept, function, a, b), 0


def _vmap_softmax_backward(
    info: Any, in_dims: Sequence[int | None], grad_output: Tensor, output: Tensor, logarithm: bool
) -> tuple[Tensor, int]:
    pair = [
        _batch_first(grad_output, in_dims[0], info.batch_size),
        _batch_first(output, in_dims[1], info.batch_size),
    ]
    # A scalar is a row of its own, and a batch of them is none.
    rows = [t[..., None] if t.dim() == 1 else t for t in pair]
    result = torch.ops.torchbp.softmax_backward.default(*rows, logarithm)
    return result.reshape(pair[1].shape), 0


def _vmap_blame_reduce(
    info: Any,
    in_dims: Sequence[int | None],
    activation: Tensor,
    error: Tensor,
    unit_dim: int,
    gradient: bool,
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    op = torch.ops.torchbp.blame_reduce.default
    pairs = zip(
        _batch_first(activation, in_dims[0], info.batch_size).unbind(0),
        _batch_first(error, in_dims[1], info.batch_size).unbind(0),
        strict=True,
    )
    contributions, stats = zip(*(op(a, d, unit_dim, gradient) for a, d in pairs), strict=True)
    return (torch.stack(contributions), torch.stack(stats)), (0, 0)
