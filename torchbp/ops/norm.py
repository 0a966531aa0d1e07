"""Normalisation over the batch and over features."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchbp.ops.base import Op, add_tangents, midpoint, wide
from torchbp.ops.registry import Maker, Sample, register, sample


class _Moments:
    """``x̂ = (x - mean) r`` with ``r = (variance + eps)^-½`` over ``dims``, and its derivatives.

    Backward: ``∂x = r (g - mean(g) - x̂ mean(g x̂))`` (Ioffe & Szegedy 2015).
    Secant by composition: centre (linear), mean of squares (``c² - c₀² = (c + c₀)(c - c₀)``),
    reciprocal root (``r - r₀ = -(v - v₀) / (s s₀ (s + s₀))``, ``s = 1/r``), product (midpoints).
    """

    def __init__(self, x: Tensor, dims: Sequence[int], eps: float) -> None:
        self.dims = tuple(dims)
        self.centred = x - x.mean(self.dims, keepdim=True)
        variance = self.centred.square().mean(self.dims, keepdim=True)
        self.rstd = torch.rsqrt(variance + eps)

    @property
    def normalised(self) -> Tensor:
        return self.centred * self.rstd


def _mean(tensor: Tensor, dims: Sequence[int]) -> Tensor:
    return tensor.mean(tuple(dims), keepdim=True)


def _tangent(v: Tensor, xhat: Tensor, rstd: Tensor, dims: Sequence[int]) -> Tensor:
    """The derivative of ``x̂``, applied to ``v``: symmetric, so backward and jvp are one."""
    through = torch.addcmul(v, xhat, _mean(v * xhat, dims), value=-1)
    return rstd * (through - _mean(v, dims))


def _secant(m: Tensor, now: _Moments, ref: _Moments) -> Tensor:
    """Multipliers of ``x`` from multipliers of ``x̂``, between two runs."""
    dims = now.dims
    centred, rstd = midpoint(now.centred, ref.centred), midpoint(now.rstd, ref.rstd)
    s, s0 = 1 / now.rstd, 1 / ref.rstd
    of_rstd = (m * centred).sum(dims, keepdim=True)
    of_variance = -of_rstd / (s * s0 * (s + s0))
    count = math.prod(centred.shape[d] for d in dims)
    of_centred = m * rstd + of_variance * 2 * centred / count
    return of_centred - _mean(of_centred, dims)


def _sum_over(tensor: Tensor, dims: Sequence[int], like: Tensor) -> Tensor:
    """Gradient of a parameter that was broadcast over ``dims``."""
    summed = tensor.sum(tuple(dims)) if dims else tensor
    return summed.reshape(like.shape).to(like.dtype)


class LayerNorm(Op):
    """``y = x̂ w + b`` with mean and variance over the last ``len(normalized_shape)`` dimensions.

    Backward: ``∂b = Σ g``, ``∂w = Σ g x̂`` (over the other dimensions), and g w goes through ``x̂``
    (Ba et al. 2016). Secant: ``x̂ w`` by midpoints, then through ``x̂``; see :class:`_Moments`.
    """

    autocast = {"cuda": "fp32"}

    @staticmethod
    def forward(
        x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.native_layer_norm(x, shape, weight, bias, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, shape, weight, bias, ctx.eps = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.save_for_forward(x, weight, bias, mean, rstd)
        ctx.over = tuple(range(x.dim() - len(shape), x.dim()))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * 5
        x, weight, bias, mean, rstd = ctx.saved_tensors
        xhat, rstd = _statistics(x, mean, rstd, ctx.over, ctx.eps)
        others = tuple(range(x.dim() - len(ctx.over)))
        g = wide(grad_output)
        needs_x, _, needs_weight, needs_bias, _ = ctx.needs_input_grad
        through = g if weight is None else g * wide(weight)
        return (
            _tangent(through, xhat, rstd, ctx.over).to(x.dtype) if needs_x else None,
            None,
            _sum_over(g * xhat, others, weight) if needs_weight else None,
            _sum_over(g, others, bias) if needs_bias else None,
            None,
        )

    @staticmethod
    def jvp(
        ctx: Any, tx: Tensor | None, _: Any, tw: Tensor | None, tb: Tensor | None, __: Any
    ) -> tuple[Tensor | None, None, None]:
        x, weight, _bias, _mean, _rstd = ctx.saved_tensors
        moments = _Moments(wide(x), ctx.over, ctx.eps)
        return _affine_jvp(moments, x, weight, tx, tw, tb), None, None

    @staticmethod
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        (x, shape, weight, bias, eps), (x0, _, weight0, _, _) = args, args0
        over = tuple(range(x.dim() - len(shape), x.dim()))
        others = tuple(range(x.dim() - len(shape)))
        now, ref = _Moments(x, over, eps), _Moments(x0, over, eps)
        xhat = midpoint(now.normalised, ref.normalised)
        through = multiplier if weight is None else multiplier * midpoint(weight, weight0)
        return (
            _secant(through, now, ref),
            None,
            None if weight is None else _sum_over(multiplier * xhat, others, weight),
            None if bias is None else _sum_over(multiplier, others, bias),
            None,
        )


def _statistics(
    x: Tensor, mean: Tensor, rstd: Tensor, over: Sequence[int], eps: float
) -> tuple[Tensor, Tensor]:
    """``x̂`` and ``r``: from the saved statistics, or anew where backward is differentiated."""
    x = wide(x)
    if torch.is_grad_enabled():  # the saved ones are constants to autograd
        moments = _Moments(x, over, eps)
        return moments.normalised, moments.rstd
    rstd = wide(rstd)
    return (x - wide(mean)) * rstd, rstd


def _affine_jvp(
    moments: _Moments,
    x: Tensor,
    weight: Tensor | None,
    tx: Tensor | None,
    tw: Tensor | None,
    tb: Tensor | None,
) -> Tensor | None:
    """Tangent of ``x̂ w + b``; ``weight`` and the tangents already broadcast against x."""
    t_xhat = None
    if tx is not None:
        t_xhat = _tangent(wide(tx), moments.normalised, moments.rstd, moments.dims)
        t_xhat = t_xhat if weight is None else t_xhat * weight
    total = add_tangents(
        t_xhat,
        None if tw is None else moments.normalised * tw,
        None if tb is None else tb.expand(x.shape),
    )
    return None if total is None else total.to(x.dtype).clone()


def _layer_samples(make: Maker) -> Iterator[Sample]:
    yield sample(make(3, 5), (5,), make(5), make(5))
    yield sample(make(2, 3, 4), (3, 4), make(3, 4), make(3, 4), eps=1e-3)
    yield sample(make(2, 3, 4), (4,))
    yield sample(make(2, 4), (4,), make(4))
    yield sample(make(0, 4), (4,), make(4), make(4))


@register(F.layer_norm, replaces=[torch.layer_norm], modules=[nn.LayerNorm], samples=_layer_samples)
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise the last dimensions, as :func:`torch.nn.functional.layer_norm`.

    Args:
        input: ``(*, *normalized_shape)``.
        normalized_shape: sizes of the dimensions to normalise over.
        weight: scale of that shape, or ``None``.
        bias: shift of that shape, or ``None``.
        eps: added to the variance.

    Returns:
        Shape of ``input``.
    """
    return LayerNorm.call(input, tuple(normalized_shape), weight, bias, eps)[0]


