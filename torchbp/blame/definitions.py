"""What a blame value is: its sign, its question, and the per-sample loss it is measured in.

For sample ``n`` with un-averaged loss ``l_n``, blame of a unit estimates
``l_n(as it is) - l_n(unit set to its reference)``: positive blame RAISES the loss (a culprit),
negative blame lowers it (a helper).
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchbp.ops.base import wide

Question = Literal["removal", "allocation", "sensitivity"]
Kind = Literal["cross_entropy", "mse", "bce", "other"]
LossFn = Callable[[Any, Any], Tensor]

_FUNCTIONS: dict[str, Kind] = {
    "cross_entropy": "cross_entropy",
    "mse_loss": "mse",
    "binary_cross_entropy_with_logits": "bce",
}
_MODULES: tuple[tuple[type[nn.Module], Kind], ...] = (
    (nn.CrossEntropyLoss, "cross_entropy"),
    (nn.MSELoss, "mse"),
    (nn.BCEWithLogitsLoss, "bce"),
)
#: Modules whose losses are what their names say.
_HOMES = ("torch.nn.functional", "torch.nn.modules.loss", "torchbp")


@dataclass(frozen=True)
class LossHead:
    """A loss function taken apart: which family it is of, and its value per sample.

    Attributes:
        loss_fn: the user's ``loss_fn(output, targets)``, with any reduction.
        kind: its family; ``"other"`` where it is none that torchbp knows.
        elementwise: the same loss with ``reduction="none"``, or ``None`` where only single
            samples can be evaluated.
        settings: the keyword settings of a known loss (class weights, smoothing, ...).
    """

    loss_fn: LossFn
    kind: Kind
    elementwise: LossFn | None
    settings: dict[str, Any]

    @staticmethod
    def of(loss_fn: Any) -> LossHead:
        """Recognise a loss function, module or partial.

        Args:
            loss_fn: callable ``(output, targets) -> loss``.

        Raises:
            TypeError: if it cannot be called.
        """
        if not callable(loss_fn):
            raise TypeError(
                f"loss_fn: expected a callable (output, targets) -> loss, got {loss_fn!r}"
            )
        for module, kind in _MODULES:
            if isinstance(loss_fn, module):
                bare = copy.copy(loss_fn)
                bare.reduction = "none"  # type: ignore[assignment]
                if not type(loss_fn).forward.__module__.startswith(_HOMES):
                    return LossHead(loss_fn, "other", bare, {})  # a user's own formula
                names = ("weight", "pos_weight", "ignore_index", "label_smoothing")
                found = {n: getattr(loss_fn, n) for n in names if hasattr(loss_fn, n)}
                return LossHead(loss_fn, kind, bare, found)
        function = loss_fn.func if isinstance(loss_fn, functools.partial) else loss_fn
        settings = dict(loss_fn.keywords) if isinstance(loss_fn, functools.partial) else {}
        home = getattr(function, "__module__", "") or ""
        known = home.startswith(_HOMES)
        family: Kind = _FUNCTIONS.get(getattr(function, "__name__", ""), "other")
        elementwise = None
        if _accepts_reduction(function):
            elementwise = functools.partial(loss_fn, reduction="none")
        return LossHead(loss_fn, family if known else "other", elementwise, settings)

    def per_sample(self, output: Any, targets: Any) -> Tensor:
        """The un-averaged loss of every sample, terms of one sample added up.

        Args:
            output: what the model returned; dimension 0 runs over samples.
            targets: as ``loss_fn`` takes them.

        Returns:
            ``[N]`` losses, differentiable with respect to ``output``.

        Raises:
            TypeError: if the loss is not a tensor.
            ValueError: if targets have the wrong shape or range, or the loss is not a sum or
                mean over samples.
        """
        check_targets(self, output, targets)
        loss = self.evaluate(output, targets)
        if loss.dim() > 0:
            return loss.flatten(1).sum(1) if loss.dim() > 1 else loss
        return self._one_by_one(loss, output, targets)

    def evaluate(self, output: Any, targets: Any) -> Tensor:
        """The loss as it is called: un-averaged where it has a ``reduction``.

        Raises:
            TypeError: if it is not a tensor.
        """
        loss = (self.elementwise or self.loss_fn)(output, targets)
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss_fn: expected a tensor in return, got {type(loss).__name__}")
        return loss

    def _one_by_one(self, whole: Tensor, output: Any, targets: Any) -> Tensor:
        if not isinstance(output, Tensor) or not isinstance(targets, Tensor):
            raise ValueError(
                "loss_fn returned a scalar, and output or targets is not a tensor that could be "
                "cut into samples: return one loss per sample (shape [N]) instead"
            )
        rows = [self.loss_fn(output[n : n + 1], targets[n : n + 1]) for n in range(len(output))]
        losses = torch.stack(rows)
        whole, total = whole.detach(), losses.detach().sum()
        tolerance = 1e-4 * float(losses.detach().abs().sum()) + 1e-12
        if not any(abs(float(whole) * n - float(total)) <= tolerance for n in (1, len(output))):
            raise ValueError(
                "loss_fn is neither a sum nor a mean over samples: on the batch it gives "
                f"{float(whole):.6g}, on its samples one by one {float(total):.6g} in all. "
                "Blame per sample is not defined for it"
            )
        return losses


def refuse_coupled(head: LossHead, output: Any, targets: Any, losses: Tensor) -> None:
    """Refuse a loss that gives a sample another value in other company.

    Half the samples, picked at random, are evaluated by themselves. Losses that torchbp knows are
    exempt, scalars are compared by :meth:`LossHead.per_sample`, and what cannot be cut into samples
    (weights of a batch that the function keeps to itself, lists as long as the batch) is not
    compared.

    Args:
        head: the loss.
        output: what the model returned.
        targets: as the loss takes them.
        losses: ``[N]`` what :meth:`LossHead.per_sample` made of them.

    Raises:
        ValueError: if losses differ, as contrastive ones do.
    """
    samples = len(losses)
    if head.kind != "other" or samples < 2 or any(_lists(v, samples) for v in (output, targets)):
        return
    some = torch.randperm(samples, generator=torch.Generator().manual_seed(0))[: samples // 2]

    def cut(value: Any) -> Any:
        fits = isinstance(value, Tensor) and value.shape[:1] == (samples,)
        return value.detach()[some.to(value.device)] if fits else value

    with torch.no_grad():
        try:
            alone = head.evaluate(pytree.tree_map(cut, output), pytree.tree_map(cut, targets))
        except Exception:
            return  # the function is made for this batch only
    if alone.dim() == 0 or len(alone) != len(some):
        return
    together = losses.detach()[some.to(losses.device)].reshape(len(some), -1).sum(1)
    difference = (alone.reshape(len(alone), -1).sum(1) - together).abs().max()
    tolerance = 1e-4 if losses.dtype in (torch.float32, torch.float64) else 1e-2
    if bool(difference > tolerance * losses.detach().abs().max()):
        raise ValueError(
            "loss_fn is not a sum over samples: it returned one loss per sample, but with half of "
            f"the batch alone one of them changes by {float(difference):.3g}. Blame per sample is "
            "not defined for a loss that couples the samples of a batch"
        )


def _lists(value: Any, samples: int) -> bool:
    """Whether a list or tuple in it may hold one thing for every sample."""
    if isinstance(value, dict):
        return any(_lists(v, samples) for v in value.values())
    if not isinstance(value, (list, tuple)):
        return False
    return len(value) == samples or any(_lists(v, samples) for v in value)


def _accepts_reduction(function: Any) -> bool:
    try:
        return "reduction" in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def check_targets(head: LossHead, output: Any, targets: Any) -> None:
    """Refuse targets of the wrong shape or out of range, for the losses torchbp knows.

    Raises:
        TypeError: if output or targets is not a tensor although the loss needs one.
        ValueError: naming what came and what was expected.
    """
    if head.kind == "other":
        return
    for name, value in (("output", output), ("targets", targets)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if head.kind != "cross_entropy" or targets.is_floating_point():
        if targets.shape != output.shape:
            raise ValueError(
                f"targets: expected shape {tuple(output.shape)} like the output, "
                f"got {tuple(targets.shape)}"
            )
        return
    if output.dim() < 2:
        raise ValueError(
            f"output: cross-entropy expects [N, C, ...], a number per class, got "
            f"{tuple(output.shape)}"
        )
    expected = (*output.shape[:1], *output.shape[2:])
    if targets.shape != torch.Size(expected):
        raise ValueError(f"targets: expected shape {expected}, got {tuple(targets.shape)}")
    classes, ignored = output.shape[1], head.settings.get("ignore_index", -100)
    wrong = ((targets < 0) | (targets >= classes)) & (targets != ignored)
    if bool(wrong.any()):
        value = int(targets[wrong][0])
        raise ValueError(f"targets: expected classes in [0, {classes}), got {value}")


def sample_weights(head: LossHead, targets: Tensor) -> Tensor | None:
    """``[N]`` factor of each sample's loss by its class weight; ``None`` for all ones."""
    weight = head.settings.get("weight")
    if head.kind != "cross_entropy" or weight is None:
        return None
    ignored = targets == head.settings.get("ignore_index", -100)
    return weight[targets.masked_fill(ignored, 0)]


