"""Blame after the fact: one call, any method."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor, nn

from torchbp.blame.arguments import as_arguments, check_count, check_model
from torchbp.blame.capture import Call, Of, input_name, player_shape, unknown
from torchbp.blame.classes import ClassBlame, class_blame
from torchbp.blame.definitions import LossHead
from torchbp.blame.methods import METHODS
from torchbp.blame.problem import Problem, Run
from torchbp.blame.rerun import repeat_samples
from torchbp.blame.result import Blame
from torchbp.blame.samples import SampleBlame, sample_blame
from torchbp.blame.tokens import TokenBlame, token_blame
from torchbp.blame.weights import WeightBlame, weight_blame

#: What can be blamed besides the units of layers, and who finds it.
_OTHERS: dict[str, Callable[..., Any]] = {
    "weights": weight_blame,
    "samples": sample_blame,
    "classes": class_blame,
    "tokens": token_blame,
}


@overload
def attribute(
    model: nn.Module,
    inputs: Any,
    targets: Any,
    loss_fn: Any,
    *,
    of: Literal["weights"],
    **options: Any,
) -> WeightBlame: ...
@overload
def attribute(
    model: nn.Module,
    inputs: Any,
    targets: Any,
    loss_fn: Any,
    *,
    of: Literal["samples"],
    **options: Any,
) -> SampleBlame: ...
@overload
def attribute(
    model: nn.Module,
    inputs: Any,
    targets: Any,
    loss_fn: Any,
    *,
    of: Literal["classes"],
    **options: Any,
) -> ClassBlame: ...
@overload
def attribute(
    model: nn.Module,
    inputs: Any,
    targets: Any,
    loss_fn: Any,
    *,
    of: Literal["tokens"],
    **options: Any,
) -> TokenBlame: ...
@overload
def attribute(
    model: nn.Module,
    inputs: Any,
    targets: Any,
    loss_fn: Any,
    method: str = ...,
    layers: Sequence[str | nn.Module] | str | None = ...,
    baseline: Any = ...,
    n_steps: int | None = ...,
    of: Literal["units", "positions", "elements", "inputs"] = ...,
    class_names: Sequence[str] | None = ...,
    **options: Any,
) -> Blame: ...


def attribute(
    model: nn.Module,
    inputs: Any,
    targets: Any,
    loss_fn: Any,
    method: str | None = None,
    layers: Sequence[str | nn.Module] | str | None = None,
    baseline: Any = None,
    n_steps: int | None = None,
    of: str = "units",
    class_names: Sequence[str] | None = None,
    **options: Any,
) -> Any:
    """Blame of every unit of a model for every sample's loss.

    Works on torch.nn, converted and user modules alike. Nothing of the model is changed: not
    gradients, parameters, buffers, mode or hooks; and the random state is kept.

    Args:
        model: the model, in the mode (``eval()``, usually) in which it shall be judged.
        inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs; dimension 0
            runs over the ``N`` samples.
        targets: as ``loss_fn`` takes them.
        loss_fn: ``loss_fn(output, targets)``, with any reduction; blame is of the un-averaged loss.
        method: one of :data:`torchbp.blame.methods.METHODS`; ``"secant"`` if ``None``.
        layers: names (as ``model.named_modules()`` gives them) or modules; ``"input"`` for the
            model's input (``"(input)"`` if a module has that name); ``"all"`` for the input and
            every module that computes; ``None`` for the hidden units of each cut: activations,
            and layers that no activation or norm follows, without the model's output.
        baseline: what blame is measured against; see docs/blame.md. ``None`` is zero: a zero input
            for methods that allocate, zero activations for methods that remove.
        n_steps: segments or nodes of the path for methods that have one; their own default if
            ``None``.
        of: what to blame in a layer: ``"units"`` (neurons; channels, summed over positions;
            features, summed over tokens), ``"positions"`` (tokens or pixels, summed over units) or
            ``"elements"`` (every number of its output). ``"inputs"``: the elements of the model's
            input, or, where that is integer tokens, the positions of the embedding that takes them.
            ``"weights"``, ``"samples"``, ``"classes"`` and ``"tokens"`` call
            :func:`~torchbp.blame.weights.weight_blame`,
            :func:`~torchbp.blame.samples.sample_blame`,
            :func:`~torchbp.blame.classes.class_blame` and
            :func:`~torchbp.blame.tokens.token_blame`, which say what arguments they take.
        class_names: names of the classes, for tables.
        **options: settings of the method, as its docstring has them.

    Returns:
        A :class:`~torchbp.blame.result.Blame`: ``blame["layer"]`` is ``[N, U]`` for units,
        ``[N, *positions]`` or ``[N, *shape]`` for positions and elements. For weights, samples,
        classes and tokens, what the functions named above return.

    Raises:
        TypeError: if an argument is of the wrong type, or an option is not one of the method's.
        ValueError: for an unknown method or layer (close names are suggested), wrong targets or
            baseline, an empty batch, or a loss the method cannot treat.
        NotImplementedError: for ``secant`` and ``lrp``, naming a function that has no rule.
        FloatingPointError: naming the first layer with NaN or infinity in activation or blame.
    """
    check_model(model)
    if of in _OTHERS:
        given = dict(
            method=method, layers=layers, baseline=baseline, n_steps=n_steps,
            class_names=class_names,
        )  # fmt: skip
        options |= {name: value for name, value in given.items() if value is not None}
        _refuse_unknown(f"of={of!r}", options, [*inspect.signature(_OTHERS[of]).parameters][4:])
        return _OTHERS[of](model, inputs, targets, loss_fn, **options)
    if of != "inputs" and of not in get_args(Of):
        raise ValueError(unknown("of", str(of), [*get_args(Of), "inputs", *_OTHERS]))
    method = "secant" if method is None else method
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(unknown("method", str(method), [*METHODS]))
    chosen = METHODS[method]
    n_steps = chosen.n_steps if n_steps is None else n_steps
    check_count("n_steps", n_steps)
    _refuse_unknown(f"method {method!r}", options, chosen.options)
    args, kwargs = as_arguments(inputs)
    head = LossHead.of(loss_fn)
    players: Any = of
    if of == "inputs":
        layers, players = _input_layers(Problem(model, args, kwargs, targets, head), layers)
    problem = Problem(
        model, args, kwargs, targets, head, layers, baseline, n_steps, players, options
    )
    with problem.session():
        result = chosen.solve(problem)
    _refuse_nonfinite(result.run, result.values)
    return Blame(
        units={
            name: value.detach().reshape(len(value), *_shape(result.run.calls[name], players))
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
        of=players,
    )


def _refuse_unknown(who: str, options: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in options:
        if name not in known:
            takes = ", ".join(known) or "none"
            raise TypeError(f"attribute: {who} has no option {name!r} (has: {takes})")


def _input_layers(problem: Problem, layers: Any) -> tuple[list[str | nn.Module], Of]:
    """The layers at which a model's input can be blamed, and its players there."""
    if layers is not None:
        raise ValueError(f"layers: of='inputs' names the layers itself, got {layers!r}")
    model = problem.model
    inputs = [v for v in (*problem.args, *problem.kwargs.values()) if isinstance(v, Tensor)]
    if any(v.is_floating_point() for v in inputs):
        return [input_name(model)], "elements"
    tables = {name: m for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
    if not tables:
        raise ValueError(
            "of='inputs': the inputs are integers and the model has no torch.nn.Embedding that "
            "takes them; name the layer whose positions stand for the tokens, with of='positions'"
        )
    fed = [] if len(tables) == 1 else _fed(problem, inputs, tables)
    return [*fed, *tables][:1], "positions"


def _fed(problem: Problem, inputs: Sequence[Tensor], tables: Mapping[str, nn.Module]) -> list[str]:
    """The embeddings that are given an input of the model as it came, in the order of their calls.

    Others look up positions, say, and may be first among the model's modules.
    """
    found: list[str] = []

    def note(name: str) -> Any:
        def hook(module: nn.Module, given: tuple[Any, ...]) -> None:
            if any(isinstance(g, Tensor) and torch.equal(g, v) for g in given for v in inputs):
                found.append(name)

        return hook

    handles = [table.register_forward_pre_hook(note(name)) for name, table in tables.items()]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of training mode; the method says so
            with problem.session(), torch.no_grad():
                problem.call(*repeat_samples((problem.args, problem.kwargs), 0, 1))
    finally:
        for handle in handles:
            handle.remove()
    return found


def _shape(call: Call, of: Of) -> tuple[int, ...]:
    return player_shape(call.output, call.unit_dim, of)


def _refuse_nonfinite(run: Run, values: Mapping[str, Tensor]) -> None:
    for name, call in run.calls.items():
        if not bool(torch.isfinite(call.output).all()):
            raise FloatingPointError(
                f"layer {name!r}: its activation holds NaN or infinity{_range(call.output)}"
            )
    if not bool(torch.isfinite(run.losses).all()):
        raise FloatingPointError(
            "loss: it holds NaN or infinity although the activations of the layers asked for are "
            f"finite{_range(run.losses)}"
        )
    for name, value in reversed([*values.items()]):  # an error signal comes from the loss
        if not bool(torch.isfinite(value).all()):
            raise FloatingPointError(
                f"layer {name!r}: its blame holds NaN or infinity although activations are finite; "
                f"the error signal overflowed on its way back{_range(run.losses)}"
            )


def _range(tensor: Tensor) -> str:
    """What to say about numbers that a half cannot hold."""
    if tensor.dtype != torch.float16:
        return ""
    largest = torch.finfo(tensor.dtype).max
    return f"; float16 ends at {largest:.0f}, use bfloat16 or float32"
