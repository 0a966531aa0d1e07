"""What a layer's activations are measured against: the references of the removal methods."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchbp.blame.capture import Call
from torchbp.blame.problem import Point, Problem, Run
from torchbp.blame.reference import input_reference
from torchbp.blame.state import checkpoint_state, is_checkpoint

#: Words that stand for activations of the batch itself.
WORDS = ("mean", "resample")


def reference_activations(problem: Problem, run: Run) -> dict[str, Tensor | None]:
    """Per layer, what silencing a unit sets it to; ``None`` stands for zero.

    ``problem.baseline`` says which:

    * ``None``: zero;
    * ``"mean"``: the mean over the samples of the batch, each position of a layer by itself;
    * ``"resample"``: the activation of another sample, drawn by the option ``seed``;
    * a tensor, number, tuple or dict: the activations at another input (attribution patching:
      Nanda 2023);
    * a module or state dict: the activations of another checkpoint at the same input.

    Args:
        problem: with the baseline, in a session.
        run: the forward pass on the input.

    Returns:
        Tensors that expand to the layers' outputs.

    Raises:
        TypeError: for a baseline of no such type.
        ValueError: for a word that is not known, a reference of the wrong shape, or a layer that
            at the reference is not called or returns another shape.
    """
    given = problem.baseline
    if given is None:
        return dict.fromkeys(run.calls)
    if isinstance(given, str):
        if given not in WORDS:
            expected = ", ".join(map(repr, WORDS))
            raise ValueError(
                f"baseline: expected {expected}, a tensor, a module or a state dict, got {given!r}"
            )
        if given == "mean":
            return {n: c.output.detach().mean(0, keepdim=True) for n, c in run.calls.items()}
        other = _other_samples(len(run.losses), seed_of(problem))
        return {n: c.output.detach()[other] for n, c in run.calls.items()}
    reference = problem.run(_reference(problem)).calls
    return {name: _matching(name, call, reference.get(name)) for name, call in run.calls.items()}


def _reference(problem: Problem) -> Point:
    given = problem.baseline
    if not is_checkpoint(problem.model, given):
        return input_reference(problem)
    state = checkpoint_state(problem.model, given, "baseline")
    return Point(problem.args, problem.kwargs, state=state)


def seed_of(problem: Problem) -> int:
    """The option ``seed``.

    Raises:
        TypeError: if it is not an integer.
    """
    seed: Any = problem.option("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed: expected an integer, got {seed!r}")
    return seed


def _other_samples(samples: int, seed: int) -> Tensor:
    """``[N]`` indices, each of another sample than its position says."""
    if samples < 2:
        raise ValueError("baseline: 'resample' needs at least two samples in the batch, got one")
    generator = torch.Generator().manual_seed(seed)
    ahead = torch.randint(1, samples, (samples,), generator=generator)
    return (torch.arange(samples) + ahead) % samples


def _matching(name: str, call: Call, reference: Call | None) -> Tensor:
    if reference is None:
        raise ValueError(
            f"baseline: layer {name!r} is called on the input, but not at the reference"
        )
    if reference.output.shape != call.output.shape:
        raise ValueError(
            f"baseline: layer {name!r} returns {tuple(call.output.shape)} on the input, but "
            f"{tuple(reference.output.shape)} at the reference"
        )
    return reference.output.detach()
