"""``ablation``: silence a unit, run the rest of the network, and see. The ground truth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from torchbp.blame.capture import INPUT, Call, Of, first_tensor, replace_first
from torchbp.blame.methods.base import Method, Result
from torchbp.blame.problem import Problem

#: Samples (times silenced units) run at once.
_ROWS = 1 << 13


def ablation(problem: Problem) -> Result:
    """``b = L - L(unit := 0)`` for every unit of every layer, each by a forward pass.

    In a ``torch.nn.Sequential`` only the part after the layer runs again; in other models the
    whole forward does. Many units go through in one batch.
    """
    run = problem.run()
    with torch.no_grad():
        values = {
            name: _ablate(problem, name, call, run.losses.detach())
            for name, call in run.calls.items()
        }
    return Result(values, run)


def player_masks_shape(activation: Tensor, call: Call, of: Of) -> torch.Size:
    """Shape, without samples, of a mask with one entry per player that fits the activation."""
    dim = call.unit_dim % activation.dim()
    kept = {"units": [dim], "elements": [*range(1, activation.dim())]}.get(
        of, [d for d in range(1, activation.dim()) if d != dim]
    )
    return torch.Size(activation.shape[d] if d in kept else 1 for d in range(1, activation.dim()))


def _ablate(problem: Problem, name: str, call: Call, losses: Tensor) -> Tensor:
    activation = call.output.detach()
    if activation.dim() == 1:
        activation = activation[:, None]
    shape = player_masks_shape(activation, call, problem.of)
    units, n = shape.numel(), len(losses)
    rest = _suffix(problem, call) or _whole(problem, name, call)
    step = max(1, _ROWS // max(n, 1))
    parts = []
    for start in range(0, units, step):
        count = min(step, units - start)
        keep = torch.ones(count, units, dtype=activation.dtype, device=activation.device)
        keep[torch.arange(count), torch.arange(start, start + count)] = 0
        silenced = activation * keep.view(count, 1, *shape)
        output = rest(silenced.reshape(count * n, *call.output.shape[1:]), count)
        targets = problem.targets.repeat(count, *[1] * (problem.targets.dim() - 1))
        parts.append(losses - problem.head.per_sample(output, targets).view(count, n))
    return torch.cat(parts).T if parts else losses.new_zeros(n, 0)


Rest = Callable[[Tensor, int], Any]


def _suffix(problem: Problem, call: Call) -> Rest | None:
    """What follows the layer in (nested) Sequentials; ``None`` where the model is none."""
    if call.name == INPUT:
        others = problem.args[1:]
        return lambda silenced, count: problem.call(
            (silenced, *(_repeat(a, count) for a in others)), {}
        )
    after: list[nn.Module] = []
    module: nn.Module = problem.model
    places = [m for parent in module.modules() for m in parent._modules.values()]
    if len({id(m) for m in places}) != len(places):
        return None  # a reused module has several suffixes
    for part in call.name.split("."):
        if type(module) is not nn.Sequential:
            return None
        children = dict(module.named_children())
        names = [*children]
        following = [children[n] for n in names[names.index(part) + 1 :]]
        after = [*following, *after]
        module = children[part]
    rest = nn.Sequential(*after)
    rest.training = problem.model.training
    state = {n: p.detach() for n, p in rest.named_parameters()}
    state |= {n: b.clone() for n, b in rest.named_buffers()}
    return lambda silenced, count: functional_call(rest, state, (silenced,))


def _whole(problem: Problem, name: str, call: Call) -> Rest:
    """The whole forward, with the layer's output replaced at its call."""
    wanted = int(name.rpartition("#")[2]) if name != call.name else 1

    def rest(silenced: Tensor, count: int) -> Any:
        seen = 0

        def replace(module: nn.Module, args: Any, output: Any) -> Any:
            nonlocal seen
            if first_tensor(output) is None:
                return None
            seen += 1
            return replace_first(output, silenced) if seen == wanted else None

        handle = call.module.register_forward_hook(replace)
        try:
            return problem.call(
                tuple(_repeat(a, count) for a in problem.args),
                {k: _repeat(v, count) for k, v in problem.kwargs.items()},
            )
        finally:
            handle.remove()

    return rest


def _repeat(value: Any, count: int) -> Any:
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    return value.repeat(count, *[1] * (value.dim() - 1))


ABLATION = Method("ablation", "removal", ablation)
