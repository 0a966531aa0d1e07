"""Second derivatives of a loss by the model's output: exactly, or as random directions.

A loss is not taken apart by its name but watched: the loss functions it calls are seen by a
``TorchFunctionMode``, so that a user's own ``loss_fn`` (which flattens tokens, takes a mean, adds
two tasks up) is understood as long as its value is linear in what those functions return.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from torchbp.blame.definitions import LossHead
from torchbp.ops.cross_entropy import CrossEntropy
from torchbp.ops.loss_binary import BCEWithLogits
from torchbp.ops.loss_regression import MSE

#: Losses whose terms see one element each; their curvature is diagonal.
_ELEMENTWISE: tuple[Callable[..., Any], ...] = (
    F.mse_loss, F.binary_cross_entropy_with_logits, F.smooth_l1_loss, F.huber_loss, F.l1_loss,
    F.poisson_nll_loss, F.soft_margin_loss,
)  # fmt: skip

#: torchbp's ops behind functions of the same name, with the order of their arguments.
_OPS: dict[type, tuple[Callable[..., Any], tuple[str, ...]]] = {
    CrossEntropy: (
        F.cross_entropy,
        ("input", "target", "weight", "ignore_index", "reduction", "label_smoothing"),
    ),
    MSE: (F.mse_loss, ("input", "target", "reduction")),
    BCEWithLogits: (
        F.binary_cross_entropy_with_logits,
        ("input", "target", "weight", "pos_weight", "reduction"),
    ),
}

#: Numbers that the exact second derivatives may take.
HESSIAN_ELEMENTS = 1 << 26


@dataclass
class _Seen:
    """One call of a loss function: ``terms`` of the detached copy ``leaf`` of its ``input``."""

    input: Tensor
    leaf: Tensor
    terms: Tensor
    size: Tensor | None  # factor of every term of a cross-entropy: class weights and the like

    def curvature(self, factor: Tensor) -> Tensor:
        """Factor of every term's ``diag(p) - p p'``, or the second derivative of every element.

        Args:
            factor: of every term in the whole loss.
        """
        if self.size is not None:
            return self.size * factor
        (first,) = torch.autograd.grad((self.terms * factor).sum(), self.leaf, create_graph=True)
        if not first.requires_grad:
            return torch.zeros_like(self.leaf)
        return torch.autograd.grad(first.sum(), self.leaf, retain_graph=True)[0]


class _Watch(TorchFunctionMode):
    """Takes the loss functions that are called apart into their terms."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[_Seen] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "op", None) in _OPS:
            known, names = _OPS[func.op]  # type: ignore[attr-defined]
            return self._split(known, dict(zip(names, args, strict=True)))
        if func is F.cross_entropy or func in _ELEMENTWISE:
            return self._split(func, inspect.signature(func).bind(*args, **kwargs).arguments)
        return func(*args, **kwargs)

    def _split(self, func: Callable[..., Any], settings: dict[str, Any]) -> Any:
        input, reduction = settings.pop("input"), settings.pop("reduction", "mean")
        old = settings.get("reduce") is not None or settings.get("size_average") is not None
        weighted_mean = func is F.mse_loss and settings.get("weight") is not None
        if old or not input.requires_grad or (weighted_mean and reduction == "mean"):
            return func(input, **settings, reduction=reduction)  # stays in the graph as it is
        leaf = input.detach().requires_grad_()

        def value(of: Tensor, how: str) -> Tensor:
            return func(of, **settings, reduction=how)

        terms = value(leaf, "none")
        size = None
        if func is F.cross_entropy:
            # The loss of the uniform prediction is log C times all its weights.
            flat, classes = torch.zeros_like(leaf), leaf.shape[1 if leaf.dim() > 1 else 0]
            uniform = value(flat, "none").detach()
            size = uniform / max(math.log(classes), torch.finfo(leaf.dtype).tiny)
        self.seen.append(_Seen(input, leaf, terms, size))
        if reduction == "none":
            return terms
        if reduction == "mean" and size is None:
            return terms.mean()
        if reduction == "mean":
            return terms.sum() * (value(flat, "mean").detach() / uniform.sum())
        return terms.sum()


