"""The CUDA source of the dropout kernels, run on the CPU, against the CPU kernels."""

from __future__ import annotations

import pytest
import simt
import torch
from simt import dtypes, unwritten

from torchbp import kernels

dropout = simt.family("dropout")
COUNTS = [1, 7, 8, 9, 31, 33, 257, 4097]


@pytest.mark.parametrize("kind", [torch.int32, torch.uint8, torch.bool], ids=str)
def test_bits(dropout, kind):
    for count in COUNTS:
        kept = (torch.rand(count) < 0.6).to(kind)
        bits = torch.full((-(-count // 8),), 85, dtype=torch.uint8)
        dropout.bits(kind == torch.int32, kept, bits, count)
        assert torch.equal(bits, kernels.dropout_bits(kept))


@dtypes
def test_apply(dropout, dtype):
    for count in COUNTS:
        x = torch.randn(count).to(dtype)
        bits = kernels.dropout_bits(torch.rand(count) < 0.6)
        y = unwritten(x)
        dropout.apply(dtype, x, bits, y, count, 1.25)
        assert torch.equal(y, kernels.dropout_apply(x, bits, 1.25))
