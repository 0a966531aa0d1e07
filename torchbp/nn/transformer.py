"""Transformer layers and their stacks: compositions of child modules and residual additions.

Their constructors are torch.nn's and make torch.nn children; :func:`torchbp.convert` swaps those.
In evaluation they take the way of training, child by child, where torch.nn may jump over its
children; only a nested tensor is left to torch's own inference path, which has no backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.transformer import _detect_is_causal_mask, _get_seq_len
from torch.overrides import has_torch_function

from torchbp import functional as F
from torchbp.ops.multi_head_attention import canonical_mask
from torchbp.ops.registry import BY_TORCH_FUNCTION


def _feed_forward(layer: Any, x: Tensor, last_dropout: nn.Module) -> Tensor:
    """``W₂ f(W₁ x)`` with dropout after each; torch's activation functions give way to ours."""
    activation = layer.activation
    if not isinstance(activation, nn.Module) and activation in BY_TORCH_FUNCTION:
        activation = BY_TORCH_FUNCTION[activation].functional
    x = layer.linear2(layer.dropout(activation(layer.linear1(x))))
    return last_dropout(x)


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """:class:`torch.nn.TransformerEncoderLayer`, child by child in evaluation too."""

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Self-attention and a feed-forward network, each with a residual connection.

        Args:
            src: ``(S, N, E)``, ``(N, S, E)`` if ``batch_first``, or ``(S, E)``.
            src_mask: ``(S, S)`` or ``(N num_heads, S, S)``.
            src_key_padding_mask: ``(N, S)`` or ``(S,)``.
            is_causal: a hint that ``src_mask`` is causal.

        Returns:
            The shape of ``src``.

        Raises:
            AssertionError: if shapes do not fit.
            RuntimeError: if ``is_causal`` comes without a mask, or a mask has a wrong shape.
        """
        if src.is_nested:
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        padding = canonical_mask(src_key_padding_mask, "src_key_padding_mask", src_mask, src.dtype)
        mask = canonical_mask(src_mask, "src_mask", None, src.dtype)
        x = src
        if self.norm_first:
            x = F.add(x, self._sa_block(self.norm1(x), mask, padding, is_causal=is_causal))
            return F.add(x, _feed_forward(self, self.norm2(x), self.dropout2))
        x = self.norm1(F.add(x, self._sa_block(x, mask, padding, is_causal=is_causal)))
        return self.norm2(F.add(x, _feed_forward(self, x, self.dropout2)))


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """:class:`torch.nn.TransformerDecoderLayer`, child by child."""

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Self-attention, attention to ``memory`` and a feed-forward network, each residual.

        Args:
            tgt: ``(T, N, E)``, ``(N, T, E)`` if ``batch_first``, or ``(T, E)``.
            memory: ``(S, N, E)``, ``(N, S, E)`` or ``(S, E)``.
            tgt_mask: ``(T, T)`` or ``(N num_heads, T, T)``.
            memory_mask: ``(T, S)`` or ``(N num_heads, T, S)``.
            tgt_key_padding_mask: ``(N, T)`` or ``(T,)``.
            memory_key_padding_mask: ``(N, S)`` or ``(S,)``.
            tgt_is_causal: a hint that ``tgt_mask`` is causal.
            memory_is_causal: a hint that ``memory_mask`` is causal.

        Returns:
            The shape of ``tgt``.

        Raises:
            AssertionError: if shapes do not fit.
            RuntimeError: if a causal hint comes without a mask, or a mask has a wrong shape.
        """
        own = tgt_mask, tgt_key_padding_mask, tgt_is_causal
        other = memory, memory_mask, memory_key_padding_mask, memory_is_causal
        x = tgt
        if self.norm_first:
            x = F.add(x, self._sa_block(self.norm1(x), *own))
            x = F.add(x, self._mha_block(self.norm2(x), *other))
            return F.add(x, _feed_forward(self, self.norm3(x), self.dropout3))
        x = self.norm1(F.add(x, self._sa_block(x, *own)))
        x = self.norm2(F.add(x, self._mha_block(x, *other)))
        return self.norm3(F.add(x, _feed_forward(self, x, self.dropout3)))


def _drops_padding(
    encoder: nn.TransformerEncoder, src: Tensor, mask: Tensor | None, padding: Tensor | None
) -> bool:
    """Whether torch.nn takes the padding out in inference, so that zeros come out there."""
    first: Any = encoder.layers[0]
    if (
        padding is None
        or mask is not None
        or first.training
        or src.dim() != 3
        or not getattr(encoder, "use_nested_tensor", False)
        or not torch.backends.mha.get_fastpath_enabled()
        or torch.is_autocast_enabled()
        or has_torch_function((src,))
    ):
        return False
    layer: list[Tensor] = [
        first.self_attn.in_proj_weight, first.self_attn.in_proj_bias,
        first.self_attn.out_proj.weight, first.self_attn.out_proj.bias,
        first.norm1.weight, first.norm1.bias, first.norm2.weight, first.norm2.bias,
        first.linear1.weight, first.linear1.bias, first.linear2.weight, first.linear2.bias,
    ]  # fmt: skip
    if torch.is_grad_enabled() and any(t.requires_grad for t in (src, *layer)):
        return False
    if not getattr(encoder, "mask_check", True):
        return True
    # Only padding at the end can be taken out; to see where it is needs values.
    return not torch.compiler.is_compiling() and bool(
        torch._nested_tensor_from_mask_left_aligned(src, padding == 0)
    )


class TransformerEncoder(nn.TransformerEncoder):
    """:class:`torch.nn.TransformerEncoder`, layer by layer.

    Where torch.nn would take the padding out (inference with a padding mask alone), the layers see
    it masked, and zeros are put there before the last norm: the same outputs.
    """

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """The layers one after the other, then the norm.

        Args:
            src: ``(S, N, E)``, ``(N, S, E)`` if the layers are ``batch_first``, or ``(S, E)``.
            mask: ``(S, S)`` or ``(N num_heads, S, S)``.
            src_key_padding_mask: ``(N, S)`` or ``(S,)``.
            is_causal: a hint that ``mask`` is causal; ``None`` finds out.

        Returns:
            The shape of ``src``.

        Raises:
            AssertionError: if shapes do not fit.
            RuntimeError: if ``is_causal`` comes without a mask, or a mask has a wrong shape.
        """
        if src.is_nested:
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        padding = canonical_mask(src_key_padding_mask, "src_key_padding_mask", mask, src.dtype)
        mask = canonical_mask(mask, "mask", None, src.dtype)
        hidden = None
        if _drops_padding(self, src, mask, padding):
            hidden = padding != 0
            padding = torch.zeros_like(padding).masked_fill_(hidden, -torch.inf)
        first: Any = self.layers[0]
        length = _get_seq_len(src, first.self_attn.batch_first)
        causal = _detect_is_causal_mask(mask, is_causal, length)
        output = src
        for layer in self.layers:
            output = layer(output, src_mask=mask, is_causal=causal, src_key_padding_mask=padding)
        if hidden is not None:
            output = output.masked_fill(hidden.unsqueeze(-1), 0.0)
        return output if self.norm is None else self.norm(output)


class TransformerDecoder(nn.TransformerDecoder):
    """:class:`torch.nn.TransformerDecoder`, whose forward is its layers' and nothing else."""


class Transformer(nn.Transformer):
    """:class:`torch.nn.Transformer`, whose forward is its encoder's and decoder's alone."""