def one_term_reason(head: LossHead, output: Any, targets: Any) -> str | None:
    """Why a sample has more than one loss term (``None`` if it has one): ``link`` needs one."""
    if head.kind == "other":
        return "the loss is none of cross-entropy, squared error or binary cross-entropy"
    if head.kind == "cross_entropy":
        if output.dim() != 2:
            return f"the output of shape {tuple(output.shape)} has several loss terms per sample"
        if targets.is_floating_point():
            return "the targets are probabilities, so every class is a loss term"
        if head.settings.get("label_smoothing"):
            return "label smoothing makes every class a loss term"
        return None
    if output.numel() != output.shape[0]:
        return f"the output of shape {tuple(output.shape)} has several loss terms per sample"
    if head.kind == "bce":
        if head.settings.get("weight") is not None or head.settings.get("pos_weight") is not None:
            return "the binary cross-entropy is weighted"
        if bool(((targets != 0) & (targets != 1)).any()):
            return "the targets are soft, so both answers are loss terms"
    return None


def log_odds_blame(taylor: Tensor, loss: Tensor, weight: Tensor | None = None) -> Tensor:
    r"""Removal blame with the loss exact in the log-odds of error: the ``link`` of cross-entropy.

    With ``r = 1 - exp(-l)`` the probability of error, a unit that changes the log-odds by
    ``d = t / r`` changes the loss by ``b = softplus(s) - softplus(s - d)``, which equals
    ``-log1p(r * expm1(-d))`` without cancellation.

    Args:
        taylor: ``[N, U]`` first-order blame ``t`` of the un-averaged loss; float32 or float64.
        loss: ``[N]`` per-sample losses ``l >= 0``, of the same dtype.
        weight: ``[N]`` factor of each loss (class weights), or ``None``.

    Returns:
        ``[N, U]`` blame, never above the loss.
    """
    if weight is not None:
        safe = torch.where(weight == 0, 1.0, weight)
        return log_odds_blame(taylor / safe[:, None], loss / safe) * weight[:, None]
    loss = loss[:, None]
    r = -torch.expm1(-loss)
    gain = taylor * torch.where(r > 0, -1 / r, 0.0)  # -d
    if _is_tame(gain, loss):
        # One buffer, four passes: this runs over every unit of every tracked step.
        blame = gain.expm1_().mul_(r).log1p_().neg_()
    else:
        near = (gain <= 30) & (gain >= -4)
        blame = -torch.where(
            near,
            torch.log1p(r * torch.expm1(gain.clamp(-4, 30))),
            torch.logaddexp(-loss, r.log() + gain),
        )
    return torch.minimum(blame, loss, out=blame)


