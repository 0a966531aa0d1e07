"""What users give as inputs, as the arguments of a model's call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def as_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments from a tensor, a tuple or list, or a dict of keywords.

    Raises:
        TypeError: if no tensor is among them.
        ValueError: for an empty batch.
    """
    if isinstance(inputs, Mapping):
        args, kwargs = (), dict(inputs)
    else:
        args, kwargs = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {}
    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
    if not tensors:
        raise TypeError(
            "inputs: expected a tensor, or a tuple or dict with tensors, "
            f"got {type(inputs).__name__}"
        )
    if any(t.dim() > 0 and t.shape[0] == 0 for t in tensors):
        raise ValueError("inputs: the batch is empty")
    return args, kwargs
