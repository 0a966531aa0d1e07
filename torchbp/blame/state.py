"""Another checkpoint of a model: its parameters and buffers, by the names the model knows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchbp.blame.capture import unknown


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under every name it goes by."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def is_checkpoint(model: nn.Module, given: Any) -> bool:
    """Whether ``given`` is a module or names parameters, rather than inputs, of the model."""
    if isinstance(given, nn.Module):
        return True
    return isinstance(given, Mapping) and any(name in tensors_of(model) for name in given)


def checkpoint_state(model: nn.Module, given: Any, argument: str) -> dict[str, Tensor]:
    """The values a checkpoint has for the model's parameters and buffers.

    Args:
        model: whose names count.
        given: a state dict, or a module with the same parameters. What it leaves out is as in the
            model; dtype and device become the model's, as ``load_state_dict`` has it.
        argument: what the user calls it, for errors.

    Returns:
        One detached tensor for every parameter and buffer, under the first of its names; a tied
        parameter comes once.

    Raises:
        TypeError: if it is neither, or a value is no tensor.
        ValueError: for an empty checkpoint, a name the model does not have, another shape, NaN or
            infinity, or several values for one tied parameter.
    """
    if isinstance(given, nn.Module):
        given = tensors_of(given)
    if not isinstance(given, Mapping):
        raise TypeError(
            f"{argument}: expected a state dict or a torch.nn.Module, got {type(given).__name__}"
        )
    if not given:
        raise ValueError(f"{argument}: expected parameters by name, got none")
    own = tensors_of(model)
    first: dict[int, str] = {}
    for name, tensor in own.items():
        first.setdefault(id(tensor), name)
    state = {name: own[name].detach() for name in first.values()}
    came: dict[str, str] = {}
    for name, value in given.items():
        if name not in own:
            raise ValueError(unknown(argument, str(name), [*own]))
        key = first[id(own[name])]
        value = _fitting(f"{argument}[{name!r}]", value, own[name])
        if key in came and not torch.equal(value, state[key]):
            raise ValueError(
                f"{argument}: the model has one tensor for {came[key]!r} and {name!r}, the "
                "checkpoint two that differ"
            )
        state[key], came[key] = value, name
    return state


def _fitting(argument: str, value: Any, own: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument}: expected a tensor, got {type(value).__name__}")
    if value.shape != own.shape:
        raise ValueError(f"{argument}: expected shape {tuple(own.shape)}, got {tuple(value.shape)}")
    value = value.detach().to(own.device, own.dtype)
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{argument}: expected finite values, got NaN or infinity")
    return value


def differing(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[str]:
    """Names of the floating tensors that are not the same in both states."""
    return [
        name
        for name, value in after.items()
        if value.is_floating_point() and not torch.equal(value, before[name])
    ]


def state_between(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], w: float, changed: Iterable[str]
) -> dict[str, Tensor]:
    """The state ``w`` of the way from one checkpoint to another; the ends themselves are exact.

    Args:
        before: one state.
        after: another, with the same names; what differs in it and is not floating is its.
        w: from 0 to 1.
        changed: names of the floating tensors that differ; new leaves in the result.
    """
    state = {**(after if w else before)}
    for name in changed:
        mixed = state[name] if w in (0, 1) else before[name] + (after[name] - before[name]) * w
        state[name] = mixed.detach().clone().requires_grad_()
    return state
