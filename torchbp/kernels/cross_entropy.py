"""Cross-entropy of class indices: the losses in one look at the logits, the gradient in another."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference_common import check_alike, check_dtype, sums_dtype, up
from .table import add, vmap_one_by_one

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
_MEAN = REDUCTIONS["mean"]


def _check(logits: Tensor, target: Tensor, weight: Tensor | None) -> None:
    check_dtype(logits, "logits")
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise RuntimeError(
            f"logits: expected rows x classes with a class at least, got {logits.dim()} dims and "
            f"{logits.numel()} elements"
        )
    rows, classes = logits.shape
    if target.shape != (rows,):
        raise RuntimeError(
            f"target: expected one class for each of the {rows} rows, got {target.numel()} in "
            f"{target.dim()} dims"
        )
    if target.dtype != torch.int64:
        raise RuntimeError(f"target: expected int64, got {target.dtype}")
    if target.device != logits.device:
        raise RuntimeError("target: expected the device of logits")
    if weight is None:
        return
    if weight.shape != (classes,):
        raise RuntimeError(
            f"weight: expected one value for each of the {classes} classes, got {weight.numel()} "
            f"in {weight.dim()} dims"
        )
    check_alike(weight, "weight", logits, "logits")


def _check_reduction(reduction: int) -> None:
    if not 0 <= reduction <= 2:
        raise RuntimeError(f"reduction: expected 0, 1 or 2, got {reduction}")


def _check_gradient(grad_output: Tensor, logits: Tensor, by_row: bool) -> None:
    if grad_output.shape != (logits.shape[:1] if by_row else ()):
        raise RuntimeError(
            f"grad_output: expected {'one value per row' if by_row else 'a scalar'}, got "
            f"{grad_output.numel()} in {grad_output.dim()} dims"
        )
    if grad_output.dtype != sums_dtype(logits):
        raise RuntimeError(f"grad_output: expected {sums_dtype(logits)}, got {grad_output.dtype}")
    if grad_output.device != logits.device:
        raise RuntimeError("grad_output: expected the device of logits")


class _Rows:
    """What forward and backward of the reference share: the rows with their targets and weights."""

    def __init__(
        self, logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int
    ) -> None:
        self.classes = logits.shape[1]
        self.ignored = target == ignore_index
        self.target = target.masked_fill(self.ignored, 0)
        wrong = (self.target < 0) | (self.target >= self.classes)
        if bool(wrong.any()):
            raise RuntimeError(
                f"target: expected classes in [0, {self.classes}), got {int(target[wrong][0])}"
            )
        self.z = up(logits)
        self.weight = self.z.new_ones(self.classes) if weight is None else up(weight)
        self.own_weight = self.weight[self.target].masked_fill(self.ignored, 0)
        self.index = self.target[:, None]
        self.own = self.z.gather(1, self.index)[:, 0]
        self.lse = self.z.logsumexp(1)

    def losses(self, smoothing: float, z_loss: float) -> Tensor:
        rest = self.z.scatter(1, self.index, -torch.inf).logsumexp(1)
        odds = self.own - rest
        loss = self.own_weight * (1 - smoothing) * F.softplus(-odds, threshold=torch.inf)
        if z_loss:
            loss = loss + self.own_weight * z_loss * self.lse.square()
        if smoothing:
            errors = self.weight * (self.lse[:, None] - self.z)
            loss = loss + smoothing / self.classes * errors.sum(1)
        both = [loss.masked_fill(self.ignored, 0), odds.masked_fill(self.ignored, torch.inf)]
        return torch.stack(both)

    def gradient(self, g: Tensor, smoothing: float, z_loss: float) -> Tensor:
        p = (self.z - self.lse[:, None]).exp()
        hit = (self.own_weight * (1 - smoothing))[:, None]
        share = self.weight * (smoothing / self.classes)
        total = hit + share.sum() + (2 * z_loss * self.own_weight * self.lse)[:, None]
        slope = (p * total - share).scatter_add(1, self.index, -hit)
        return (slope * g.expand(self.ignored.shape)[:, None]).masked_fill(self.ignored[:, None], 0)


def _reference(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor]:
    _check(logits, target, weight)
    _check_reduction(reduction)
    rows = _Rows(logits, target, weight, ignore_index)
    both = rows.losses(smoothing, z_loss)
    loss = both[0] if reduction == 0 else both[0].sum()
    if reduction == _MEAN:
        loss = loss / rows.own_weight.sum()
    return loss.to(logits.dtype, copy=True), both


def _backward_reference(
    grad_output: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
) -> Tensor:
    _check(logits, target, weight)
    _check_reduction(reduction)
    _check_gradient(grad_output, logits, reduction == 0)
    rows = _Rows(logits, target, weight, ignore_index)
    if reduction == _MEAN:
        grad_output = grad_output / rows.own_weight.sum()
    return rows.gradient(grad_output, smoothing, z_loss).to(logits.dtype).contiguous()


def _in_place_reference(
    logits: Tensor,
    grad_output: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
) -> Tensor:
    _check(logits, target, weight)
    if not logits.is_contiguous():
        raise RuntimeError("logits: expected a contiguous tensor to write into")
    _check_gradient(grad_output, logits, grad_output.dim() > 0)
    rows = _Rows(logits, target, weight, ignore_index)
    both = rows.losses(smoothing, z_loss)
    logits.copy_(rows.gradient(grad_output, smoothing, z_loss))
    return both


def _fake(
    logits: Tensor, target: Tensor, weight: Tensor | None, reduction: int, *settings: Any
) -> tuple[Tensor, Tensor]:
    _check(logits, target, weight)
    _check_reduction(reduction)
    rows = logits.shape[0]
    loss = logits.new_empty(() if reduction else (rows,))
    return loss, logits.new_empty((2, rows), dtype=sums_dtype(logits))


def _fake_backward(
    grad_output: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    *settings: Any,
) -> Tensor:
    _check(logits, target, weight)
    _check_reduction(reduction)
    _check_gradient(grad_output, logits, reduction == 0)
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _fake_in_place(
    logits: Tensor, grad_output: Tensor, target: Tensor, weight: Tensor | None, *settings: Any
) -> Tensor:
    _check(logits, target, weight)
    _check_gradient(grad_output, logits, grad_output.dim() > 0)
    return logits.new_empty((2, logits.shape[0]), dtype=sums_dtype(logits))


_op = add(
    "cross_entropy(Tensor logits, Tensor target, Tensor? weight, int reduction, int ignore_index,"
    " float smoothing, float z_loss) -> (Tensor, Tensor)",
    _reference,
    _fake,
    vmap_one_by_one("cross_entropy"),
)
_backward_op = add(
    "cross_entropy_backward(Tensor grad_output, Tensor logits, Tensor target, Tensor? weight,"
    " int reduction, int ignore_index, float smoothing, float z_loss) -> Tensor",
    _backward_reference,
    _fake_backward,
    vmap_one_by_one("cross_entropy_backward"),
)
_in_place_op = add(
    "cross_entropy_in_place(Tensor(a!) logits, Tensor grad_output, Tensor target, Tensor? weight,"
    " int ignore_index, float smoothing, float z_loss) -> Tensor",
    _in_place_reference,
    _fake_in_place,
)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Compute the cross-entropy of every row, and the log-odds of its class, reading logits once.

    With ``c = lse(z) - z_y``, the loss of a row is
    ``w_y ((1 - ε) c + ζ lse²) + ε / C Σ_k w_k (lse - z_k)``: label smoothing ε as torch has it
    (Szegedy et al. 2016), z-loss ζ as in PaLM (Chowdhery et al. 2022). The running maximum and sum
    are those of Milakov and Gimelshein (2018), the class itself left out of the sum, so that ``c``
    keeps its digits where the prediction is all but certain.

    Args:
        logits: Shape ``[N, C]``; float32, float64, bfloat16 or float16.
        target: Shape ``[N]``, int64; classes in ``[0, C)`` or ``ignore_index``. On CUDA a class out
            of range makes the results of its row NaN.
        weight: Shape ``[C]``, dtype of ``logits``; None for ones.
        reduction: ``"none"``, ``"mean"`` (over the weights ``w_y``) or ``"sum"``.
        ignore_index: The class of rows that do not count.
        label_smoothing: ε, in [0, 1].
        z_loss: ζ, at least 0.

    Returns:
        The loss, a scalar or ``[N]``, in the dtype of ``logits``; and ``[2, N]``, float64 for
        float64 ``logits`` and float32 for all others: the losses of the rows, zero where ignored,
        and the log-odds ``s = log(p_y / (1 - p_y))``, infinite where ignored; without weights,
        smoothing and z-loss, ``l = softplus(-s)``. They do not depend on the number of threads.

    Raises:
        RuntimeError: An argument is not as described.
    """
    settings = ignore_index, label_smoothing, z_loss
    result: tuple[Tensor, Tensor] = _op(logits, target, weight, REDUCTIONS[reduction], *settings)
    return result


