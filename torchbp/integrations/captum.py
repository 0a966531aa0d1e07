"""Every blame method as a Captum class, and converted models inside Captum's own methods.

For each method of :data:`torchbp.blame.methods.METHODS` there are two classes, made from the table:
one for a layer (``LayerSecant``, ``LayerLink``, ``LayerConductance``, ...) and one for the model's
inputs (``Secant``, ``Link``, ``Conductance``, ...). Without a loss they attribute the output that
``target`` selects, as Captum does; with one they attribute the loss, and ``target`` holds its
labels.

Captum's DeepLIFT and LRP find their rules by the exact class of a module. Importing this module
enters torchbp's drop-ins beside their torch.nn twins, so that a converted model is treated as the
plain one is.

Requires Captum (``pip install torchbp[captum]``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchbp.blame.attribute import attribute
from torchbp.blame.capture import input_name, unknown
from torchbp.blame.definitions import LossHead
from torchbp.blame.methods import METHODS
from torchbp.blame.problem import Problem
from torchbp.blame.result import Blame
from torchbp.nn import DROP_INS

try:
    from captum.attr import Attribution, LayerAttribution
    from captum.attr._core import deep_lift, lrp
except ImportError as error:
    raise ImportError(
        "torchbp.integrations.captum needs Captum: pip install torchbp[captum]"
    ) from error

for _rules in (deep_lift.SUPPORTED_NON_LINEAR, lrp.SUPPORTED_LAYERS_WITH_RULES):
    _rules.update({DROP_INS[k]: rule for k, rule in [*_rules.items()] if k in DROP_INS})
_linear = lrp.SUPPORTED_NON_LINEAR_LAYERS
_linear.extend(DROP_INS[k] for k in [*_linear] if k in DROP_INS and DROP_INS[k] not in _linear)


#: Methods whose path begins at an input: Captum's default for it is zero, of integers too.
_FROM_INPUT = ("secant", "conductance", "layer_ig", "internal_influence")


class _Blaming:
    """What layer and input attributions share: the model, the objective and the method.

    Attributes:
        method: name in :data:`torchbp.blame.methods.METHODS`.
    """

    method = "secant"
    forward_func: Any

    def _prepare(self, model: Any, loss_fn: Any, method: str | None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                "forward_func: expected a torch.nn.Module, whose state can be protected, got "
                f"{type(model).__name__}; put the function into a module's forward"
            )
        if method is not None:
            self.method = method
        if self.method not in METHODS:
            raise ValueError(unknown("method", str(self.method), [*METHODS]))
        self._loss_fn = loss_fn

    @property
    def multiplies_by_inputs(self) -> bool:
        """Whether attributions hold the activation (or its change) as a factor."""
        return METHODS[self.method].question != "sensitivity"

    def has_convergence_delta(self) -> bool:
        """Whether there is a sum that attributions should have."""
        return METHODS[self.method].question == "allocation"

    def compute_convergence_delta(
        self,
        attributions: Any,
        start_point: Any,
        end_point: Any,
        target: Any = None,
        additional_forward_args: Any = None,
    ) -> Tensor:
        """``[N]``: sum of the attributions, less the objective's change from start to end.

        Args:
            attributions: a tensor, or a tuple of them that sum up together.
            start_point: the baselines; tensors, numbers, or ``None`` for zero.
            end_point: the inputs.
            target: as for ``attribute``.
            additional_forward_args: as for ``attribute``.
        """
        ends, extra = _as_tuple(end_point), _as_extra(additional_forward_args)
        starts = tuple(
            torch.as_tensor(b, dtype=x.dtype, device=x.device).expand_as(x)
            for x, b in zip(ends, _as_baselines(start_point, ends), strict=True)
        )
        before, after = (self._objective(point, target, extra) for point in (starts, ends))
        sums = [a.detach().flatten(1).sum(1) for a in _as_tuple(attributions)]
        return torch.stack(sums).sum(0) - (after - before)

    def _objective(self, inputs: tuple[Tensor, ...], target: Any, extra: tuple[Any, ...]) -> Tensor:
        targets, loss_fn = self._goal(target, len(inputs[0]))
        args, head = (*inputs, *extra), LossHead.of(loss_fn)
        problem = Problem(self.forward_func, args, {}, targets, head)
        with problem.session(), torch.no_grad():
            return head.per_sample(problem.call(args, {}), targets)

    def _goal(self, target: Any, samples: int) -> tuple[Any, Callable[..., Tensor]]:
        """Targets and loss function, as :func:`torchbp.attribute` takes them."""
        if self._loss_fn is not None:
            return target, self._loss_fn
        return _indices(target, samples), _selected

    def _blame(
        self,
        inputs: Any,
        baselines: Any,
        target: Any,
        extra: tuple[Any, ...],
        model: nn.Module,
        layers: Sequence[Any],
        n_steps: int | None,
        options: dict[str, Any],
    ) -> Blame:
        given = _as_tuple(inputs)
        targets, loss_fn = self._goal(target, len(given[0]))
        if baselines is not None or self.method in _FROM_INPUT:
            # Further arguments are no inputs: they stay what they are along the path.
            baselines = (*_as_baselines(baselines, given), *extra)
        return attribute(
            model, (*given, *extra), targets, loss_fn, self.method, layers=layers,
            baseline=baselines, n_steps=n_steps, of="elements", **options,
        )  # fmt: skip

    def _delta(self, blame: Blame, names: Sequence[str]) -> Tensor:
        """``[N]``: how far the sum of a cut is from what it should be."""
        if not self.has_convergence_delta():
            raise ValueError(
                f"return_convergence_delta: method {self.method!r} answers "
                f"{blame.question}, so that there is no sum to converge to"
            )
        total = torch.stack([blame.per_sample(n) + blame.absorbed.get(n, 0) for n in names]).sum(0)
        expected = blame.expected.get(names[0])
        if expected is None:
            start = blame.reference_losses
            expected = blame.losses - (0 if start is None else start)
        return total - expected


class LayerBlame(_Blaming, LayerAttribution):
    """Blame of one layer or several, by Captum's conventions.

    Args:
        forward_func: the model, a ``torch.nn.Module``.
        layer: a module of it or its name, or a list of those: one sweep serves them all.
        loss_fn: ``loss_fn(output, target)`` to attribute; ``None`` for the output that ``target``
            selects.
        method: name in :data:`torchbp.blame.methods.METHODS`.
    """

    def __init__(
        self, forward_func: nn.Module, layer: Any, loss_fn: Any = None, method: str | None = None
    ) -> None:
        self._prepare(forward_func, loss_fn, method)
        LayerAttribution.__init__(self, forward_func, layer)

    def attribute(
        self,
        inputs: Any,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        n_steps: int | None = None,
        return_convergence_delta: bool = False,
        attribute_to_layer_input: bool = False,
        **options: Any,
    ) -> Any:
        """Attributions of the layer's output, in its shape.

        Args:
            inputs: a tensor or a tuple of them; dimension 0 runs over samples.
            baselines: reference inputs: tensors or numbers; zeros if ``None``.
            target: which output to attribute: an integer, a tensor or list of one per sample, a
                tuple of indices, or a list of tuples; with a loss function, its labels.
            additional_forward_args: further arguments of the model, which stay what they are.
            n_steps: steps of the method; its default if ``None``.
            return_convergence_delta: also return ``[N]`` what the sum of the attributions is too
                large by.
            attribute_to_layer_input: attribute the layer's first argument instead of its output.
            **options: settings of the method (``rule``, ``n_permutations``, ...).

        Returns:
            A tensor like the layer's output (its first, where it returns a tuple); a tuple of one
            for each call of a layer that runs several times; a list of those for a list of layers;
            with the delta after it, if asked for: a list of deltas for a list of layers.

        Raises:
            TypeError: for an option the method does not take, or a target of another type.
            ValueError: for a target that does not fit the output, or where there is no delta.
        """
        several = isinstance(self.layer, (list, tuple))
        wanted = [self._module(layer) for layer in (self.layer if several else [self.layer])]
        model, layers = self.forward_func, wanted
        if attribute_to_layer_input:
            model = _Probed(self.forward_func, wanted)
            layers = [*model.probes]
        blame = self._blame(
            inputs, baselines, target, _as_extra(additional_forward_args), model, layers, n_steps,
            options,
        )  # fmt: skip
        names = {id(m): n for n, m in model.named_modules()}
        calls = [[n for n in blame if n.partition("#")[0] == names[id(m)]] for m in layers]
        found = [blame[c[0]] if len(c) == 1 else tuple(blame[n] for n in c) for c in calls]
        result = found if several else found[0]
        if not return_convergence_delta:
            return result
        deltas = [self._delta(blame, c[:1]) for c in calls]
        return result, deltas if several else deltas[0]

    def _module(self, layer: Any) -> nn.Module:
        return self.forward_func.get_submodule(layer) if isinstance(layer, str) else layer


class InputBlame(_Blaming, Attribution):
    """Blame of every element of the input, by Captum's conventions.

    Args:
        forward_func: the model, a ``torch.nn.Module``.
        loss_fn: ``loss_fn(output, target)`` to attribute; ``None`` for the output that ``target``
            selects.
        method: name in :data:`torchbp.blame.methods.METHODS`.
    """

    def __init__(
        self, forward_func: nn.Module, loss_fn: Any = None, method: str | None = None
    ) -> None:
        self._prepare(forward_func, loss_fn, method)
        Attribution.__init__(self, forward_func)

    def attribute(
        self,
        inputs: Any,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        n_steps: int | None = None,
        return_convergence_delta: bool = False,
        **options: Any,
    ) -> Any:
        """Attributions in the inputs' shapes; arguments as for :meth:`LayerBlame.attribute`.

        Raises:
            ValueError: if an input is not floating; name the layer it enters and use the method's
                layer class.
        """
        given = _as_tuple(inputs)
        whole = [i for i, x in enumerate(given) if not x.is_floating_point()]
        if whole:
            raise ValueError(
                f"inputs: number {whole[0]} is {given[whole[0]].dtype}, and only floating inputs "
                "have attributions; use the method's layer class at the embedding"
            )
        blame = self._blame(
            inputs, baselines, target, _as_extra(additional_forward_args), self.forward_func,
            [input_name(self.forward_func)], n_steps, options,
        )  # fmt: skip
        names = [*blame][: len(given)]
        found = tuple(blame[n].view_as(x) for n, x in zip(names, given, strict=True))
        result = found[0] if isinstance(inputs, Tensor) else found
        return (result, self._delta(blame, names)) if return_convergence_delta else result


class _Probed(nn.Module):
    """A model whose layers' inputs pass through modules of their own."""

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.model, self._layers = model, tuple(layers)
        self.probes = nn.ModuleList(nn.Identity() for _ in layers)
        self.training = model.training  # train() would reach the model's own modules

    def forward(self, *args: Any) -> Any:
        def through(probe: nn.Module) -> Callable[..., Any]:
            def hook(
                module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
            ) -> tuple[tuple[Any, ...], dict[str, Any]]:
                if args:
                    return (probe(args[0]), *args[1:]), kwargs
                return args, {
                    k: probe(v) if i == 0 else v for i, (k, v) in enumerate(kwargs.items())
                }

            return hook

        handles = [
            layer.register_forward_pre_hook(through(probe), with_kwargs=True)
            for layer, probe in zip(self._layers, self.probes, strict=True)
        ]
        try:
            return self.model(*args)
        finally:
            for handle in handles:
                handle.remove()


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _as_extra(value: Any) -> tuple[Any, ...]:
    return () if value is None else _as_tuple(value)


