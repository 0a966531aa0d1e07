"""The backward pass of attention, block by block.

The matrices of a few heads at a time are computed anew and stay in the cache, so that memory does
not grow with the number of heads (the idea of FlashAttention: Dao et al. 2022).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch._C._functorch import is_legacy_batchedtensor

from torchbp.ops.base import is_plain, wide

#: Bytes of one attention matrix of a block of heads: what stays in a core's cache.
BLOCK_BYTES = 1 << 20

#: Rows of a causal attention matrix that are taken together; later keys are left out of them.
CAUSAL_ROWS = 64

Room = tuple[Tensor, Tensor]


def earlier(length: int, source: int, device: torch.device) -> Tensor:
    """True where a query may look: at no later key."""
    return torch.ones(length, source, dtype=torch.bool, device=device).tril()


def masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    """The scores where a boolean mask is true, or with a floating one added."""
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -torch.inf)
    return scores + mask


def safe_softmax(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax of every row; a query that may look at nothing gets zeros, as from torch."""
    return logits.softmax(-1) if mask is None else torch.ops.aten._safe_softmax(logits, -1)


def can_block(grad_output: Tensor, *tensors: Tensor) -> bool:
    """Whether these are plain tensors of equal leading dimensions that want first derivatives."""
    query, key, value = tensors
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not _are_functorch_transforms_active()
        and is_plain(*tensors)
        and not is_legacy_batchedtensor(grad_output)  # is_grads_batched
        and 2 <= query.dim() <= 4
        and query.shape[:-2] == key.shape[:-2] == value.shape[:-2]
        and query.numel() > 0
        and key.numel() > 0
    )


def _four_dimensional(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 4 else tensor[(None,) * (4 - tensor.dim())]


def blocked_backward(ctx: Any, saved: Sequence[Any], grad_output: Tensor) -> tuple[Tensor, ...]:
    """Gradients of query, key and value, a few heads at a time, so that caches are enough.

    They are summed in float32 at least; autograd rounds them to the dtype of the arguments.
    """
    *qkv, mask, noise, output = saved
    tensors = tuple(map(_four_dimensional, (*qkv, grad_output, output)))
    batch, heads, length, _ = tensors[0].shape
    size = length * tensors[1].shape[-2]
    at_once = max(BLOCK_BYTES // (size * output.element_size()), 1)
    steps = min(max(at_once // heads, 1), batch), min(at_once, heads)
    # Blocks of several samples are written as one matrix each, which takes contiguous gradients.
    layout = torch.contiguous_format if steps[0] > 1 else torch.preserve_format
    dtype = wide(output.new_empty(0)).dtype
    grads = tuple(torch.empty_like(t, dtype=dtype, memory_format=layout) for t in qkv)
    count = steps[0] * steps[1] * size
    room = output.new_empty(count, dtype=dtype), output.new_empty(count, dtype=dtype)
    extras = (None if t is None else _per_head(t, batch, heads) for t in (mask, noise))
    later = None
    if ctx.causal:
        later = ~earlier(length, tensors[1].shape[-2], output.device)
        for grad in grads[1:]:
            grad.zero_()
    parts = *tensors, *map(_four_dimensional, grads), *extras
    for block in zip(*(_blocks(t, *steps) for t in parts), strict=False):
        _block_backward(_Block(*block), room, later, ctx.scale)
    return grads


def _per_head(tensor: Tensor, batch: int, heads: int) -> Tensor:
    tensor = tensor[(None,) * (4 - tensor.dim())]
    return tensor.expand(batch, heads, *tensor.shape[2:])


def _blocks(tensor: Tensor | None, of_batch: int, of_heads: int) -> Iterable[Tensor | None]:
    """Matrices ``(n, rows, columns)`` of a few heads each, one block at a time."""
    if tensor is None:
        return repeat(None)
    if of_heads < tensor.shape[1]:
        return (block for one in tensor.unbind() for block in one.split(of_heads))
    if of_batch == tensor.shape[0]:
        return (tensor.flatten(0, 1),)
    return (block.flatten(0, 1) for block in tensor.split(of_batch))


class _Block(NamedTuple):
    """Arguments of a few heads, and where their gradients go."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    o: Tensor
    of_q: Tensor
    of_k: Tensor
    of_v: Tensor
    mask: Tensor | None
    noise: Tensor | None

    def rows(self, start: int, stop: int) -> _Block:
        """The part with these queries and the keys that they may look at."""
        at, keys = (slice(None), slice(start, stop)), (slice(None), slice(stop))
        noise = self.noise
        if noise is not None and noise.shape[1:] != (1, 1):  # not one zero for all
            noise = noise[:, start:stop, :stop]
        q, g, o, of_q = self.q[at], self.g[at], self.o[at], self.of_q[at]
        k, v, of_k, of_v = self.k[keys], self.v[keys], self.of_k[keys], self.of_v[keys]
        return _Block(q, k, v, g, o, of_q, of_k, of_v, None, noise)


def _block_backward(block: _Block, room: Room, later: Tensor | None, scale: float) -> None:
    """:meth:`Attention.backward` of a few heads, with as few passes over memory as possible."""
    if later is None:
        _few_passes(block, room, None, scale)
        return
    for start in range(0, len(later), CAUSAL_ROWS):
        stop = start + CAUSAL_ROWS
        _few_passes(block.rows(start, stop), room, later[start:stop, start:stop], scale)


def _few_passes(block: _Block, room: Room, later: Tensor | None, scale: float) -> None:
    q, k, v, g, o = map(wide, block[:5])
    shape = (*q.shape[:2], k.shape[1])
    logits, p = (part[: math.prod(shape)].view(shape) for part in room)
    d = (g * o).sum(-1, keepdim=True)
    torch.baddbmm(logits, q, k.mT, beta=0, alpha=scale, out=logits)
    if later is not None and later.numel():
        logits[..., -later.shape[1] :].masked_fill_(later, -torch.inf)
    if block.mask is None:
        torch.softmax(logits, -1, out=p)
    else:
        p = safe_softmax(masked(logits, block.mask), block.mask)
    of_p, weights = torch.bmm(g, v.mT, out=logits), p
    if block.noise is not None:
        of_p.mul_(block.noise)
        weights = p * block.noise
    of_logits = of_p.sub_(d).mul_(p)
    beta = int(later is not None)  # several rows of blocks add to the same keys
    torch.baddbmm(block.of_q, of_logits, k, beta=0, alpha=scale, out=block.of_q)
    torch.baddbmm(block.of_k, of_logits.mT, q, beta=beta, alpha=scale, out=block.of_k)
    torch.baddbmm(block.of_v, weights.mT, g, beta=beta, out=block.of_v)
