"""What blame is measured against: a reference, and the points between it and the input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from torchbp.blame.capture import unknown
from torchbp.blame.dispatch import tensors_in
from torchbp.blame.problem import Point, Problem
from torchbp.blame.state import (
    checkpoint_state,
    differing,
    is_checkpoint,
    state_between,
    tensors_of,
)


@dataclass(frozen=True)
class Path:
    """From a reference to the input.

    Attributes:
        at: the point ``w`` of the way, for ``w`` from 0 to 1; the ends themselves are exact.
        changed: names of the parameters and buffers that differ along it, leaves in its states.
    """

    at: Callable[[float], Point]
    changed: tuple[str, ...] = ()


def reference_path(problem: Problem) -> Path:
    """The path from whatever ``baseline`` says to the input.

    * inputs (tensors, numbers, a dict of keywords): a straight line between inputs; between the
      embeddings of integer inputs (see :func:`input_path`);
    * a module, or parameters by name: a straight line between checkpoints, on the same inputs.

    Raises:
        TypeError: for a baseline that is none of these.
        ValueError: for one that does not fit, by name.
    """
    given = problem.baseline
    if not _names_parameters(problem, given):
        start, end = input_path(problem, given)
        return Path(lambda w: between(start, end, w))
    before = checkpoint_state(problem.model, given, "baseline")
    after = checkpoint_state(problem.model, problem.model, "model")
    changed = differing(before, after)
    return Path(
        lambda w: replace(problem.point, state=state_between(before, after, w, changed)),
        tuple(changed),
    )


def _names_parameters(problem: Problem, given: Any) -> bool:
    if not is_checkpoint(problem.model, given):
        return False
    both = [name for name in given if name in problem.kwargs] if isinstance(given, Mapping) else []
    if both:
        raise ValueError(
            f"baseline: {both[0]!r} is the name of an input and of a parameter; give the other "
            "checkpoint as a module"
        )
    return True


def input_reference(problem: Problem) -> Point:
    """The baseline as inputs: zeros for floating tensors and for embeddings of integer ones.

    Raises:
        TypeError: for a baseline that is no tensor, number, tuple or dict of those.
        ValueError: for a baseline of another shape.
    """
    return input_path(problem, problem.baseline)[0]


def input_path(problem: Problem, given: Any) -> tuple[Point, Point]:
    """The baseline and the input as ends of a path for :func:`between`.

    Integers have no points between them. Where the baseline says nothing of integer inputs, or a
    path of several steps is asked for, the path lies where they become floating: in the outputs
    of the modules that are first to make something of them (embeddings). Without a baseline these
    outputs are zero at the reference, and positions are as they were.
    """
    point = problem.point
    inputs = [*point.args, *point.kwargs.values()]
    if isinstance(given, Mapping):
        for name in given:
            if name not in point.kwargs:
                known = [*point.kwargs, *tensors_of(problem.model)]
                raise ValueError(unknown("baseline", str(name), known))
        chosen = [*(None for _ in point.args), *(given.get(name) for name in point.kwargs)]
    else:
        chosen = [*given] if isinstance(given, tuple) else [given] * len(inputs)
    if len(chosen) != len(inputs):
        raise ValueError(f"baseline: expected {len(inputs)} tensors, got {len(chosen)}")
    names = [*("baseline" for _ in point.args), *(f"baseline[{name!r}]" for name in point.kwargs)]
    found = [_one(*each) for each in zip(names, inputs, chosen, strict=True)]
    n = len(point.args)
    start = Point(tuple(found[:n]), dict(zip(point.kwargs, found[n:], strict=True)))
    integers = [k for k, x in enumerate(inputs) if _is_integer(x)]
    unsaid = [inputs[k] for k in integers if all(chosen[j] is None for j in integers)]
    moves = not all(torch.equal(inputs[k], found[k]) for k in integers)
    if not unsaid and not (moves and problem.n_steps > 1):
        return start, point
    reach = _Reach(unsaid)
    began = problem.run(mode=reach).began
    ends = [value.detach() for value in began]
    if moves:
        ends0 = [value.detach() for value in problem.run(start).began]
    else:
        ends0 = ends
    starts = [
        torch.zeros_like(a) if reach.holds(value) else a0
        for value, a, a0 in zip(began, ends, ends0, strict=True)
    ]
    return replace(start, starts=starts), replace(point, starts=ends)


def refuse_jumps(problem: Problem, start: Point, end: Point) -> None:
    """Refuse a baseline of integers that do more than choose embeddings.

    Along the path of :func:`input_path` they are the input's; at its beginning they become those of
    the baseline. What else they do there (a mask, a length) no point of the path would show.

    Raises:
        ValueError: if losses at the reference depend on whose integers these are.
    """
    ends = ([*p.args, *p.kwargs.values()] for p in (start, end))
    pairs = [*zip(*ends, strict=True)]
    if start.starts is None or all(x0 is x for x0, x in pairs if _is_integer(x)):
        return
    fed = [x if _is_integer(x) else x0 for x0, x in pairs]
    n = len(start.args)
    keywords = dict(zip(start.kwargs, fed[n:], strict=True))
    crossing = problem.run(Point(tuple(fed[:n]), keywords, starts=start.starts))
    if not torch.allclose(problem.run(start).losses, crossing.losses, rtol=1e-3):
        raise ValueError(
            "baseline: integer inputs differ from the baseline's not in their embeddings alone (a "
            "mask, say), and integers have no points between them: no path leads to this baseline. "
            "Method 'layer_ig' has its paths in the layers"
        )


class _Reach(TorchFunctionMode):
    """Which tensors of a run were computed from some of the inputs' values."""

    def __init__(self, inputs: Iterable[Tensor]) -> None:
        super().__init__()
        self._inputs = [*inputs]
        self._reached: dict[int, Tensor] = {}  # holding them keeps their identity taken

    def holds(self, value: Any) -> bool:
        return any(id(t) in self._reached for t in tensors_in(value))

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") not in _SHAPE_ONLY and self.holds((args, kwargs)):
            self._reached |= {id(t): t for t in tensors_in(output)}
        return output

    def next_run(self, modules: list[str]) -> None:
        """A run begins."""
        self._reached = {id(v): v for v in self._inputs}

    def drop_run(self) -> None:
        """It failed; the next one starts anew."""

    def finish_run(self) -> None:
        """It ended; what was reached is kept."""


