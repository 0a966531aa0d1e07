"""Connectionist temporal classification (Graves et al. 2006)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchbp.ops.base import Op
from torchbp.ops.loss import FROM_THE_HEAD, check_reduction, reduced
from torchbp.ops.registry import Maker, Sample, register, sample
from torchbp.ops.softmax import log_mean, sato_vartia

Lengths = Tensor | Sequence[int]


class CTC(Op):
    """``l_n = -log Σ_paths Π_t exp(x_{t, path_t})`` over the paths that spell target n.

    With the target's labels set between blanks, ``α_t(s) = x_t(s) + log Σ_k exp α_{t-1}(s - k)``
    where k is 0, 1 or, from one label to a different one, 2 (Graves et al. 2006, eq. 6-8).

    Backward: the share of the paths that pass ``(t, s)``, their eq. 14, comes from the recursion
    backwards: ``γ_{t-1}(s) = Σ_k γ_t(s + k) w_t(s + k, k)``, where w are the softmaxes of what the
    sums of α add. ``∂x_t = exp(x_t) - Σ_s γ_t(s) [label s]``: as in torch, of all gradients that
    agree on normalised log-probabilities this is the one after the softmax (eq. 16).
    Secant: the same with Sato-Vartia weights between the two runs in place of the softmaxes, and
    the logarithmic mean in place of ``exp(x)``; exact between normalised log-probabilities.
    """

    autocast = {"cpu": "fp32"}
    no_relevance = FROM_THE_HEAD

    @staticmethod
    def forward(
        x: Tensor,
        targets: Tensor,
        input_lengths: Lengths,
        target_lengths: Lengths,
        blank: int,
        zero_infinity: bool,
        reduction: str,
    ) -> tuple[Tensor, Tensor]:
        # torch (seen in 2.13) misreads concatenated targets that have gaps in memory.
        ctc: Any = torch._ctc_loss
        labels = targets.contiguous()
        loss, alpha = ctc(x, labels, input_lengths, target_lengths, blank, zero_infinity)
        if zero_infinity:
            loss = loss.masked_fill(loss == torch.inf, 0)
        if reduction == "mean":
            loss = loss / torch.as_tensor(target_lengths).to(loss).clamp(min=1)
        return reduced(loss, reduction), alpha

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, targets, *ctx.lengths, ctx.blank, ctx.zero_infinity, ctx.reduction = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, targets, output[1])
        ctx.save_for_forward(x, targets, output[1])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * 7
        x, targets, alpha = ctx.saved_tensors
        lattice = _Lattice(x, targets, ctx.lengths, ctx.blank, alpha.shape[-1])
        if torch.is_grad_enabled():  # the saved one is a constant to autograd
            alpha = lattice.alpha(x)
        shares, possible = lattice.shares(alpha, alpha)
        v = lattice.per_sample(grad_output, ctx.reduction)
        v = v.masked_fill(~possible, 0 if ctx.zero_infinity else torch.nan)
        return lattice.within((x.exp() - shares) * v[:, None]), *(None,) * 6

    @staticmethod
    def jvp(ctx: Any, tx: Tensor, *_: Any) -> tuple[Tensor, None]:
        x, targets, alpha = ctx.saved_tensors
        lattice = _Lattice(x, targets, ctx.lengths, ctx.blank, alpha.shape[-1])
        alpha = lattice.alpha(x)
        shares, possible = lattice.shares(alpha, alpha)
        tangent = -(shares * tx).sum((0, 2))
        if ctx.zero_infinity:
            tangent = tangent.masked_fill(~possible, 0)
        if ctx.reduction == "mean":
            tangent = tangent / lattice.target_lengths.clamp(min=1)
        return reduced(tangent, ctx.reduction), None

    @staticmethod
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        (x, targets, *lengths, blank, _, reduction), x0 = args, args0[0]
        lattice = _Lattice(x, targets, lengths, blank, output[1].shape[-1])
        shares, possible = lattice.shares(lattice.alpha(x), lattice.alpha(x0))
        v = lattice.per_sample(multiplier, reduction).masked_fill(~possible, 0)
        return lattice.within((log_mean(x, x0) - shares) * v[:, None]), *(None,) * 6


class _Lattice:
    """States of a batch: the labels of every target between blanks, and the ways between them."""

    def __init__(
        self,
        x: Tensor,
        targets: Tensor,
        lengths: Sequence[Lengths],
        blank: int,
        states: int,
    ) -> None:
        self.shape, device = x.shape, x.device
        self.input_lengths, self.target_lengths = (
            torch.as_tensor(n, device=device).to(torch.long) for n in lengths
        )
        place = torch.arange(states // 2, device=device)
        if targets.dim() == 1:  # one after the other
            ends = self.target_lengths.cumsum(0)
            index = (ends - self.target_lengths)[:, None] + place
            labels = targets[index.clamp(max=max(targets.shape[0] - 1, 0))]
        else:
            labels = targets[:, : states // 2]
        labels = torch.where(place < self.target_lengths[:, None], labels.long(), blank)
        blanks = torch.full_like(labels, blank)
        ends_with = torch.full((x.shape[1], 1), blank, device=device)
        #: ``(N, S)``, the label of every state.
        self.labels = torch.cat([torch.stack([blanks, labels], -1).flatten(1), ends_with], 1)
        self.exists = torch.arange(states, device=device) <= 2 * self.target_lengths[:, None]
        self.floor = torch.finfo(x.dtype).min / 8  # in place of -inf, which has no derivative
        # From two states before one may come only from a label, to a different one.
        before = F.pad(self.labels, (2, 0), value=blank)[:, :states]
        self.barred = (self.labels == before).to(x.dtype) * self.floor
        time = torch.arange(x.shape[0], device=device)[:, None]
        self.inside, self.last = time < self.input_lengths, time == self.input_lengths - 1

    def within(self, values: Tensor) -> Tensor:
        """``(T, N, C)`` with zeros beyond the input lengths."""
        return torch.where(self.inside[:, :, None], values, 0)

    def per_sample(self, multiplier: Tensor, reduction: str) -> Tensor:
        """The multiplier of every sample's loss ``(N,)``, given that of the reduced one."""
        if reduction == "mean":
            return multiplier / (self.target_lengths.clamp(min=1) * max(self.shape[1], 1))
        return multiplier.expand(self.shape[1])

    def alpha(self, x: Tensor) -> Tensor:
        """``(N, T, S)``, logarithms of the sums over all beginnings of paths."""
        at = x.gather(2, self.labels.expand(x.shape[0], -1, -1))
        first = torch.arange(self.labels.shape[1], device=x.device) < 2
        rows = [torch.where(first & self.exists, at[0], self.floor).clamp(min=self.floor)]
        for t in range(1, x.shape[0]):
            total = (at[t] + self._ways(rows[-1]).logsumexp(0)).clamp(min=self.floor)
            rows.append(torch.where(self.exists, total, self.floor))
        return torch.stack(rows, 1)

    def _ways(self, alpha: Tensor) -> Tensor:
        """``(3, ..., S)``: for every state what comes from two before, one before and itself."""
        before, states = F.pad(alpha, (2, 0), value=self.floor), alpha.shape[-1]
        barred = self.barred if alpha.dim() == 2 else self.barred[:, None]
        return torch.stack([before[..., :states] + barred, before[..., 1:-1], alpha])

    def shares(self, alpha: Tensor, alpha0: Tensor) -> tuple[Tensor, Tensor]:
        """What part of the paths passes each label at each time ``(T, N, C)``, between two runs.

        Also whether there are any paths ``(N,)``.
        """
        same = alpha is alpha0
        alpha = self._finite(alpha)
        alpha0 = alpha if same else self._finite(alpha0)
        ends = self._ends(alpha)
        ends0 = ends if same else self._ends(alpha0)
        share = _mean_softmax(ends, ends0, -1)
        place = torch.arange(alpha.shape[-1], device=alpha.device)
        final = 2 * self.target_lengths[:, None]
        end = (place == final) * share[:, 1:] + (place == final - 1) * share[:, :1]
        ways = self._ways(alpha[:, :-1])
        two, one, stay = _mean_softmax(ways, ways if same else self._ways(alpha0[:, :-1]), 0)
        # To each state from the ones that it leads to.
        one, two = F.pad(one, (0, 1))[..., 1:], F.pad(two, (0, 2))[..., 2:]
        *starts, row = (end * self.last[:, :, None]).unbind(0)
        rows = [row]
        for t in range(len(starts) - 1, -1, -1):
            after = F.pad(rows[-1], (0, 2))
            row = torch.addcmul(starts[t], rows[-1], stay[:, t])
            row = torch.addcmul(row, after[:, 1:-1], one[:, t])
            rows.append(torch.addcmul(row, after[:, 2:], two[:, t]))
        passed = torch.stack(rows[::-1])
        index = self.labels.expand(self.shape[0], -1, -1)
        possible = (ends.amax(-1) > self.floor / 2) & (ends0.amax(-1) > self.floor / 2)
        return passed.new_zeros(self.shape).scatter_add(2, index, passed), possible

    def _finite(self, alpha: Tensor) -> Tensor:
        # Where there is no state torch leaves what was in memory.
        real = self.exists[:, None] & self.inside.T[:, :, None] & (alpha > self.floor)
        return torch.where(real, alpha, self.floor)

    def _ends(self, alpha: Tensor) -> Tensor:
        """``(N, 2)``: α of the last label and of the blank after it, at the last time."""
        time = (self.input_lengths - 1).clamp(min=0)[:, None, None]
        last = alpha.gather(1, time.expand(-1, 1, alpha.shape[2])).squeeze(1)
        final = 2 * self.target_lengths[:, None]
        label = last.gather(1, (final - 1).clamp(min=0))
        label = torch.where(final > 0, label, self.floor)
        return torch.cat([label, last.gather(1, final)], 1)


