"""The chunks of a linear layer's logits, their cross-entropy and its gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _is_any_autocast_enabled
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.overrides import _get_current_function_mode_stack, has_torch_function
from torch.utils._device import DeviceContext

from torchbp import kernels
from torchbp.ops.arithmetic import mul
from torchbp.ops.base import is_plain, wide
from torchbp.ops.cross_entropy import class_dim, cross_entropy, index_rows, residual
from torchbp.ops.elementwise import can_fuse
from torchbp.ops.linear import linear
from torchbp.ops.pointwise import square
from torchbp.ops.reduce import logsumexp

CHUNK_BYTES = 32 << 20
"""What the logits of one chunk may take: with less, the matrix products lose speed; the gradient
of the weight, which is as large as the weight, is read and written once per chunk."""


class Settings(NamedTuple):
    """What a chunk needs to know besides its tensors."""

    reduction: str
    ignore_index: int
    smoothing: float
    z_loss: float
    chunk_rows: int
    dtype: torch.dtype  # of the loss
    recorded: bool  # whether gradients may be asked for


class Chunked(torch.autograd.Function):
    """Losses chunk by chunk; their gradients are computed while the logits are there.

    Forward overwrites a chunk's logits with ``g = ∂l/∂z`` and adds up ``∂x = g W``, ``∂W = gᵀ x``
    and ``∂b = Σ g`` (Hsu et al. 2024, "Liger Kernel"); backward multiplies them by the scalar that
    arrives, and hands them over: a second pass through a graph that was retained visits the chunks
    again. So does ``reduction="none"``, where every row is scaled by a number of its own. A second
    derivative differentiates the formula written out over all rows, which also takes a batch of
    gradients. In float16, where a mean over many rows would leave most gradients zero, they are
    divided by the number of rows in backward alone, together with the scale of the loss.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        settings: Settings,
    ) -> tuple[Tensor, Tensor]:
        """The loss, and ``[2, N]``: losses and log-odds of the rows."""
        ctx.set_materialize_grads(False)
        ctx.settings, ctx.grads = settings, None
        ctx.save_for_backward(x, w, b, target, weight)
        scale = _scale(x, target, weight, settings)
        summed = settings.reduction != "none"
        needs = ctx.needs_input_grad[:3] if summed and settings.recorded else (False,) * 3
        ctx.late, factor = None, scale
        if x.dtype is torch.float16 and any(needs):
            ctx.late = scale.masked_fill((target == settings.ignore_index).all(), 0)
            factor = torch.ones_like(scale)
        rows, grads = _visit(x, w, b, target, weight, factor, settings, needs)
        if any(needs):
            ctx.grads = grads if ctx.late is not None else _narrow(grads, w)
        loss = (rows[0].sum() * scale).to(settings.dtype) if summed else rows[0].to(settings.dtype)
        ctx.mark_non_differentiable(rows)
        return loss, rows

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        """Gradients of input, weight and bias."""
        if grad_loss is None:
            return (None,) * 6
        x, w, b, target, weight = ctx.saved_tensors
        settings, needs = ctx.settings, ctx.needs_input_grad[:3]
        grads, ctx.grads = ctx.grads, None
        batched = _are_functorch_transforms_active() or is_legacy_batchedtensor(grad_loss)
        if torch.is_grad_enabled() or batched:
            grads = _differentiable(grad_loss, x, w, b, target, weight, settings, needs)
        elif grads is None:
            scale = (wide(grad_loss) * _scale(x, target, weight, settings)).contiguous()
            grads = _narrow(_visit(x, w, b, target, weight, scale, settings, needs)[1], w)
        elif ctx.late is not None:
            factor = wide(grad_loss) * ctx.late
            grads = _narrow([None if g is None else wide(g) * factor for g in grads], w)
        else:
            for g in grads:
                if g is not None:
                    g.mul_(grad_loss)
        return *grads, None, None, None


def _narrow(grads: list[Tensor | None], w: Tensor) -> list[Tensor | None]:
    return [None if g is None else g.to(w.dtype) for g in grads]


def _differentiable(
    grad_loss: Tensor,
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    settings: Settings,
    needs: tuple[bool, ...],
) -> list[Tensor | None]:
    """The gradients as a graph of their own, for a second derivative."""
    reduction, ignore, smoothing, z_loss = settings[:4]
    wide_x, wide_w = wide(x), wide(w)
    z = F.linear(wide_x, wide_w, None if b is None else wide(b))
    p = z.softmax(1)
    g = residual(p, grad_loss, target, weight, ignore, reduction, smoothing)
    if z_loss:
        *_, own = index_rows(grad_loss, target, weight, ignore, reduction, 1)
        g = g + 2 * z_loss * own * z.logsumexp(1, keepdim=True) * p
    return [
        (g @ wide_w).to(x.dtype) if needs[0] else None,
        (g.t() @ wide_x).to(w.dtype) if needs[1] else None,
        g.sum(0).to(w.dtype) if needs[2] else None,
    ]


def _scale(x: Tensor, target: Tensor, weight: Tensor | None, settings: Settings) -> Tensor:
    """What every row's loss is multiplied by on its way into the result."""
    one = wide(x).new_ones(())
    if settings.reduction != "mean":
        return one
    there = target != settings.ignore_index
    if weight is None:
        return one / there.sum()
    own = wide(weight)[target.clamp(0, len(weight) - 1)]
    return one / own.masked_fill(~there, 0).sum()


