"""One attribution problem: a model, inputs, targets and a loss, and how to run them safely."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from torchbp.blame.arguments import check_count
from torchbp.blame.capture import (
    NO_LAYER,
    Call,
    Capture,
    Of,
    call_names,
    cuda_devices,
    hidden,
    input_name,
    leaf_copy,
    leaves,
    named_layers,
    per_player,
    training_modules,
    unit_calls,
    writes_in_place,
)
from torchbp.blame.definitions import LossHead, refuse_coupled
from torchbp.blame.watch import unwatched
from torchbp.ops.base import wide


@dataclass(frozen=True)
class Point:
    """What one forward pass is fed.

    Attributes:
        args: positional inputs.
        kwargs: keyword inputs.
        state: parameters and buffers by name, used in place of the model's own; those that require
            grad get error signals.
        shift: added to the model's output before the loss; for references other than an input.
        starts: values of the outputs where paths begin (embeddings of integer inputs), in the order
            of the pass, in place of what the model makes of its inputs.
        targets: used in place of the problem's own, where the inputs hold its batch several times.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    state: Mapping[str, Tensor] | None = None
    shift: Tensor | None = None
    starts: Sequence[Tensor] | None = None
    targets: Any = None


@dataclass
class Run:
    """One forward pass: what every layer returned, and every sample's loss.

    Attributes:
        calls: by layer name, in the order of the pass.
        output: what the model returned.
        losses: ``[N]``, not averaged.
        sources: where paths to the loss begin: the floating inputs as differentiable leaves, and
            outputs that no such input leads to (embeddings of integers).
        began: those outputs.
    """

    calls: dict[str, Call]
    output: Any
    losses: Tensor
    sources: list[Tensor]
    began: list[Tensor]


