"""Bags of rows of a look-up table, reduced to one row each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchbp.ops.base import Op, add_tangents, midpoint, wide
from torchbp.ops.embedding import rows_summed
from torchbp.ops.registry import Maker, Sample, register, sample
from torchbp.ops.relevance import Rule, quotient

_REST = (None,) * 5


class _Bags:
    """Which positions lie in which bag.

    Args:
        indices: ``(n,)`` cut up by ``offsets``, or ``(bags, n)``.
        offsets: where each bag starts; with ``include_last`` also where the last one ends.
        include_last: see there.
        padding_idx: an index that counts for nothing.
        size: how many rows the table has.
    """

    def __init__(
        self,
        indices: Tensor,
        offsets: Tensor | None,
        include_last: bool,
        padding_idx: int | None,
        size: int,
    ) -> None:
        self.flat = indices.reshape(indices.numel())
        if offsets is None:
            self.count, each = indices.shape
            first = torch.arange(self.count, device=indices.device)[:, None]
            self.bag = first.expand(self.count, each).reshape(self.count * each)
        else:
            starts = offsets[:-1] if include_last else offsets
            self.count = starts.shape[0]
            at = torch.arange(self.flat.shape[0], dtype=offsets.dtype, device=offsets.device)
            self.bag = torch.searchsorted(starts.contiguous(), at, right=True) - 1
        self.padding_idx = -1 if padding_idx is None else padding_idx % max(size, 1)

    def counts(self) -> Tensor:
        """Which positions hold something else than padding."""
        return self.flat != self.padding_idx

    def sizes(self, like: Tensor) -> Tensor:
        """``(bags, 1)``: how many indices of each bag count."""
        ones = wide(self.counts().to(like.dtype))
        return ones.new_zeros(self.count).index_add_(0, self.bag, ones)[:, None]


class EmbeddingBag(Op):
    """``y[b] = Σ s_p W[i_p]`` over the positions p of bag b, or their mean (then s = 1).

    Backward: ``∂W[v] = Σ s_p g[b_p]`` over the positions that looked v up (divided by the bag's
    size), ``∂s_p = <g[b_p], W[i_p]>``. Secant: bilinear in (W, s), so each is weighted by the
    other's midpoint; indices that differ between the runs as in
    :class:`torchbp.ops.embedding.Embedding`. LRP: to the rows, in proportion to what they added.
    """

    @staticmethod
    def forward(
        indices: Tensor,
        weight: Tensor,
        offsets: Tensor | None,
        scales: Tensor | None,
        mode: str,
        by_frequency: bool,
        sparse: bool,
        include_last: bool,
        padding_idx: int | None,
    ) -> Tensor:
        return F.embedding_bag(
            indices, weight, offsets, None, 2.0, by_frequency, mode, sparse, scales, include_last,
            padding_idx,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        indices, weight, offsets, scales, *ctx.settings = inputs
        table = weight if scales is not None else None
        ctx.save_for_backward(indices, offsets, scales, table)
        ctx.save_for_forward(indices, offsets, scales, table)
        ctx.size = weight.shape[0]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        indices, offsets, scales, weight = ctx.saved_tensors
        _, needs_weight, _, needs_scales, *_ = ctx.needs_input_grad
        per_position = _PerPosition(grad_output, indices, offsets, ctx.size, ctx.settings)
        of_weight = per_position.of_weight(scales) if needs_weight else None
        return (
            None,
            of_weight,
            None,
            per_position.of_scales(weight) if needs_scales else None,
            *_REST,
        )

    @staticmethod
    def jvp(
        ctx: Any, _: Any, tw: Tensor | None, __: Any, ts: Tensor | None, *___: Any
    ) -> Tensor | None:
        indices, offsets, scales, weight = ctx.saved_tensors
        forward = EmbeddingBag.forward
        return add_tangents(
            None if tw is None else forward(indices, tw, offsets, scales, *ctx.settings),
            None if ts is None else forward(indices, weight, offsets, ts, *ctx.settings),
        )

    @staticmethod
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        (_, weight, _, scales, *settings), (_, weight0, _, scales0, *_) = args, args0
        scales = None if scales is None else midpoint(scales, scales0)
        weight = midpoint(weight, weight0)
        settings[1:3] = False, False  # not by frequency, and dense
        shares = []
        for indices, _, offsets, *_ in (args, args0):
            per_position = _PerPosition(multiplier, indices, offsets, len(weight), settings)
            of_scales = None if scales is None else per_position.of_scales(weight)
            shares.append((per_position.of_weight(scales), of_scales))
        (of_weight, of_scales), (of_weight0, of_scales0) = shares
        if of_scales is not None:
            of_scales = midpoint(of_scales, of_scales0)
        return None, midpoint(of_weight, of_weight0), None, of_scales, *_REST

    @classmethod
    def relevance(
        cls, relevance: Tensor, rule: Rule, args: tuple[Any, ...], output: Any
    ) -> tuple[Tensor | None, ...]:
        indices, weight, offsets, scales, mode, _, _, *rest = args
        s = quotient(relevance, output, rule.epsilon)
        settings = (mode, False, False, *rest)
        back = _PerPosition(s, indices, offsets, len(weight), settings).of_weight(scales)
        return None, weight * back, None, None, *_REST


class _PerPosition:
    """The error of every position of every bag."""

    def __init__(
        self, g: Tensor, indices: Tensor, offsets: Tensor | None, size: int, settings: Any
    ) -> None:
        mode, self.by_frequency, self.sparse, include_last, self.padding_idx = settings
        self.size, self.shape = size, indices.shape
        self.bags = _Bags(indices, offsets, include_last, self.padding_idx, size)
        if mode == "mean":
            g = (g / self.bags.sizes(g).clamp(min=1)).to(g.dtype)
        self.rows = g.index_select(0, self.bags.bag)

    def of_weight(self, scales: Tensor | None) -> Tensor:
        rows = self.rows
        if scales is not None:
            rows = rows * scales.reshape(rows.shape[0], 1)
        return rows_summed(
            rows, self.bags.flat, self.size, self.padding_idx, self.by_frequency, self.sparse
        )

    def of_scales(self, weight: Tensor) -> Tensor:
        products = (self.rows * weight.index_select(0, self.bags.flat)).sum(-1)
        return torch.where(self.bags.counts(), products, 0).reshape(self.shape)


class EmbeddingBagMax(Op):
    """``y[b] = max W[i_p]`` over bag b, feature by feature; the second output names the rows.

    Backward: g goes to the row that gave the maximum. Secant: a maximum that moves from row v₀ to
    row v splits its multiplier as in :class:`torchbp.ops.max_pool.MaxPool2d`. LRP: to that row.
    """

    @staticmethod
    def forward(
        indices: Tensor,
        weight: Tensor,
        offsets: Tensor | None,
        include_last: bool,
        padding_idx: int | None,
    ) -> tuple[Tensor, Tensor]:
        if offsets is None:
            count, each = indices.shape
            offsets = torch.arange(count, dtype=indices.dtype, device=indices.device) * each
            indices, include_last = indices.reshape(count * each), False
        y, _, _, rows = torch.embedding_bag(
            weight, indices, offsets, False, 2, False, None, include_last, padding_idx
        )
        return y, rows

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        indices, weight, offsets, *ctx.settings = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(indices, offsets, output[1])
        ctx.save_for_forward(indices, offsets, output[1])
        ctx.size = weight.shape[0]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * 5
        indices, offsets, rows = ctx.saved_tensors
        filled = _filled(grad_output, indices, offsets, ctx.size, ctx.settings)
        return None, _scattered(grad_output * filled, rows, ctx.size), None, None, None

    @staticmethod
    def jvp(ctx: Any, _: Any, tw: Tensor | None, *__: Any) -> tuple[Tensor | None, None]:
        indices, offsets, rows = ctx.saved_tensors
        if tw is None:
            return None, None
        return _picked(tw, rows) * _filled(tw, indices, offsets, ctx.size, ctx.settings), None

    @staticmethod
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        (y, rows), (y0, rows0) = output, output0
        indices, weight, offsets, *settings = args
        weight0, size = args0[1], len(weight)
        multiplier = multiplier * _filled(multiplier, indices, offsets, size, settings)
        a, b = y - _picked(weight, rows0), y0 - _picked(weight0, rows)
        total = a + b
        share = torch.where(total > 0, a / total, 0.5)
        routed = _scattered(multiplier * share, rows, size)
        return None, routed + _scattered(multiplier * (1 - share), rows0, size), None, None, None

    @classmethod
    def relevance(
        cls, relevance: Tensor, rule: Rule, args: tuple[Any, ...], output: Any
    ) -> tuple[Tensor | None, ...]:
        indices, weight, offsets, *settings = args
        filled = _filled(relevance, indices, offsets, len(weight), settings)
        return None, _scattered(relevance * filled, output[1], len(weight)), None, None, None


def _filled(like: Tensor, indices: Tensor, offsets: Any, size: int, settings: Any) -> Tensor:
    """``(bags, 1)``: one for a bag with something in it; torch gives empty ones zeros."""
    return (_Bags(indices, offsets, settings[0], settings[1], size).sizes(like) > 0).to(like.dtype)


def _picked(weight: Tensor, rows: Tensor) -> Tensor:
    return weight.gather(0, rows.long().clamp(min=0))


def _scattered(values: Tensor, rows: Tensor, size: int) -> Tensor:
    total = values.new_zeros(size, values.shape[-1])
    return total.scatter_add_(0, rows.long().clamp(min=0), values)


def _samples(make: Maker) -> Iterator[Sample]:
    offsets = torch.tensor([0, 2, 2])
    yield sample(make.integers(4, 2, 3), make(4, 3), mode="sum")
    yield sample(make.integers(4, 5), make(4, 2), offsets)
    yield sample(make.integers(3, 5), make(4, 2), offsets, mode="sum", padding_idx=3)
    yield sample(torch.tensor([2, 0, 1]), make(4, 2), offsets, scale_grad_by_freq=True)
    yield sample(make.integers(4, 2, 3), make(4, 2), mode="sum", per_sample_weights=make(2, 3))
    last = torch.tensor([0, 2, 5])
    yield sample(make.integers(4, 5), make(4, 2), last, mode="mean", include_last_offset=True)
    yield sample(make.integers(4, 5), make(4, 2), offsets, mode="max")
    yield sample(make.integers(4, 2, 3), make(4, 2), mode="max")
    yield sample(make.integers(4, 0, 3), make(4, 2), mode="sum")


@register(F.embedding_bag, modules=[nn.EmbeddingBag], samples=_samples)
def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Sums, means or maxima of rows, as :func:`torch.nn.functional.embedding_bag`.

    Args:
        input: indices, ``(bags, n)``, or ``(n,)`` cut up by ``offsets``.
        weight: ``(rows, d)``.
        offsets: where each bag starts.
        max_norm: rows that are looked up and longer than this are shortened to it, in place.
        norm_type: the p of that norm.
        scale_grad_by_freq: divide a row's gradient by how often it was looked up.
        mode: ``"sum"``, ``"mean"`` or ``"max"``.
        sparse: make the gradient a sparse tensor.
        per_sample_weights: factors of the rows, like ``input``; for ``"sum"``.
        include_last_offset: the last offset is where the last bag ends.
        padding_idx: an index that counts for nothing.

    Returns:
        ``(bags, d)``.

    Raises:
        ValueError: for shapes or a mode that do not go together.
        NotImplementedError: for factors in another mode than ``"sum"``.
    """
    settings = scale_grad_by_freq, sparse, include_last_offset, padding_idx
    if max_norm is not None:
        with torch.no_grad():
            F.embedding_bag(
                input, weight.detach(), offsets, max_norm, norm_type, scale_grad_by_freq, mode,
                sparse, per_sample_weights, include_last_offset, padding_idx,
            )  # fmt: skip
    if mode == "max" and per_sample_weights is None and not scale_grad_by_freq and not sparse:
        flat = input.dim() == 1 and offsets is not None and offsets.dim() == 1
        if weight.dim() == 2 and (flat or (input.dim() == 2 and offsets is None)):
            last = include_last_offset and flat
            return EmbeddingBagMax.call(input, weight, offsets, last, padding_idx)[0]
    return EmbeddingBag.call(input, weight, offsets, per_sample_weights, mode, *settings)
