"""Softmax and log-softmax, and the logarithmic means that make their secants exact."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchbp import kernels
from torchbp.ops.base import Op, wide
from torchbp.ops.elementwise import can_fuse
from torchbp.ops.registry import Maker, Sample, register, sample
from torchbp.ops.relevance import Rule


def log_mean(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Logarithmic mean ``(a - b) / (ln a - ln b)`` of two positive numbers, ``a`` where ``a = b``.

    Accurate for every gap ``d = ln a - ln b``: near ones go through ``sqrt(ab) sinh(d/2)/(d/2)``,
    which has no cancellation, far ones through the definition. Zero when either number is zero.

    Args:
        log_a: logarithms of the first number, any shape and floating dtype; ``-inf`` is allowed.
        log_b: logarithms of the second number, same shape.

    Returns:
        The means, same shape and dtype.
    """
    gap = log_a - log_b
    far = gap.abs() > 2
    half = torch.where(far | (gap == 0), 1.0, gap / 2)
    ratio = torch.where(gap == 0, 1.0, half.sinh() / half)
    near = ((log_a + log_b) / 2).exp() * ratio
    mean = torch.where(far, (log_a.exp() - log_b.exp()) / gap, near)
    # Two zeros have no gap (inf - inf); a masked entry weighs nothing.
    return mean.masked_fill((log_a == -torch.inf) | (log_b == -torch.inf), 0.0)


def sato_vartia(logits: Tensor, logits0: Tensor, dim: int) -> Tensor:
    """The distribution ``q`` with ``<q, z - z0> = logsumexp(z) - logsumexp(z0)`` exactly.

    ``q`` is the normalised logarithmic mean of the two softmaxes (Sato 1976, Vartia 1976): it does
    not change when a constant is added to either run, and equals the softmax where both agree.

    Args:
        logits: ``z``, any shape, floating; ``-inf`` masks an entry.
        logits0: ``z0``, the reference, same shape.
        dim: dimension of the distribution.

    Returns:
        ``q``, same shape, at least float32; it sums to one along ``dim``.
    """
    mean = _mean_of_softmaxes(logits, logits0, dim)
    return mean / mean.sum(dim, keepdim=True)


def _mean_of_softmaxes(logits: Tensor, logits0: Tensor, dim: int) -> Tensor:
    return log_mean(wide(logits).log_softmax(dim), wide(logits0).log_softmax(dim))


