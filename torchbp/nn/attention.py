"""Multi-head attention."""

from __future__ import annotations

import torch
from torch import Tensor

from torchbp import functional as F
from torchbp.ops.multi_head_attention import canonical_mask


class MultiheadAttention(torch.nn.MultiheadAttention):
    """:class:`torch.nn.MultiheadAttention` with its backward written out.

    Training and evaluation take the same way, except that a nested tensor is left to torch's own
    inference path, which has no backward pass. That path differs in two cases: it takes a floating
    mask for a boolean one, and gives NaN where a query may look at nothing.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from queries to keys and values.

        Args:
            query: ``(L, N, E)``, ``(N, L, E)`` if ``batch_first``, or ``(L, E)``.
            key: ``(S, N, E_k)``, ``(N, S, E_k)`` or ``(S, E_k)``.
            value: ``(S, N, E_v)``, ``(N, S, E_v)`` or ``(S, E_v)``.
            key_padding_mask: ``(N, S)`` or ``(S,)``; true, or minus infinity, hides a key.
            need_weights: return the attention weights too.
            attn_mask: ``(L, S)`` or ``(N num_heads, L, S)``; true, or minus infinity, hides.
            average_attn_weights: whether the weights returned are averaged over heads.
            is_causal: a hint that ``attn_mask`` is causal.

        Returns:
            The output in the shape of ``query``, and the weights or ``None``.

        Raises:
            AssertionError: if shapes do not fit.
            RuntimeError: if ``is_causal`` comes without a mask, or a mask has a wrong shape.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask,
                average_attn_weights, is_causal,
            )  # fmt: skip
        padding = canonical_mask(key_padding_mask, "key_padding_mask", attn_mask, query.dtype)
        mask = canonical_mask(attn_mask, "attn_mask", None, query.dtype)
        swapped = self.batch_first and query.dim() == 3
        if swapped:
            # What is one tensor must stay one: it is projected once.
            same_key, same_value = key is query, value is key
            query = query.transpose(0, 1)
            key = query if same_key else key.transpose(0, 1)
            value = key if same_value else value.transpose(0, 1)
        output, weights = F.multi_head_attention_forward(
            query,
            key,
            value,
            self.embed_dim,
            self.num_heads,
            self.in_proj_weight,
            self.in_proj_bias,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            self.dropout,
            self.out_proj.weight,
            self.out_proj.bias,
            self.training,
            padding,
            need_weights,
            mask,
            not self._qkv_same_embed_dim,
            self.q_proj_weight,
            self.k_proj_weight,
            self.v_proj_weight,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        return output.transpose(0, 1) if swapped else output, weights
