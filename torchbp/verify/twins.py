"""Properties of a function that torch has too: torch's values, dtypes and gradients."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

from torchbp.verify.cases import Case, NotApplicable, Outcome, outcome
from torchbp.verify.properties import close, short

# Relative to the largest element: 64 rounding errors of float32, 8 of bfloat16.
TOLERANCE = {torch.float32: 64 * 2.0**-23, torch.bfloat16: 8 * 2.0**-7}


def float32(case: Case) -> None:
    """In float32 the outputs are bitwise those of a twin in torch, the gradients close."""
    got, expected = _both(case.to(torch.float32))
    if not str(getattr(case.twin, "__module__", None)).startswith("torchbp"):
        close(Outcome(got.outputs, ()), Outcome(expected.outputs, ()), "float32", 0)
    close(got, expected, "float32", TOLERANCE[torch.float32])


def bfloat16(case: Case) -> None:
    """In bfloat16 outputs and gradients are close to torch's, in the same dtypes."""
    close(*_both(case.to(torch.bfloat16)), "bfloat16", TOLERANCE[torch.bfloat16])


def autocast(case: Case) -> None:
    """Under autocast outputs and gradients have torch's dtypes and values."""
    small = case.to(torch.float32)
    for half_input in (False, True):  # the second: what the layer before hands on
        if half_input:
            first, *others = small.inputs
            small = small.with_inputs([first.to(torch.bfloat16), *others])
        got, expected = _both(small, torch.autocast("cpu", torch.bfloat16))
        close(got, expected, "autocast", TOLERANCE[torch.bfloat16])


def _both(
    case: Case, context: AbstractContextManager[Any] | None = None
) -> tuple[Outcome, Outcome]:
    if case.twin is None:
        raise NotApplicable("no twin in torch to compare with")
    try:
        expected = outcome(case, function=case.twin, context=context)
    except Exception as error:
        raise NotApplicable(f"torch's twin refuses it: {short(error)}") from None
    return outcome(case, context=context), expected
