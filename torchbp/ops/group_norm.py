"""Normalisation of every sample over groups of channels, and over single ones."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _are_functorch_transforms_active

from torchbp import kernels
from torchbp.ops.base import Op, midpoint, wide
from torchbp.ops.batch_norm import BatchNorm
from torchbp.ops.norm import (
    Moments,
    affine_jvp,
    all_but_channel,
    as_parameter,
    as_sums,
    has_backward,
    of_dtype,
    per_channel,
    secant,
    shares,
    sum_over,
    tangent,
)
from torchbp.ops.registry import Maker, Sample, register, sample
from torchbp.ops.relevance import Rule, Shares
from torchbp.ops.sample_factors import Factors, of_channels

_WITHIN = (2,)


def _grouped(x: Tensor, groups: int) -> Tensor:
    """``(N, C, *)`` as ``(N, groups, elements of one group)``."""
    return x.reshape(x.shape[0], groups, math.prod(x.shape[1:]) // groups)


class GroupNorm(Op):
    """``y = x̂ w + b`` with mean and variance over groups of channels, ``w`` and ``b`` per channel.

    Backward: ``∂b = Σ g``, ``∂w = Σ g x̂`` per channel, and g w goes through ``x̂`` (Wu & He 2018).
    Secant: ``x̂ w`` by midpoints, then through ``x̂``; see :class:`torchbp.ops.norm.Moments`. LRP:
    the standard deviation counts as a constant (:func:`torchbp.ops.norm.shares`).
    """

    autocast = {"cuda": "fp32"}

    @staticmethod
    def forward(
        x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        samples, channels, *positions = x.shape
        # torch's kernel takes the layout of what it gets for granted.
        weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
        x = x if _is_channels_last(x) else x.contiguous()
        count = math.prod(positions)
        return torch.native_group_norm(x, weight, bias, samples, channels, count, groups, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, ctx.groups, weight, bias, ctx.eps = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.save_for_forward(x, weight, bias, mean, rstd)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * 5
        x, weight, bias, mean, rstd = ctx.saved_tensors
        needs_x, _, needs_weight, needs_bias, _ = ctx.needs_input_grad
        if has_backward(grad_output, x):
            w = as_parameter(weight, x)
            of_x, of_weight, of_bias = kernels.batch_norm_backward(
                grad_output, x, as_sums(mean, x), as_sums(rstd, x), w, True
            )
            return (
                of_x if needs_x else None,
                None,
                of_dtype(of_weight, weight) if needs_weight else None,
                of_dtype(of_bias, bias) if needs_bias else None,
                None,
            )
        xhat, rstd = _normalised(x, mean, rstd, ctx.groups, ctx.eps)
        over, g = all_but_channel(x), wide(grad_output)
        through = g if weight is None else g * per_channel(wide(weight), x)
        grad_x = None
        if needs_x:
            grad_x = tangent(_grouped(through, ctx.groups), xhat, rstd, _WITHIN)
            grad_x = grad_x.reshape(x.shape).to(x.dtype)
        return (
            grad_x,
            None,
            sum_over(g * xhat.reshape(x.shape), over, weight) if needs_weight else None,
            sum_over(g, over, bias) if needs_bias else None,
            None,
        )

    @staticmethod
    def jvp(
        ctx: Any, tx: Tensor | None, _: Any, tw: Tensor | None, tb: Tensor | None, __: Any
    ) -> tuple[Tensor | None, None, None]:
        x, weight, _bias, _mean, _rstd = ctx.saved_tensors
        weight, tw, tb = (None if t is None else per_channel(t, x) for t in (weight, tw, tb))
        moments = Moments(_grouped(wide(x), ctx.groups), _WITHIN, ctx.eps)
        xhat, t = moments.normalised, None
        if tx is not None:
            grouped = _grouped(wide(tx), ctx.groups)
            t = tangent(grouped, xhat, moments.rstd, _WITHIN).reshape(x.shape)
        return affine_jvp(x, t, xhat.reshape(x.shape), weight, tw, tb), None, None

    @staticmethod
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        (x, groups, weight, bias, eps), (x0, _, weight0, _, _) = args, args0
        now, ref = (Moments(_grouped(t, groups), _WITHIN, eps) for t in (x, x0))
        xhat = midpoint(now.normalised, ref.normalised).reshape(x.shape)
        through, over = multiplier, all_but_channel(x)
        if weight is not None:
            through = multiplier * per_channel(midpoint(weight, weight0), x)
        return (
            secant(_grouped(through, groups), now, ref).reshape(x.shape),
            None,
            None if weight is None else sum_over(multiplier * xhat, over, weight),
            None if bias is None else sum_over(multiplier, over, bias),
            None,
        )

    @classmethod
    def sample_factors(cls, grad_output: Tensor, args: tuple[Any, ...], output: Any) -> Factors:
        x, groups, weight, bias, eps = args
        xhat = cls.forward(x, groups, None, None, eps)[0]
        of_weight = of_channels(grad_output * xhat, weight)
        return None, None, of_weight, of_channels(grad_output, bias), None

    @classmethod
    def relevance(cls, relevance: Tensor, rule: Rule, args: tuple[Any, ...], output: Any) -> Shares:
        x, groups, weight, _bias, eps = args
        grouped = _grouped(x, groups)
        scale = Moments(grouped, _WITHIN, eps).rstd.expand(grouped.shape).reshape(x.shape)
        if weight is not None:
            scale = scale * per_channel(weight, x)
        r, x_, y, scale = (_grouped(t, groups) for t in (relevance, x, output[0], scale))
        of_x = shares(r, x_, y, scale, _WITHIN, rule)
        return of_x.reshape(x.shape), *(None,) * 4


def _is_channels_last(x: Tensor) -> bool:
    """Whether torch's kernel reads ``x`` as it is, channels last: on the CPU, outside vmap.

    It refuses strides of dimensions of size 1 that are not as torch itself sets them.
    """
    if x.device.type != "cpu" or x.dim() not in (4, 5) or _are_functorch_transforms_active():
        return False
    last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    if not x.is_contiguous(memory_format=last):
        return False
    if 1 not in x.shape:
        return True
    return x.stride() == torch.empty(x.shape, device="meta", memory_format=last).stride()


def _normalised(
    x: Tensor, mean: Tensor, rstd: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    """``x̂`` and ``r``: from the saved statistics, or anew where backward is differentiated."""
    grouped = _grouped(wide(x), groups)
    if torch.is_grad_enabled():  # the saved ones are constants to autograd
        moments = Moments(grouped, _WITHIN, eps)
        return moments.normalised, moments.rstd
    rstd = wide(rstd).unsqueeze(-1)
    return (grouped - wide(mean).unsqueeze(-1)) * rstd, rstd


def _group_samples(make: Maker) -> Iterator[Sample]:
    yield sample(make(2, 4, 3), 2, make(4), make(4))
    yield sample(make(2, 4, 2, 2), 1, make(4), make(4), eps=1e-3)
    yield sample(make(2, 3, 1, 2, 2), 3)
    yield sample(make(3, 6), 2, make(6))
    yield sample(make(0, 4, 2), 2, make(4), make(4))


@register(F.group_norm, replaces=[torch.group_norm], modules=[nn.GroupNorm], samples=_group_samples)
def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise groups of channels of every sample, as :func:`torch.nn.functional.group_norm`.

    Args:
        input: ``(N, C, *)``.
        num_groups: how many groups the channels are divided into; divides ``C``.
        weight: ``(C,)`` scale, or ``None``.
        bias: ``(C,)`` shift, or ``None``.
        eps: added to the variance.

    Returns:
        Shape of ``input``.

    Raises:
        ValueError: if a group has a single value.
        RuntimeError: if the shapes do not fit, or the groups do not divide the channels.
    """
    if input.dim() < 2:
        raise RuntimeError(f"group_norm: input must have at least 2 dims, but has {input.dim()}")
    if num_groups <= 0:
        raise RuntimeError(f"group_norm: num_groups must be positive, got {num_groups}")
    samples, channels, *positions = input.shape
    F._verify_batch_size(  # type: ignore[attr-defined]
        [samples * channels // num_groups, num_groups, *positions]
    )
    if channels % num_groups:
        raise RuntimeError(
            f"group_norm: num_groups must divide the {channels} channels, got {num_groups}"
        )
    return GroupNorm.call(input, num_groups, weight, bias, eps)[0]


def _instance_samples(make: Maker) -> Iterator[Sample]:
    def running(n: int) -> tuple[Tensor, Tensor]:
        return make.constant(n), make.constant(n, positive=True)

    yield sample(make(2, 3, 4))
    yield sample(make(2, 3, 2, 2), None, None, make(3), make(3), eps=1e-3)
    yield sample(make(2, 3, 2, 2), *running(3), make(3), make(3), False)
    yield sample(make(2, 2, 3), *running(2), make(2), make(2), True, 0.3)
    yield sample(make(1, 2, 1, 2, 2), None, None, make(2))


@register(
    F.instance_norm,
    modules=[nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d],
    samples=_instance_samples,
)
def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise every channel of every sample, as :func:`torch.nn.functional.instance_norm`.

    It is :class:`~torchbp.ops.batch_norm.BatchNorm` of one sample with ``N C`` channels (Ulyanov et
    al. 2016).

    Args:
        input: ``(N, C, *)``.
        running_mean: ``(C,)``; with ``use_input_stats`` updated in place, used otherwise.
        running_var: ``(C,)``; likewise (with the unbiased variance).
        weight: ``(C,)`` scale, or ``None``.
        bias: ``(C,)`` shift, or ``None``.
        use_input_stats: normalise by the statistics of the input.
        momentum: weight of the new statistics in the running ones.
        eps: added to the variance.

    Returns:
        Shape of ``input``.

    Raises:
        ValueError: with ``use_input_stats``, if a channel has a single value.
        RuntimeError: without, if the running statistics are missing.
    """
    if use_input_stats:
        F._verify_spatial_size(input.size())  # type: ignore[attr-defined]
    elif running_mean is None or running_var is None:
        raise RuntimeError(
            "instance_norm: without use_input_stats, running_mean and running_var are needed"
        )
    samples, channels, *positions = input.shape

    def each(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.repeat(samples)

    output, _, _, *updated = BatchNorm.call(
        input.reshape(1, samples * channels, *positions),
        each(weight), each(bias), each(running_mean), each(running_var),
        use_input_stats, momentum, eps,
    )  # fmt: skip
    for running, new in zip((running_mean, running_var), updated, strict=True):
        if running is not None and new is not None:
            running.copy_(new.reshape(samples, channels).mean(0))
    return output.reshape(input.shape)
