"""What holds for every kernel in the table: cases, opcheck, layouts, any number of threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from calls import LARGE, SMALL
from torch import Tensor

from torchbp import kernels

NAMES = list(kernels.KERNELS)
FORMS = [(name, form) for name, forms in SMALL.items() for form in forms]
forms = pytest.mark.parametrize("name, form", FORMS, ids=[" ".join(f).strip() for f in FORMS])


def tensors(results: Any) -> list[Tensor]:
    results = results if isinstance(results, (tuple, list)) else (results,)
    return [t for t in results if isinstance(t, Tensor)]


def fresh(name: str, arguments: tuple[Any, ...]) -> list[Any]:
    """The arguments, with copies of those that the kernel writes into."""
    declared = kernels.KERNELS[name].op._schema.arguments
    written = [d.alias_info is not None and d.alias_info.is_write for d in declared]
    return [a.clone() if w else a for a, w in zip(arguments, written, strict=True)]


def layout(t: Tensor) -> tuple[Any, ...]:
    """Strides count where there is more than one element."""
    return t.dtype, t.shape, [s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1]


@pytest.mark.parametrize("calls", [SMALL, LARGE], ids=["small", "large"])
def test_every_kernel_has_calls(calls):
    assert sorted(calls) == sorted(NAMES)


@forms
def test_opcheck(name, form):
    torch.library.opcheck(kernels.KERNELS[name].op, SMALL[name][form])


@forms
def test_reference_and_kernel_agree_and_have_one_layout(name, form):
    kernel, arguments = kernels.KERNELS[name], SMALL[name][form]
    got, expected = (tensors(f(*fresh(name, arguments))) for f in (kernel.op, kernel.reference))
    for ours, theirs in zip(got, expected, strict=True):
        assert layout(ours) == layout(theirs)
        torch.testing.assert_close(
            ours, theirs, rtol=2e-3 if ours.itemsize == 2 else 1e-5, atol=1e-5
        )


@forms
def test_inputs_are_left_alone(name, form):
    arguments = SMALL[name][form]
    before = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    kernels.KERNELS[name].op(*fresh(name, arguments))
    for argument, copy in zip(arguments, before, strict=True):
        assert torch.equal(argument, copy) if isinstance(copy, Tensor) else argument == copy


@pytest.mark.skipif(not kernels.HAS_EXT, reason="torch's own operators may depend on threads")
@pytest.mark.parametrize("name", NAMES)
def test_results_do_not_depend_on_the_number_of_threads(name):
    for arguments in LARGE[name]():
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(tensors(kernels.KERNELS[name].op(*fresh(name, arguments))))
        for one, *others in zip(*results, strict=True):
            for other in others:
                assert torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (one, other)))