class RandomCurvature:
    """Random directions ``g`` by the model's output with ``E[g g'] = H``, the loss's curvature.

    ``E[(g . u)^2] = u' H u`` then holds for the change ``u`` of the whole output of a sample, over
    all its tokens, since directions of different terms are independent and of mean zero.

    Args:
        head: the loss.
        output: what the model returned.
        targets: as the loss takes them.

    Raises:
        ValueError: if the loss is not linear in the loss functions it calls.
    """

    def __init__(self, head: LossHead, output: Any, targets: Any) -> None:
        self.outputs = [t for t in pytree.tree_leaves(output) if _has_gradient(t)]
        self._copies = [t.detach().requires_grad_() for t in self.outputs]
        copies = iter(self._copies)
        copied = pytree.tree_map(lambda t: next(copies) if _has_gradient(t) else t, output)
        with _Watch() as watch:
            losses = head.per_sample(copied, targets)
        seen = watch.seen
        if not seen or not losses.requires_grad:
            raise ValueError(_NOT_UNDERSTOOD)
        found = torch.autograd.grad(
            losses.sum(), [*self._copies, *(s.terms for s in seen)], create_graph=True,
            allow_unused=True,
        )  # fmt: skip
        direct, factors = found[: len(self._copies)], found[len(self._copies) :]
        used = [(s, f) for s, f in zip(seen, factors, strict=True) if f is not None]
        linear = all(d is None for d in direct) and not any(f.requires_grad for _, f in used)
        self._parts = [(s, s.curvature(f).detach()) for s, f in used] if linear else []
        if not self._parts or any(bool((c < 0).any()) for _, c in self._parts):
            raise ValueError(_NOT_UNDERSTOOD)

    def draw(self, generator: torch.Generator) -> list[Tensor]:
        """One direction, as a tensor like each of ``outputs``."""
        directions = [_direction(s, c, generator) for s, c in self._parts]
        found = torch.autograd.grad(
            [s.input for s, _ in self._parts], self._copies, directions, retain_graph=True,
            allow_unused=True,
        )  # fmt: skip
        return [
            torch.zeros_like(t) if g is None else g
            for t, g in zip(self.outputs, found, strict=True)
        ]


def second_derivatives(head: LossHead, output: Any, targets: Any) -> Tensor:
    """``[N, K, K]`` second derivatives of every sample's loss by the ``K`` numbers of its output.

    Args:
        head: the loss, twice differentiable.
        output: what the model returned, a tensor whose dimension 0 runs over samples.
        targets: as the loss takes them.

    Raises:
        TypeError: if the output is not a tensor.
        ValueError: if they would take more than ``HESSIAN_ELEMENTS`` numbers.
    """
    if not isinstance(output, Tensor):
        raise TypeError(
            f"estimate: 'exact' needs an output that is a tensor, got {type(output).__name__}"
        )
    z = output.detach().requires_grad_()
    samples, size = len(z), z.numel() // max(len(z), 1)
    if samples * size * size > HESSIAN_ELEMENTS:
        raise ValueError(
            f"estimate: 'exact' needs {size} backward passes and {samples} x {size} x {size} "
            f"second derivatives for an output of shape {tuple(z.shape)}; use 'montecarlo'"
        )
    hessian = z.new_zeros(samples, size, size)
    losses = head.per_sample(z, targets)
    first = torch.autograd.grad(losses.sum(), z, create_graph=True)[0].reshape(samples, size)
    if first.requires_grad:
        for k in range(size):
            (row,) = torch.autograd.grad(
                first[:, k].sum(), z, retain_graph=True, materialize_grads=True
            )
            hessian[:, k] = row.reshape(samples, size)
    return hessian


_NOT_UNDERSTOOD = (
    "estimate: 'montecarlo' needs a loss_fn that calls cross_entropy, mse_loss, "
    "binary_cross_entropy_with_logits or another elementwise loss of torch.nn.functional, and is "
    "linear in their values; use estimate='exact' or 'empirical'"
)


def _has_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _direction(seen: _Seen, curvature: Tensor, generator: torch.Generator) -> Tensor:
    z = seen.leaf.detach()
    signs = torch.randint(2, z.shape, generator=generator).to(z) * 2 - 1
    if seen.size is None:
        return signs * curvature.sqrt()
    dim = 1 if z.dim() > 1 else 0
    p = z.softmax(dim)
    root = p.sqrt() * signs
    return (root - p * root.sum(dim, keepdim=True)) * curvature.sqrt().unsqueeze(dim)