@dataclass
class Problem:
    """What to attribute, and the means to run it without touching anything of the user's.

    Parameters are passed to the model detached and buffers as copies, so neither gradients nor
    running statistics can reach the originals.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: Any
    head: LossHead
    layers: Sequence[str | nn.Module] | str | None = None
    baseline: Any = None
    n_steps: int = 1
    of: Of = "units"
    options: Mapping[str, Any] = field(default_factory=dict)
    wanted: dict[str, nn.Module] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.layers is None or self.layers == "all":
            self.wanted = leaves(self.model)
        else:
            self.wanted = named_layers(self.model, self.layers)
        self.protect = writes_in_place(self.model)
        self.checked = False
        # Where inputs are integers, paths begin at their embeddings, whatever layers are asked for.
        integers = [v for v in (*self.args, *self.kwargs.values()) if _is_integer(v)]
        self.hooked = {**leaves(self.model), **self.wanted} if integers else self.wanted

    @property
    def point(self) -> Point:
        """The inputs as given."""
        return Point(self.args, self.kwargs)

    def option(self, name: str, default: Any) -> Any:
        """An option of the method, as the user gave it."""
        return self.options.get(name, default)

    def count_option(self, name: str, default: int) -> int:
        """An option that is a number of things.

        Raises:
            TypeError: if it is no integer.
            ValueError: if it is below 1.
        """
        value = self.option(name, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name}: expected an integer, got {value!r}")
        check_count(name, value)
        return value

    def reduce(self, values: Tensor, call: Call) -> Tensor:
        """``[N, players]``: values of a layer's elements, summed as ``of`` says."""
        return per_player(values, call.unit_dim, self.of)

    def contribution(self, call: Call, error: Tensor, reference: Tensor | None = None) -> Tensor:
        """``[N, players]``: activation, less its reference, times error signal.

        Halves are multiplied and summed in float32.
        """
        activation = call.output.detach()
        gap = activation if reference is None else activation - reference
        return self.reduce(wide(gap) * wide(error), call)

    @contextmanager
    def session(self) -> Iterator[None]:
        """Random state kept, gradients on, and a word about training mode."""
        if training_modules(self.model):
            warnings.warn(_in_training(self.model), UserWarning, stacklevel=4)
        devices = cuda_devices([*self.model.parameters(), *self.model.buffers()])
        with (
            unwatched(),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.random.fork_rng(devices),
        ):
            self._rng: dict[int | None, Tensor] = {d: torch.cuda.get_rng_state(d) for d in devices}
            self._rng[None] = torch.get_rng_state()
            yield

    def fresh_state(self) -> dict[str, Tensor]:
        """Detached parameters and copied buffers, by name."""
        written = _renormalised(self.model)
        parameters = {
            n: p.detach().clone() if id(p) in written else p.detach()
            for n, p in self.model.named_parameters()
        }
        return {**parameters, **{n: b.clone() for n, b in self.model.named_buffers()}}

    def call(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        state: Mapping[str, Tensor] | None = None,
        module: nn.Module | None = None,
    ) -> Any:
        """The model's output; every call sees the same random numbers.

        Args:
            args: positional inputs.
            kwargs: keyword inputs.
            state: parameters and buffers by name, used in place of the model's own.
            module: what to call instead of the model: a module that holds it as ``model``.
        """
        for device, random in self._rng.items():
            if device is None:
                torch.set_rng_state(random)
            else:
                torch.cuda.set_rng_state(random, device)
        # Copies, for a model may write into its buffers.
        own = {**self.fresh_state(), **{n: v.clone() for n, v in (state or {}).items()}}
        if module is not None:
            own = {f"model.{name}": value for name, value in own.items()}
        return functional_call(module or self.model, own, args, kwargs)

    def run(self, point: Point | None = None, *, mode: Any = None) -> Run:
        """Forward pass and losses, with every wanted layer's output on record.

        Args:
            point: what to feed instead of the problem's own inputs.
            mode: a secant tape to run under.
        """
        try:
            return self._run(point or self.point, mode)
        except _WrittenInPlace:
            self.protect = True  # something wrote into a layer's output: hand copies on
            return self._run(point or self.point, mode)

    def _run(self, point: Point, mode: Any) -> Run:
        inputs = [leaf_copy(v) for v in (*point.args, *point.kwargs.values())]
        floating = [i for i, v in enumerate(inputs) if _is_floating(v)]
        watched = {} if mode is None else dict(self.model.named_modules())
        watched.pop("", None)
        modules = {n: m for n, m in self.hooked.items() if n != input_name(self.model)}
        capture = Capture(modules, True, self.protect, watched, point.starts)
        # Where paths begin is told by what requires grad.
        with torch.enable_grad(), capture, _tape(mode, capture):
            fed = [*map(_own_copy, inputs)]
            for i in floating:
                capture.record_input(self.model, inputs[i], fed[i])
            n = len(point.args)
            keywords = dict(zip(point.kwargs, fed[n:], strict=True))
            output = self.call(tuple(fed[:n]), keywords, point.state)
            if not self.protect and any(c.changed for c in capture.calls):
                raise _WrittenInPlace
            final = capture.producer(output)
            judged = output if point.shift is None else output + point.shift
            targets = self.targets if point.targets is None else point.targets
            losses = self.head.per_sample(judged, targets)
        self._check_losses(point, judged, targets, losses)
        calls = self._select(capture.calls, final, len(losses))
        began = capture.began
        return Run(calls, output, losses, [*(inputs[i] for i in floating), *began], began)

    def _check_losses(self, point: Point, output: Any, targets: Any, losses: Tensor) -> None:
        inputs = [v for v in (*point.args, *point.kwargs.values()) if isinstance(v, Tensor)]
        if not any(v.shape[:1] == losses.shape[:1] for v in inputs):
            raise ValueError(
                f"loss_fn: expected one loss per sample of inputs {[*map(_shape, inputs)]}, whose "
                f"first dimension runs over samples; got {len(losses)} losses"
            )
        if not self.checked:
            refuse_coupled(self.head, output, targets, losses)
            self.checked = True

    def _select(self, calls: list[Call], final: Call | None, samples: int) -> dict[str, Call]:
        names = dict(zip(map(id, calls), call_names(calls), strict=True))
        # Tables of positions, say, are the same for all samples: nobody's share can be told.
        # Recurrent layers may run over time there, of as many steps as there are samples.
        shared = [c for c in calls if c.output.shape[:1] != (samples,) or _is_time_first(c)]
        chosen = hidden(unit_calls(calls), final) if self.layers is None else calls
        chosen = [c for c in chosen if all(c is not s for s in shared)]
        if not chosen:
            raise ValueError(NO_LAYER)
        wanted = self.layers not in (None, "all")
        found = {names[id(c)]: c for c in chosen if not wanted or c.name in self.wanted}
        missing = [n for n in self.wanted if n not in found] if wanted else []
        for call in shared:
            if call.name in missing:
                raise ValueError(
                    f"layers: {call.name!r} returned {tuple(call.output.shape)}, whose first "
                    f"dimension does not run over the {samples} samples"
                )
        if missing:
            raise ValueError(
                f"layers: {', '.join(map(repr, missing))} did not run in the forward pass, or did "
                "not return a floating tensor"
            )
        return found


def _renormalised(model: nn.Module) -> set[int]:
    """Identities of the weights whose rows a look-up shortens in place (``max_norm``)."""
    tables = (m for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)))
    return {id(m.weight) for m in tables if m.max_norm is not None}


def _in_training(model: nn.Module) -> str:
    names = training_modules(model)
    norms = [name for name in names if "BatchNorm" in name]
    text = (
        f"attribute: the model is in training mode: {', '.join(names[:3])} "
        f"{'and others ' if len(names) > 3 else ''}make blame random or dependent on the batch; "
        "call model.eval() first"
    )
    if norms:
        text += (
            f". Through {norms[0]} every sample moves the losses of all: what is given for a "
            "sample is its share in the blame of this batch, not a value of its own"
        )
    return text


class _WrittenInPlace(Exception):
    """A layer's output was overwritten before it could be read."""


@contextmanager
def _tape(mode: Any, capture: Capture) -> Iterator[None]:
    if mode is None:
        yield
        return
    mode.next_run(capture.current)
    try:
        with mode:
            yield
    except BaseException:
        mode.drop_run()
        raise
    mode.finish_run()


def _own_copy(value: Any) -> Any:
    """What the model may write into; tensors in containers are constants to it."""
    if isinstance(value, Tensor):
        return value.clone()
    return pytree.tree_map(lambda v: v.detach().clone() if isinstance(v, Tensor) else v, value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_floating_point()


def _is_time_first(call: Call) -> bool:
    return call.output.dim() == 3 and getattr(call.module, "batch_first", True) is False


def _shape(value: Tensor) -> tuple[int, ...]:
    return tuple(value.shape)


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
