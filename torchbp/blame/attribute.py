"""Blame after the fact: one call, any method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from torchbp.blame.capture import Call, Of, player_shape, unknown
from torchbp.blame.definitions import LossHead
from torchbp.blame.methods import METHODS
from torchbp.blame.problem import Problem
from torchbp.blame.result import Blame


def attribute(
    model: nn.Module,
    inputs: Any,
    targets: Any,
    loss_fn: Any,
    method: str = "secant",
    layers: Sequence[str | nn.Module] | str | None = None,
    baseline: Any = None,
    n_steps: int = 1,
    of: Of = "units",
    class_names: Sequence[str] | None = None,
    **options: Any,
) -> Blame:
    """Blame of every unit of a model for every sample's loss.

    Works on torch.nn, converted and user modules alike. Nothing of the model is changed: not
    gradients, parameters, buffers, mode or hooks; and the random state is kept.

    Args:
        model: the model, in the mode (``eval()``, usually) in which it shall be judged.
        inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs; dimension 0
            runs over the ``N`` samples.
        targets: as ``loss_fn`` takes them.
        loss_fn: ``loss_fn(output, targets)``, with any reduction; blame is of the un-averaged loss.
        method: ``gradient``, ``taylor``, ``link``, ``logits``, ``secant`` or ``ablation``.
        layers: names (as ``model.named_modules()`` gives them) or modules; ``"all"`` for the input
            and every module that computes; ``None`` for the hidden units of each cut: activations,
            and layers that no activation or norm follows, without the model's output.
        baseline: reference input of ``secant``, expandable to the input's shape; zeros if ``None``.
        n_steps: segments of ``secant`` between baseline and input.
        of: what to blame in a layer: ``"units"`` (neurons; channels, summed over positions;
            features, summed over tokens), ``"positions"`` (tokens or pixels, summed over units) or
            ``"elements"`` (every number of its output).
        class_names: names of the classes, for tables.
        **options: settings of the method; see :data:`torchbp.blame.methods.METHODS`.

    Returns:
        A :class:`~torchbp.blame.result.Blame`: ``blame["layer"]`` is ``[N, U]`` for units,
        ``[N, *positions]`` or ``[N, *shape]`` for positions and elements.

    Raises:
        TypeError: if an argument is of the wrong type, or an option is not one of the method's.
        ValueError: for an unknown method or layer (close names are suggested), wrong targets or
            baseline, an empty batch, or a loss the method cannot treat.
        NotImplementedError: for ``secant``, naming a function that has no rule.
        FloatingPointError: naming the first layer with NaN or infinity in activation or blame.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(unknown("method", str(method), [*METHODS]))
    if not isinstance(n_steps, int) or n_steps < 1:
        raise ValueError(f"n_steps: expected an integer >= 1, got {n_steps!r}")
    if of not in get_args(Of):
        raise ValueError(f"of: expected one of {', '.join(get_args(Of))}, got {of!r}")
    chosen = METHODS[method]
    unasked = [name for name in options if name not in chosen.options]
    if unasked:
        takes = ", ".join(chosen.options) or "none"
        raise TypeError(f"attribute: method {method!r} has no option {unasked[0]!r} (has: {takes})")
    args, kwargs = as_arguments(inputs)
    head = LossHead.of(loss_fn)
    problem = Problem(model, args, kwargs, targets, head, layers, baseline, n_steps, of, options)
    with problem.session():
        result = chosen.solve(problem)
    _refuse_nonfinite(result.run.calls, result.values)
    return Blame(
        units={
            name: value.detach().reshape(len(value), *_shape(result.run.calls[name], of))
            for name, value in result.values.items()
        },
        method=chosen.name,
        question=chosen.question,
        targets=targets.detach() if isinstance(targets, Tensor) else targets,
        output=result.run.output.detach() if isinstance(result.run.output, Tensor) else None,
        losses=result.run.losses.detach(),
        reference_losses=result.reference_losses,
        expected=result.expected,
        class_names=class_names,
        absorbed=result.absorbed,
        of=of,
    )


def _shape(call: Call, of: Of) -> tuple[int, ...]:
    return player_shape(call.output, call.unit_dim, of)


def as_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a model's call, from what users give as inputs.

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


def _refuse_nonfinite(calls: Mapping[str, Any], values: Mapping[str, Tensor]) -> None:
    for name, call in calls.items():
        if not bool(torch.isfinite(call.output).all()):
            raise FloatingPointError(f"layer {name!r}: its activation holds NaN or infinity")
    for name, value in values.items():
        if not bool(torch.isfinite(value).all()):
            raise FloatingPointError(
                f"layer {name!r}: its blame holds NaN or infinity although activations are finite; "
                "the error signal overflowed on its way back"
            )
