"""A loss at any parameters of a model: value and gradient, with nothing of the model touched."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from torchbp.blame.arguments import as_arguments, check_model
from torchbp.blame.capture import cuda_devices
from torchbp.blame.watch import unwatched
from torchbp.ops.embedding import Embedding
from torchbp.ops.embedding_bag import EmbeddingBag

State = Mapping[str, Tensor]


def snapshot(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Copies of the parameters and of the buffers of a model, by name."""
    return (
        {name: p.detach().clone() for name, p in model.named_parameters()},
        {name: b.detach().clone() for name, b in model.named_buffers()},
    )


def loss_value(loss_fn: Any, output: Any, targets: Any) -> Tensor:
    """The loss as users see it: what ``loss_fn`` gives, or its mean if that is several numbers."""
    loss = loss_fn(output, targets)
    return loss.mean() if loss.dim() > 0 else loss


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; every module gets its own mode back, whatever happens.

    Flags are set one by one: ``model.eval()`` may have been overridden to keep parts as they are.
    """
    training = [m for m in model.modules() if m.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


_REWEIGHTING = ("scale_grad_by_freq", "by_frequency", "sparse")


class WholeGradient(TorchFunctionMode):
    """Has embeddings hand on the whole derivative of the loss.

    A row of padding gets no gradient from torch, and scaling by frequency or making it sparse
    changes what it gets. That is a choice about training, not the slope of the loss.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        op = getattr(func, "op", None)
        target = op.forward if op in (Embedding, EmbeddingBag) else func
        if target is func and func not in (F.embedding, F.embedding_bag):
            return func(*args, **(kwargs or {}))
        given = inspect.signature(target).bind(*args, **(kwargs or {}))
        given.apply_defaults()
        given.arguments |= {k: False for k in _REWEIGHTING if k in given.arguments}
        if op is Embedding or func is F.embedding:  # in a bag, padding is out of the forward too
            given.arguments["padding_idx"] = None
        return func(*given.args, **given.kwargs)


class Probe:
    """One scalar of a model's output on fixed inputs, as a function of parameters and buffers.

    The model runs in evaluation mode and with the same random numbers each time, on copies: its
    own parameters, buffers, gradients, mode and the global random state stay as they are.

    Args:
        model: the model.
        inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs.
        objective: gives the scalar from the model's output.
        whole: take the whole derivative where torch withholds a part; see :class:`WholeGradient`.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        objective: Callable[[Any], Tensor],
        whole: bool = False,
    ) -> None:
        check_model(model)
        self.model, self.objective, self._whole = model, objective, whole
        self._args, self._kwargs = as_arguments(inputs)
        self._devices = cuda_devices([*model.parameters(), *model.buffers()])
        self._rng = torch.get_rng_state()
        self._cuda_rng = {d: torch.cuda.get_rng_state(d) for d in self._devices}
        self._recurrent = any(isinstance(m, nn.RNNBase) for m in model.modules())

    def loss(self, state: State) -> float:
        """The scalar at ``state`` (parameters and buffers by name)."""
        with self.session(), torch.no_grad():
            return float(self._value(state))

    def gradient(self, state: State, names: Iterable[str]) -> tuple[float, dict[str, Tensor]]:
        """The scalar at ``state``, and its gradient by the named entries of it.

        Models that renormalise their weights write into these entries: give copies.
        """
        with self.session():
            leaves = {n: state[n].detach().requires_grad_() for n in names}
            with WholeGradient() if self._whole else nullcontext():
                value = self._value({**state, **leaves})
            if not value.requires_grad:
                return float(value), {n: torch.zeros_like(p) for n, p in leaves.items()}
            grads = torch.autograd.grad(value, [*leaves.values()], allow_unused=True)
        found = zip(leaves.items(), grads, strict=True)
        return float(value.detach()), {
            n: torch.zeros_like(p) if g is None else g for (n, p), g in found
        }

    def _value(self, state: State) -> Tensor:
        args, kwargs = _fresh(self._args), _fresh(self._kwargs)
        names = {name for name, _ in self.model.named_buffers()}
        fresh = {n: t.detach().clone() if n in names else t for n, t in state.items()}
        return self.objective(functional_call(self.model, fresh, args, kwargs))

    @contextmanager
    def session(self) -> Iterator[None]:
        """Evaluation mode, gradients on, and the probe's random numbers."""
        # cuDNN has no backward of a recurrent layer in evaluation mode.
        no_cudnn = torch.backends.cudnn.flags(enabled=False) if self._recurrent else nullcontext()
        with (
            evaluation(self.model),
            unwatched(),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.random.fork_rng(self._devices),
            no_cudnn,
        ):
            torch.set_rng_state(self._rng)
            for device, state in self._cuda_rng.items():
                torch.cuda.set_rng_state(state, device)
            yield


def _fresh(value: Any) -> Any:
    """Copies of the tensors of a model's arguments, which a model may write into."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, tuple):
        return tuple(_fresh(v) for v in value)
    return {k: _fresh(v) for k, v in value.items()} if isinstance(value, dict) else value
