"""Seeing what every module of a model returns, without changing the model."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd

_CHANNELS_SECOND = (_ConvNd, _NormBase, nn.GroupNorm)
_FEATURES_LAST = (
    nn.Linear,
    nn.Bilinear,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.Embedding,
    nn.RNNBase,
    nn.MultiheadAttention,
)
_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm)
_NO_UNITS = (
    nn.Flatten,
    nn.Unflatten,
    nn.Identity,
    nn.modules.dropout._DropoutNd,
    nn.modules.loss._Loss,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
)
INPUT = "input"
Of = Literal["units", "positions", "elements"]

NO_LAYER = (
    "model: none of its modules that ran has units (a layer with parameters, a norm or an "
    "activation, with a floating output); there is no layer to blame"
)


def input_name(model: nn.Module) -> str:
    """What the model's input is called among its layers: unlike any of its modules."""
    return INPUT if INPUT not in dict(model.named_modules()) else f"({INPUT})"


def is_activation(module: nn.Module) -> bool:
    """Whether a module is one of torch.nn's elementwise activations."""
    return any(c.__module__ == "torch.nn.modules.activation" for c in type(module).__mro__) and (
        not isinstance(module, nn.MultiheadAttention)
    )


def leaves(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that compute something themselves, by name, in registration order.

    Attention counts as one: it uses its output projection's weights without calling it.
    """
    found: dict[str, nn.Module] = {}
    whole: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(whole) and whole:
            continue
        if isinstance(module, nn.MultiheadAttention):
            whole = (*whole, f"{name}.")
        elif next(module.children(), None) is not None:
            continue
        found[name] = module
    return found


def named_layers(model: nn.Module, layers: Iterable[str | nn.Module]) -> dict[str, nn.Module]:
    """Look layers up by name or by identity.

    Raises:
        TypeError: if an element is neither a name nor a module.
        ValueError: if the model has no such layer; names close to it are suggested.
    """
    layers = [layers] if isinstance(layers, str) else list(layers)
    if not layers:
        raise ValueError("layers: expected at least one name or module, got none")
    modules = dict(model.named_modules())
    names = {id(m): n for n, m in modules.items()}
    found: dict[str, nn.Module] = {}
    for layer in layers:
        if isinstance(layer, nn.Module):
            if id(layer) not in names:
                raise ValueError(f"layers: {layer!r} is not a module of the model")
            layer = names[id(layer)]
        elif not isinstance(layer, str):
            raise TypeError(f"layers: expected names or modules, got {type(layer).__name__}")
        elif layer not in modules and layer != input_name(model):
            raise ValueError(unknown("layers", layer, [*modules][1:]))
        if layer in found:
            raise ValueError(f"layers: {layer!r} is given twice")
        found[layer] = modules.get(layer, model)
    return found


def unknown(argument: str, value: str, known: Sequence[str]) -> str:
    """An error text for a name that is not known, with the closest names."""
    close = difflib.get_close_matches(value, known, n=3, cutoff=0.4)
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
    return f"{argument}: unknown name {value!r}{hint} (known: {', '.join(known)})"


def first_tensor(output: Any) -> Tensor | None:
    """The tensor that carries a module's value: itself, or the first of a tuple (LSTM)."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    if isinstance(output, (tuple, list)):
        return next((t for t in map(first_tensor, output) if t is not None), None)
    if isinstance(output, dict):
        return first_tensor(tuple(output.values()))
    return None


def replace_first(output: Any, new: Tensor) -> Any:
    """A module's output with its first tensor exchanged; ``None`` for unusual containers."""
    if isinstance(output, Tensor):
        return new
    if isinstance(output, tuple) and isinstance(output[0], Tensor):
        rest = (new, *output[1:])
        return type(output)(*rest) if hasattr(output, "_fields") else rest
    return None


def unit_dim(module: nn.Module, output: Tensor, inherited: int | None) -> int:
    """The dimension of ``output`` that runs over units (negative: counted from the end)."""
    if isinstance(module, _CHANNELS_SECOND):
        return 1
    if isinstance(module, _FEATURES_LAST):
        return -1
    if inherited is not None:
        return inherited
    return 1 if output.dim() >= 4 else -1


def per_unit(values: Tensor, dim: int) -> Tensor:
    """Sum ``[N, ...]`` over everything but samples and units: ``[N, U]``."""
    if values.dim() == 1:
        return values[:, None]
    rest = [d for d in range(1, values.dim()) if d != dim % values.dim()]
    return values.sum(rest) if rest else values


def per_player(values: Tensor, dim: int, of: Of) -> Tensor:
    """Sum ``[N, ...]`` over what the players of one layer share: ``[N, players]``.

    Args:
        values: one number per element of the layer's output.
        dim: the dimension that runs over units.
        of: who plays: ``units`` (summed over positions), ``positions`` (tokens, pixels; summed over
            units) or ``elements`` (nothing is summed).
    """
    if of == "units" or values.dim() == 1:
        return per_unit(values, dim)
    if of == "positions":
        values = values.sum(dim)
    return values.reshape(len(values), -1)


def player_shape(output: Tensor, dim: int, of: Of) -> tuple[int, ...]:
    """Shape of the players of a layer that returns ``output``, without the samples."""
    shape = [*output.shape[1:]] or [1]
    dim = dim % max(output.dim(), 2) - 1
    if of == "units":
        return (shape[dim],)
    if of == "positions":
        shape.pop(dim)
    return tuple(shape) or (1,)


@dataclass
class Call:
    """One call of one module during a forward pass."""

    name: str
    module: nn.Module
    output: Tensor
    unit_dim: int
    source: int | None = None  # the call (by position) whose output is this one's input
    version: int = 0
    alone: bool = True  # whether the module returned this tensor and nothing else
    is_input: bool = False  # of the model, whatever a module of it is called

    @property
    def changed(self) -> bool:
        """Whether something wrote into the output after the module returned it."""
        return self.output._version != self.version


@dataclass
class Capture:
    """Records the output of every call of the given modules while it is entered.

    Args:
        modules: by name.
        differentiable: make outputs require grad where nothing before them does (integer inputs).
        protect: hand a copy on to the next module, so that in-place operations spare the record.
        watched: modules whose names stand in ``current`` while they are being called.
        starts: values to begin paths with, in the order of the pass, in place of the outputs that
            no differentiable input leads to.
    """

    modules: dict[str, nn.Module]
    differentiable: bool = False
    protect: bool = False
    watched: dict[str, nn.Module] = field(default_factory=dict)
    starts: Sequence[Tensor] | None = None
    calls: list[Call] = field(default_factory=list)
    current: list[str] = field(default_factory=list)
    began: list[Tensor] = field(default_factory=list)
    _handles: list[Any] = field(default_factory=list)
    _position: dict[int, int] = field(default_factory=dict)
    _passed: list[Tensor] = field(default_factory=list)

    def __enter__(self) -> Capture:
        for name, module in self.watched.items():
            self._handles.append(module.register_forward_pre_hook(self._enter(name)))
            self._handles.append(module.register_forward_hook(self._leave))
        for name, module in self.modules.items():
            self._handles.append(module.register_forward_hook(self._record(name)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._passed.clear()

    def _enter(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            self.current.append(name)

        return hook

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.current.pop()

    def _record(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            value = first_tensor(output)
            return None if value is None else self.record(name, module, args, output, value)

        return hook

    def producer(self, output: Any) -> Call | None:
        """The call that returned the model's output, if a recorded one did."""
        position = self._position.get(id(first_tensor(output)))
        return None if position is None else self.calls[position]

    def record_input(self, model: nn.Module, leaf: Tensor, passed: Tensor) -> None:
        """Enter the model's input as the first cut; ``passed`` is what the model receives."""
        name, dim = input_name(model), unit_dim(model, leaf, None)
        self.calls.append(Call(name, model, leaf, dim, is_input=True))
        self.passes(passed)

    def record(self, name: str, module: nn.Module, args: Any, output: Any, value: Tensor) -> Any:
        """Enter one call; returns what the module shall return instead, or ``None``."""
        replaced, alone = None, value is output
        begins = self.differentiable and not value.requires_grad
        if begins:
            value = self._beginning(value)
        elif any(value is t for t in (*args, *self._passed)):
            # A module that hands its input on (Identity, dropout in eval) is an edge of its own.
            value = value.view_as(value)
            replaced = replace_first(output, value)
        source = self._position.get(id(args[0])) if args else None
        inherited = None
        if source is not None and self.calls[source].output.dim() == value.dim():
            inherited = self.calls[source].unit_dim
        dim = unit_dim(module, value, inherited)
        self.calls.append(Call(name, module, value, dim, source, value._version, alone))
        passed = value
        if self.protect or begins:  # nothing may write into a leaf
            passed = value.clone()
            replaced = replace_first(output, passed)
        self.passes(passed)
        return replaced

    def _beginning(self, value: Tensor) -> Tensor:
        """A leaf to begin a path with: the value that came, or the next one that was given."""
        if self.starts is not None:
            k = len(self.began)
            if k >= len(self.starts) or self.starts[k].shape != value.shape:
                raise RuntimeError(
                    "the model's embeddings ran differently than in the pass before: its control "
                    "flow must not depend on values"
                )
            value = self.starts[k]
        self.began.append(value.detach().requires_grad_())
        return self.began[-1]

    def passes(self, passed: Tensor) -> None:
        """Note that ``passed`` is what the next module sees of the last call's output."""
        self._position[id(passed)] = len(self.calls) - 1
        self._passed.append(passed)  # keeps the identity taken while the pass lasts


def _shapes_units(module: nn.Module) -> bool:
    return is_activation(module) or isinstance(module, _NORMS)


def passes_units(module: nn.Module) -> bool:
    """Whether what a module returns are the units it was given: activations, norms, pooling."""
    return _shapes_units(module) or isinstance(module, _NO_UNITS)


def unit_calls(calls: Sequence[Call]) -> list[Call]:
    """The calls whose outputs are units: by default one per cut.

    Pooling, flattening, dropout and whatever else has no parameters only pass units on. A layer
    whose output goes straight into a norm or activation is represented by that: the neuron is what
    the rest of the network sees.
    """
    kept = []
    for call in calls:
        if call.is_input or isinstance(call.module, _NO_UNITS):
            continue
        if next(call.module.parameters(), None) is None and not _shapes_units(call.module):
            continue
        followers = [c for c in calls if c.source is not None and calls[c.source] is call]
        if any(_shapes_units(c.module) for c in followers):
            continue
        kept.append(call)
    return kept


def hidden(calls: Sequence[Call], output: Call | None) -> list[Call]:
    """Leave out the layer that returns the model's output, unless it is the only one.

    Silencing a logit has no meaning: softmax cares for differences of logits alone.
    """
    return [c for c in calls if c is not output] or list(calls)


def call_names(calls: Sequence[Call]) -> list[str]:
    """Names of calls: ``name``, and ``name#2`` for the second call of a reused module."""
    seen: dict[str, int] = {}
    names = []
    for call in calls:
        seen[call.name] = seen.get(call.name, 0) + 1
        names.append(call.name if seen[call.name] == 1 else f"{call.name}#{seen[call.name]}")
    return names


def writes_in_place(model: nn.Module) -> bool:
    """Whether a module announces in-place work (``nn.ReLU(inplace=True)``)."""
    return any(getattr(m, "inplace", False) is True for m in model.modules())


def training_modules(model: nn.Module) -> list[str]:
    """Names of modules whose training mode makes values random or couples samples."""
    coupled = (_BatchNorm, nn.modules.dropout._DropoutNd, nn.MultiheadAttention, nn.RNNBase)
    return [
        f"{name} ({type(m).__name__})"
        for name, m in model.named_modules()
        if m.training and isinstance(m, coupled) and (getattr(m, "dropout", 1) or 0) != 0
    ]


def cuda_devices(tensors: Iterable[Tensor]) -> list[int]:
    """CUDA devices in use, whose random state must be kept."""
    return sorted({t.device.index or 0 for t in tensors if t.device.type == "cuda"})


def leaf_copy(value: Any) -> Any:
    """A differentiable leaf with the value of a floating tensor; other values as they are."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().clone().requires_grad_()
    return value