def cross_entropy_backward(
    grad_output: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Compute the gradient of the logits; a row is scanned again instead of kept from forward.

    Args:
        grad_output: The gradient of the loss: a scalar, or ``[N]`` for ``"none"``; float64 for
            float64 ``logits``, float32 for all others.
        logits: As for :func:`cross_entropy`, like all arguments that follow.
        target: Classes.
        weight: Of the classes.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        ignore_index: The class of rows that do not count.
        label_smoothing: ε.
        z_loss: ζ.

    Returns:
        The gradient, contiguous; shape and dtype of ``logits``.

    Raises:
        RuntimeError: An argument is not as described.
    """
    settings = ignore_index, label_smoothing, z_loss
    number = REDUCTIONS[reduction]
    grad: Tensor = _backward_op(grad_output, logits, target, weight, number, *settings)
    return grad


def cross_entropy_in_place(
    logits: Tensor,
    grad_output: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Compute the losses of rows and overwrite the logits with their gradient, in one visit.

    Args:
        logits: ``[N, C]``, contiguous; overwritten with the gradient of ``Σ grad_output · loss``.
        grad_output: Of the loss of every row, ``[N]``, or a scalar for all; dtype as for
            :func:`cross_entropy_backward`.
        target: As for :func:`cross_entropy`, like all arguments that follow.
        weight: Of the classes.
        ignore_index: The class of rows that do not count.
        label_smoothing: ε.
        z_loss: ζ.

    Returns:
        ``[2, N]``: losses and log-odds, as :func:`cross_entropy` gives them.

    Raises:
        RuntimeError: An argument is not as described.
    """
    settings = ignore_index, label_smoothing, z_loss
    both: Tensor = _in_place_op(logits, grad_output, target, weight, *settings)
    return both
