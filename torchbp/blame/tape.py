"""Two runs of one network, paired op by op: the secant tape.

A ``TorchFunctionMode`` sees every torch function a model calls, whether from a torch.nn module, a
torchbp module or the user's own forward. On the first run it notes the arguments and output of
every op that has a secant rule; on the next run each op is paired with its note, and autograd
carries multipliers instead of gradients through it. Linear functions need no note but of their
masks and indices, which must be the same in both runs: the secant of a linear map is its tangent,
so torch's own backward is right. Any other function on the path from input to loss is refused by
name.

The mode was chosen over ``torch.fx`` and ``torch.export`` because it needs no graph capture: data
dependent Python in a forward runs as it is, and so do tensors of any layout.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils import _pytree as pytree

import torchbp.ops  # noqa: F401  fills the registry
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


class _Quadratic:
    """A function of degree two as if it were an op, its tensors taken out of the arguments."""

    def __init__(self, func: Callable[..., Any], spec: Any) -> None:
        self.func, self.spec = func, spec
        self.__name__ = getattr(func, "__name__", repr(func))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Quadratic) and (self.func, self.spec) == (other.func, other.spec)

    def forward(self, *leaves: Any) -> Any:
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


class Note:
    """Arguments and output of one op in one run, detached."""

    __slots__ = ("args", "op", "output")

    def __init__(self, op: Any, args: tuple[Any, ...], output: Any) -> None:
        self.op = op
        self.args = tuple(_detached(a) for a in args)
        self.output = _detached(output)


class SecantTape(TorchFunctionMode):
    """Pairs a run with the one before it.

    Use :meth:`next_run` before every forward pass, and run it inside ``with tape:``. In the first
    run nothing is paired; from the second on, ``torch.autograd.grad`` through the results gives
    multipliers with respect to the run before.
    """

    def __init__(self) -> None:
        super().__init__()
        self._modules: list[str] = []
        self._notes: list[Note] = []
        self._before: list[Note] | None = None
        self._runs = 0
        self._sending: list[Entry] = []

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

    def _where(self) -> str:
        return self._modules[-1] if self._modules else ""

    def _place(self) -> str:
        where = self._where()
        return f"module {where!r}" if where else "the model's own forward"

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        op = getattr(func, "op", None)
        if isinstance(op, type) and issubclass(op, Op):
            if op.no_secant and self._before is not None and _how_many_depend(args):
                raise NotImplementedError(
                    f"secant: {op.__name__}, called in {self._place()}, has no rule: {op.no_secant}"
                )
            return self._call(op, args)
        if not _how_many_depend((args, kwargs)):
            return func(*args, **kwargs)
        if func in LINEAR or self._tangent_is_right(func, args, kwargs):
            if func not in SHAPED_LIKE:
                self._note_choices(func, args, kwargs)
            return func(*args, **kwargs)
        if func in QUADRATIC and (func not in ANY_DEGREE or _how_many_depend(args) == 2):
            leaves, spec = pytree.tree_flatten((args, kwargs))
            return self._call(_Quadratic(func, spec), tuple(leaves))
        entry = BY_TORCH_FUNCTION.get(func)
        if entry is not None and entry not in self._sending:
            return self._send(entry, func, args, kwargs)
        if hasattr(func, "__wrapped__"):  # Python over other torch functions: 1 / x, 2 ** x
            with self:
                return func.__wrapped__(*args, **kwargs)
        output = func(*args, **kwargs)
        if self._before is not None:
            self._refuse_unknown(func, output)
        return output

    @staticmethod
    def _tangent_is_right(
        func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        """Whether only the argument that the function is linear in depends on the input."""
        if func in QUOTIENT:
            rounds = kwargs.get("rounding_mode") is not None
            return not (rounds or _how_many_depend((args[1:], kwargs)))
        product = func in PRODUCT_IN_PLACE or func in PRODUCTS
        return product and _how_many_depend((args, kwargs)) == 1

    def _note_choices(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Masks and indices: a function is linear only as long as they are the same."""
        choices = tuple(t for t in _tensors((args, kwargs)) if not _has_derivative(t))
        if not choices:
            return
        if self._before is not None:
            before = self._partner(func, choices).args
            if not all(map(torch.equal, choices, before)):
                raise RuntimeError(
                    f"secant: {func.__name__}, called in {self._place()}, takes a mask or indices "
                    "that differ between the input and the reference: they must not depend on "
                    "values. A piecewise function such as torch.where(x > 0, x, 0) has a rule if "
                    "it is called by its name, torch.relu"
                )
        self._notes.append(Note(func, choices, None))

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

    def _call(self, op: Any, args: tuple[Any, ...]) -> Any:
        partner = None if self._before is None else self._partner(op, args)
        output = _Paired.apply(op, partner, *args)
        self._notes.append(Note(op, args, output))
        return output

    def _partner(self, op: Any, args: tuple[Any, ...]) -> Note:
        assert self._before is not None
        k = len(self._notes)
        note = self._before[k] if k < len(self._before) else None
        if note is None or note.op != op or _shapes(note.args) != _shapes(args):
            came = f"{op.__name__}{_shapes(args)} in {self._where() or 'the model'}"
            expected = "nothing more" if note is None else f"{note.op.__name__}{_shapes(note.args)}"
            raise RuntimeError(
                f"secant: the run on the input and the run on the reference differ: call {k} is "
                f"{came}, the reference has {expected}. Control flow must not depend on values, "
                "and the baseline must have the input's shape"
            )
        return note

    def _refuse_unknown(self, func: Callable[..., Any], output: Any) -> None:
        if func in CUT or not _depends(output):
            return
        if func in VIEWS or getattr(func, "__name__", "") == "__get__":
            return
        name = resolve_name(func) or getattr(func, "__name__", repr(func))
        raise NotImplementedError(
            f"secant: no rule for {name}, called in {self._place()}. Methods gradient, taylor, "
            "link, logits and ablation work with any function"
        )