class BatchNorm(Op):
    """``y = x̂ w + b`` per channel; training: statistics of the batch; else: running ones.

    Backward in training is that of ``x̂`` over all dimensions but the channel; with running
    statistics the map is affine, ``∂x = g w r``. Secant: likewise.
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
        over = _all_but_channel(x)
        if ctx.training:
            xhat, rstd = _statistics(x, _per_channel(mean, x), _per_channel(rstd, x), over, ctx.eps)
        else:
            xhat, rstd = _running(x, mean, rstd, ctx.eps)
        g = wide(grad_output)
        needs_x, needs_weight, needs_bias, *_constants = ctx.needs_input_grad
        grad_x = None
        if needs_x:
            through = g if weight is None else g * _per_channel(wide(weight), x)
            grad_x = _tangent(through, xhat, rstd, over) if ctx.training else through * rstd
            grad_x = grad_x.to(x.dtype)
        return (
            grad_x,
            _sum_over(g * xhat, over, weight) if needs_weight else None,
            _sum_over(g, over, bias) if needs_bias else None,
            *(None,) * 5,
        )

    @staticmethod
    def jvp(
        ctx: Any, tx: Tensor | None, tw: Tensor | None, tb: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, None, None, None, None]:
        x, weight, _bias, mean, rstd = ctx.saved_tensors
        weight, tw, tb = (None if t is None else _per_channel(t, x) for t in (weight, tw, tb))
        if ctx.training:
            moments = _Moments(wide(x), _all_but_channel(x), ctx.eps)
            return _affine_jvp(moments, x, weight, tx, tw, tb), *(None,) * 4
        xhat, rstd = _running(x, mean, rstd, ctx.eps)
        through = None
        if tx is not None:
            through = tx * rstd if weight is None else tx * rstd * weight
        total = add_tangents(
            through,
            None if tw is None else xhat * tw,
            None if tb is None else tb.expand(x.shape),
        )
        return None if total is None else total.to(x.dtype).clone(), *(None,) * 4

    @staticmethod
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        (x, weight, bias, mean, var, training, _, eps), (x0, weight0, *_) = args, args0
        over = _all_but_channel(x)
        through = multiplier
        if weight is not None:
            through = multiplier * _per_channel(midpoint(weight, weight0), x)
        if training:
            now, ref = _Moments(x, over, eps), _Moments(x0, over, eps)
            xhat = midpoint(now.normalised, ref.normalised)
            of_x = _secant(through, now, ref)
        else:
            xhat, rstd = _running(midpoint(x, x0), mean, var, eps)
            of_x = through * rstd
        return (
            of_x,
            None if weight is None else _sum_over(multiplier * xhat, over, weight),
            None if bias is None else _sum_over(multiplier, over, bias),
            *(None,) * 5,
        )


def _all_but_channel(x: Tensor) -> tuple[int, ...]:
    return (0, *range(2, x.dim()))


def _per_channel(tensor: Tensor, x: Tensor) -> Tensor:
    return tensor.reshape(1, x.shape[1], *(1,) * (x.dim() - 2))


def _running(x: Tensor, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rstd = torch.rsqrt(_per_channel(wide(var), x) + eps)
    return (wide(x) - _per_channel(wide(mean), x)) * rstd, rstd


def _batch_samples(make: Maker) -> Iterator[Sample]:
    def running(n: int) -> tuple[Tensor, Tensor]:
        return make.constant(n), make.constant(n, positive=True)

    yield sample(make(4, 3), *running(3), make(3), make(3))
    yield sample(make(2, 3, 2, 2), *running(3), make(3), make(3), eps=1e-3)
    yield sample(make(2, 3, 4), *running(3))
    yield sample(make(4, 3), *running(3), make(3), make(3), training=True)
    yield sample(make(2, 3, 2, 2), None, None, training=True)
    yield sample(make(3, 2, 3), None, None, make(2), training=True)
    yield sample(make(0, 3), *running(3), make(3), make(3))


@register(F.batch_norm, modules=[nn.BatchNorm1d, nn.BatchNorm2d], samples=_batch_samples)
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
    if not training or running_mean is None or running_var is None:
        return BatchNorm.call(
            input, weight, bias, running_mean, running_var, training, momentum, eps
        )[0]
    # Copies, because whoever keeps the op's arguments must not see them change.
    before = running_mean.clone(), running_var.clone()
    output, _, _, *after = BatchNorm.call(input, weight, bias, *before, True, momentum, eps)
    with torch.no_grad():
        running_mean.copy_(after[0])
        running_var.copy_(after[1])
    return output
