"""Runs every property on every case and collects the verdicts."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

import torchbp.ops  # noqa: F401  fills the registry
from torchbp.ops.registry import OPS, Entry, Maker
from torchbp.verify import properties, secants, twins
from torchbp.verify.cases import Case, NotApplicable, foreign
from torchbp.verify.properties import short
from torchbp.verify.report import Cell, Report, Row

# A case and its reference run, in float64.
Pair = tuple[Case, Case]
Property = Callable[[Case, Case], None]


def _columns(backend: str) -> dict[str, Property]:
    alone: dict[str, Callable[[Case], None]] = {
        "gradcheck": properties.gradcheck,
        "gradgradcheck": properties.gradgradcheck,
        "forward": properties.forward_mode,
        "vmap": properties.vmap,
        "compile": partial(properties.compiles, backend=backend),
        "strides": properties.strides,
        "zero-size": properties.zero_size,
        "float32": twins.float32,
        "bfloat16": twins.bfloat16,
        "autocast": twins.autocast,
        "threads": properties.threads,
        "tangent": secants.limit,
    }
    return {**{name: _alone(f) for name, f in alone.items()}, "secant": secants.conservation}


def _alone(property: Callable[[Case], None]) -> Property:
    return lambda case, reference: property(case)


PROPERTIES = tuple(_columns(""))


def check(
    fn_or_module: Any, *example_inputs: Any, backend: str = "aot_eager", **kwargs: Any
) -> Report:
    """Verify anyone's function, ``autograd.Function`` or module.

    Args:
        fn_or_module: a function; a subclass of ``torch.autograd.Function``; or a module, whose
            parameters are differentiated as well. It is not changed: a module is copied.
        *example_inputs: arguments of one call. Floating tensors are verified in float64; where
            some require a gradient, only those are differentiated. Choose a point where the
            function is smooth, and tensors small enough for finite differences.
        backend: of ``torch.compile``.
        **kwargs: further arguments of the call.

    Returns:
        A report of one row; the columns are explained in :mod:`torchbp.verify.properties`,
        ``twins`` and ``secants``.

    Raises:
        TypeError: if this cannot be called, or returns no floating tensor.
        ValueError: if no argument is a floating tensor.
    """
    with _state_kept():
        case = foreign(fn_or_module, example_inputs, kwargs)
        pairs = [(case, secants.reference_of(case))]
        return Report([_row(_name(fn_or_module), pairs, backend)])


def verify(names: Sequence[str] | None = None, backend: str = "aot_eager") -> Report:
    """Verify functions of the registry.

    Args:
        names: which; ``None`` for all, in the order of registration.
        backend: of ``torch.compile``.

    Raises:
        ValueError: for an unknown name, with those that are spelled alike.
    """
    entries = [_entry(name) for name in (OPS if names is None else names)]
    return Report([verify_entry(entry, backend) for entry in entries])


def _entry(name: str) -> Entry:
    if name not in OPS:
        alike = difflib.get_close_matches(name, OPS, n=3)
        hint = f"; did you mean {' or '.join(alike)}?" if alike else ""
        raise ValueError(f"verify: no op named {name!r} in the registry{hint}")
    return OPS[name]


def verify_entry(entry: Entry, backend: str = "aot_eager") -> Row:
    """Verify one function of the registry on all its samples."""
    with _state_kept():
        try:
            pairs = list(_entry_pairs(entry))
        except Exception as error:  # nothing can be verified of what cannot be called
            cell = Cell("FAIL", f"the call itself: {short(error)}")
            return Row(entry.name, dict.fromkeys(_columns(backend), cell))
        return _row(entry.name, pairs, backend)


class _SplitMaker(Maker):
    """Differentiable tensors and constants from two generators: runs may share the latter."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed=1000)
        self._differentiable = Maker(seed=seed)

    def __call__(self, *shape: int) -> torch.Tensor:
        return self._differentiable(*shape)


def _entry_pairs(entry: Entry) -> Iterator[Pair]:
    runs = [entry.samples(_SplitMaker(seed)) for seed in (1, 2)]
    for actual, reference in zip(*runs, strict=True):
        first, second = (
            Case.of(entry.functional, s.args, s.kwargs, entry.twin) for s in (actual, reference)
        )
        yield first, second


def _row(name: str, pairs: Sequence[Pair], backend: str) -> Row:
    cells = {
        column: _cell(column, property, pairs) for column, property in _columns(backend).items()
    }
    if cells["gradgradcheck"].status == cells["forward"].status == "ok":
        # Without a second derivative this would only say the same again.
        cells["forward"] = _cell("forward", _alone(properties.forward_over_reverse), pairs)
    return Row(name, cells)


# Where torch's own function falls short as well, ours may.
_LIMITS_OF_TORCH = ("gradcheck", "vmap", "compile", "strides", "threads")


def _cell(column: str, property: Property, pairs: Sequence[Pair]) -> Cell:
    excuses = {}
    for i, (case, reference) in enumerate(pairs):
        try:
            property(case, reference)
        except NotApplicable as reason:
            excuses[i] = str(reason)
        except Exception as error:
            excuse = column in _LIMITS_OF_TORCH and _twin_fails(property, case)
            if not excuse:
                return Cell("FAIL", f"sample {i}: {short(error)}" if pairs[1:] else short(error))
            excuses[i] = excuse
    if len(excuses) == len(pairs):
        return Cell("n/a", next(iter(excuses.values())))
    return Cell("ok", "; ".join(f"not sample {i}: {text}" for i, text in excuses.items()))


def _twin_fails(property: Property, case: Case) -> str:
    if case.twin is None:
        return ""
    try:
        twin = replace(case, function=case.twin)
        property(twin, twin)
    except Exception as error:
        return f"torch's twin fails too: {short(error)}"
    return ""


def _name(subject: Any) -> str:
    return getattr(subject, "__name__", type(subject).__name__)


@contextmanager
def _state_kept() -> Iterator[None]:
    # Dynamo and vmap warn of things that are asked for on purpose here.
    # Thousands of calls on a few numbers each: a second thread would only be waited for.
    with (
        torch.random.fork_rng(devices=[]),
        warnings.catch_warnings(),
        torch.enable_grad(),
        properties.threads_set_to(1),
    ):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        yield
