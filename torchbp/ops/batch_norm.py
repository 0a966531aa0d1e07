"""Normalisation of every channel over the batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchbp import kernels
from torchbp.ops.base import Op, midpoint, wide
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


class BatchNorm(Op):
    """``y = x̂ w + b`` per channel; training: statistics of the batch; else: running ones.

    Backward in training is that of ``x̂`` over all dimensions but the channel; with running
    statistics the map is affine, ``∂x = g w r``. Secant: likewise. LRP: the standard deviation
    counts as a constant, a running mean as part of the shift (:func:`torchbp.ops.norm.shares`).
    """

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        if training and running_mean is not None and running_var is not None:
            # An op has no side effects: the new statistics are outputs, stored by the caller.
            running_mean, running_var = running_mean.clone(), running_var.clone()
        cudnn = torch.backends.cudnn.enabled
        output, mean, rstd, *_ = torch._batch_norm_impl_index(
            x, weight, bias, running_mean, running_var, training, momentum, eps, cudnn
        )
        return (output, mean, rstd, *((running_mean, running_var) if training else (None, None)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, bias, running_mean, running_var, ctx.training, _, ctx.eps = inputs
        _, mean, rstd, *updated = output
        ctx.mark_non_differentiable(mean, rstd, *(u for u in updated if u is not None))
        ctx.set_materialize_grads(False)
        if not ctx.training:
            mean, rstd = running_mean, running_var
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.save_for_forward(x, weight, bias, mean, rstd)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * 8
        x, weight, bias, mean, rstd = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_constants = ctx.needs_input_grad
        if has_backward(grad_output, x):
            if not ctx.training:
                rstd = torch.rsqrt(wide(rstd) + ctx.eps)
            w = as_parameter(weight, x)
            of_x, of_weight, of_bias = kernels.batch_norm_backward(
                grad_output, x, as_sums(mean, x), as_sums(rstd, x), w, ctx.training
            )
            return (
                of_x if needs_x else None,
                of_dtype(of_weight, weight) if needs_weight else None,
                of_dtype(of_bias, bias) if needs_bias else None,
                *(None,) * 5,
            )
        over = all_but_channel(x)
        xhat, rstd = _normalised(x, mean, rstd, ctx.training, ctx.eps)
        g = wide(grad_output)
        grad_x = None
        if needs_x:
            through = g if weight is None else g * per_channel(wide(weight), x)
            grad_x = tangent(through, xhat, rstd, over) if ctx.training else through * rstd
            grad_x = grad_x.to(x.dtype)
        return (
            grad_x,
            sum_over(g * xhat, over, weight) if needs_weight else None,
            sum_over(g, over, bias) if needs_bias else None,
            *(None,) * 5,
        )

    @staticmethod
    def jvp(
        ctx: Any, tx: Tensor | None, tw: Tensor | None, tb: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, None, None, None, None]:
        x, weight, _bias, mean, rstd = ctx.saved_tensors
        weight, tw, tb = (None if t is None else per_channel(t, x) for t in (weight, tw, tb))
        over = all_but_channel(x)
        if ctx.training:
            moments = Moments(wide(x), over, ctx.eps)
            xhat, rstd = moments.normalised, moments.rstd
        else:
            xhat, rstd = _running(x, mean, rstd, ctx.eps)
        t = None
        if tx is not None:
            t = tangent(wide(tx), xhat, rstd, over) if ctx.training else tx * rstd
        return affine_jvp(x, t, xhat, weight, tw, tb), *(None,) * 4

    @staticmethod
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        (x, weight, bias, *_, training, _, eps), (x0, weight0, *_) = args, args0
        over = all_but_channel(x)
        through = multiplier
        if weight is not None:
            through = multiplier * per_channel(midpoint(weight, weight0), x)
        of_statistics: tuple[Tensor | None, ...] = (None, None)
        if training:
            now, ref = Moments(x, over, eps), Moments(x0, over, eps)
            xhat = midpoint(now.normalised, ref.normalised)
            of_x = secant(through, now, ref)
        else:
            xhat, of_x, of_statistics = _running_secant(through, args, args0)
        return (
            of_x,
            None if weight is None else sum_over(multiplier * xhat, over, weight),
            None if bias is None else sum_over(multiplier, over, bias),
            *of_statistics,
            *(None,) * 3,
        )

    @classmethod
    def sample_factors(cls, grad_output: Tensor, args: tuple[Any, ...], output: Any) -> Factors:
        x, weight, bias, *rest = args
        xhat = cls.forward(x, None, None, *rest)[0]
        of_weight = of_channels(grad_output * xhat, weight)
        return None, of_weight, of_channels(grad_output, bias), *(None,) * 5

    @classmethod
    def relevance(cls, relevance: Tensor, rule: Rule, args: tuple[Any, ...], output: Any) -> Shares:
        x, weight, _bias, mean, var, training, _, eps = args
        over = all_but_channel(x) if training else ()
        rstd = Moments(x, over, eps).rstd if training else _running(x, mean, var, eps)[1]
        scale = rstd if weight is None else rstd * per_channel(weight, x)
        return shares(relevance, x, output[0], scale, over, rule), *(None,) * 7


def _normalised(
    x: Tensor, mean: Tensor, rstd: Tensor, training: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """``x̂`` and ``r``: from the saved statistics, or anew where backward is differentiated."""
    if not training:
        return _running(x, mean, rstd, eps)
    x = wide(x)
    if torch.is_grad_enabled():  # the saved ones are constants to autograd
        moments = Moments(x, all_but_channel(x), eps)
        return moments.normalised, moments.rstd
    rstd = per_channel(wide(rstd), x)
    return (x - per_channel(wide(mean), x)) * rstd, rstd


def _running(x: Tensor, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rstd = torch.rsqrt(per_channel(wide(var), x) + eps)
    return (wide(x) - per_channel(wide(mean), x)) * rstd, rstd


def _running_secant(
    m: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...]
) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None]]:
    """Midpoint of ``x̂``, multipliers of ``x``, and those of the statistics if they differ."""
    (x, _, _, mean, var, *_, eps), (x0, _, _, mean0, var0, *_) = args, args0
    if torch.equal(mean, mean0) and torch.equal(var, var0):
        xhat, rstd = _running(midpoint(x, x0), mean, var, eps)
        return xhat, m * rstd, (None, None)
    (xhat, r), (xhat0, r0) = _running(x, mean, var, eps), _running(x0, mean0, var0, eps)
    over = all_but_channel(x)
    of_x = m * midpoint(r, r0)
    of_rstd = (m * midpoint(xhat / r, xhat0 / r0)).sum(over, keepdim=True)
    of_var = -of_rstd * (r * r0) ** 2 / (r + r0)  # as in Moments
    statistics = -sum_over(of_x, over, mean), of_var.reshape(var.shape)
    return midpoint(xhat, xhat0), of_x, statistics


def _batch_samples(make: Maker) -> Iterator[Sample]:
    def running(n: int) -> tuple[Tensor, Tensor]:
        return make.constant(n), make.constant(n, positive=True)

    yield sample(make(4, 3), *running(3), make(3), make(3))
    yield sample(make(2, 3, 2, 2), *running(3), make(3), make(3), eps=1e-3)
    yield sample(make(2, 3, 4), *running(3))
    yield sample(make(4, 3), *running(3), make(3), make(3), training=True)
    yield sample(make(2, 3, 2, 2), None, None, training=True)
    yield sample(make(2, 2, 1, 2, 2), None, None, make(2), make(2), training=True)
    yield sample(make(3, 2, 3), None, None, make(2), training=True)
    yield sample(make(0, 3), *running(3), make(3), make(3))


@register(
    F.batch_norm,
    modules=[nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm],
    samples=_batch_samples,
)
def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise every channel, as :func:`torch.nn.functional.batch_norm`.

    Args:
        input: ``(N, C, *)``.
        running_mean: ``(C,)``; updated in place in training, used otherwise.
        running_var: ``(C,)``; likewise (with the unbiased variance).
        weight: ``(C,)`` scale, or ``None``.
        bias: ``(C,)`` shift, or ``None``.
        training: use the statistics of the batch.
        momentum: weight of the new statistics in the running ones.
        eps: added to the variance.

    Returns:
        Shape of ``input``.

    Raises:
        ValueError: in training, if a channel has a single value; if ``eps`` is too small; if only
            one of the running statistics is given.
        RuntimeError: without training, if the running statistics are missing.
    """
    if training:
        F._verify_batch_size(input.size())  # type: ignore[attr-defined]
    if eps < 0 or (training and eps == 0):
        bound = "positive during training" if training else "non-negative"
        raise ValueError(f"batch_norm: eps must be {bound}, but got {eps}")
    if (running_mean is None) != (running_var is None):
        raise ValueError(
            "batch_norm: of running_mean and running_var, both or neither must be None"
        )
    if not training and running_mean is None:
        raise RuntimeError("batch_norm: without training, running_mean and running_var are needed")
    output, _, _, *updated = BatchNorm.call(
        input, weight, bias, running_mean, running_var, training, momentum, eps
    )
    if training and running_mean is not None and running_var is not None:
        # No part of the graph, even where somebody differentiates by the statistics.
        running_mean.detach().copy_(updated[0])
        running_var.detach().copy_(updated[1])
    return output
