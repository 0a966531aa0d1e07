"""Undoing what stood between the per-sample loss and ``backward()``.

A mean reduction, gradient accumulation and an AMP gradient scaler all multiply every error signal
by one factor. It need not be told: the error signal at the output, which the tracker observes, is
that factor times the gradient of the un-averaged loss, which is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchbp.blame.definitions import LossHead, check_targets
from torchbp.ops.base import wide

#: Largest part of the observed error signal that the loss may leave unexplained.
_TOLERANCE = 0.02


def candidates(output: Tensor, targets: Tensor) -> list[LossHead]:
    """Losses a tracker tries when it was not told one, by the look of the targets."""
    if targets.is_floating_point() and targets.shape == output.shape:
        names = (F.mse_loss, F.binary_cross_entropy_with_logits, F.cross_entropy)
        return [LossHead.of(f) for f in names if output.dim() > 1 or f is not F.cross_entropy]
    return [LossHead.of(F.cross_entropy)]


def losses_and_gradient(head: LossHead, output: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
    """``[N]`` un-averaged losses, and the gradient of their sum at the output."""
    plain = head.kind == "cross_entropy" and output.dim() == 2 and not targets.is_floating_point()
    if plain and not _has_settings(head):
        return _cross_entropy(head, output, targets)
    return _by_autograd(head, output, targets)


def _by_autograd(head: LossHead, output: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        z = output.detach().requires_grad_()
        losses = head.per_sample(z, targets)
        (gradient,) = torch.autograd.grad(losses.sum(), z)
    return losses.detach(), gradient


def _has_settings(head: LossHead) -> bool:
    settings = dict(head.settings)
    ignore = settings.pop("ignore_index", -100)
    return ignore != -100 or any(
        isinstance(v, Tensor) or v not in (None, 0) for v in settings.values()
    )


def _cross_entropy(head: LossHead, output: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    # Written out because it runs on every tracked step: -log p_y and p - onehot(y).
    if targets.shape != output.shape[:1]:
        check_targets(head, output, targets)
    with torch.no_grad():
        log_p = torch.log_softmax(output, 1)
        index = targets[:, None]
        try:
            losses = -log_p.gather(1, index)
        except (RuntimeError, IndexError):  # ignored samples, or classes out of range
            return _by_autograd(head, output, targets)
        gradient = log_p.exp_().scatter_add_(1, index, torch.full_like(losses, -1))
    return losses[:, 0], gradient


def fit(
    heads: Sequence[LossHead], output: Tensor, error: Tensor, targets: Any, loss: Tensor
) -> tuple[LossHead, float, Tensor]:
    """Find the loss among ``heads`` that explains the error signal, and the factor.

    Args:
        heads: losses to try.
        output: the model's output ``z``.
        error: the observed ``∂(what backward was called on)/∂z``.
        targets: as the losses take them.
        loss: the scalar that ``backward`` was called on; used where the error signal vanishes.

    Returns:
        The head, the factor and the ``[N]`` un-averaged losses. The factor is NaN where the error
        signal or the loss is not finite.

    Raises:
        ValueError: if none of them explains it.
    """
    error = wide(error)
    wrong_targets: Exception | None = None
    for head in heads:
        try:
            losses, gradient = losses_and_gradient(head, output.to(error.dtype), targets)
        except (TypeError, ValueError) as problem:
            wrong_targets = problem
            continue
        pair = torch.stack([error.flatten(), gradient.flatten()])
        (ee, eg), (_, gg) = (pair @ pair.T).tolist()
        if not ee < float("inf") or not gg < float("inf"):
            return head, float("nan"), losses
        if gg == 0:
            total = float(losses.sum())
            return head, float(loss) / total if total > 0 and float(loss) > 0 else 1.0, losses
        if ee > 0 and ee - eg * eg / gg <= _TOLERANCE**2 * ee and eg > 0:
            return head, eg / gg, losses
    if wrong_targets is not None and len(heads) == 1:
        raise wrong_targets
    tried = " or ".join(h.kind.replace("_", "-") for h in heads)
    raise ValueError(
        f"loss: the error signal at the model's output is not that of {tried} with these targets; "
        "pass the loss to the tracker, BlameTracker(model, loss_fn=...), and to step() the targets "
        "it was computed with"
    )
