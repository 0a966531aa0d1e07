"""What dropout draws, as torch draws it: factors, or one bit for each element."""

from __future__ import annotations

from functools import cache
from threading import Lock

import torch
from torch import Tensor

from torchbp import kernels
from torchbp.ops.base import is_ordinary
from torchbp.ops.elementwise import can_fuse

# From this many elements on the kernel saves more than copying the generator's state costs.
_MANY = 4096
# Between reading the state and writing it no other thread may draw.
_drawing = Lock()


def _noise(x: Tensor, p: float) -> Tensor:
    """Factors that consume the generator exactly as torch's dropout does."""
    if p == 1:
        return torch.zeros((), dtype=x.dtype, device=x.device)
    if x.is_cuda:
        _, kept = torch.native_dropout(x.detach(), p, True)
        return kept.to(x.dtype) / (1 - p)
    if _draws_bits(x):
        return _unpacked(x, _bits(x, p), _scale(p, x.dtype))
    return torch.empty_like(x, requires_grad=False).bernoulli_(1 - p).div_(1 - p)


def _unpacked(like: Tensor, bits: Tensor, scale: float) -> Tensor:
    """The factors that the bits stand for."""
    ones = torch.ones(like.shape, dtype=like.dtype, device=like.device)
    return kernels.dropout_apply(ones, bits, scale)


def _draws_bits(x: Tensor) -> bool:
    """Whether :func:`_bits` is faster for ``x``, and nobody but the caller sees what is drawn."""
    return x.is_cpu and x.numel() >= _MANY and x.is_contiguous() and can_fuse(x) and is_ordinary(x)


@cache
def _scale(p: float, dtype: torch.dtype) -> float:
    """``1 / (1 - p)`` as torch rounds it in that dtype."""
    return float(torch.ones((), dtype=dtype).div_(1 - p).item())


def _kept(x: Tensor, p: float) -> Tensor:
    """The mask of :func:`_noise`; torch draws the same numbers for every dtype."""
    if x.is_cuda:
        return torch.native_dropout(x.detach(), p, True)[1]
    return torch.empty_like(x, dtype=torch.int32, requires_grad=False).bernoulli_(1 - p)


@cache
def _draws_as_torch() -> bool:
    """Whether the kernel draws what this torch draws on this processor, and all of it."""
    theirs = torch.Generator("cpu").manual_seed(5)
    bits, state = kernels.bernoulli_bits(theirs.get_state(), 2000, 0.7)
    drawn = torch.empty(2000, dtype=torch.int32, device="cpu").bernoulli_(0.7, generator=theirs)
    return torch.equal(bits, kernels.dropout_bits(drawn)) and torch.equal(state, theirs.get_state())


def _bits(x: Tensor, p: float) -> Tensor:
    """:func:`_kept` of an ``x`` without gaps, as one bit for each element in the order of memory.

    torch draws from the CPU's generator one element after the other; the kernel does the same from
    the generator's state, several times as fast, and leaves the same state behind.
    """
    if x.is_cpu and x.numel() >= _MANY and _draws_as_torch():
        with _drawing:
            generator = torch.default_generator
            bits, state = kernels.bernoulli_bits(generator.get_state(), x.numel(), 1 - p)
            generator.set_state(state)
        return bits
    kept = _kept(x, p)
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    return kernels.dropout_bits(kept if x.is_contiguous() else kept.permute(order))