class Softmax(Op):
    """``s_i = exp(z_i) / Σ_k exp(z_k)``.

    Backward: ``∂z = s (g - <s, g>)``; the same map, which is symmetric, is the jvp.
    Secant: ``Δs = L (Δz - <q, Δz>)`` with ``L`` the logarithmic means of the two outputs and
    ``q = L / ΣL`` (Sato 1976, Vartia 1976), hence ``m_z = L (m - <q, m>)``.
    Relevance: the first-order Taylor term at z, ``R_i = z_i (R_i - s_i Σ_j R_j)`` (Achtibat et al.,
    2024). The expansion's constant term takes the rest of what came; it is not handed on.
    """

    autocast = {"cuda": "fp32"}

    @staticmethod
    def forward(x: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
        return torch.softmax(x, dim, dtype=dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.dim, _ = inputs
        ctx.in_dtype, ctx.out_dtype = x.dtype, output.dtype
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (s,) = ctx.saved_tensors
        if _in_one_pass(grad_output, s, ctx.dim):
            grad = kernels.softmax_backward(grad_output, s)
        else:
            grad = _softmax_map(s, grad_output, ctx.dim)
        return grad if grad.dtype is ctx.in_dtype else grad.to(ctx.in_dtype), None, None

    @staticmethod
    def jvp(ctx: Any, tx: Tensor, *_: Any) -> Tensor:
        (s,) = ctx.saved_tensors
        return _softmax_map(s, tx, ctx.dim).to(ctx.out_dtype)

    @staticmethod
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        (x, dim, _), (x0, *_) = args, args0
        mean = _mean_of_softmaxes(x.to(output.dtype), x0.to(output.dtype), dim)
        m = wide(multiplier)
        average = (mean * m).sum(dim, keepdim=True) / mean.sum(dim, keepdim=True)
        return (mean * (m - average)).to(x.dtype), None, None

    @classmethod
    def relevance(
        cls, relevance: Tensor, rule: Rule, args: tuple[Any, ...], output: Any
    ) -> tuple[Tensor | None, ...]:
        x, dim, _ = args
        pulled = relevance - output * relevance.sum(dim, keepdim=True)
        # A masked entry has no relevance; minus infinity times zero would say NaN.
        return (x.masked_fill(x == -torch.inf, 0) * pulled).to(x.dtype), None, None


def _softmax_map(s: Tensor, v: Tensor, dim: int) -> Tensor:
    s, v = wide(s), wide(v)
    product = s * v
    return torch.addcmul(product, s, product.sum(dim, keepdim=True), value=-1)


def _in_one_pass(grad_output: Tensor, output: Tensor, dim: int) -> bool:
    """Whether the kernel takes it: it runs along the last dimension and is not differentiable."""
    return (
        not torch.is_grad_enabled()
        and dim in (-1, output.dim() - 1)
        and can_fuse(output, grad_output)
    )


class Softmin(Softmax):
    """``s = softmax(-z)``; backward, jvp and secant are those of :class:`Softmax`, negated."""

    @staticmethod
    def forward(x: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
        return torch.softmax(-x, dim, dtype=dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (s,) = ctx.saved_tensors
        if _in_one_pass(grad_output, s, ctx.dim):
            grad = kernels.softmax_backward(grad_output, s).neg_()
        else:
            grad = _softmax_map(s, -grad_output, ctx.dim)
        return grad if grad.dtype is ctx.in_dtype else grad.to(ctx.in_dtype), None, None

    @staticmethod
    def jvp(ctx: Any, tx: Tensor, *_: Any) -> Tensor:
        (s,) = ctx.saved_tensors
        return _softmax_map(s, -tx, ctx.dim).to(ctx.out_dtype)

    @staticmethod
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        negated, negated0 = (-args[0], *args[1:]), (-args0[0], *args0[1:])
        return Softmax.secant(-multiplier, negated, negated0, output, output0)

    @classmethod
    def relevance(
        cls, relevance: Tensor, rule: Rule, args: tuple[Any, ...], output: Any
    ) -> tuple[Tensor | None, ...]:
        return Softmax.relevance(relevance, rule, (-args[0], *args[1:]), output)


class LogSoftmax(Op):
    """``y_i = z_i - log Σ_k exp(z_k)``.

    Backward: ``∂z = g - s Σg`` with ``s = exp(y)``; jvp: ``t - <s, t>``.
    Secant: ``Δy = Δz - <q, Δz>`` with the Sato-Vartia distribution ``q`` for ``s``.
    """

    autocast = {"cuda": "fp32"}
    no_relevance = (
        "the literature has no LRP rule for log-softmax; start from the loss head's secant"
    )

    @staticmethod
    def forward(x: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
        return torch.log_softmax(x, dim, dtype=dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.dim, _ = inputs
        ctx.in_dtype, ctx.out_dtype = x.dtype, output.dtype
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (y,) = ctx.saved_tensors
        if _in_one_pass(grad_output, y, ctx.dim):
            grad = kernels.softmax_backward(grad_output, y, logarithm=True)
        else:
            g = wide(grad_output)
            grad = torch.addcmul(g, wide(y).exp(), g.sum(ctx.dim, keepdim=True), value=-1)
        return grad if grad.dtype is ctx.in_dtype else grad.to(ctx.in_dtype), None, None

    @staticmethod
    def jvp(ctx: Any, tx: Tensor, *_: Any) -> Tensor:
        (y,) = ctx.saved_tensors
        t = wide(tx)
        return (t - (wide(y).exp() * t).sum(ctx.dim, keepdim=True)).to(ctx.out_dtype)

    @staticmethod
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        (x, dim, _), (x0, *_) = args, args0
        q = sato_vartia(x.to(output.dtype), x0.to(output.dtype), dim)
        m = wide(multiplier)
        return (m - q * m.sum(dim, keepdim=True)).to(x.dtype), None, None


def _softmax_samples(make: Maker) -> Iterator[Sample]:
    yield sample(make(3, 4), 1)
    yield sample(make(2, 3, 4), dim=-2)
    yield sample(make(5), dim=0)
    yield sample(make(3, 4), dim=-1, dtype=torch.float64)
    yield sample(make(), dim=0)
    yield sample(make(0, 4), dim=1)


def _arguments(name: str, x: Tensor, dim: Any, level: Any, dtype: Any) -> tuple[Any, ...]:
    if isinstance(level, torch.dtype):  # torch.softmax and Tensor.softmax give the dtype here
        dtype = level
    if dim is None and torch.compiler.is_compiling():  # the warning cannot be traced
        dim = 0 if x.dim() in (0, 1, 3) else 1
    elif dim is None:  # one frame further from the caller than torch's own function is
        dim = F._get_softmax_dim(name, x.dim(), level + 1)  # type: ignore[attr-defined]
    return x, dim, dtype


@register(
    F.softmax,
    replaces=[torch.softmax, Tensor.softmax, torch.special.softmax],
    modules=[nn.Softmax, nn.Softmax2d],
    samples=_softmax_samples,
)
def softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """``exp(input) / Σ exp(input)`` along ``dim``, as :func:`torch.nn.functional.softmax`.

    Args:
        input: any shape.
        dim: dimension that sums to one; ``None`` picks one as torch does, with its warning.
        dtype: dtype to compute in and to return; ``None`` keeps that of ``input``.

    Returns:
        The probabilities, shape of ``input``.
    """
    return Softmax.call(*_arguments("softmax", input, dim, _stacklevel, dtype))


@register(
    F.log_softmax,
    replaces=[torch.log_softmax, Tensor.log_softmax, torch.special.log_softmax],
    modules=[nn.LogSoftmax],
    samples=_softmax_samples,
)
def log_softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """``input - log Σ exp(input)`` along ``dim``, as :func:`torch.nn.functional.log_softmax`.

    Args:
        input: any shape.
        dim: dimension of the distribution; ``None`` picks one as torch does, with its warning.
        dtype: dtype to compute in and to return; ``None`` keeps that of ``input``.

    Returns:
        The log-probabilities, shape of ``input``.
    """
    return LogSoftmax.call(*_arguments("log_softmax", input, dim, _stacklevel, dtype))


@register(F.softmin, modules=[nn.Softmin], samples=_softmax_samples)
def softmin(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """``exp(-input) / Σ exp(-input)`` along ``dim``, as :func:`torch.nn.functional.softmin`.

    Args:
        input: any shape.
        dim: dimension that sums to one; ``None`` picks one as torch does, with its warning.
        dtype: dtype to compute in and to return; ``None`` keeps that of ``input``.

    Returns:
        The probabilities, shape of ``input``.
    """
    return Softmin.call(*_arguments("softmin", input, dim, _stacklevel, dtype))
