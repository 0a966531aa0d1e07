"""Scaled dot-product attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torchbp.ops.attention_blocks import (
    blocked_backward,
    can_block,
    earlier,
    masked,
    safe_softmax,
)
from torchbp.ops.base import Op, add_tangents, midpoint, sum_to, wide
from torchbp.ops.dropout_draws import _noise as dropout_noise
from torchbp.ops.registry import Maker, Sample, register, sample
from torchbp.ops.relevance import Rule, quotient
from torchbp.ops.softmax import Softmax


class _Factors(NamedTuple):
    """The factors of ``O = (softmax(scale Q Kᵀ + mask) ⊙ noise) V`` in one run.

    ``scores`` is without and ``logits`` with the mask; ``weights`` is what multiplies ``v``.
    Keys and values are repeated for grouped queries.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scores: Tensor
    logits: Tensor
    probabilities: Tensor
    weights: Tensor


def _factors(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    noise: Tensor | None,
    causal: bool,
    scale: float,
    grouped: bool,
) -> _Factors:
    q, k, v = wide(query), wide(key), wide(value)
    if grouped:
        k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
    root = math.sqrt(abs(scale))  # on both factors, as torch does: the same bits
    scores = torch.matmul(q * math.copysign(root, scale), k.mT * root)
    if causal:
        mask = earlier(scores.shape[-2], scores.shape[-1], scores.device)
    logits = masked(scores, mask)
    p = safe_softmax(logits, mask)
    return _Factors(q, k, v, scores, logits, p, p if noise is None else p * noise)


