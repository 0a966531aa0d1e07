"""Multi-head attention: linear maps around attention, composed of explicit ops."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchbp.ops.arithmetic import matmul, mul
from torchbp.ops.attention import scaled_dot_product_attention
from torchbp.ops.dropout import dropout
from torchbp.ops.linear import add, linear
from torchbp.ops.registry import Maker, Sample, register, sample
from torchbp.ops.softmax import softmax


def canonical_mask(mask: Tensor | None, name: str, other: Tensor | None, dtype: Any) -> Any:
    """A mask to be added: a boolean one becomes 0 where false and minus infinity where true.

    Args:
        mask: boolean or floating, any shape, or ``None``.
        name: what to call it in errors and warnings.
        other: a mask that should have the same dtype, or ``None``.
        dtype: dtype of what a boolean mask becomes.

    Raises:
        AssertionError: if the mask is neither boolean nor floating.
    """
    return F._canonical_mask(
        mask, name, None if other is None else other.dtype, "attn_mask", dtype, other is not None
    )


def _with_batch(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One sample as a batch of one; what is one tensor stays one."""
    same_key, same_value = key is query, value is key
    query = query.unsqueeze(1)
    key = query if same_key else key.unsqueeze(1)
    return query, key, key if same_value else value.unsqueeze(1)


def _masks(
    attn: Tensor | None, padding: Tensor | None, is_causal: bool, need_weights: bool, query: Tensor
) -> tuple[Tensor | None, Tensor | None, bool]:
    """Both masks to be added, and whether attention is told "causal" in place of a mask."""
    padding = canonical_mask(padding, "key_padding_mask", attn, query.dtype)
    if is_causal and attn is None:
        raise RuntimeError("is_causal is a hint about attn_mask: give the mask too")
    if is_causal and padding is None and not need_weights:
        return None, None, True
    return canonical_mask(attn, "attn_mask", None, query.dtype), padding, False


def _check_widths(
    query: Tensor, key: Tensor, value: Tensor, expected: int, heads: int, separate: bool
) -> None:
    width = query.shape[-1]
    if width != expected:
        raise AssertionError(f"was expecting embedding dimension of {expected}, but got {width}")
    if width % heads:
        raise AssertionError(f"embed_dim {width} not divisible by num_heads {heads}")
    of_key, of_value = key.shape, value.shape
    if of_key != of_value and not (separate and of_key[:2] == of_value[:2]):
        raise AssertionError(f"key shape {of_key} does not match value shape {of_value}")


def _project(
    inputs: Sequence[Tensor],
    packed: Tensor | None,
    separate: Sequence[Tensor | None],
    bias: Tensor | None,
    use_separate: bool,
) -> Sequence[Tensor]:
    """Query, key and value through their linear maps; one map for tensors that are the same."""
    query, key, value = inputs
    if use_separate:
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        for letter, weight in zip("qkv", separate, strict=True):
            if weight is None:
                raise AssertionError(f"use_separate_proj_weight: {letter}_proj_weight is None")
        return [linear(x, w, b) for x, w, b in zip(inputs, separate, biases, strict=True)]  # type: ignore[arg-type]
    if packed is None:
        raise AssertionError("in_proj_weight is None, and use_separate_proj_weight is False")
    if query is key and key is value:
        return linear(query, packed, bias).chunk(3, -1)
    width = query.shape[-1]
    if key is value:
        of_query, of_rest = packed.split([width, 2 * width])
        bias_query, bias_rest = (None, None) if bias is None else bias.split([width, 2 * width])
        rest = linear(key, of_rest, bias_rest)
        return linear(query, of_query, bias_query), *rest.chunk(2, -1)
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    return [linear(x, w, b) for x, w, b in zip(inputs, packed.chunk(3), biases, strict=True)]


