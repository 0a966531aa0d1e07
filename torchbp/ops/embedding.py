"""Look-up tables: rows of a weight, one by one or reduced in bags."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchbp.ops.base import Op, midpoint, wide
from torchbp.ops.registry import Maker, Sample, register, sample
from torchbp.ops.relevance import Rule
from torchbp.ops.sample_factors import Factors, Lookup


class Embedding(Op):
    """``y = W[i]``.

    Backward: ``∂W[v] = Σ g`` over the positions that looked up v, as a dense or a sparse tensor;
    torch withholds the gradient of the padding row, and by frequency turns the sum into a mean.
    Secant: the sum over all positions, for it must be conserved; if the runs looked up different
    rows, half of it goes to each run's rows, and what the change of the indices did is nobody's.
    LRP: the indices carry no signal, so the relevance goes to the rows that were looked up.
    """

    @staticmethod
    def forward(
        indices: Tensor, weight: Tensor, padding_idx: int | None, by_frequency: bool, sparse: bool
    ) -> Tensor:
        return F.embedding(indices, weight, padding_idx, None, 2.0, by_frequency, sparse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        indices, weight, *ctx.settings = inputs
        ctx.save_for_backward(indices)
        ctx.save_for_forward(indices)
        ctx.size = weight.shape[0]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (indices,) = ctx.saved_tensors
        return None, rows_summed(grad_output, indices, ctx.size, *ctx.settings), None, None, None

    @staticmethod
    def jvp(ctx: Any, _: Any, tw: Tensor | None, *__: Any) -> Tensor | None:
        (indices,) = ctx.saved_tensors
        return None if tw is None else F.embedding(indices, tw)

    @staticmethod
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        (indices, weight, *_), indices0 = args, args0[0]
        both = (indices,) if indices is indices0 else (indices, indices0)
        shares = [rows_summed(multiplier, i, weight.shape[0]) for i in both]
        return None, midpoint(shares[0], shares[-1]), None, None, None

    @staticmethod
    def sample_factors(grad_output: Tensor, args: tuple[Any, ...], output: Any) -> Factors:
        indices, weight, padding_idx, by_frequency, _ = args
        if by_frequency:
            counts = _frequencies(indices.flatten(), weight.shape[0], grad_output)
            grad_output = grad_output / counts.view(*indices.shape, 1)
        kept = torch.ones_like(indices, dtype=torch.bool)
        if padding_idx is not None:
            kept = indices != padding_idx % weight.shape[0]
        return None, Lookup(grad_output, indices, weight, kept), None, None, None

    @classmethod
    def relevance(
        cls, relevance: Tensor, rule: Rule, args: tuple[Any, ...], output: Any
    ) -> tuple[Tensor | None, ...]:
        return None, rows_summed(relevance, args[0], args[1].shape[0]), None, None, None


def rows_summed(
    g: Tensor,
    indices: Tensor,
    size: int,
    padding_idx: int | None = None,
    by_frequency: bool = False,
    sparse: bool = False,
) -> Tensor:
    """The transpose of a look-up.

    Args:
        g: ``(*indices.shape, d)``.
        indices: which rows were looked up.
        size: how many rows there are.
        padding_idx: a row that receives nothing.
        by_frequency: divide by how often a row was looked up.
        sparse: return a sparse tensor.

    Returns:
        ``(size, d)``.

    Raises:
        RuntimeError: if ``by_frequency`` and ``sparse`` are both asked for, as torch does.
    """
    flat = indices.reshape(indices.numel())
    rows = g.reshape(indices.numel(), g.shape[-1])
    if padding_idx is not None and padding_idx < 0:
        padding_idx += size
    if sparse:
        if by_frequency:
            raise RuntimeError("embedding: scale_grad_by_freq does not go with sparse gradients")
        if padding_idx is not None:
            kept = flat != padding_idx
            flat, rows = flat[kept], rows[kept]
        shape = (size, rows.shape[-1])
        return torch.sparse_coo_tensor(flat[None], rows, shape, check_invariants=False)
    rows = wide(rows)
    if by_frequency:
        rows = rows / _frequencies(flat, size, rows)[:, None]
    total = rows.new_zeros(size, rows.shape[-1]).index_add_(0, flat, rows)
    if padding_idx is not None:
        total.select(0, padding_idx).zero_()
    return total.to(g.dtype)


def _frequencies(flat: Tensor, size: int, like: Tensor) -> Tensor:
    """How often what each position looked up was looked up."""
    ones = torch.ones(flat.shape, dtype=like.dtype, device=flat.device)
    return ones.new_zeros(size).index_add_(0, flat, ones).index_select(0, flat)


def _samples(make: Maker) -> Iterator[Sample]:
    yield sample(make.integers(4, 2, 3), make(4, 3))
    yield sample(make.integers(3, 3), make(4, 3), padding_idx=-1)
    yield sample(torch.tensor([2, 0, 1]), make(4, 2), padding_idx=3, scale_grad_by_freq=True)
    yield sample(make.integers(3), make(4, 2))
    yield sample(make.integers(3, 0, 2), make(4, 2))


@register(F.embedding, modules=[nn.Embedding], samples=_samples)
def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Look rows up, as :func:`torch.nn.functional.embedding`.

    Args:
        input: indices of any shape.
        weight: ``(rows, d)``.
        padding_idx: a row that receives no gradient.
        max_norm: rows that are looked up and longer than this are shortened to it, in place.
        norm_type: the p of that norm.
        scale_grad_by_freq: divide a row's gradient by how often it was looked up.
        sparse: make the gradient a sparse tensor.

    Returns:
        ``(*, d)``.

    Raises:
        IndexError: for an index out of range.
    """
    if max_norm is not None:
        with torch.no_grad():
            F.embedding(input, weight.detach(), padding_idx, max_norm, norm_type)
    return Embedding.call(input, weight, padding_idx, scale_grad_by_freq, sparse)