def _through(
    m: Tensor, f: _Factors, noise: Tensor | None, scale: float, pull: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Carry the error of the output to query, key, value and logits.

    ``pull`` carries it from the probabilities to the logits.
    """
    of_weights = m @ f.v.mT
    of_logits = pull(of_weights if noise is None else of_weights * noise)
    scaled = of_logits * scale
    return scaled @ f.k, scaled.mT @ f.q, f.weights.mT @ m, of_logits


def _like(grad: Tensor, arg: Tensor, grouped: bool) -> Tensor:
    """Undo the repetition of grouped heads, broadcasting and widening."""
    if grouped and arg.dim() == grad.dim() and arg.shape[-3] != grad.shape[-3]:
        *leading, heads, length, width = grad.shape
        of = arg.shape[-3]
        grad = grad.reshape(*leading, of, heads // of, length, width).sum(-3)
    return sum_to(grad, arg.shape).to(arg.dtype)


class Attention(Op):
    """``O = (P ⊙ noise) V`` with ``P = softmax(S)`` and ``S = scale Q Kᵀ + mask``.

    Source: Vaswani et al. 2017.
    Backward: ``∂V = (P ⊙ noise)ᵀ g``, ``dP = (g Vᵀ) ⊙ noise``, ``∂S = P (dP - d)``,
    ``∂Q = scale ∂S K``, ``∂K = scale ∂Sᵀ Q``, where ``d = Σ_j dP_j P_j = Σ_e g_e O_e`` needs no
    attention matrix (Dao et al. 2022). The matrices are computed anew, block by block.
    Secant: both products by midpoints, softmax by logarithmic means (:class:`Softmax`); the noise
    is drawn outside and counts as a constant, so that two runs can share it.
    LRP: halves for the factors of a product, the first-order Taylor term for softmax (Achtibat et
    al. 2024). With epsilon zero in ``Q Kᵀ`` its quotient is the softmax's own factor:
    ``R_Q = Q ∂Q / 2`` for ``∂S = R_P - P ΣR_P``, with no division.
    """

    autocast = {"cpu": "low", "cuda": "low"}

    @staticmethod
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        noise: Tensor | None,
        causal: bool,
        scale: float,
        grouped: bool,
    ) -> Tensor:
        if noise is None:
            return F.scaled_dot_product_attention(
                query, key, value, mask, is_causal=causal, scale=scale, enable_gqa=grouped
            )
        f = _factors(query, key, value, mask, noise, causal, scale, grouped)
        return (f.weights @ f.v).to(query.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.causal, ctx.scale, ctx.grouped = inputs
        ctx.save_for_backward(*tensors, output)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        query, key, value, mask, noise, output = saved
        needs_mask, grouped = ctx.needs_input_grad[3], ctx.grouped
        if not (needs_mask or grouped) and can_block(grad_output, query, key, value):
            of_qkv = blocked_backward(ctx, saved, grad_output)
            needs = ctx.needs_input_grad
            return *(g if n else None for g, n in zip(of_qkv, needs, strict=False)), *(None,) * 5
        f = _factors(query, key, value, mask, noise, ctx.causal, ctx.scale, grouped)
        g = wide(grad_output)
        d = (g * wide(output)).sum(-1, keepdim=True)

        def pull(of_p: Tensor) -> Tensor:
            return f.probabilities * (of_p - d)

        of_q, of_k, of_v, of_logits = _through(g, f, noise, ctx.scale, pull)
        grads = zip((of_q, of_k, of_v, of_logits), (query, key, value, mask), strict=True)
        return (
            *(
                _like(grad, arg, grouped) if needed else None
                for (grad, arg), needed in zip(grads, ctx.needs_input_grad, strict=False)
            ),
            *(None,) * 4,
        )

    @staticmethod
    def jvp(
        ctx: Any,
        tq: Tensor | None,
        tk: Tensor | None,
        tv: Tensor | None,
        tm: Tensor | None,
        *_: Any,
    ) -> Tensor | None:
        query, key, value, mask, noise = ctx.saved_tensors
        f = _factors(query, key, value, mask, noise, ctx.causal, ctx.scale, ctx.grouped)
        if ctx.grouped:
            heads = query.shape[-3]
            tk, tv = (
                None if t is None else t.repeat_interleave(heads // t.shape[-3], -3)
                for t in (tk, tv)
            )
        of_logits = add_tangents(
            None if tq is None else ctx.scale * (wide(tq) @ f.k.mT),
            None if tk is None else ctx.scale * (f.q @ wide(tk).mT),
            None if tm is None else wide(tm),
        )
        parts = [None if tv is None else f.weights @ wide(tv)]
        if of_logits is not None:
            p = f.probabilities
            of_p = p * (of_logits - (p * of_logits).sum(-1, keepdim=True))
            parts.append((of_p if noise is None else of_p * noise) @ f.v)
        out = add_tangents(*parts)
        return None if out is None else out.to(query.dtype)

    @staticmethod
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        noise, _, scale, grouped = args[4:]
        now, ref = _factors(*args), _factors(*args0)
        middle = _Factors(*(midpoint(a, a0) for a, a0 in zip(now, ref, strict=True)))

        def pull(of_p: Tensor) -> Tensor:
            logits, logits0, along = now.logits, ref.logits, (-1, None)
            found = Softmax.secant(of_p, (logits, *along), (logits0, *along), logits, logits0)
            assert found[0] is not None
            return found[0].masked_fill(_dead(logits) | _dead(logits0), 0)

        noise = None if noise is None else midpoint(noise, args0[4])
        found = _through(wide(multiplier), middle, noise, scale, pull)
        return (*_reduced(found, args, grouped), None, None, None, None)

    @classmethod
    def relevance(
        cls, relevance: Tensor, rule: Rule, args: tuple[Any, ...], output: Any
    ) -> tuple[Tensor | None, ...]:
        mask, scale, grouped = args[3], args[6], args[7]
        f = _factors(*args)

        def pull(of_weights: Tensor) -> Tensor:
            arriving = f.weights * of_weights
            return arriving - f.probabilities * arriving.sum(-1, keepdim=True)

        per_output = quotient(wide(relevance), wide(output), rule.epsilon) / 2
        of_q, of_k, of_v, of_logits = _through(per_output, f, None, scale, pull)
        taken = torch.zeros_like(of_logits)
        if mask is not None and mask.is_floating_point():
            taken = mask.masked_fill(mask == -torch.inf, 0) * of_logits
        shares = f.q * of_q / 2, f.k * of_k / 2, f.v * of_v, taken
        return (*_reduced(shares, args, grouped), None, None, None, None)


def _reduced(
    found: tuple[Tensor, ...], args: tuple[Any, ...], grouped: bool
) -> Iterator[Tensor | None]:
    """What was found for query, key, value and mask, in their shapes and dtypes."""
    for grad, arg in zip(found[:3], args[:3], strict=True):
        yield _like(grad, arg, grouped)
    mask = args[3]
    # A constant mask has no share; what it hides would be infinity less infinity.
    yield _like(found[3], mask, grouped) if mask is not None and mask.requires_grad else None


def _dead(logits: Tensor) -> Tensor:
    """Queries that may look at no key."""
    return (logits == -torch.inf).all(-1, keepdim=True)


def _noise(query: Tensor, key: Tensor, p: float, grouped: bool) -> Tensor:
    """Noise for every attention weight."""
    leading = (
        query.shape[:-2] if grouped else torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
    )
    weights = query.detach().new_empty(*leading, query.shape[-2], key.shape[-2])
    return dropout_noise(weights, p)


def _attention_samples(make: Maker) -> Iterator[Sample]:
    yield sample(make(2, 2, 3, 4), make(2, 2, 5, 4), make(2, 2, 5, 3))
    yield sample(make(2, 3, 4), make(2, 3, 4), make(2, 3, 2), is_causal=True, scale=0.7)
    yield sample(make(3, 4), make(2, 4), make(2, 4))
    yield sample(make(2, 1, 3, 2), make(2, 1, 3, 2), make(2, 1, 3, 2), make(3, 3))
    yield sample(make(2, 3, 2), make(2, 3, 2), make(2, 3, 2), make(3, 3), 0.4)
    allowed = make.constant(2, 3, 4) > -0.5
    allowed[0, 1] = False
    yield sample(make(2, 3, 2), make(2, 4, 2), make(2, 4, 2), allowed)
    yield sample(make(1, 4, 3, 2), make(1, 2, 3, 2), make(1, 2, 3, 2), enable_gqa=True)
    yield sample(make(0, 2, 3, 4), make(0, 2, 5, 4), make(0, 2, 5, 3))


@register(F.scaled_dot_product_attention, samples=_attention_samples)
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention, as :func:`torch.nn.functional.scaled_dot_product_attention`.

    Args:
        query: ``(*, L, E)``.
        key: ``(*, S, E)``.
        value: ``(*, S, E_v)``.
        attn_mask: broadcasts with ``(*, L, S)``: boolean, true where a query may look, or floating
            and added to the scores. A query that may look at nothing gets zeros.
        dropout_p: probability of a weight to be zeroed; drawn with torch's numbers on the CPU.
        is_causal: a query looks at no later key; excludes ``attn_mask``.
        scale: factor of the scores; ``None`` is ``1 / sqrt(E)``.
        enable_gqa: key and value have fewer heads (dimension -3), each for a group of queries.

    Returns:
        ``(*, L, E_v)``.

    Raises:
        RuntimeError: if shapes, dtypes or settings do not fit together.
    """
    noise = None
    if dropout_p != 0.0:
        if (is_causal and attn_mask is not None) or not 0.0 <= dropout_p <= 1.0:
            return F.scaled_dot_product_attention(  # torch's own error for it
                query, key, value, attn_mask, dropout_p, is_causal
            )
        noise = _noise(query, key, dropout_p, enable_gqa)
    if scale is None:
        scale = 1 / math.sqrt(max(query.shape[-1], 1))
    return Attention.call(query, key, value, attn_mask, noise, is_causal, scale, enable_gqa)