def _mean_softmax(logits: Tensor, logits0: Tensor, dim: int) -> Tensor:
    """Softmax, or the Sato-Vartia distribution between two runs."""
    return logits.softmax(dim) if logits is logits0 else sato_vartia(logits, logits0, dim)


def _ctc_samples(make: Maker) -> Iterator[Sample]:
    def normalised(*shape: int) -> Tensor:
        return make(*shape).detach().log_softmax(-1).requires_grad_(make.requires_grad)

    padded = torch.tensor([[1, 1, 2], [3, 1, 0]], device=make.device)
    for reduction in ("none", "sum", "mean"):
        yield sample(normalised(6, 2, 4), padded, (6, 5), (3, 2), reduction=reduction)
    flat = torch.tensor([0, 2, 2, 0, 1], device=make.device)
    yield sample(normalised(5, 3, 4), flat, (5, 4, 5), (3, 0, 2), 3)
    # No path spells three labels in two steps.
    yield sample(normalised(5, 2, 4), padded, (5, 2), (3, 3), zero_infinity=True)
    yield sample(normalised(4, 3), flat[1:3] - 1, (4,), (2,), reduction="none")


@register(F.ctc_loss, replaces=[torch.ctc_loss], modules=[nn.CTCLoss], samples=_ctc_samples)
def ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Lengths,
    target_lengths: Lengths,
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    """Connectionist temporal classification, as :func:`torch.nn.functional.ctc_loss`.

    Args:
        log_probs: normalised log-probabilities ``(T, N, C)`` or ``(T, C)``.
        targets: labels ``(N, S)``, padded, or those of all samples one after the other.
        input_lengths: ``(N,)``, each at most T.
        target_lengths: ``(N,)``.
        blank: index of the blank.
        reduction: ``"none"``, ``"mean"`` (of the losses over the target lengths) or ``"sum"``.
        zero_infinity: take zero where no path spells the target.

    Returns:
        A scalar, or the losses ``(N,)`` (``()`` without a batch) for ``reduction="none"``.

    Raises:
        RuntimeError: if shapes, lengths, labels or dtypes do not fit.
        ValueError: for an unknown reduction.
    """
    check_reduction("ctc_loss", reduction)
    lengths = [tuple(n) if isinstance(n, list) else n for n in (input_lengths, target_lengths)]
    rest = (blank, zero_infinity, reduction)
    if log_probs.dim() != 2:
        loss: Tensor = CTC.call(log_probs, targets, *lengths, *rest)[0]
        return loss
    lengths = [n.reshape(1) if isinstance(n, Tensor) else n for n in lengths]
    loss = CTC.call(log_probs.unsqueeze(1), targets.unsqueeze(0), *lengths, *rest)[0]
    return loss.squeeze(0) if reduction == "none" else loss
