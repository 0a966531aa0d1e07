"""Running the rest of a network again, from one layer's output on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchbp.blame.capture import Call, first_tensor, replace_first, training_modules
from torchbp.blame.problem import Point, Problem, Run

#: ``rest(activation, count)``: the model's output for ``count * N`` rows.
Rest = Callable[[Tensor, int], Any]


def rerun(problem: Problem, name: str, call: Call, point: Point | None = None) -> Rest:
    """What the model makes of another output of one layer.

    Below the layer (and beside it, in a skip connection) everything is as it was. Inside nested
    ``torch.nn.Sequential`` only what follows the layer runs; in other models the whole forward
    does, with the layer's output replaced at its call: hooks cannot keep a module from running, and
    the model's methods are not ours to exchange.

    Args:
        problem: the model and its inputs; needs ``problem.session()``.
        name: of the layer's call, as ``problem.run().calls`` has it (``name#2`` for the second).
        call: that call.
        point: inputs and state to use instead of the problem's own.

    Returns:
        ``rest(activation, count)``: the model's output for ``activation`` of shape
        ``[count * N, ...]``, whose rows are ``count`` batches one after the other;
        differentiable with respect to it. Arguments whose first dimension is ``N`` are repeated.

    Raises:
        TypeError: (from ``rest``) if the layer's output stands in a container that cannot be
            rebuilt.
        RuntimeError: (from ``rest``) if this time the layer is not called.
    """
    point = point or problem.point
    if call.is_input:
        return _from_input(problem, name, call, point)
    return _from_sequential(problem, call, point) or _from_anywhere(problem, name, call, point)


def repeat_samples(value: Any, samples: int, count: int) -> Any:
    """Copies of tensors (in any containers), ``count`` times where they run over samples."""

    def repeated(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.shape[:1] != (samples,):
            return leaf.detach().clone()
        return leaf.detach().repeat(count, *[1] * (leaf.dim() - 1))

    return pytree.tree_map(repeated, value)


def losses_again(problem: Problem, output: Any, count: int) -> Tensor:
    """``[count, N]`` losses of an output of ``rest``."""
    rows = first_tensor(output)
    samples = 0 if rows is None else len(rows) // count
    targets = repeat_samples(problem.targets, samples, count)
    return problem.head.per_sample(output, targets).view(count, -1)


def loss_can_be_repeated(problem: Problem, run: Run) -> bool:
    """Whether the loss of two copies of the output are its losses twice.

    Not where the loss keeps something of this batch to itself, as weights of its samples, or takes
    a list with one thing for each.
    """
    if problem.head.kind == "cross_entropy":
        return True
    return _twice(run, lambda: repeat_samples(run.output, len(run.losses), 2), problem)


def can_be_repeated(problem: Problem, run: Run) -> bool:
    """Whether two copies of the batch in one pass have its losses twice.

    Not where samples are coupled or drawn at random (training mode), nor where
    :func:`loss_can_be_repeated` does not hold. Of several inputs, one may run over samples in
    another dimension (the state of a recurrent layer), or be as long as there are samples by chance
    (a square mask).
    """
    if training_modules(problem.model) or not loss_can_be_repeated(problem, run):
        return False
    inputs = (problem.args, problem.kwargs)
    if sum(isinstance(v, Tensor) for v in pytree.tree_leaves(inputs)) == 1:
        return True

    def output() -> Any:
        args, kwargs = repeat_samples(inputs, len(run.losses), 2)
        return problem.call(args, kwargs)

    return _twice(run, output, problem)


def _twice(run: Run, output: Callable[[], Any], problem: Problem) -> bool:
    try:
        with torch.no_grad():
            losses = losses_again(problem, output(), 2)
    except Exception:
        return False  # model or loss is made for this batch only
    expected = run.losses.detach().expand(2, -1)
    return losses.shape == expected.shape and torch.allclose(losses, expected, rtol=1e-3)


def _call_number(name: str, call: Call) -> int:
    """1 for ``name``, 2 for ``name#2``."""
    return 1 if name == call.name else int(name.rpartition("#")[2])


def _owned(problem: Problem, activation: Tensor) -> Tensor:
    """What the model may write into."""
    return activation.clone() if problem.protect else activation


def _from_input(problem: Problem, name: str, call: Call, point: Point) -> Rest:
    inputs = [*point.args, *point.kwargs.values()]
    floating = [i for i, v in enumerate(inputs) if first_tensor(v) is v and v is not None]
    replaced = floating[_call_number(name, call) - 1]
    n, samples = len(point.args), len(call.output)

    def rest(activation: Tensor, count: int) -> Any:
        fed = repeat_samples(inputs, samples, count)
        fed[replaced] = activation.clone()  # the model may write into its input
        keywords = dict(zip(point.kwargs, fed[n:], strict=True))
        return problem.call(tuple(fed[:n]), keywords, point.state)

    return rest


class _Following(nn.Module):
    """Some modules of a model, one after the other, with the model's parameters."""

    def __init__(self, model: nn.Module, following: list[nn.Module]) -> None:
        super().__init__()
        self.model, self._following = model, tuple(following)

    def forward(self, value: Any) -> Any:
        for module in self._following:
            value = module(value)
        return value


def _from_sequential(problem: Problem, call: Call, point: Point) -> Rest | None:
    """What follows the layer in (nested) Sequentials; ``None`` where the model is none."""
    places = [id(m) for parent in problem.model.modules() for m in parent._modules.values()]
    if len({*places}) != len(places) or not call.alone:
        return None  # a reused module has several suffixes; of a tuple, a part is missing
    following: list[nn.Module] = []
    module: nn.Module = problem.model
    for part in call.name.split("."):
        if type(module) is not nn.Sequential or _has_hooks(module):
            return None
        names = [*module._modules]
        after = names[names.index(part) + 1 :]
        following = [*(module.get_submodule(name) for name in after), *following]
        module = module.get_submodule(part)
    tail = _Following(problem.model, following)

    def rest(activation: Tensor, count: int) -> Any:
        return problem.call((_owned(problem, activation),), {}, point.state, tail)

    return rest


def _has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _from_anywhere(problem: Problem, name: str, call: Call, point: Point) -> Rest:
    """The whole forward, with the layer's output replaced at its call."""
    wanted, samples = _call_number(name, call), len(call.output)

    def rest(activation: Tensor, count: int) -> Any:
        seen = 0

        def replace(module: nn.Module, args: Any, output: Any) -> Any:
            nonlocal seen
            if first_tensor(output) is None:
                return None
            seen += 1
            if seen != wanted:
                return None
            replaced = replace_first(output, _owned(problem, activation))
            if replaced is None:
                raise TypeError(
                    f"layer {name!r}: its output stands in a {type(output).__name__}, "
                    "expected a tensor or a tuple that begins with one"
                )
            return replaced

        args, kwargs = repeat_samples((point.args, point.kwargs), samples, count)
        handle = call.module.register_forward_hook(replace)
        try:
            output = problem.call(args, kwargs, point.state)
        finally:
            handle.remove()
        if seen < wanted:
            raise RuntimeError(
                f"layer {name!r} was called in the first forward pass, but not when it was run "
                "again: the model's control flow changed"
            )
        return output

    return rest
