"""The CUDA source of blame_settle, run on the CPU, against the CPU kernel."""

from __future__ import annotations

import pytest
import simt
import torch
from simt import close, unwritten, wide_dtypes

from torchbp import kernels
from torchbp.kernels import reference

blame_settle = simt.family("blame_settle")
# samples, columns of each layer. The first has more layers than one launch takes.
CASES = [(21, [1, 40, 0, 26] + 70 * [1]), (1, [1]), (257, [33]), (1, [4097]), (31, [31, 2])]


@wide_dtypes
@pytest.mark.parametrize("kind", reference.BLAME_KINDS)
@pytest.mark.parametrize("with_labels", [True, False], ids=["labels", "none"])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_settle(blame_settle, dtype, kind, with_labels, case):
    samples, sizes = CASES[case]
    units, n_classes = sum(sizes), 11
    contribution = torch.randn(samples, units).to(dtype)
    losses = torch.linspace(-0.1, 6, samples).to(dtype)
    labels = torch.randint(-2, n_classes + 2, (samples,)) if with_labels else None
    stats = torch.rand(3, units).to(dtype)
    layers = contribution.split(sizes, 1), stats.split(sizes, 1)
    kinds = [kind] * len(sizes)
    expected = kernels.blame_settle(*layers, losses, labels, n_classes, 0.5, kinds)
    results = [unwritten(t) for t in expected]
    results[1].zero_()
    number, wide = [*reference.BLAME_KINDS].index(kind), dtype == torch.float64
    blame_settle.settle(
        wide, number, contribution, stats, losses, labels, 0.5, sizes, *results,
        samples, units, n_classes, len(sizes),
    )  # fmt: skip
    for got, want in zip(results, expected, strict=True):
        close(got, want, scale=10.0)
