"""The tracker's eyes: hooks that reduce each layer's error signal as backward brings it by."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from torchbp import kernels
from torchbp.blame.capture import (
    Capture,
    call_names,
    first_tensor,
    hidden,
    replace_first,
    unit_calls,
    unit_dim,
    writes_in_place,
)
from torchbp.kernels.reference_common import sums_dtype

_PAUSED: ContextVar[bool] = ContextVar("paused", default=False)


@contextmanager
def unwatched() -> Iterator[None]:
    """Passes through the model that are no part of the training: no tracker counts them."""
    token = _PAUSED.set(True)
    try:
        yield
    finally:
        _PAUSED.reset(token)


def _watching() -> bool:
    return torch.is_grad_enabled() and not _PAUSED.get()


@dataclass
class Entry:
    """What one layer call left behind in backward.

    Attributes:
        order: position of the call in the forward pass.
        name: the layer, with ``#2`` for a second call.
        contribution: ``[N, U]`` activation x error signal (or the error signal), unscaled.
        stats: ``[3, U]`` as :func:`torchbp.kernels.blame_reduce` gives them.
        elements: activations per unit.
    """

    order: int
    name: str
    contribution: Tensor
    stats: Tensor
    elements: int


@dataclass
class Pending:
    """What happened since the last step.

    Attributes:
        forwards: calls of the model with gradients on.
        calls: layer calls among them.
        entries: one per layer call whose backward ran.
        outputs: model outputs and the error signals that reached them.
    """

    forwards: int = 0
    calls: int = 0
    entries: list[Entry] = field(default_factory=list)
    outputs: list[tuple[Tensor, Tensor]] = field(default_factory=list)


#: Results by the order of their call.
Memory = dict[int, tuple[Tensor, Tensor]]


def _results(memory: Memory, order: int, activation: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """``[N, U]`` and ``[3, U]`` to write a layer's sums into: those of the step before if they fit.

    They are as large as the activations, and pages that the allocator hands back and takes anew at
    every step cost more than the sums themselves.
    """
    shape = (activation.shape[0], activation.shape[dim])
    dtype = sums_dtype(activation)
    found = memory.get(order)
    if found is not None:
        t = found[0]
        if t.shape == shape and t.dtype is dtype and t.device == activation.device:
            return found
    new = activation.new_empty
    memory[order] = new(shape, dtype=dtype), new((3, shape[1]), dtype=dtype)
    return memory[order]


class Watch:
    """Hooks on a model's layers and on its output.

    Args:
        model: the model.
        modules: the layers, by name.
        units_only: keep only the hidden units of each cut (see
            :func:`torchbp.blame.capture.unit_calls`), found in the first forward.
        gradient: reduce the error signal alone, not times the activation.
        output_fn: gives the tensor the loss is computed from.

    Attributes:
        live: whether the next forward is watched; off, a hook returns at once.
        step: number of the current step, for warnings.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: dict[str, nn.Module],
        units_only: bool,
        gradient: bool,
        output_fn: Callable[[Any], Any],
    ) -> None:
        self.live, self.step = False, 0
        self._model, self._modules = model, modules
        self._units_only, self._gradient, self._output_fn = units_only, gradient, output_fn
        self._protect: set[str] = set(modules) if writes_in_place(model) else set()
        self._dims: dict[tuple[str, int], int] = {}
        self._selected: set[str] | None = None
        self._probe: Capture | None = None
        self._final: Any = None
        self._pending = Pending()
        self._memory: Memory = {}
        self._handles: dict[str, Any] = {}
        self._norm_handles: list[Any] = []
        self._norm_calls: list[tuple[nn.Module, int]] = []
        self._before: list[tuple[nn.Module, frozenset[str]]] = []

    @property
    def coupled(self) -> frozenset[str]:
        """Layers above which a batch norm in training mode mixes the samples of the batch.

        There a sample's error signal holds parts of other samples' losses as well.
        """
        return frozenset().union(*(names for norm, names in self._before if norm.training))

    @property
    def active(self) -> bool:
        """Whether hooks are on the model."""
        return bool(self._handles)

    def attach(self) -> None:
        """Put the hooks on the model."""
        for name, module in self._modules.items():
            if self._selected is None or name in {n.partition("#")[0] for n in self._selected}:
                self._handles[name] = module.register_forward_hook(self._layer_hook(name))
        if self._selected is None:
            for module in self._model.modules():
                if isinstance(module, _BatchNorm):
                    self._norm_handles.append(module.register_forward_pre_hook(self._norm_hook))
        # Last, so that it runs after the layers' own where the model is one of them.
        self._output_handle = self._model.register_forward_hook(self._output_hook)
        self._pending = Pending()

    def detach(self) -> None:
        """Take every hook off."""
        for handle in (*self._handles.values(), *self._norm_handles, self._output_handle):
            handle.remove()
        self._handles.clear()
        self._norm_handles.clear()
        self._pending, self._probe = Pending(), None
        self._memory.clear()

    def take(self) -> Pending:
        """What happened since the last call, and start afresh."""
        pending, self._pending = self._pending, Pending()
        probe, self._probe = self._probe, None
        if probe is not None and self._selected is None and pending.outputs:
            self._select(probe)
        self._final = None
        self._norm_calls = []
        pending.entries = self._named(pending.entries)
        return pending

    def _layer_hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if not self.live or not _watching():
                return None
            value = first_tensor(output)
            if value is None or not value.requires_grad:
                return None
            handed_on = False  # Identity is an edge of its own
            for argument in args:  # twice as fast as any(), and every call pays for it
                handed_on = handed_on or argument is value
            if handed_on:
                value = value.view_as(value)
            if self._selected is None:
                self._probe = self._probe or Capture({})
                self._probe.record(name, module, args, value, value)
                dim = self._probe.calls[-1].unit_dim
                self._dims[name, value.dim()] = dim
            else:
                known = self._dims.get((name, value.dim()))
                dim = unit_dim(module, value, None) if known is None else known
            passed = self._watch(name, value, dim)
            return replace_first(output, passed) if handed_on or passed is not value else None

        return hook

    def _norm_hook(self, module: nn.Module, args: Any) -> None:
        if self.live and _watching():
            seen = 0 if self._probe is None else len(self._probe.calls)
            self._norm_calls.append((module, seen))

    def _watch(self, name: str, value: Tensor, dim: int) -> Tensor:
        """Have the error signal of ``value`` reduced; returns what the next module shall see."""
        order, version = self._pending.calls, value._version
        self._pending.calls += 1
        kept, pending = [value.detach()], self._pending

        def on_error(error: Tensor) -> None:
            if not kept:
                return  # a second backward, which step() refuses
            # The graph lives longer than its saved tensors, and this one shall not outlive them.
            a, delta = kept.pop(), error.detach()
            if a._version != version:
                self._overwritten(name)
                return
            if a.dim() == 1:
                a, delta = a[:, None], delta[:, None]
            memory = self._memory if pending is self._pending else {}
            contribution, stats = _results(memory, order, a, dim)
            kernels.blame_reduce_into(a, delta, dim, self._gradient, contribution, stats)
            elements = a.numel() // max(contribution.shape[1], 1)
            pending.entries.append(Entry(order, name, contribution, stats, elements))

        value.register_hook(on_error)
        passed = value.clone() if name in self._protect else value
        if self._probe is not None and passed is not value:
            self._probe.passes(passed)
        return passed

    def _overwritten(self, name: str) -> None:
        self._protect.add(name)
        warnings.warn(
            f"BlameTracker: the output of layer {name!r} was overwritten in place before its "
            f"backward, so step {self.step} has no blame for it; from the next step on the "
            "tracker keeps a copy",
            UserWarning,
            stacklevel=2,
        )

    def _output_hook(self, module: nn.Module, args: Any, output: Any) -> None:
        if not _watching():
            return
        self._pending.forwards += 1
        if not self.live:
            return
        value = self._output_fn(output)
        if not isinstance(value, Tensor) or not value.requires_grad:
            return
        z, pending = value.detach(), self._pending
        value.register_hook(lambda error: pending.outputs.append((z, error.detach())))
        if self._probe is not None:
            self._final = self._probe.producer(value)

    def _select(self, probe: Capture) -> None:
        names = dict(zip(map(id, probe.calls), call_names(probe.calls), strict=True))
        calls = probe.calls
        if self._units_only:
            calls = hidden(unit_calls(calls), self._final)
        self._selected = {names[id(c)] for c in calls}
        chosen = [names[id(c)] if names[id(c)] in self._selected else None for c in probe.calls]
        self._before = [
            (norm, frozenset(n for n in chosen[:position] if n is not None))
            for norm, position in self._norm_calls
        ]
        for handle in self._norm_handles:
            handle.remove()
        self._norm_handles.clear()
        for name in {*self._handles} - {c.name for c in calls}:
            self._handles.pop(name).remove()
        self._memory.clear()  # that of layers which are watched no more, too

    def _named(self, entries: list[Entry]) -> list[Entry]:
        """Entries in forward order, named by call, and only those that were selected.

        Calls are counted among those that backward reached, so that a forward which was never
        followed by a backward does not shift the names.
        """
        seen: dict[str, int] = {}
        found = []
        for entry in sorted(entries, key=lambda e: e.order):
            name, count = entry.name, seen.get(entry.name, 0) + 1
            seen[name] = count
            entry.name = name if count == 1 else f"{name}#{count}"
            if self._selected is None or entry.name in self._selected:
                found.append(entry)
        return found
