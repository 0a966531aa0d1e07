"""What users give, checked: models, counts, and inputs as the arguments of a model's call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def check_model(model: Any) -> None:
    """Refuse what is no model.

    Raises:
        TypeError: if it is not a ``torch.nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def check_count(argument: str, value: Any) -> None:
    """Refuse what cannot be a number of things.

    Args:
        argument: its name, for the error.
        value: what was given.

    Raises:
        ValueError: if it is not an integer of at least 1.
    """
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{argument}: expected an integer >= 1, got {value!r}")


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
