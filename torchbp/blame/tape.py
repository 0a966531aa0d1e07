"""Two runs of one network, paired op by op: the secant tape.

On the first run the tape notes the arguments and output of every op that has a secant rule; on the
next run each op is paired with its note, and autograd carries multipliers instead of gradients
through it. Linear functions need no note but of their constants: the secant of a linear map is its
tangent, so torch's own backward is right. Constants (masks, indices, numbers without a derivative)
must be the same in both runs. Any other function on the path from input to loss is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchbp.blame.dispatch import (
    ANY_DEGREE,
    LINEAR,
    PRODUCT_IN_PLACE,
    PRODUCTS,
    QUADRATIC,
    QUOTIENT,
    SHAPED_LIKE,
    Polynomial,
    Tape,
    how_many_depend,
    run_op,
    tensors_in,
)
from torchbp.blame.kept import Kept

#: Functions that write into their first argument, whatever it held before.
WRITES = frozenset({Tensor.copy_, Tensor.__setitem__, Tensor.zero_})


class SecantTape(Tape):
    """Pairs a run with the one before it.

    Use :meth:`next_run` before every forward pass, and run it inside ``with tape:``. In the first
    run nothing is paired; from the second on, ``torch.autograd.grad`` through the results gives
    multipliers with respect to the run before.
    """

    method = "secant"

    def __init__(self) -> None:
        super().__init__()
        self._notes: list[Kept] = []
        self._before: list[Kept] | None = None
        self._runs = 0

    def next_run(self, modules: list[str]) -> None:
        """Start another run, paired with the one that just ended.

        Args:
            modules: the live stack of names of the modules being called, for error texts.
        """
        self._modules = modules
        self._before = self._notes if self._runs else None
        self._notes = []
        self._runs += 1

    def drop_run(self) -> None:
        """Forget the run that was started last, for it failed and will be tried again."""
        self._runs -= 1
        self._notes = self._before or []

    def finish_run(self) -> None:
        """Check that the run called as many ops as the one before."""
        if self._before is not None and len(self._notes) != len(self._before):
            raise RuntimeError(
                f"secant: the model called {len(self._notes)} ops on the input and "
                f"{len(self._before)} on the reference; its control flow must not depend on values"
            )

    def call(self, op: Any, args: tuple[Any, ...]) -> Any:
        """Run an op, paired with its note from the run before."""
        reason = getattr(op, "no_secant", None)
        if reason and self._before is not None and how_many_depend(args):
            raise NotImplementedError(
                f"secant: {op.__name__}, called in {self.place()}, has no rule: {reason}"
            )
        partner = None if self._before is None else self._partner(op, args)
        if partner is not None and how_many_depend(args):
            self._refuse_differing(op, args, partner.args)
        return _Paired.apply(self, op, partner, *args)

    def keep(self, op: Any, args: tuple[Any, ...], output: Any) -> Kept:
        """Keep a call, and note it for the next run."""
        self._notes.append(super().keep(op, args, output))
        return self._notes[-1]

    def treat(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Leave linear functions to torch, and pair products."""
        if func in LINEAR or self._tangent_is_right(func, args, kwargs):
            if func not in SHAPED_LIKE:
                self._note_constants(func, args[1:] if func in WRITES else args, kwargs)
            return func(*args, **kwargs)
        if func in QUADRATIC and (func not in ANY_DEGREE or how_many_depend(args) == 2):
            leaves, spec = pytree.tree_flatten((args, kwargs))
            return self.call(Polynomial(func, spec), tuple(leaves))
        return NotImplemented

    def refuse(self, func: Callable[..., Any], output: Any) -> None:
        """Raise: its multipliers would be wrong."""
        if self._before is not None:
            raise self.no_rule(func)

    @staticmethod
    def _tangent_is_right(
        func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        """Whether only the argument that the function is linear in depends on the input."""
        if func in QUOTIENT:
            rounds = kwargs.get("rounding_mode") is not None
            return not (rounds or how_many_depend((args[1:], kwargs)))
        product = func in PRODUCT_IN_PLACE or func in PRODUCTS
        return product and how_many_depend((args, kwargs)) == 1

    def _note_constants(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        constants = tuple(t for t in tensors_in((args, kwargs)) if not t.requires_grad)
        if not constants:
            return
        if self._before is not None:
            self._refuse_differing(func, constants, self._partner(func, constants).args)
        self.keep(func, constants, None)

    def _refuse_differing(self, func: Any, args: Iterable[Any], before: Iterable[Any]) -> None:
        """Raise if a constant is not the same in both runs: what it did would be nobody's."""
        for value, value0 in zip(args, before, strict=True):
            if not isinstance(value, Tensor) or value.requires_grad or _same(value, value0):
                continue
            if _has_derivative(value):
                raise RuntimeError(
                    f"secant: {func.__name__}, called in {self.place()}, takes numbers that differ "
                    "between the input and the reference, but have no derivative: a detached "
                    "tensor, or a comparison as a float. What they do to the loss cannot be shared"
                )
            raise RuntimeError(
                f"secant: {func.__name__}, called in {self.place()}, takes a mask or indices "
                "that differ between the input and the reference: they must not depend on "
                "values. A piecewise function such as torch.where(x > 0, x, 0) has a rule if "
                "it is called by its name, torch.relu"
            )

    def _partner(self, op: Any, args: tuple[Any, ...]) -> Kept:
        assert self._before is not None
        k = len(self._notes)
        note = self._before[k] if k < len(self._before) else None
        if note is None or note.op != op or _shapes(note.args) != _shapes(args):
            came = f"{op.__name__}{_shapes(args)} in {self.where() or 'the model'}"
            expected = "nothing more" if note is None else f"{note.op.__name__}{_shapes(note.args)}"
            raise RuntimeError(
                f"secant: the run on the input and the run on the reference differ: call {k} is "
                f"{came}, the reference has {expected}. Control flow must not depend on values, "
                "and the baseline must have the input's shape"
            )
        return note


class _Paired(torch.autograd.Function):
    """An op whose backward is its secant with respect to a noted run; the first run has none."""

    @staticmethod
    def forward(ctx: Any, tape: SecantTape, op: Any, note: Kept | None, *args: Any) -> Any:
        ctx.note = note
        return run_op(ctx, tape, op, args)

    @staticmethod
    def backward(ctx: Any, *multipliers: Tensor) -> tuple[Tensor | None, ...]:
        kept, note = ctx.kept.check(), ctx.note.check()
        # Parameters are shared by both runs: the very same object means "no difference".
        args0 = tuple(
            a if isinstance(a, Tensor) and a.data_ptr() == a0.data_ptr() and a.shape == a0.shape
            else a0
            for a, a0 in zip(kept.args, note.args, strict=True)
        )  # fmt: skip
        result = note.op.secant(multipliers[0], kept.args, args0, kept.output, note.output)
        needs = ctx.needs_input_grad[3:]
        return (None, None, None, *(r if n else None for r, n in zip(result, needs, strict=True)))


def _shapes(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(tuple(a.shape) if isinstance(a, Tensor) else None for a in args)


def _same(value: Tensor, value0: Tensor) -> bool:
    alike = value.data_ptr() == value0.data_ptr() and value.stride() == value0.stride()
    return alike or torch.equal(value, value0)


def _has_derivative(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
