"""PyTorch's own inputs for every torch.nn module, through the drop-in and through its twin.

``torch.testing._internal.common_modules.module_db`` holds what PyTorch tests its modules with:
constructor arguments and inputs for every class, and inputs that must fail.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

import torchbp
from torchbp.nn import DROP_INS

common_modules = pytest.importorskip(
    "torch.testing._internal.common_modules", reason="needs expecttest"
)

#: Modules of the database that are not compared, each with the reason.
EXCLUDED: dict[str, str] = {}

INFOS = {info.module_cls.__name__: info for info in common_modules.module_db if not info.is_lazy}
COMPARED = {name: info for name, info in INFOS.items() if name not in EXCLUDED}
COUNTS: Counter[str] = Counter()
SEEN: set[str] = set()

TOLERANCE = {
    torch.float32: dict(rtol=2e-5, atol=2e-5),
    torch.float64: dict(rtol=1e-10, atol=1e-12),
}


# torch's own second derivatives are rounder: that of the binary cross-entropy adds 1e-12 to odds.
SECOND = dict(rtol=1e-8, atol=1e-10)


# torch's float32 recursion is off by up to 1e-4 there (measured against float64; ours by 1e-5).
ROUGH = {("CTCLoss", torch.float32): dict(rtol=2e-4, atol=2e-4)}


@contextlib.contextmanager
def quietly() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def fresh(value: Any) -> Any:
    """The same arguments again, sharing nothing; leaves stay leaves."""

    def copied(leaf: Any) -> Any:
        if isinstance(leaf, PackedSequence):
            return PackedSequence(copied(leaf.data), *leaf[1:])
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.detach().clone().requires_grad_(leaf.requires_grad)

    return pytree.tree_map(copied, value, is_leaf=lambda v: isinstance(v, PackedSequence))


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, PackedSequence):
        return [value.data]
    leaves = pytree.tree_leaves(value, is_leaf=lambda v: isinstance(v, PackedSequence))
    found = [leaf.data if isinstance(leaf, PackedSequence) else leaf for leaf in leaves]
    return [leaf for leaf in found if isinstance(leaf, Tensor)]


def errors_for(outputs: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]


class Observed:
    """What one module does with one input: outputs, gradients, second gradients, state."""

    def __init__(self, module: torch.nn.Module, given: Any, twice: bool) -> None:
        args, kwargs = fresh((given.args, given.kwargs))
        torch.manual_seed(11)
        with quietly():
            self.outputs = tensors(module(*args, **kwargs))
        self.rng = torch.get_rng_state()
        self.state = {n: b.detach().clone() for n, b in module.named_buffers()}
        self.weights = [p.detach().clone() for p in module.parameters()]
        inputs = [t for t in tensors((args, kwargs)) if t.requires_grad]
        wrt = [*inputs, *(p for p in module.parameters() if p.requires_grad)]
        recorded = [o for o in self.outputs if o.requires_grad]
        self.grads: list[Tensor | None] = []
        self.second: list[Tensor | None] | str = []
        if recorded and wrt:
            errors = errors_for(recorded)
            options: Any = dict(allow_unused=True)
            self.grads = [*torch.autograd.grad(recorded, wrt, errors, retain_graph=True, **options)]
            if twice:
                self.second = second_order(recorded, wrt, errors)


def second_order(outputs: list[Tensor], wrt: list[Tensor], errors: list[Tensor]) -> Any:
    """Gradients of the gradients, or the name of the error that says there are none."""
    errors = [e.requires_grad_() for e in errors]
    try:
        grads = torch.autograd.grad(outputs, wrt, errors, create_graph=True, allow_unused=True)
        again = [g for g in grads if g is not None and g.requires_grad]
        if not again:
            return []
        seconds = torch.autograd.grad(again, [*wrt, *errors], errors_for(again), allow_unused=True)
    except RuntimeError as error:
        return type(error).__name__
    return [*seconds]


def same(ours: Any, theirs: Any, what: str, **tolerance: float) -> None:
    assert len(ours) == len(theirs), what
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a is None or b is None:
            # No gradient and a gradient of zeros mean the same.
            given = b if a is None else a
            assert given is None or not given.any(), f"{what} {i}: one has none"
            continue
        a, b = (t.to_dense() if t.is_sparse else t for t in (a, b))
        assert a.dtype == b.dtype, f"{what} {i}"
        try:
            torch.testing.assert_close(a, b, equal_nan=True, **tolerance)
        except AssertionError as error:
            raise AssertionError(f"{what} {i}: {error}") from None


def test_every_class_of_the_database_has_a_drop_in() -> None:
    missing = [name for name, info in COMPARED.items() if info.module_cls not in DROP_INS]
    assert not missing, f"{len(missing)} without a drop-in: {missing}"
    assert len(EXCLUDED) <= 5


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", COMPARED)
def test_drop_in_computes_what_its_twin_does(name: str, dtype: torch.dtype, training: bool) -> None:
    info = COMPARED[name]
    if info.module_cls not in DROP_INS:
        pytest.fail(f"{name} has no drop-in")
    for requires_grad in (True, False):
        torch.manual_seed(0)
        samples = info.module_inputs_func(
            info, device="cpu", dtype=dtype, requires_grad=requires_grad, training=training
        )
        for number, sample in enumerate(samples):
            compare(info.module_cls, sample, dtype, training, f"{name} sample {number}")
            COUNTS["samples"] += 1
            SEEN.add(name)


def compare(
    kind: type[torch.nn.Module], sample: Any, dtype: torch.dtype, training: bool, what: str
) -> None:
    given = sample.constructor_input
    torch.manual_seed(7)
    with quietly():
        theirs = kind(*given.args, **given.kwargs).to(dtype).train(training)
    ours = torchbp.convert(copy.deepcopy(theirs))
    assert type(ours) is DROP_INS[kind]
    if sample.forward_input is None:
        return
    twice = dtype == torch.float64
    expected = Observed(theirs, sample.forward_input, twice)
    got = Observed(ours, sample.forward_input, twice)
    tolerance = ROUGH.get((kind.__name__, dtype), TOLERANCE[dtype])
    assert [o.requires_grad for o in got.outputs] == [o.requires_grad for o in expected.outputs]
    same(got.outputs, expected.outputs, f"{what}: output", **tolerance)
    same([*got.state.values()], [*expected.state.values()], f"{what}: buffer", **tolerance)
    same(got.weights, expected.weights, f"{what}: parameter", **tolerance)
    same(got.grads, expected.grads, f"{what}: gradient", **tolerance)
    assert torch.equal(got.rng, expected.rng), f"{what}: random numbers drawn"
    if isinstance(expected.second, str):  # torch has no second derivative here
        COUNTS["without a second derivative in torch"] += 1
        return
    if getattr(theirs, "options", None):  # torch's chunked linear cross-entropy cuts its graph
        COUNTS["without a second derivative in torch"] += 1
        return
    same(got.second, expected.second, f"{what}: second gradient", **SECOND)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "name", [name for name, info in COMPARED.items() if info.module_error_inputs_func]
)
def test_the_same_inputs_are_refused(name: str, training: bool) -> None:
    info = COMPARED[name]
    cases = info.module_error_inputs_func(
        info, device="cpu", dtype=torch.float64, requires_grad=False, training=training
    )
    for case in cases:
        sample, given = case.module_error_input, case.module_error_input.constructor_input
        if case.error_on is common_modules.ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(case.error_type, match=case.error_regex):
                DROP_INS[info.module_cls](*given.args, **given.kwargs)
        else:
            theirs = info.module_cls(*given.args, **given.kwargs).double().train(training)
            ours = torchbp.convert(copy.deepcopy(theirs))
            raised = [error_of(module, sample.forward_input) for module in (ours, theirs)]
            assert type(raised[0]) is type(raised[1]), raised
            if raised[1] is None:  # evaluation mode takes some of what training refuses
                continue
            assert isinstance(raised[1], case.error_type)
        COUNTS["inputs refused"] += 1


def error_of(module: torch.nn.Module, given: Any) -> Exception | None:
    try:
        with quietly():
            module(*given.args, **given.kwargs)
    except Exception as error:
        return error
    return None


def test_lazy_modules_are_left_and_named() -> None:
    lazy = [info for info in common_modules.module_db if info.is_lazy]
    for info in lazy:
        kind = info.module_cls
        model = torch.nn.Sequential(kind(3, kernel_size=2), torch.nn.ReLU())
        torchbp.convert(model)
        assert type(model[0]) is kind
        assert "lazy" in str(next(iter(torchbp.conversion_report(model)))[3])
    assert lazy
