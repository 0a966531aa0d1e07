"""Attention: settings, blocks, errors, LRP and what the blocked backward must not get wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import torchbp.functional as B
from torchbp.ops import attention_blocks
from torchbp.ops.arithmetic import MatMul
from torchbp.ops.attention import Attention
from torchbp.ops.linear import Add
from torchbp.ops.registry import Maker
from torchbp.ops.relevance import Rule
from torchbp.ops.softmax import Softmax


def inputs(*leading: int, length: int = 7, source: int = 7, width: int = 4) -> list[Tensor]:
    make = Maker()
    sizes = length, source, source
    return [make(*leading, size, width) for size in sizes]


def results(home: Any, tensors: list[Tensor], **settings: Any) -> list[Tensor]:
    torch.manual_seed(5)
    output = home.scaled_dot_product_attention(*tensors, **settings)
    errors = torch.rand(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    return [output, *torch.autograd.grad(output, tensors, errors)]


def same(ours: list[Tensor], theirs: list[Tensor], **tolerance: float) -> None:
    tolerance = tolerance or dict(rtol=1e-11, atol=1e-12)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def hidden(*shape: int) -> Tensor:
    """A mask that hides some keys, and all of them from one query."""
    allowed = torch.rand(shape, generator=torch.Generator().manual_seed(2)) > 0.3
    allowed[..., 1, :] = False
    return allowed


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": dict(scale=0.3),
    "negative scale": dict(scale=-0.5, dropout_p=0.2),
    "causal": dict(is_causal=True),
    "causal dropout": dict(is_causal=True, dropout_p=0.3),
    "dropout": dict(dropout_p=0.3),
    "all dropped": dict(dropout_p=1.0, is_causal=True),
    "boolean mask": dict(attn_mask=hidden(7, 7)),
    "mask for each sample": dict(attn_mask=hidden(3, 1, 7, 7)),
    "mask for each head": dict(attn_mask=hidden(2, 7, 7), dropout_p=0.2),
    "floating mask": dict(attn_mask=torch.randn(3, 2, 7, 7).double()),
    "mask for keys": dict(attn_mask=(torch.arange(7) < 5).expand(3, 1, 1, 7)),
}


@pytest.mark.parametrize("matrices", [1, 2, 3, 6, 100])
@pytest.mark.parametrize("name", SETTINGS)
def test_blocks_of_any_size_give_torchs_gradients(monkeypatch, name, matrices):
    monkeypatch.setattr(attention_blocks, "BLOCK_BYTES", matrices * 7 * 7 * 8)
    monkeypatch.setattr(attention_blocks, "CAUSAL_ROWS", 3)
    for tensors in (inputs(3, 2), [t.transpose(1, 2) for t in map(spread, inputs(3, 2))]):
        same(results(B, tensors, **SETTINGS[name]), results(F, tensors, **SETTINGS[name]))


def spread(tensor: Tensor) -> Tensor:
    """The same numbers with samples, positions, heads in this order in memory."""
    return tensor.detach().transpose(1, 2).contiguous().requires_grad_()


@pytest.mark.parametrize(("length", "source"), [(9, 4), (4, 9), (1, 9), (9, 1)])
def test_causal_rectangles(monkeypatch, length, source):
    monkeypatch.setattr(attention_blocks, "CAUSAL_ROWS", 3)
    for settings in (dict(is_causal=True), dict(is_causal=True, dropout_p=0.4)):
        tensors = inputs(2, 3, length=length, source=source)
        same(results(B, tensors, **settings), results(F, tensors, **settings))


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 3)])
def test_any_number_of_leading_dimensions(leading):
    tensors = inputs(*leading)
    same(results(B, tensors), results(F, tensors))


def test_leading_dimensions_broadcast():
    q, k, v = Maker()(2, 3, 5, 4), Maker()(1, 3, 6, 4), Maker()(3, 6, 2)
    same(results(B, [q, k, v]), results(F, [q, k, v]))


def test_a_floating_mask_that_learns():
    tensors, mask = inputs(2, 3), Maker()(2, 1, 7, 7)
    grads = []
    for home in (B, F):
        output = home.scaled_dot_product_attention(*tensors, attn_mask=mask)
        grads.append(torch.autograd.grad(output.sin().sum(), [*tensors, mask]))
    same(*grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_keeps_its_dtype(dtype):
    tensors = [t.detach().to(dtype).requires_grad_() for t in inputs(2, 3)]
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for settings in ({}, dict(is_causal=True), dict(attn_mask=hidden(7, 7))):
        ours, theirs = (results(home, tensors, **settings) for home in (B, F))
        assert [t.dtype for t in ours] == [dtype] * 4
        same(ours, theirs, rtol=tolerance, atol=tolerance)


def test_subclasses_are_not_cut_into_blocks():
    """DTensor knows none of the functions that write into a block, and hides behind this flag."""

    class Distributed(Tensor):
        __torch_function__ = torch._C._disabled_torch_function_impl

    q, k, v = (t.detach() for t in inputs(2))
    with torch.no_grad():
        assert attention_blocks.can_block(q, q, k, v)
        assert not attention_blocks.can_block(q, q, k.as_subclass(Distributed), v)


def test_memory_does_not_grow_with_the_number_of_heads():
    shape, blocks = (4, 8, 64, 4), []
    tensors = [torch.randn(shape, requires_grad=True) for _ in range(3)]

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            blocks.extend(t.numel() for t in [out] if isinstance(t, Tensor))
            return out

    output = B.scaled_dot_product_attention(*tensors)
    budget, attention_blocks.BLOCK_BYTES = attention_blocks.BLOCK_BYTES, 4 * 64 * 64 * 2
    try:
        with Largest():
            output.backward(torch.ones_like(output))
    finally:
        attention_blocks.BLOCK_BYTES = budget
    assert max(blocks) <= output.numel() < 4 * 8 * 64 * 64


@pytest.mark.parametrize(
    ("shapes", "settings"),
    [
        ([(2, 3, 4), (2, 3, 5), (2, 3, 5)], {}),
        ([(4,), (4,), (4,)], {}),
        ([(2, 3, 4)] * 3, dict(is_causal=True, attn_mask=torch.ones(3, 3, dtype=torch.bool))),
        ([(2, 3, 4)] * 3, dict(attn_mask=torch.ones(5, 5, dtype=torch.bool))),
        ([(2, 3, 4)] * 3, dict(attn_mask=torch.ones(3, 3, dtype=torch.int64))),
        ([(2, 3, 4)] * 3, dict(dropout_p=1.5)),
        ([(2, 3, 4)] * 3, dict(dropout_p=0.5, is_causal=True, attn_mask=torch.ones(3, 3) > 0)),
        ([(2, 3, 4), (2, 3, 5), (2, 3, 5)], dict(dropout_p=0.5)),
        ([(2, 3, 4, 4), (2, 2, 4, 4), (2, 2, 4, 4)], dict(enable_gqa=True)),
        ([(2, 3, 4, 4), (2, 2, 4, 4), (2, 2, 4, 4)], dict(enable_gqa=True, dropout_p=0.5)),
    ],
)
def test_what_torch_refuses_is_refused(shapes, settings):
    tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
    kinds = []
    for home in (F, B):
        with pytest.raises(Exception) as caught:
            home.scaled_dot_product_attention(*tensors, **settings)
        kinds.append(caught.type)
    assert kinds[0] is kinds[1]


def composed_relevance(
    relevance: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor
) -> list[Tensor | None]:
    """The rules of product, sum and softmax one after the other."""
    rule = Rule(epsilon=1e-12)
    scores = q @ k.mT
    logits = scores + mask
    p = logits.softmax(-1)
    of_p, of_v = MatMul.relevance(relevance, rule, (p, v), p @ v)
    of_logits = Softmax.relevance(of_p, rule, (logits, -1, None), p)[0]
    of_scores, of_mask, _ = Add.relevance(of_logits, rule, (scores, mask, 1), logits)
    of_q, of_kt = MatMul.relevance(of_scores, rule, (q, k.mT), scores)
    assert of_kt is not None
    return [of_q, of_kt.mT, of_v, of_mask]


def test_relevance_is_the_composition_of_its_parts():
    q, k, v = (t.detach() for t in inputs(2, source=5))
    mask, arriving = Maker(seed=3).constant(7, 5), Maker(seed=4).constant(2, 7, 4)
    expected = composed_relevance(arriving, q, k, v, mask)
    args = (q, k, v, mask.requires_grad_(), None, False, 1.0, False)
    output = B.scaled_dot_product_attention(q, k, v, mask, scale=1.0)
    with torch.no_grad():
        got = Attention.relevance(arriving, Rule(epsilon=1e-12), args, output)
    for a, b in zip(got[:4], expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_half_of_the_relevance_goes_to_the_values():
    tensors = inputs(2)
    args = (*tensors, hidden(7, 7), None, False, 0.5, False)
    with torch.no_grad():
        output = Attention.forward(*args)
        arriving = (output != 0) * (torch.rand_like(output) + 0.5)
        _, _, of_v, *_ = Attention.relevance(arriving, Rule(epsilon=1e-12), args, output)
    torch.testing.assert_close(of_v.sum(), arriving.sum() / 2)


def test_secant_of_two_runs_of_which_none_sees_anything():
    allowed = hidden(7, 7)
    runs = [[t.detach() * scale for t in inputs(2)] for scale in (1.0, 0.3)]
    args, args0 = ((*run, allowed, None, False, 0.5, False) for run in runs)
    output, output0 = Attention.forward(*args), Attention.forward(*args0)
    m = torch.rand_like(output)
    found = Attention.secant(m, args, args0, output, output0)[:3]
    before = sum((f * (a - b)).sum() for f, a, b in zip(found, *runs, strict=True))
    torch.testing.assert_close(before, (m * (output - output0)).sum(), rtol=1e-12, atol=1e-12)
    assert not found[0][:, 1].any()  # the query that sees nothing
