"""What layers save for backward: no more than their torch.nn twins, by saved-tensor hooks."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import torchbp
from torchbp import kernels

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
memory = pytest.importorskip("memory")

#: Layers that keep more storages alive, each with the reason.
KEEP_INPUTS = "keeps its inputs, which exist anyway, where torch keeps a tensor that it made"
MORE_IN_ALL = {
    **dict.fromkeys(
        ("PairwiseDistance", "HingeEmbeddingLoss", "MarginRankingLoss", "TripletMarginLoss",
         "TripletMarginWithDistanceLoss", "GaussianNLLLoss", "L1Loss", "LSTMCell"),
        KEEP_INPUTS,
    ),
    "KLDivLoss": "keeps the input, which exists anyway, for the gradient of the target",
    "AdaptiveLogSoftmaxWithLoss": "see MORE_BEYOND",
}  # fmt: skip
#: Layers that save more of their own, with the bytes and the reason.
MORE_BEYOND = {
    "AdaptiveLogSoftmaxWithLoss": (
        292,
        "one index for each sample more, which puts the clusters together",
    ),
}


def test_every_drop_in_is_measured():
    assert memory.uncovered() == {"SyncBatchNorm"}  # which needs a process group


@pytest.mark.skipif(not kernels.HAS_EXT, reason="dropout's bits need the compiled kernels")
@pytest.mark.parametrize("name", memory.CASES)
def test_saves_no_more_than_its_twin(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, ours, theirs = memory.measure(name)
    assert ours.beyond <= theirs.beyond + MORE_BEYOND.get(name, (0, ""))[0]
    assert (ours.total <= theirs.total) == (name not in MORE_IN_ALL)


def test_counts_what_a_layer_saves():
    """By hand: tanh saves its output, linear its input, dropout of torch a mask of its own."""
    x = torch.randn(8, 4)
    assert memory.saved_bytes(nn.Tanh(), (x,)) == (128, 0)
    assert memory.saved_bytes(nn.Linear(4, 2), (x,)) == (128, 0)
    assert memory.saved_bytes(nn.Dropout(), (x,)) == (128, 128)
    if kernels.HAS_EXT:
        assert memory.saved_bytes(torchbp.convert(nn.Dropout()), (x,)) == (4, 4)


@pytest.mark.skipif(not kernels.HAS_EXT, reason="dropout's bits need the compiled kernels")
def test_peak_of_a_transformer_step():
    ours, theirs, parameters = memory.encoder_peaks(0.1)
    assert ours + parameters <= 0.8 * (theirs + parameters)
    ours, theirs, _ = memory.encoder_peaks(0.0)
    assert ours <= theirs
