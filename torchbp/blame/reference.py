"""What blame is measured against: a reference input, and the points between it and the input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchbp.blame.problem import Point, Problem


def input_reference(problem: Problem) -> Point:
    """The baseline as inputs: zeros for floating tensors, unless one was given.

    Raises:
        TypeError: for a baseline that is no tensor, number, tuple or dict of those.
        ValueError: for a baseline of another shape, or integer inputs that cannot be interpolated.
    """
    given = problem.baseline
    if isinstance(given, Mapping):
        missing = [name for name in given if name not in problem.kwargs]
        if missing:
            raise ValueError(f"baseline: the inputs have no entry {missing[0]!r}")
        named = {k: _one(problem, f"baseline[{k!r}]", v, given.get(k)) for k, v in
                 problem.kwargs.items()}  # fmt: skip
        return Point(tuple(_one(problem, "baseline", v, None) for v in problem.args), named)
    inputs = [*problem.args, *problem.kwargs.values()]
    given = given if isinstance(given, tuple) else (given,) * len(inputs)
    if len(given) != len(inputs):
        raise ValueError(f"baseline: expected {len(inputs)} tensors, got {len(given)}")
    found = [_one(problem, "baseline", v, v0) for v, v0 in zip(inputs, given, strict=True)]
    n = len(problem.args)
    return Point(tuple(found[:n]), dict(zip(problem.kwargs, found[n:], strict=True)))


def _one(problem: Problem, name: str, x: Any, x0: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    if x0 is None:
        return torch.zeros_like(x) if x.is_floating_point() else x
    if not isinstance(x0, (Tensor, int, float)):
        raise TypeError(f"{name}: expected a tensor or a number, got {type(x0).__name__}")
    x0 = torch.as_tensor(x0, dtype=x.dtype, device=x.device)
    try:
        x0 = x0.expand_as(x)
    except RuntimeError:
        raise ValueError(
            f"{name}: expected a shape that expands to the input's {tuple(x.shape)}, "
            f"got {tuple(x0.shape)}"
        ) from None
    if not x.is_floating_point() and problem.n_steps > 1:
        raise ValueError(
            f"{name}: integer inputs have no points between baseline and input; use n_steps=1"
        )
    return x0


def between(start: Point, end: Point, w: float) -> Point:
    """The point ``w`` of the way from ``start`` to ``end``; the ends themselves are exact."""
    if w in (0, 1):
        return end if w else start

    def mixed(x0: Any, x: Any) -> Any:
        return x0 + (x - x0) * w if isinstance(x, Tensor) and x.is_floating_point() else x

    return Point(
        tuple(mixed(x0, x) for x0, x in zip(start.args, end.args, strict=True)),
        {name: mixed(start.kwargs[name], x) for name, x in end.kwargs.items()},
    )
