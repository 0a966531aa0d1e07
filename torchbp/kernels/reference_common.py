"""What the kernels in plain PyTorch share: dtypes and checks; see `torchbp.kernels.reference`."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def sums_dtype(t: Tensor) -> torch.dtype:
    """What sums of the elements of ``t`` are kept in."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def up(t: Tensor) -> Tensor:
    """``t`` in the dtype its sums are kept in: float64 stays, anything else becomes float32."""
    return t if t.dtype == torch.float64 else t.float()


def check_alike(t: Tensor, name: str, like: Tensor, like_name: str) -> None:
    """Raise RuntimeError unless both have one dtype and device."""
    if t.dtype != like.dtype:
        raise RuntimeError(
            f"{name}: expected the dtype of {like_name}, {like.dtype}, got {t.dtype}"
        )
    if t.device != like.device:
        raise RuntimeError(f"{name}: expected the device of {like_name}")


def check_dtype(t: Tensor, name: str) -> None:
    """Raise RuntimeError unless the kernels take the dtype."""
    if t.dtype not in DTYPES:
        raise RuntimeError(f"{name}: expected float32, float64, bfloat16 or float16, got {t.dtype}")


def check_same(t: Tensor, name: str, like: Tensor, like_name: str) -> None:
    """Raise RuntimeError unless both have one shape, dtype and device."""
    if t.shape != like.shape:
        raise RuntimeError(
            f"{name}: expected the shape of {like_name}, {tuple(like.shape)}, got {tuple(t.shape)}"
        )
    check_alike(t, name, like, like_name)
