"""``lrp``: layer-wise relevance propagation, started from the loss head."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchbp.blame.capture import unknown
from torchbp.blame.cut_off import without_cut_off
from torchbp.blame.cuts import cuts_of
from torchbp.blame.methods.base import Method, Result, error_signals, left_at_cut
from torchbp.blame.problem import Problem, Run
from torchbp.blame.relevance_tape import RelevanceTape
from torchbp.blame.tape import SecantTape
from torchbp.ops.relevance import Rule, RuleName


def lrp(problem: Problem) -> Result:
    """Relevance of every layer, from ``R = m (z - z')`` at the prediction ``z`` down.

    The multipliers ``m`` are the loss head's secant between ``z`` and the reference prediction
    ``z'``, so relevance starts with the sum ``L(z) - L(z')``; the seed ``p - onehot`` would start
    with the sum zero. With a logit for a loss and ``z' = 0`` this is the usual start from a logit.

    Options of :func:`torchbp.attribute`:

    * ``rules``: a :class:`~torchbp.ops.relevance.Rule` or its name for all layers; or a mapping
      from layer names, name patterns (``"features.*"``) and module classes to rules. A layer's own
      name counts first, then the last entry of the mapping whose pattern or class fits it, then
      whatever holds for the module around it; else ``epsilon``.
    * ``reference``: the prediction ``z'``, a number or a tensor that expands to the output's shape;
      0, the uniform prediction of a classifier, by default.

    What biases and stabilisers took above a layer stands in ``absorbed``. Summed over the batch it
    is measured op by op; a sample's part is what is missing at the cut. If the two disagree,
    ``residual`` shows it.

    Source: Bach et al. (2015); Montavon et al. (2019); for attention and norms Achtibat et al.
    (2024).

    Raises:
        TypeError: if ``rules`` or ``reference`` is of the wrong type.
        ValueError: for an unknown rule or layer, a rule that nothing in the layer it was named for
            follows, a reference of the wrong shape, or a baseline.
        NotImplementedError: naming a function on the path that has no rule.
    """
    if problem.baseline is not None:
        raise ValueError(
            "baseline: method 'lrp' measures against a prediction, not an input; give that as "
            "reference=..."
        )
    rules = layer_rules(problem.model, problem.option("rules", "epsilon"))
    tape = RelevanceTape(rules)
    run = problem.run(mode=tape)
    rules.refuse_idle(tape.followed)
    seeds, reference_losses = _seeds(problem, run.output)
    calls = [*run.calls.values()]
    start = torch.stack([(z * seed).sum() for z, seed in seeds]).sum()
    relevances = error_signals(start, calls)
    pairs = zip(run.calls.items(), relevances, strict=True)
    values = {name: problem.reduce(relevance, call) for (name, call), relevance in pairs}
    values = without_cut_off(problem, run, values)
    change = run.losses.detach() - reference_losses
    cuts = cuts_of(run)
    expected = {name: change for name in values if name in cuts}
    taken = tape.taken()
    absorbed = {name: _absorbed(taken, run, name, values[name], change) for name in expected}
    return Result(values, run, expected, reference_losses, absorbed)


def _absorbed(
    taken: list[tuple[int, float]], run: Run, name: str, values: Tensor, change: Tensor
) -> Tensor:
    """``[N]``: what the ops above a cut took."""
    # Above a complete cut is what ran after it: nothing else leads from there to the loss.
    node = run.calls[name].output.grad_fn
    start = -1 if node is None else node._sequence_nr()
    return left_at_cut(sum(amount for number, amount in taken if number > start), change, values)


def _seeds(problem: Problem, output: Any) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Relevance of every floating tensor of the output, and the losses at the reference."""
    leaves, spec = pytree.tree_flatten(output)
    at = [i for i, z in enumerate(leaves) if isinstance(z, Tensor) and z.requires_grad]
    if not at:
        raise ValueError("lrp: the model's output does not depend on the layers, nor on the input")
    reference = _reference(problem.option("reference", 0.0), [leaves[i] for i in at])
    tape = SecantTape()
    losses = []
    for point in (reference, [leaves[i] for i in at]):
        fed = [*leaves]
        for i, z in zip(at, point, strict=True):
            fed[i] = z.detach().clone().requires_grad_()
        tape.next_run([])
        with tape:
            outcome = problem.head.per_sample(pytree.tree_unflatten(fed, spec), problem.targets)
        tape.finish_run()
        losses.append(outcome)
    multipliers = torch.autograd.grad(losses[1].sum(), [fed[i] for i in at], allow_unused=True)
    seeds = [
        (leaves[i], m * (leaves[i].detach() - z0))
        for i, m, z0 in zip(at, multipliers, reference, strict=True)
        if m is not None
    ]
    return seeds, losses[0].detach()


