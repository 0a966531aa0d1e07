"""What there is: every functional, the layers it serves, and the blame rules of its ops."""

from __future__ import annotations

from contextlib import suppress

from torchbp.ops.base import Op
from torchbp.ops.registry import OPS, Entry
from torchbp.tables import Table
from torchbp.verify.cases import NotApplicable, of_entry
from torchbp.verify.secants import record


def ops_of(entry: Entry) -> list[type[Op]]:
    """The ops that a functional's samples call, in order of appearance."""
    found: dict[type[Op], None] = {}
    for case in of_entry(entry):
        with suppress(NotApplicable):  # the input is handed on as it is
            found.update(dict.fromkeys(call.op for call in record(case)))
    return list(found)


def catalogue() -> Table:
    """One row per registered functional.

    Returns:
        A table with the columns functional, layers (torch.nn classes whose drop-in it serves), ops
        (whose derivatives are written out), secant and LRP (``"yes"``, the name of a shared rule,
        ``"own rule"``, or the reason why there is none).
    """
    rows = []
    for name, entry in OPS.items():
        ops = ops_of(entry)
        layers = ", ".join(m.__name__ for m in entry.modules)
        secants = [op.no_secant or "yes" for op in ops]
        rules = [op.no_relevance or _rule(op) for op in ops]
        rows.append(
            (name, layers, ", ".join(op.__name__ for op in ops), _each(ops, secants),
             _each(ops, rules))
        )  # fmt: skip
    return Table(("functional", "layers", "ops", "secant", "LRP"), rows)


def _each(ops: list[type[Op]], answers: list[str]) -> str:
    """One answer for all ops of a functional if they agree, else one for each."""
    distinct = dict.fromkeys(answers)
    if len(distinct) <= 1:
        return next(iter(distinct), "")
    return "; ".join(f"{op.__name__}: {answer}" for op, answer in zip(ops, answers, strict=True))


def _rule(op: type[Op]) -> str:
    function = op.relevance.__func__  # type: ignore[attr-defined]
    shared = function.__module__ == "torchbp.ops.relevance"
    return function.__name__ if shared else "own rule"
