"""The flow of blame along the weights between layers, whose sums are the blame of the units."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from torchbp.blame.arguments import as_arguments, check_count, check_model
from torchbp.blame.capture import Call, first_tensor, passes_units
from torchbp.blame.definitions import LossHead, Question
from torchbp.blame.edge_graph import EdgeFlow, LayerFlow, Unit
from torchbp.blame.methods.base import gradients
from torchbp.blame.problem import Problem, Run
from torchbp.blame.reference import reference_path
from torchbp.blame.tape import SecantTape
from torchbp.ops.base import wide
from torchbp.ops.conv_gradients import grad_weight, leading


@dataclass
class _Inputs:
    """What the calls of modules were given, by name of the call."""

    modules: dict[str, nn.Module]
    given: dict[str, Tensor] = field(default_factory=dict)
    _calls: Counter[str] = field(default_factory=Counter)

    @contextmanager
    def recorded(self) -> Iterator[dict[str, Tensor]]:
        """The inputs of one run."""
        handles = [
            module.register_forward_pre_hook(self._hook(name), with_kwargs=True)
            for name, module in self.modules.items()
        ]
        self.given, self._calls = {}, Counter()
        try:
            yield self.given
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensor = first_tensor((*args, *kwargs.values()))
            if tensor is not None:
                self._calls[name] += 1
                call = name if self._calls[name] == 1 else f"{name}#{self._calls[name]}"
                # A copy, for what follows may write into it.
                self.given[call] = tensor.detach().clone()

        return hook


def edge_flow(
    model: nn.Module,
    inputs: Any,
    targets: Any,
    loss_fn: Any,
    method: Literal["taylor", "secant"] = "taylor",
    baseline: Any = None,
    n_steps: int = 1,
) -> EdgeFlow:
    """The blame that flows along every weight of the linear and convolution layers.

    ``E_ji = w_ji Σ_n δ_nj a_ni``: a function of ``W ∂L/∂W`` alone for ``taylor``. The sum over a
    row, with the bias, is the blame of the layer's output unit, and the sum over a column that of
    its input unit, as :func:`torchbp.attribute` gives them (Tanaka et al. 2020). For ``secant``,
    ``δ`` is the multiplier and ``a`` the difference from the baseline; the bias drops out, and the
    edges of every complete cut sum to ``L - L(baseline)``.

    Args:
        model: the model, in the mode (``eval()``, usually) in which it shall be judged.
        inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs; dimension 0
            runs over the ``N`` samples.
        targets: as ``loss_fn`` takes them.
        loss_fn: ``loss_fn(output, targets)``, with any reduction.
        method: ``"taylor"`` (removal) or ``"secant"`` (allocation).
        baseline: reference input of ``secant``; zeros if ``None``.
        n_steps: segments of ``secant`` between baseline and input.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: for another method, an empty batch, wrong targets or baseline, a loss that is
            not one per sample, or a model without linear and convolution layers that run.
        FloatingPointError: if a flow holds NaN or infinity.
        NotImplementedError: for ``secant``, naming a function that has no rule.
    """
    check_model(model)
    if method not in ("taylor", "secant"):
        raise ValueError(f"method: expected 'taylor' or 'secant', got {method!r}")
    if method == "taylor" and baseline is not None:
        raise ValueError("baseline: method 'taylor' measures edges against zero; use 'secant'")
    check_count("n_steps", n_steps)
    args, kwargs = as_arguments(inputs)
    head = LossHead.of(loss_fn)
    problem = Problem(model, args, kwargs, targets, head, "all", baseline, n_steps)
    with problem.session():
        flows = (_tangent if method == "taylor" else _secant)(problem)
    if not flows:
        raise ValueError("model: none of its linear and convolution layers has run")
    question: Question = "removal" if method == "taylor" else "allocation"
    for name, flow in flows.items():
        if not bool(torch.isfinite(flow.edges).all()):
            raise FloatingPointError(f"layer {name!r}: its edges hold NaN or infinity")
    return EdgeFlow(flows, method, question, _missing(problem, flows))


def _missing(problem: Problem, flows: Mapping[str, LayerFlow]) -> tuple[str, ...]:
    """Modules with matrices that no flow is given for."""
    covered = {name.split("#")[0] for name in flows}
    inside = tuple(f"{name}." for name in problem.wanted if name)
    found = []
    for name, module in problem.model.named_modules():
        # Leaves are named whole; of others, what is theirs alone (parametrized weights, tables).
        whole = name in problem.wanted
        if name in covered or (not whole and name.startswith(inside)):
            continue
        if any(p.dim() > 1 for p in module.parameters(recurse=whole)):
            found.append(name.split(".parametrizations.")[0] or "(model)")
    return tuple(dict.fromkeys(found))


def _tangent(problem: Problem) -> dict[str, LayerFlow]:
    inputs = _Inputs(problem.wanted)
    with inputs.recorded() as given:
        run = problem.run()
    signals = _signals(run)
    flows = {}
    for name, call in _weighted(run).items():
        edges = _edges(call.module, signals[name], given[name])
        bias = _bias(call.module, signals[name])
        flows[name] = _flow(name, edges, bias, run, given)
    return flows


def _secant(problem: Problem) -> dict[str, LayerFlow]:
    if isinstance(problem.baseline, str):
        raise ValueError(f"baseline: expected inputs for edges, got {problem.baseline!r}")
    inputs, tape, path = _Inputs(problem.wanted), SecantTape(), reference_path(problem)
    if path.changed:
        raise ValueError("baseline: edges need inputs, not a checkpoint: the weights must be equal")
    with inputs.recorded() as before:
        run = problem.run(path.at(0), mode=tape)
    sums: dict[str, Tensor] = {}
    for k in range(1, problem.n_steps + 1):
        with inputs.recorded() as given:
            run = problem.run(path.at(k / problem.n_steps), mode=tape)
        signals = _signals(run)
        for name, call in _weighted(run).items():
            edges = _edges(call.module, signals[name], given[name] - before[name])
            sums[name] = sums[name] + edges if name in sums else edges
        before = given
    return {
        name: _flow(name, edges, edges.new_zeros(len(edges)), run, before)
        for name, edges in sums.items()
    }


def _weighted(run: Run) -> dict[str, Call]:
    # The model's input stands as a call of the model, which may be a linear layer itself.
    calls = [(name, call) for name, call in run.calls.items() if not call.is_input]
    return {name: call for name, call in calls if _is_plain(call.module)}


def _is_plain(module: nn.Module) -> bool:
    """Whether it is a linear or convolution layer that does with its weight what those do."""
    if not isinstance(module, (nn.Linear, _ConvNd)):
        return False
    home = next(c for c in type(module).__mro__ if "forward" in vars(c)).__module__
    return home.startswith(("torch.nn.modules.", "torchbp."))


def _signals(run: Run) -> dict[str, Tensor]:
    calls = _weighted(run)
    found = gradients(run.losses.sum(), [call.output for call in calls.values()])
    return dict(zip(calls, found, strict=True))


def _edges(module: nn.Module, error: Tensor, x: Tensor) -> Tensor:
    """``[O, I]``: weight times what the errors and the inputs would have made its gradient."""
    assert isinstance(module, (nn.Linear, _ConvNd))
    error, x, weight = wide(error), wide(x), wide(module.weight.detach())
    if isinstance(module, nn.Linear):
        return weight * (error.reshape(-1, error.shape[-1]).mT @ x.reshape(-1, x.shape[-1]))
    kernel = weight.shape[2:]
    first = leading(module.padding, kernel, module.dilation)
    rest = module.stride, first, module.dilation, module.groups
    if isinstance(module, _ConvTransposeNd):
        grad = grad_weight(x, error, kernel, *rest)
        return _spread((weight * grad).flatten(2).sum(2), module.groups).mT
    if module.padding_mode != "zeros":
        mode = module.padding_mode
        x = nn.functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
        rest = module.stride, (0,) * len(kernel), module.dilation, module.groups
    with torch.no_grad():
        grad = grad_weight(error, x, kernel, *rest)
    return _spread((weight * grad).flatten(2).sum(2), module.groups)


def _spread(blocks: Tensor, groups: int) -> Tensor:
    """``[O, I]`` from ``[O, I / groups]`` of a grouped convolution, which lacks the other edges."""
    return torch.block_diag(*blocks.chunk(groups)) if groups > 1 else blocks


def _bias(module: nn.Module, error: Tensor) -> Tensor:
    assert isinstance(module, (nn.Linear, _ConvNd))
    units = -1 if isinstance(module, nn.Linear) else 1
    summed = wide(error).movedim(units, 0).flatten(1).sum(1)
    bias = module.bias
    return torch.zeros_like(summed) if bias is None else summed * wide(bias.detach())


def _flow(
    name: str, edges: Tensor, bias: Tensor, run: Run, given: Mapping[str, Tensor]
) -> LayerFlow:
    source, units = _source(name, edges.shape[1], run, given)
    columns: list[Unit] = [*range(edges.shape[1])]
    if units < edges.shape[1]:  # flattened: every unit has as many columns as positions
        edges = edges.unflatten(1, (units, -1)).sum(2)
        columns = [*range(units)]
    return LayerFlow(name, source, edges, bias, [*range(len(edges))], columns)


def _source(
    name: str, columns: int, run: Run, given: Mapping[str, Tensor]
) -> tuple[str | None, int]:
    """The layer before, found by the values it handed on, and how many units it has."""
    calls = [*run.calls.items()]
    weighted = _weighted(run)
    end = [n for n, _ in calls].index(name)
    x = given[name]
    rank = x.dim()
    columns_last = rank == 2 or isinstance(calls[end][1].module, nn.Linear)
    while True:
        for i in range(end - 1, -1, -1):
            before, call = calls[i]
            output = call.output.detach()
            alike = output.numel() == x.numel() and output.dtype == x.dtype
            if alike and torch.equal(output.flatten(), x.flatten()):
                break
        else:
            return None, columns
        if before in weighted or call.is_input:
            units = call.output.shape[call.unit_dim]
            last = call.unit_dim in (-1, call.output.dim() - 1)
            same = units == columns and last == columns_last
            flattened = before in weighted and call.unit_dim == 1 and columns % units == 0
            fits = same if call.output.dim() == rank else same or flattened
            return (before, units) if fits else (None, columns)
        if before not in given or not passes_units(call.module):
            return None, columns
        x, end = given[before], i
