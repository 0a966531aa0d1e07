"""Seeing every torch function that a model calls, and giving ops a backward of their own.

A ``TorchFunctionMode`` sees every torch function a model calls, whether from a torch.nn module, a
torchbp module or the user's own forward. It was chosen over ``torch.fx`` and ``torch.export``
because it needs no graph capture: data dependent Python in a forward runs as it is, and so do
tensors of any layout.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils import _pytree as pytree

import torchbp.ops  # noqa: F401  fills the registry
from torchbp.blame.kept import Keeper, Kept, writes
from torchbp.blame.source_line import user_line
from torchbp.ops.base import Op, midpoint
from torchbp.ops.registry import BY_TORCH_FUNCTION, Entry

T = Tensor


def _named(*homes: tuple[Any, str]) -> frozenset[Callable[..., Any]]:
    return frozenset(getattr(home, name) for home, names in homes for name in names.split())


#: Functions linear in every tensor argument together: their tangent is their secant.
LINEAR = _named(
    (
        torch,
        """add sub subtract rsub neg negative cat concat concatenate stack hstack vstack dstack
        reshape squeeze unsqueeze transpose swapaxes permute movedim moveaxis t sum mean chunk
        split tensor_split narrow select index_select gather take_along_dim tile flip roll clone
        broadcast_to broadcast_tensors unbind diagonal tril triu unflatten ravel zeros_like where
        masked_fill cumsum repeat_interleave meshgrid diag_embed scatter scatter_add index_add
        masked_select positive trace real imag rot90 fliplr flipud atleast_1d atleast_2d
        atleast_3d as_strided masked_scatter column_stack adjoint""",
    ),
    (
        T,
        """add add_ sub sub_ __add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ neg neg_ __neg__
        reshape view view_as reshape_as squeeze unsqueeze transpose swapaxes permute movedim t sum
        mean chunk split tensor_split narrow select index_select gather expand expand_as repeat
        flip roll clone contiguous to float double half bfloat16 type_as broadcast_to unbind
        diagonal tril triu unfold unflatten ravel __getitem__ requires_grad_ sum_to_size copy_
        masked_fill masked_fill_ where cumsum repeat_interleave diag_embed scatter scatter_add
        index_add masked_select squeeze_ unsqueeze_ transpose_ t_ type cpu cuda trace as_strided
        masked_scatter adjoint new_zeros new_ones zero_ index_add_ scatter_add_ index_copy
        positive __setitem__ retain_grad""",
    ),
)

#: Functions that do not depend on their arguments' values, or cut the path on purpose.
CUT: frozenset[Callable[..., Any]] = frozenset({T.detach, torch.detach})

#: Functions of degree two in all tensor arguments together. The difference of such a function
#: between two runs is its derivative midway, applied to the difference of the arguments: exactly.
QUADRATIC = _named(
    (
        torch,
        """addmm addmv addr baddbmm addbmm addcmul einsum dot vdot inner outer ger tensordot kron
        chain_matmul cross var mul multiply matmul mm bmm mv""",
    ),
    (
        T,
        """addmm addmv addr baddbmm addbmm addcmul dot vdot inner outer ger cross var __rmatmul__
        mul multiply matmul mm bmm mv __mul__ __rmul__ __matmul__""",
    ),
    (torch.linalg, "vecdot matmul cross"),
)

#: Those among them that take any number of factors, and are of degree two for two.
ANY_DEGREE = _named((torch, "einsum chain_matmul"))

#: Linear functions that look at the shape or dtype alone of an argument.
SHAPED_LIKE = _named((T, "view_as reshape_as expand_as type_as"))

#: Functions linear in their first argument as long as no other one depends on the input.
QUOTIENT = _named(
    (torch, "div divide true_divide"), (T, "div divide true_divide __truediv__ div_ __itruediv__")
)

#: Affine in one argument as long as no other one depends on the input.
PRODUCTS = QUADRATIC - {torch.var, T.var}

#: In-place products: linear in one argument as long as the other does not depend on the input.
PRODUCT_IN_PLACE = _named((T, "mul_ multiply_ __imul__"))

#: Views by attribute: ``x.T``, ``x.mT`` and the like arrive as property getters.
VIEWS: frozenset[Any] = frozenset(
    getattr(T, name).__get__ for name in ("T", "mT", "H", "mH", "data", "real")
)


class Polynomial:
    """A function of degree two as if it were an op, its tensors taken out of the arguments."""

    def __init__(self, func: Callable[..., Any], spec: Any) -> None:
        self.func, self.spec = func, spec
        self.__name__ = getattr(func, "__name__", repr(func))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Polynomial) and (self.func, self.spec) == (other.func, other.spec)

    def forward(self, *leaves: Any) -> Any:
        """The function of its arguments, flattened."""
        args, kwargs = pytree.tree_unflatten(list(leaves), self.spec)
        return self.func(*args, **kwargs)

    def secant(
        self, multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], *_: Any
    ) -> tuple[Tensor | None, ...]:
        """The tangent midway between the runs."""
        middle = [
            midpoint(a, a0).detach().requires_grad_()
            if isinstance(a, Tensor) and a.is_floating_point()
            else a
            for a, a0 in zip(args, args0, strict=True)
        ]
        with torch.enable_grad():
            output = self.forward(*middle)
        at = [i for i, m in enumerate(middle) if isinstance(m, Tensor) and m.requires_grad]
        grads = torch.autograd.grad(output, [middle[i] for i in at], multiplier, allow_unused=True)
        found = dict(zip(at, grads, strict=True))
        return tuple(found.get(i) for i in range(len(args)))


class Tape(TorchFunctionMode):
    """Hands every op of a run to :meth:`call`, whatever function it was called by.

    A subclass gives ``call(op, args)``, which runs an op; ``treat(func, args, kwargs)``, which runs
    a function that needs no op, or returns ``NotImplemented``; and ``refuse(func, output)``, which
    is told of functions that nobody knows. Use it inside ``with tape:``.

    Attributes:
        method: named in errors.
    """

    method: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self._modules: list[str] = []
        self._sending: list[Entry] = []
        self._keeper = Keeper()

    def keep(self, op: Any, args: tuple[Any, ...], output: Any) -> Kept:
        """Keep a call for a backward pass, whatever the model writes over it."""
        return self._keeper.keep(op, args, output)

    def call(self, op: Any, args: tuple[Any, ...]) -> Any:
        """Run an op."""
        raise NotImplementedError

    def treat(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a function that needs no op, or return ``NotImplemented``."""
        raise NotImplementedError

    def refuse(self, func: Callable[..., Any], output: Any) -> None:
        """Take note of what a function without a rule has returned."""
        raise NotImplementedError

    def where(self) -> str:
        """Name of the module that is being called; empty in the model's own forward."""
        return self._modules[-1] if self._modules else ""

    def site(self) -> str:
        """The same in words."""
        where = self.where()
        return f"module {where!r}" if where else "the model's own forward"

    def place(self) -> str:
        """The same with the user's line, which takes as long to look up as a small op to run."""
        line = user_line()
        return self.site() + (f" ({line})" if line else "")

    def no_rule(self, func: Callable[..., Any]) -> NotImplementedError:
        """The error that says which function has no rule, and where it was called."""
        name = resolve_name(func) or getattr(func, "__name__", repr(func))
        return NotImplementedError(
            f"{self.method}: no rule for {name}, called in {self.place()}. Methods gradient, "
            "taylor, link, logits and ablation work with any function"
        )

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if writes(func):
            self._keeper.before_writing(args[0])
        op = getattr(func, "op", None)
        if isinstance(op, type) and issubclass(op, Op):
            return self.call(op, args)
        if not how_many_depend((args, kwargs)):
            return func(*args, **kwargs)
        output = self.treat(func, args, kwargs)
        if output is not NotImplemented:
            return output
        entry = BY_TORCH_FUNCTION.get(func)
        if entry is not None and entry not in self._sending:
            return self._send(entry, func, args, kwargs)
        if hasattr(func, "__wrapped__"):  # Python over other torch functions: 1 / x, 2 ** x
            with self:
                return func.__wrapped__(*args, **kwargs)
        output = func(*args, **kwargs)
        known = func in CUT or func in VIEWS or getattr(func, "__name__", "") == "__get__"
        if not known and how_many_depend(output):
            self.refuse(func, output)
        return output

    def _send(
        self, entry: Entry, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self._sending.append(entry)
        try:
            with self:  # a mode is off in its own handler; the op must reach the tape
                given = inspect.signature(entry.functional).bind(*args, **kwargs).arguments
                if func in entry.inplace or given.get("inplace"):
                    # The op keeps its arguments: give it a copy, then write as was asked.
                    target = given.pop(next(iter(given)))
                    given.pop("inplace", None)
                    return target.copy_(entry.functional(target.clone(), **given))
                return entry.functional(*args, **kwargs)
        finally:
            self._sending.pop()


def run_op(ctx: Any, tape: Tape, op: Any, args: tuple[Any, ...]) -> Any:
    """Forward of an op inside a Function; ``ctx.kept`` has the call.

    Args:
        ctx: of the Function.
        tape: that keeps the call.
        op: has ``forward(*args)``.
        args: tensors and constants.

    Returns:
        The op's output. All tensors in it but the first have no derivative.
    """
    output = op.forward(*args)
    ctx.kept = tape.keep(op, args, output)
    if isinstance(output, tuple):
        ctx.mark_non_differentiable(*(o for o in output[1:] if isinstance(o, Tensor)))
    return output


def tensors_in(value: Any) -> Iterable[Tensor]:
    """Every tensor among the arguments of a call, or in what it returned."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(tuple(value.values()))


def how_many_depend(value: Any) -> int:
    """How many tensors in it depend on what blame is traced to."""
    return sum(t.requires_grad for t in tensors_in(value))