def _is_tame(gain: Tensor, loss: Tensor) -> bool:
    """Whether ``log1p(r expm1(gain))`` neither overflows nor cancels (where l is large)."""
    if gain.numel() == 0:
        return True
    low, high = (float(v) for v in torch.aminmax(gain))
    return high <= 80 and (low >= -4 or float(loss.amax()) <= 4)


def squared_error_blame(taylor: Tensor, loss: Tensor) -> Tensor:
    """Removal blame for ``l = (z - y)²`` with one output: ``b = t - t² / (4 l)``.

    A unit that adds ``u`` to ``z`` has ``t = 2 (z - y) u``; without it the loss is
    ``(z - u - y)²``. Where ``l`` is zero the error signal says nothing and blame is zero.

    Args:
        taylor: ``[N, U]`` first-order blame of the un-averaged loss.
        loss: ``[N]`` per-sample losses.

    Returns:
        ``[N, U]`` blame.
    """
    loss = loss[:, None]
    return torch.where(loss > 0, taylor - taylor.square() / (4 * loss), taylor)


def link_blame(head: LossHead, taylor: Tensor, loss: Tensor, targets: Tensor) -> Tensor:
    """The closed form of ``link`` for the loss at hand; see :func:`one_term_reason` first."""
    if head.kind == "mse":
        return squared_error_blame(taylor, loss)
    return log_odds_blame(wide(taylor), wide(loss), sample_weights(head, targets))