def _visit(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    scale: Tensor,
    settings: Settings,
    needs: tuple[bool, ...],
) -> tuple[Tensor, list[Tensor | None]]:
    """Losses and log-odds of all rows, ``[2, N]``, and the gradients of x, w and b asked for.

    The gradients are those of ``Σ scale · loss``.
    """
    count, step = x.shape[0], settings.chunk_rows
    losses = settings.ignore_index, settings.smoothing, settings.z_loss
    rows = x.new_empty((2, count), dtype=scale.dtype)
    buffer = x.new_empty((min(step, count), w.shape[0]))
    sums = _Sums(x, w, b, needs)
    for begin in range(0, count, step):
        end = min(begin + step, count)
        chunk, z = x[begin:end], buffer[: end - begin]
        if b is None:
            torch.mm(chunk, w.t(), out=z)
        else:
            torch.addmm(b, chunk, w.t(), out=z)
        if not any(needs):
            found = kernels.cross_entropy(z, target[begin:end], weight, "none", *losses)[1]
        else:
            part = scale[begin:end] if scale.dim() else scale
            found = kernels.cross_entropy_in_place(z, part, target[begin:end], weight, *losses)
            sums.add(begin, end, z)
        rows[:, begin:end] = found
    return rows, sums.results()


class _Sums:
    """Gradients that grow chunk by chunk; short dtypes add up the weight's in float32."""

    def __init__(self, x: Tensor, w: Tensor, b: Tensor | None, needs: tuple[bool, ...]) -> None:
        self.x, self.w = x, w
        self.of_x = torch.empty_like(x) if needs[0] else None
        self.of_w = torch.zeros_like(w, dtype=wide(w[:0]).dtype) if needs[1] else None
        self.of_b = wide(w.new_zeros(len(w))) if needs[2] and b is not None else None

    def add(self, begin: int, end: int, g: Tensor) -> None:
        """Rows ``begin`` to ``end``, whose logits have the gradient ``g``."""
        if self.of_x is not None:
            torch.mm(g, self.w, out=self.of_x[begin:end])
        if self.of_w is not None:
            if self.of_w.dtype == g.dtype:
                self.of_w.addmm_(g.t(), self.x[begin:end])
            else:
                self.of_w += g.t() @ self.x[begin:end]
        if self.of_b is not None:
            self.of_b += g.sum(0, dtype=self.of_b.dtype)

    def results(self) -> list[Tensor | None]:
        """The gradients of x, in its dtype, and of w and b, in that of sums."""
        return [self.of_x, self.of_w, self.of_b]


def composed(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    """The loss by the ops it is made of, and the logits."""
    z = linear(x, w, b)
    options: Any = {"ignore_index": settings.ignore_index, "label_smoothing": settings.smoothing}
    if not settings.z_loss:
        return cross_entropy(z, target, weight, reduction=settings.reduction, **options), z
    index = not target.is_floating_point()
    rows = cross_entropy(z, target, weight, reduction="none", **options)
    target = target.long() if index else target  # bytes would wrap ignore_index around
    there = (target != settings.ignore_index) if index else torch.ones_like(rows, dtype=torch.bool)
    own = there.to(rows.dtype)
    if weight is not None and index:
        own = own * weight.to(rows.dtype)[target.masked_fill(~there, 0)]
    lse = logsumexp(wide(z), class_dim(z)).to(rows.dtype)
    rows = rows + mul(square(lse), own * settings.z_loss)
    if settings.reduction == "none":
        return rows, z
    return rows.sum() / own.sum() if settings.reduction == "mean" else rows.sum(), z


def chunk_rows(input: Tensor, classes: int, options: Any) -> int:
    """Rows of a chunk: as the options say, or as many as ``CHUNK_BYTES`` of logits hold."""
    if getattr(options, "batch_chunk_size", None) is not None:
        return int(options.batch_chunk_size)
    return max(1, CHUNK_BYTES // max(1, classes * input.element_size()))


def can_chunk(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    settings: Settings,
) -> bool:
    """Whether the chunked path takes them: plain tensors, and nothing but autograd around."""
    given = [t for t in (x, w, b, weight) if t is not None]
    if (
        is_compiling()
        or _is_watched(*given, target)
        or _are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or not (can_fuse(*cast_for_chunks(*given)) and is_plain(target))
    ):
        return False
    return (
        target.dtype is torch.int64
        and target.shape == x.shape[:1]
        and w.shape[0] > 0
        and (weight is None or (weight.shape == w.shape[:1] and not weight.requires_grad))
        and settings.reduction in kernels.REDUCTIONS
        and 0 <= settings.smoothing <= 1
    )


def _is_watched(*tensors: Tensor) -> bool:
    """Whether a subclass or a mode wants to see the ops; that of the default device does not."""
    if not has_torch_function(tensors):
        return False
    modes = _get_current_function_mode_stack()
    return not is_plain(*tensors) or any(type(m) is not DeviceContext for m in modes)


def cast_for_chunks(*tensors: Tensor | None) -> tuple[Any, ...]:
    """As autocast would have the matrix product: its loss stays that of the kernel, in float32."""
    device = next(t for t in tensors if t is not None).device.type
    if not _is_any_autocast_enabled() or not torch.is_autocast_enabled(device):
        return tensors
    short = torch.get_autocast_dtype(device)
    return tuple(
        t.to(short)
        if t is not None and t.is_floating_point() and t.dtype is not torch.float64
        else t
        for t in tensors
    )
