"""One run of a network through which autograd carries relevance: layer-wise relevance propagation.

Backward of every op is its LRP rule (see :mod:`torchbp.ops.relevance`). Functions that only move
elements keep torch's own backward, which brings relevance back to where each element came from.
Sums, and products that are no op, share in proportion to what each argument gave.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchbp.blame.dispatch import (
    ANY_DEGREE,
    LINEAR,
    QUADRATIC,
    Polynomial,
    Tape,
    how_many_depend,
    run_op,
    tensors_in,
)
from torchbp.ops.arithmetic import MatMul, mul
from torchbp.ops.batch_norm import BatchNorm
from torchbp.ops.group_norm import GroupNorm
from torchbp.ops.layer_norm import LayerNorm
from torchbp.ops.linear import Linear, linear
from torchbp.ops.recurrent import RecurrentLayer
from torchbp.ops.registry import BY_TORCH_FUNCTION
from torchbp.ops.relevance import Rule, Shares, only_epsilon, quotient, weighted

Functions = frozenset[Callable[..., Any]]


def _those(names: str) -> Functions:
    wanted = names.split()
    return frozenset(f for f in LINEAR if getattr(f, "__name__", "") in wanted)


#: Linear functions that add elements up.
SUMS = _those(
    """add sub subtract rsub __add__ __radd__ __sub__ __rsub__ sum mean cumsum trace index_add
    scatter_add sum_to_size"""
)

#: Functions that may put constants among the elements they move.
FILLS = _those(
    """cat concat concatenate stack hstack vstack dstack column_stack where masked_fill scatter
    index_copy masked_scatter tril triu diag_embed"""
)

NEGATIONS = _those("neg negative __neg__")

#: What writes a sum, or a constant, into its first argument (``+=`` arrives as ``add_``), and the
#: same without writing.
IN_PLACE: dict[Callable[..., Any], Callable[..., Any]] = {
    Tensor.add_: torch.add,
    Tensor.sub_: torch.sub,
    Tensor.neg_: torch.neg,
    Tensor.index_add_: torch.index_add,
    Tensor.scatter_add_: torch.scatter_add,
    Tensor.masked_fill_: torch.masked_fill,
}


class _Sum(Polynomial):
    """A sum, of terms or of products of two factors."""

    def relevance(
        self, relevance: Tensor, rule: Rule, args: tuple[Any, ...], output: Tensor
    ) -> Shares:
        """In proportion to what each gave (the epsilon rule); halves for two factors.

        That is argument times secant between the arguments and zero, which is exact for a
        polynomial of degree two; constants are in both runs, and their part is not handed on.
        """
        depends = [isinstance(a, Tensor) and a.requires_grad for a in args]
        if self.func in QUADRATIC and rule.name != "epsilon" and sum(depends) == 1:
            only_epsilon(self.__name__, rule)
        origin = tuple(torch.zeros_like(a) if d else a for a, d in zip(args, depends, strict=True))
        found = self.secant(quotient(relevance, output, rule.epsilon), args, origin)
        return tuple(
            a * m if d and m is not None else None
            for a, m, d in zip(args, found, depends, strict=True)
        )


class _Selection(Polynomial):
    """A function that moves elements, and may put constants beside them."""

    def relevance(
        self, relevance: Tensor, rule: Rule, args: tuple[Any, ...], output: Tensor
    ) -> Shares:
        """Back to where each element came from; what came to a constant stays there."""
        return self.secant(relevance, args, args)


class RelevanceTape(Tape):
    """Makes autograd carry relevance through one run.

    Args:
        rule_of: the rule of a module, by its name.

    Attributes:
        followed: names of modules in which an op followed the rule's name, not its epsilon alone.

    """

    method = "lrp"

    def __init__(self, rule_of: Callable[[str], Rule]) -> None:
        super().__init__()
        self.rule_of = rule_of
        self.followed: set[str] = set()
        self._taken: list[tuple[int, Tensor]] = []

    def next_run(self, modules: list[str]) -> None:
        """Start the run; ``modules`` is the live stack of names of the modules being called."""
        self._modules = modules

    def drop_run(self) -> None:
        """Forget the run, which failed; nothing of it is kept before its backward pass."""

    def finish_run(self) -> None:
        """Nothing is left open by a single run."""

    def taken(self) -> list[tuple[int, float]]:
        """What every op that relevance came back through did not hand on, summed over the batch.

        That is the part of biases, other constants and the stabiliser. With each amount stands
        when the op ran: autograd's sequence number.
        """
        return [(number, float(amount)) for number, amount in self._taken]

    def call(self, op: Any, args: tuple[Any, ...]) -> Any:
        """Run an op; its backward hands relevance on."""
        if op is MatMul and _is_layer(*args):
            op, args = Linear, (args[0], args[1].mT, None)
        place = self.place() if getattr(op, "no_relevance", None) else self.site()
        where = self.where()
        rule = self.rule_of(where)
        if _follows(op, rule):
            self.followed.add(where)
        return _Relevance.apply(self, op, rule, place, *args)

    def treat(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Leave what moves elements to torch, share out sums and products."""
        if func in IN_PLACE:
            target, *rest = args
            with self:
                return target.copy_(IN_PLACE[func](target.clone(), *rest, **kwargs))
        if func in NEGATIONS:
            with self:
                return mul(args[0], -1)
        if func in SUMS:
            return self._polynomial(_Sum, func, args, kwargs)
        if func in FILLS:
            return self._polynomial(_Selection, func, args, kwargs)
        if func in LINEAR:
            return func(*args, **kwargs)
        if func in (torch.addmm, Tensor.addmm) and not kwargs and _is_layer(*args[1:], args[0]):
            with self:
                return linear(args[1], args[2].mT, args[0])
        if func in QUADRATIC and func not in BY_TORCH_FUNCTION:
            if func not in ANY_DEGREE or how_many_depend(args) <= 2:
                return self._polynomial(_Sum, func, args, kwargs)
        return NotImplemented

    def refuse(self, func: Callable[..., Any], output: Any) -> None:
        """Raise once relevance would have to go through; off its path any function is welcome."""
        error = self.no_rule(func)

        def raises(relevance: Tensor) -> None:
            raise error

        for tensor in tensors_in(output):
            if tensor.grad_fn is not None:
                tensor.register_hook(raises)

    def note(self, number: int, taken: Tensor) -> None:
        """Enter what an op did not hand on."""
        self._taken.append((number, taken))

    def _polynomial(
        self,
        kind: type[Polynomial],
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        return self.call(kind(func, spec), tuple(leaves))


def _follows(op: Any, rule: Rule) -> bool:
    """Whether an op does something else under this rule than under ``epsilon``."""
    if isinstance(op, Polynomial):
        return False
    others = (BatchNorm, GroupNorm, LayerNorm) if rule.name == "pass" else (RecurrentLayer,)
    return op.relevance.__func__ is weighted or issubclass(op, others)


def _is_layer(x: Any, weight: Any, bias: Any = None, *_: Any) -> bool:
    """Whether a product is what :class:`torch.nn.Linear` computes, so that its rules apply."""
    constant = isinstance(weight, Tensor) and not how_many_depend((weight, bias))
    flat = bias is None or (isinstance(bias, Tensor) and bias.dim() == 1)
    return constant and flat and weight.dim() == 2 and isinstance(x, Tensor) and x.dim() > 1


class _Relevance(torch.autograd.Function):
    """An op whose backward is its LRP rule."""

    @staticmethod
    def forward(ctx: Any, tape: RelevanceTape, op: Any, rule: Rule, place: str, *args: Any) -> Any:
        ctx.tape, ctx.rule, ctx.place = tape, rule, place
        return run_op(ctx, tape, op, args)

    @staticmethod
    def backward(ctx: Any, relevance: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        kept = ctx.kept.check()
        try:
            shares = kept.op.relevance(relevance, ctx.rule, kept.args, kept.output)
        except (NotImplementedError, ValueError) as error:
            raise type(error)(f"lrp: {ctx.place}: {error}") from error
        needs = ctx.needs_input_grad[4:]
        handed = [s if n else None for s, n in zip(shares, needs, strict=True)]
        ctx.tape.note(ctx._sequence_nr(), _total([relevance]) - _total(handed))
        return (None, None, None, None, *handed)


def _total(tensors: Sequence[Tensor | None]) -> Tensor:
    return torch.stack(
        [t.sum(dtype=torch.float64) for t in tensors if t is not None]
        or [torch.zeros((), dtype=torch.float64)]
    ).sum()