def _reference(given: Any, outputs: list[Tensor]) -> list[Tensor]:
    if not isinstance(given, (Tensor, int, float)):
        raise TypeError(f"reference: expected a number or a tensor, got {type(given).__name__}")
    try:
        return [torch.as_tensor(given).to(z).expand_as(z) for z in outputs]
    except RuntimeError:
        shapes = " and ".join(str(tuple(z.shape)) for z in outputs)
        raise ValueError(
            f"reference: expected a shape that expands to the output's {shapes}, "
            f"got {tuple(torch.as_tensor(given).shape)}"
        ) from None


@dataclass
class LayerRules:
    """The rule of every module of a model, by its name (empty for the model itself).

    Attributes:
        named: rules of modules that were named.
        fitting: rules of modules that a pattern or class fits.
        default: where nothing else holds.
    """

    named: dict[str, Rule] = field(default_factory=dict)
    fitting: dict[str, Rule] = field(default_factory=dict)
    default: Rule = field(default_factory=Rule)

    def __call__(self, name: str) -> Rule:
        """The module's own rule, or that of the module around it."""
        found = self.named.get(name, self.fitting.get(name))
        if found is not None or not name:
            return found or self.default
        return self(name.rpartition(".")[0])

    def refuse_idle(self, followed: Iterable[str]) -> None:
        """Raise for a rule that was given to a layer by name, in which no op can follow it.

        Raises:
            ValueError: naming the layer.
        """
        inside = [f"{name}." for name in followed]
        for layer, rule in self.named.items():
            idle = not any(name.startswith(f"{layer}." if layer else "") for name in inside)
            if rule.name != "epsilon" and idle:
                raise ValueError(
                    f"rules: nothing in layer {layer!r} follows rule {rule.name!r}; linear layers, "
                    "convolutions and recurrent layers do, and norms follow 'pass'"
                )


def layer_rules(model: nn.Module, rules: Any) -> LayerRules:
    """The rules of a model's layers; see :func:`lrp` for what may be given.

    Args:
        model: whose modules the rules are for.
        rules: a rule, its name, or a mapping from layers to those.

    Raises:
        TypeError: if something is no rule, or a key neither a string nor a module class.
        ValueError: for an unknown rule, and for names and patterns that fit no module.
    """
    if not isinstance(rules, Mapping):
        return LayerRules(default=_rule(rules))
    modules = dict(model.named_modules())
    known = [name for name in modules if name]
    found = LayerRules()
    for key, given in rules.items():
        rule = _rule(given)
        if isinstance(key, type) and issubclass(key, nn.Module):
            fits = [name for name, module in modules.items() if isinstance(module, key)]
            found.fitting |= dict.fromkeys(fits, rule)
        elif not isinstance(key, str):
            raise TypeError(f"rules: expected names or module classes as keys, got {key!r}")
        elif key in modules:
            found.named[key] = rule
        elif fits := fnmatch.filter(known, key):
            found.fitting |= dict.fromkeys(fits, rule)
        else:
            raise ValueError(unknown("rules", key, known))
    return found


def _rule(given: Any) -> Rule:
    if isinstance(given, Rule):
        return given
    if not isinstance(given, str):
        raise TypeError(f"rules: expected a Rule or its name, got {given!r}")
    if given not in get_args(RuleName):
        raise ValueError(unknown("rules", given, get_args(RuleName)))
    return Rule(given)  # type: ignore[arg-type]


LRP = Method("lrp", "allocation", lrp, options=("rules", "reference"))
