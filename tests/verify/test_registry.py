"""Every op of the registry has every property."""

from __future__ import annotations

from functools import cache

import pytest

import torchbp.ops  # noqa: F401  fills the registry
from torchbp.ops.registry import OPS
from torchbp.verify import PROPERTIES, Row, verify_entry

# What may be n/a, and a part of the reason that must be given.
NOT_APPLICABLE: dict[tuple[str, str], str] = {
    ("avg_pool3d", "bfloat16"): "torch's twin refuses it",
    # torch gives the shuffles of an empty tensor the wrong shape.
    ("pixel_shuffle", "zero-size"): "torch's twin refuses it",
    ("pixel_unshuffle", "zero-size"): "torch's twin refuses it",
    # torch's bilinear takes no mixture of dtypes on the CPU.
    ("bilinear", "autocast"): "torch's twin refuses it",
    # torch's CTC gradient, which ours follows, is that of normalised log-probabilities only;
    # tests/ops/test_ctc.py checks it through log_softmax.
    ("ctc_loss", "gradcheck"): "torch's twin fails too",
    # torch's CTC needs the lengths' values to know its shapes, at least one step, and float32.
    ("ctc_loss", "compile"): "output shape depends on input Tensor data",
    ("ctc_loss", "zero-size"): "log_probs tensor must not be empty",
    ("ctc_loss", "bfloat16"): "not implemented for 'BFloat16'",
}

# Samples that may be left out of a column that holds for the others.
LEFT_OUT = {
    # It averages in three dimensions, which torch does not do in bfloat16.
    "lp_pool3d bfloat16": ("torch's twin refuses it",),
    # torch's antialiased filters know no bfloat16.
    "interpolate bfloat16": ("not implemented for 'BFloat16'",),
    "interpolate autocast": ("not implemented for 'BFloat16'",),
    # Factors are not cast, but the table they meet is.
    "embedding_bag autocast": ("torch's twin refuses it",),
    # Every sample without an empty tensor is emptied; the call may not allow it.
    "zero-size": ("torch's twin refuses it", "no leading dimension to empty"),
    "strides": ("random numbers follow the layout",),
    # These kernels of torch know no bfloat16.
    "multi_margin_loss bfloat16": ("not implemented for 'BFloat16'",),
    "multilabel_margin_loss bfloat16": ("not implemented for 'BFloat16'",),
    # In training torch draws the slopes in a function that cannot be batched.
    "rrelu vmap": ("torch's twin fails too",),
    # Sizes of packed batches are values, which torch.compile does not know.
    "lstm compile": ("torch's twin fails too",),
    "gru compile": ("torch's twin fails too",),
    "rnn_tanh compile": ("torch's twin fails too",),
    "rnn_relu compile": ("torch's twin fails too",),
    # Outside training dropout hands its input on.
    "dropout secant": ("calls no torchbp op",),
    "dropout tangent": ("calls no torchbp op",),
    # The statistics come from torch's kernel, whose last bit depends on the threads.
    "batch_norm threads": ("torch's twin fails too",),
    # Running statistics that are shared by the batched calls cannot be updated by them.
    "batch_norm vmap": ("running_mean or running_var, which will be updated in place",),
    "instance_norm vmap": ("running_mean or running_var, which will be updated in place",),
    # torch pools in three dimensions there: dense inputs alone, and no half dtype on the CPU.
    "local_response_norm strides": ("view size is not compatible",),
    "local_response_norm bfloat16": ("avg_pool3d_out_frame",),
}


@cache
def row(name: str) -> Row:
    return verify_entry(OPS[name])


@pytest.mark.parametrize("column", PROPERTIES)
@pytest.mark.parametrize("name", OPS)
def test_property(name: str, column: str) -> None:
    cell = row(name).cells[column]
    assert cell.status != "FAIL", cell.reason
    if cell.status == "n/a":
        expected = NOT_APPLICABLE.get((name, column))
        assert expected and expected in cell.reason, f"not in the allow-list: {cell.reason}"
    for excuse in filter(None, cell.reason.split("; not sample") if cell.status == "ok" else []):
        allowed = LEFT_OUT.get(column, ()) + LEFT_OUT.get(f"{name} {column}", ())
        assert any(part in excuse for part in allowed), f"not in the allow-list: {excuse}"


def test_the_allow_lists_name_real_cells() -> None:
    for name, column in NOT_APPLICABLE:
        assert row(name).cells[column].status == "n/a", (name, column)
