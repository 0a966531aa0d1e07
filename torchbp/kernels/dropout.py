"""Dropout by one bit for each element."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .reference_common import check_dtype, up
from .table import add, batch_first, vmap_one_by_one

_FLAGS = (torch.int32, torch.uint8, torch.bool)


def _check_kept(kept: Tensor) -> None:
    if kept.dtype not in _FLAGS:
        raise RuntimeError(f"kept: expected int32, uint8 or bool, got {kept.dtype}")


def _check_apply(x: Tensor, bits: Tensor) -> None:
    check_dtype(x, "x")
    if bits.dtype != torch.uint8:
        raise RuntimeError(f"bits: expected uint8, got {bits.dtype}")
    expected = -(-x.numel() // 8)
    if bits.dim() != 1 or bits.shape[0] != expected:
        raise RuntimeError(
            f"bits: expected one for each element of x, that is {expected} bytes, got shape "
            f"{tuple(bits.shape)}"
        )
    if bits.device != x.device:
        raise RuntimeError("bits: expected the device of x")


def _empty_bits(kept: Tensor) -> Tensor:
    return kept.new_empty(-(-kept.numel() // 8), dtype=torch.uint8)


def _powers(like: Tensor) -> Tensor:
    return torch.arange(8, device=like.device)


def flags_of(bits: Tensor, like: Tensor) -> Tensor:
    """The ones and zeros that the bits of a tensor ``like`` this stand for, in its shape."""
    return (bits.long()[:, None] >> _powers(bits) & 1).flatten()[: like.numel()].view(like.shape)


def _reference_bits(kept: Tensor) -> Tensor:
    _check_kept(kept)
    flags = (kept != 0).flatten().long()
    flags = torch.nn.functional.pad(flags, (0, -flags.numel() % 8)).view(-1, 8)
    return (flags << _powers(flags)).sum(1).to(torch.uint8)


def _reference_apply(x: Tensor, bits: Tensor, scale: float) -> Tensor:
    _check_apply(x, bits)
    y = up(x) * (flags_of(bits, x).to(up(x).dtype) * scale)
    return torch.empty_like(x, memory_format=torch.contiguous_format).copy_(y)


def _fake_bits(kept: Tensor) -> Tensor:
    _check_kept(kept)
    return _empty_bits(kept)


def _fake_apply(x: Tensor, bits: Tensor, scale: float) -> Tensor:
    _check_apply(x, bits)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _vmap_bits(info: Any, in_dims: Sequence[int | None], kept: Tensor) -> tuple[Tensor, int]:
    each = batch_first(kept, in_dims[0], info.batch_size)
    if not info.batch_size:
        return each.new_empty((0, -(-each[0:0].numel() // 8)), dtype=torch.uint8), 0
    return torch.stack([_dropout_bits(k) for k in each]), 0


_dropout_bits = add("dropout_bits(Tensor kept) -> Tensor", _reference_bits, _fake_bits, _vmap_bits)
_dropout_apply = add(
    "dropout_apply(Tensor x, Tensor bits, float scale) -> Tensor",
    _reference_apply,
    _fake_apply,
    vmap_one_by_one("dropout_apply"),
)


def dropout_bits(kept: Tensor) -> Tensor:
    """Pack a mask into bits.

    Args:
        kept: What is not 0 is kept; any shape; int32, uint8 or bool.

    Returns:
        uint8, shape ``[ceil(n / 8)]`` for ``n`` elements: bit ``i % 8`` of byte ``i // 8`` stands
        for element ``i`` in row-major order; bits past the last element are 0.

    Raises:
        RuntimeError: ``kept`` has another dtype.
    """
    return _dropout_bits(kept)


def dropout_apply(x: Tensor, bits: Tensor, scale: float) -> Tensor:
    """Multiply by ``scale`` what a mask keeps, and by 0 what it does not.

    Args:
        x: Any shape; float32, float64, bfloat16 or float16.
        bits: Of `dropout_bits`, on the device of ``x``.
        scale: The factor; rounded to float32 unless ``x`` is float64.

    Returns:
        Shape and dtype of ``x``, contiguous. NaN and the sign of zero are those of the product.

    Raises:
        RuntimeError: An argument is not as described.
    """
    return _dropout_apply(x, bits, scale)