def _heads(tensor: Tensor, heads: int) -> Tensor:
    """``(L, N, E)`` to ``(N, heads, L, E / heads)``, a view."""
    length, batch, width = tensor.shape
    return tensor.reshape(length, batch, heads, width // heads).permute(1, 2, 0, 3)


def _static(tensor: Tensor, name: str, q: Tensor) -> Tensor:
    """Keys or values that were given in place of projected ones."""
    batch, heads, _, width = q.shape
    for dim, size in ((0, batch * heads), (2, width)):
        if tensor.size(dim) != size:
            raise AssertionError(
                f"{name}: expected size {size} in dim {dim}, got {tensor.size(dim)}"
            )
    return tensor.reshape(batch, heads, tensor.size(1), width)


def _with_bias(
    k: Tensor, v: Tensor, bias_k: Tensor | None, bias_v: Tensor | None, static: bool
) -> tuple[Tensor, Tensor]:
    """One more key and value, the same for every sample."""
    if bias_k is None or bias_v is None:
        raise AssertionError("bias_k and bias_v go together, but one is None")
    if static:
        raise AssertionError("bias_k and bias_v cannot be added to static keys or values")
    batch = k.shape[1]
    return (
        torch.cat([k, bias_k.repeat(1, batch, 1)]),
        torch.cat([v, bias_v.repeat(1, batch, 1)]),
    )


def _four_dimensional(mask: Tensor, batch: int, heads: int, length: int, source: int) -> Tensor:
    """An attention mask so that it broadcasts with ``(N, heads, L, S)``."""
    shape = (length, source) if mask.dim() == 2 else (batch * heads, length, source)
    if mask.shape != shape:
        raise RuntimeError(f"attn_mask: expected shape {shape}, got {tuple(mask.shape)}")
    return mask if mask.dim() == 2 else mask.reshape(batch, heads, length, source)


def _one_more(mask: Tensor | None) -> Tensor | None:
    """The mask for one more key, which is never hidden."""
    return None if mask is None else F.pad(mask, (0, 1))


def _merged(attn: Tensor | None, padding: Tensor, batch: int, source: int) -> Tensor:
    if padding.shape != (batch, source):
        raise AssertionError(
            f"key_padding_mask: expected shape {(batch, source)}, got {tuple(padding.shape)}"
        )
    padding = padding[:, None, None]
    return padding if attn is None else attn + padding


def _with_weights(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float
) -> tuple[Tensor, Tensor]:
    """Attention that shows its weights; a query that may look at nothing gives NaN, as torch's."""
    scores = matmul(mul(q, math.sqrt(1.0 / q.shape[-1])), k.mT)
    if mask is not None:
        scores = add(scores, mask)
    weights = softmax(scores, dim=-1)
    if p > 0.0:
        weights = dropout(weights, p)
    return matmul(weights, v), weights


def _multi_head_samples(make: Maker) -> Iterator[Sample]:
    def weights(width: int = 4) -> tuple[Any, ...]:
        return make(3 * width, width), make(3 * width), None, None, False, 0.0

    out = make(4, 4), make(4)
    yield sample(make(3, 2, 4), make(2, 2, 4), make(2, 2, 4), 4, 2, *weights(), *out)
    yield sample(
        make(3, 2, 4), make(3, 2, 4), make(3, 2, 4), 4, 2, *weights(), *out,
        need_weights=False, attn_mask=make(3, 3),
    )  # fmt: skip
    query = make(3, 2, 4)
    hidden = torch.tensor([[False, True], [False, False]], device=query.device)
    yield sample(
        query, make(2, 2, 4), make(2, 2, 4), 4, 2, *weights(), *out,
        key_padding_mask=hidden, need_weights=False,
    )  # fmt: skip
    yield sample(
        make(3, 4), make(2, 3), make(2, 5), 4, 2, None, make(12), make(1, 1, 4), make(1, 1, 4),
        True, 0.3, *out, use_separate_proj_weight=True, q_proj_weight=make(4, 4),
        k_proj_weight=make(4, 3), v_proj_weight=make(4, 5), average_attn_weights=False,
    )  # fmt: skip
    query = make(3, 1, 4)
    causal = torch.ones(3, 3, dtype=torch.bool, device=query.device).triu(1)
    yield sample(
        query, make(3, 1, 4), make(3, 1, 4), 4, 2, make(12, 4), None, None, None, True, 0.0,
        make(4, 4), None,
        need_weights=False, attn_mask=causal, is_causal=True,
    )  # fmt: skip


@register(
    F.multi_head_attention_forward,
    modules=[
        nn.MultiheadAttention,
        nn.TransformerEncoderLayer,
        nn.TransformerDecoderLayer,
        nn.TransformerEncoder,
        nn.TransformerDecoder,
        nn.Transformer,
    ],
    samples=_multi_head_samples,
)
def multi_head_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Multi-head attention, as :func:`torch.nn.functional.multi_head_attention_forward`.

    Args:
        query: ``(L, N, E)`` or ``(L, E)``.
        key: ``(S, N, E_k)`` or ``(S, E_k)``.
        value: ``(S, N, E_v)`` or ``(S, E_v)``.
        embed_dim_to_check: E.
        num_heads: number of heads; divides E.
        in_proj_weight: ``(3 E, E)``, the maps of query, key and value in this order.
        in_proj_bias: ``(3 E,)`` or ``None``.
        bias_k: ``(1, 1, E)``, one more key, or ``None``.
        bias_v: ``(1, 1, E)``, its value, or ``None``.
        add_zero_attn: add one more key and value of zeros.
        dropout_p: probability of an attention weight to be zeroed in training.
        out_proj_weight: ``(E, E)``.
        out_proj_bias: ``(E,)`` or ``None``.
        training: whether to drop out.
        key_padding_mask: ``(N, S)`` or ``(S,)``; true, or minus infinity, hides a key.
        need_weights: return the attention weights too.
        attn_mask: ``(L, S)`` or ``(N num_heads, L, S)``; true, or minus infinity, hides.
        use_separate_proj_weight: take the three weights that follow, not ``in_proj_weight``.
        q_proj_weight: ``(E, E)``.
        k_proj_weight: ``(E, E_k)``.
        v_proj_weight: ``(E, E_v)``.
        static_k: ``(N num_heads, S, E / num_heads)`` in place of projected keys.
        static_v: the same in place of projected values.
        average_attn_weights: whether the weights returned are averaged over heads.
        is_causal: a hint that ``attn_mask`` is causal.

    Returns:
        The output, of the shape of ``query``, and the weights ``(N, L, S)`` or
        ``(N, num_heads, L, S)``, without N if there is none, or ``None``.

    Raises:
        AssertionError: if shapes do not fit.
        RuntimeError: if ``is_causal`` comes without a mask, or a mask has a wrong shape.
    """
    batched = F._mha_shape_check(query, key, value, key_padding_mask, attn_mask, num_heads)  # type: ignore[attr-defined]
    if not batched:
        query, key, value = _with_batch(query, key, value)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
    length, batch, width = query.shape
    mask, padding, causal = _masks(attn_mask, key_padding_mask, is_causal, need_weights, query)
    _check_widths(query, key, value, embed_dim_to_check, num_heads, use_separate_proj_weight)
    separate = q_proj_weight, k_proj_weight, v_proj_weight
    q, k, v = _project(
        (query, key, value), in_proj_weight, separate, in_proj_bias, use_separate_proj_weight
    )
    if mask is not None:
        mask = _four_dimensional(mask, batch, num_heads, length, key.shape[0])
    if bias_k is not None or bias_v is not None:
        k, v = _with_bias(k, v, bias_k, bias_v, static_k is not None or static_v is not None)
        mask, padding = _one_more(mask), _one_more(padding)
    q, k, v = _heads(q, num_heads), _heads(k, num_heads), _heads(v, num_heads)
    if static_k is not None:
        k = _static(static_k, "static_k", q)
    if static_v is not None:
        v = _static(static_v, "static_v", q)
    if add_zero_attn:
        zero = k.new_zeros(batch, num_heads, 1, q.shape[-1])
        k, v = torch.cat([k, zero], 2), torch.cat([v, zero], 2)
        mask, padding = _one_more(mask), _one_more(padding)
    if padding is not None:
        mask = _merged(mask, padding, batch, k.shape[2])
    p, weights = dropout_p if training else 0.0, None
    if need_weights:
        attended, weights = _with_weights(q, k, v, mask, p)
        weights = weights.mean(dim=1) if average_attn_weights else weights
    else:
        attended = scaled_dot_product_attention(q, k, v, mask, p, causal)
    attended = attended.permute(2, 0, 1, 3).reshape(length, batch, width)
    output = linear(attended, out_proj_weight, out_proj_bias)
    if not batched:
        return output.squeeze(1), None if weights is None else weights.squeeze(0)
    return output, weights