class _Paired(torch.autograd.Function):
    """An op whose backward is its secant with respect to a noted run; the first run has none."""

    @staticmethod
    def forward(ctx: Any, op: Any, note: Note | None, *args: Any) -> Any:
        output = op.forward(*args)
        ctx.note, ctx.constants = note, tuple(None if isinstance(a, Tensor) else a for a in args)
        ctx.is_tensor = tuple(isinstance(a, Tensor) for a in args)
        ctx.is_tuple = isinstance(output, tuple)
        outputs = output if ctx.is_tuple else (output,)
        ctx.count = len(outputs)
        ctx.mark_non_differentiable(*(o for o in outputs[1:] if isinstance(o, Tensor)))
        if note is not None:
            ctx.save_for_backward(*outputs, *(a for a in args if isinstance(a, Tensor)))
        return output

    @staticmethod
    def backward(ctx: Any, *multipliers: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        outputs, tensors = saved[: ctx.count], iter(saved[ctx.count :])
        args = tuple(
            next(tensors) if is_tensor else constant
            for is_tensor, constant in zip(ctx.is_tensor, ctx.constants, strict=True)
        )
        note = ctx.note
        # Parameters are shared by both runs: the very same object means "no difference".
        args0 = tuple(
            a if isinstance(a, Tensor) and a.data_ptr() == a0.data_ptr() and a.shape == a0.shape
            else a0
            for a, a0 in zip(args, note.args, strict=True)
        )  # fmt: skip
        output = outputs if ctx.is_tuple else outputs[0]
        result = note.op.secant(multipliers[0], args, args0, output, note.output)
        needs = ctx.needs_input_grad[2:]
        return (None, None, *(r if n else None for r, n in zip(result, needs, strict=True)))


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, tuple):
        return tuple(_detached(v) for v in value)
    return value


def _shapes(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(tuple(a.shape) if isinstance(a, Tensor) else None for a in args)


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))


def _has_derivative(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _depends(value: Any) -> bool:
    return any(t.requires_grad for t in _tensors(value))


def _how_many_depend(args: Any) -> int:
    return sum(t.requires_grad for t in _tensors(args))