#: Functions that look at the shape of a tensor, not at its values.
_SHAPE_ONLY = frozenset(
    "zeros_like ones_like empty_like full_like rand_like randn_like new_zeros new_ones new_full "
    "new_empty new_tensor".split()
)


def _one(name: str, x: Any, x0: Any) -> Any:
    """The reference of one input: what was given for it, in its shape, or zero."""
    if not isinstance(x, Tensor):
        return x
    if x0 is None:
        return torch.zeros_like(x) if x.is_floating_point() else x
    if not isinstance(x0, (Tensor, int, float)):
        raise TypeError(f"{name}: expected a tensor or a number, got {type(x0).__name__}")
    given, x0 = x0, torch.as_tensor(x0, dtype=x.dtype, device=x.device)
    if not x.is_floating_point() and not bool(
        (x0 == torch.as_tensor(given, device=x.device)).all()
    ):
        raise ValueError(f"{name}: expected integers ({x.dtype}) like the input, got {given!r}")
    try:
        return x0.expand_as(x)
    except RuntimeError:
        raise ValueError(
            f"{name}: expected a shape that expands to the input's {tuple(x.shape)}, "
            f"got {tuple(x0.shape)}"
        ) from None


def _is_integer(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_floating_point()


def between(start: Point, end: Point, w: float) -> Point:
    """The point ``w`` of the way from ``start`` to ``end``; the ends themselves are exact.

    Raises:
        ValueError: for integer inputs that differ between the ends, whose path does not begin at
            their embeddings.
    """
    if w in (0, 1):
        return replace(end, starts=None) if w else start

    def mixed(x0: Any, x: Any) -> Any:
        # Equal ends stay as they are, infinities of a mask among them.
        if not isinstance(x, Tensor) or torch.equal(x, x0):
            return x
        if not x.is_floating_point():
            if end.starts is not None:
                return x
            raise ValueError(
                "baseline: integer inputs have no points between baseline and input; use n_steps=1"
            )
        return x0 + (x - x0) * w

    starts = None
    if start.starts is not None and end.starts is not None:
        starts = [mixed(a0, a) for a0, a in zip(start.starts, end.starts, strict=True)]
    return Point(
        tuple(mixed(x0, x) for x0, x in zip(start.args, end.args, strict=True)),
        {name: mixed(start.kwargs[name], x) for name, x in end.kwargs.items()},
        starts=starts,
    )
