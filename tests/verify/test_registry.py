"""Every op of the registry has every property."""

from __future__ import annotations

from functools import cache

import pytest

import torchbp.ops  # noqa: F401  fills the registry
from torchbp.ops.registry import OPS
from torchbp.verify import PROPERTIES, Row, verify_entry

# What may be n/a, and a part of the reason that must be given.
NOT_APPLICABLE: dict[tuple[str, str], str] = {}

# Samples that may be left out of a column that holds for the others.
LEFT_OUT = {
    # Every sample without an empty tensor is emptied; the call may not allow it.
    "zero-size": ("torch's twin refuses it", "no leading dimension to empty"),
    "strides": ("random numbers follow the layout",),
    # Outside training dropout hands its input on.
    "dropout secant": ("calls no torchbp op",),
    "dropout tangent": ("calls no torchbp op",),
    # The statistics come from torch's kernel, whose last bit depends on the threads.
    "batch_norm threads": ("torch's twin fails too",),
    # Running statistics that are shared by the batched calls cannot be updated by them.
    "batch_norm vmap": ("running_mean or running_var, which will be updated in place",),
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