def _as_baselines(baselines: Any, inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """One per input: what was given, or zero."""
    return (0,) * len(inputs) if baselines is None else _as_tuple(baselines)


def _indices(target: Any, samples: int) -> Tensor:
    """``[N, indices]``: which number of its output each sample's objective is.

    Raises:
        TypeError: for a target of another type.
        ValueError: if it is not one per sample.
    """
    if target is None:
        return torch.zeros(samples, 0, dtype=torch.long)
    if isinstance(target, Tensor):
        target = target.item() if target.numel() == 1 else target.tolist()
    if isinstance(target, (int, tuple)):
        target = [target] * samples
    if not isinstance(target, list):
        raise TypeError(
            "target: expected an integer, a tensor, a tuple, a list or None, got "
            f"{type(target).__name__}"
        )
    if len(target) != samples:
        raise ValueError(f"target: expected one for each of {samples} samples, got {len(target)}")
    rows = [_as_tuple(t) for t in target]
    if any(isinstance(i, float) for row in rows for i in row):
        raise TypeError("target: expected integers as indices, got floating numbers")
    return torch.tensor(rows, dtype=torch.long)


def _selected(output: Any, indices: Tensor) -> Tensor:
    """``[N]``: of each sample's output the number that the indices name."""
    if not isinstance(output, Tensor):
        raise TypeError(f"forward_func: expected a tensor as output, got {type(output).__name__}")
    if indices.shape[1] == 0 and output[:1].numel() == 1:
        return output.flatten()
    if indices.shape[1] != output.dim() - 1:
        raise ValueError(
            f"target: expected {output.dim() - 1} indices per sample, one for each dimension of "
            f"the output {tuple(output.shape)} but the first, got {indices.shape[1]}"
        )
    rows = torch.arange(len(output), device=output.device)
    where = (rows, *indices.to(output.device).unbind(1))
    return output[where]


def _title(method: str) -> str:
    """``conductance`` as ``Conductance``, ``layer_ig`` as ``IG``."""
    parts = method.removeprefix("layer_").split("_")
    return "".join(p.upper() if p in ("ig", "lrp") else p.capitalize() for p in parts)


def _classes() -> dict[str, type]:
    """A layer and an input class for every method, by name."""
    made: dict[str, type] = {}
    for method in METHODS:
        for prefix, base, what in (("Layer", LayerBlame, "a layer"), ("", InputBlame, "inputs")):
            name = prefix + _title(method)
            about = f"Method ``{method}`` for {what}; see :class:`{base.__name__}`."
            made[name] = type(
                name, (base,), {"method": method, "__doc__": about, "__module__": __name__}
            )
    return made


CLASSES = _classes()
__all__ = ["CLASSES", "InputBlame", "LayerBlame", *CLASSES]


def __getattr__(name: str) -> Any:
    if name in CLASSES:
        return CLASSES[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *CLASSES})
