"""What all recurrent layers share: sequences cut into steps, and derivatives back through time.

One op is one layer (in one direction or in both) over a whole sequence. Its forward is torch's own
kernel; what the kernel does not hand out, its gates, is computed again for all steps at once from
the states before each step, which are the output itself, one step later. Between two runs, or
between a run and itself, a layer is then linear with known coefficients, and one loop back over
the steps gives the secant or the gradient (back-propagation through time, Werbos 1990).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from torchbp.ops.base import Op, midpoint, wide
from torchbp.ops.elementwise import Elementwise
from torchbp.ops.linear import Linear
from torchbp.ops.recurrent_steps import Parts, steps_of
from torchbp.ops.relevance import Rule, quotient, weighted
from torchbp.ops.sample_factors import Factor, Factors, Outer, Rows

#: Weights of one direction: input-hidden, hidden-hidden, their biases, projection.
N_WEIGHTS = 5


class Run:
    """One direction of one call: its arguments, and the state before each step.

    Attributes:
        steps: how rows divide into time steps.
        x: inputs ``(rows, F)``.
        out: states after each step ``(rows, P)``.
        before: states before each step.
        h0: initial state ``(N, P)``.
        c0: initial cell state ``(N, H)``, or ``None``.
        weights: the five of this direction, ``None`` where there is none.
    """

    def __init__(self, args: tuple[Any, ...], rows: Tensor, direction: int) -> None:
        x, sizes, _, h0, c0, *weights = args
        width = h0.shape[-1]
        first = direction * N_WEIGHTS
        self.steps = steps_of(x, sizes, direction)
        self.x = wide(x.reshape(-1, x.shape[-1]))
        self.out = wide(rows[:, direction * width : (direction + 1) * width])
        self.h0 = wide(h0[direction])
        self.c0: Any = None if c0 is None else wide(c0[direction])
        self.weights: list[Any] = [
            None if w is None else wide(w) for w in weights[first : first + N_WEIGHTS]
        ]
        self.before = self.steps.before(self.out, self.h0)

    def gates(self) -> tuple[Tensor, Tensor]:
        """What input and state contribute to the gates, each ``(rows, G)``, biases included."""
        w_ih, w_hh, b_ih, b_hh, _ = self.weights
        return affine(self.x, w_ih, b_ih), affine(self.before, w_hh, b_hh)

    def all_gates(self) -> Tensor:
        """The sum of :meth:`gates`."""
        w_ih, w_hh, b_ih, b_hh, _ = self.weights
        of_x = affine(self.x, w_ih, None if b_ih is None else b_ih + b_hh)
        return torch.addmm(of_x, self.before, w_hh.mT)


def affine(x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
    """``x Wᵀ + b``."""
    return x @ weight.mT if bias is None else torch.addmm(bias, x, weight.mT)


def through(op: type[Elementwise], v: Tensor, now: Any, ref: Any) -> Tensor:
    """``v`` times the slope of ``op`` between two runs; each given as (argument, value)."""
    if now is ref:
        return op.tangent(v, now[1])
    result = op.secant(v, (now[0],), (ref[0],), now[1], ref[1])[0]
    assert result is not None
    return result


class Back(NamedTuple):
    """What comes back from one direction.

    Attributes:
        of_input_gates: ``(rows, G)``, of what the input contributes to the gates.
        of_state_gates: the same of what the state contributes.
        of_h0: ``(N, P)``.
        of_c0: ``(N, H)``, or ``None``.
        of_projection: ``(P, H)``, or ``None``.
    """

    of_input_gates: Tensor
    of_state_gates: Tensor
    of_h0: Tensor
    of_c0: Tensor | None = None
    of_projection: Tensor | None = None


class RecurrentLayer(Op):
    """A recurrent layer over a sequence, from ``(x, sizes, recording, h0, c0, *weights)``.

    ``x`` is ``(T, N, F)`` with ``sizes=None``, or packed ``(rows, F)`` with the number of sequences
    in each step; ``recording`` is the caller's grad mode, which some kernels go by. ``h0`` is
    ``(D, N, P)`` for D directions, ``c0`` ``(D, N, H)`` or ``None``; then five weights for each
    direction, ``None`` where there is none. The output has the states of all directions side by
    side. A subclass gives ``native`` (torch's kernel), ``unrolled`` (the same for vmap, which
    torch's kernels refuse), and what one direction does:

    * ``inner(run)``: the gates and what follows from them, for all steps;
    * ``slopes(now, ref)``: the coefficients of the linear map between two runs;
    * ``back(run, w, slopes, errors, cell_errors)``: the transposed map, a :class:`Back`; ``w`` are
      the weights midway between the runs;
    * ``ahead(run, moved, inner, slopes)``: the map itself, from the tangents ``moved``;
    * ``shares(run, inner, arriving, cell, rule)``: LRP, relevance of x, h0 and c0;
    * ``quick(grad_output, args, output, kept, needs)``, if it can do better: all gradients at once,
      from whatever ``native`` returned beside the output.
    """

    native: ClassVar[Callable[..., Any]]
    unrolled: ClassVar[Callable[..., Any]]
    inner: ClassVar[Callable[..., Any]]
    slopes: ClassVar[Callable[..., Any]]
    back: ClassVar[Callable[..., Back]]
    ahead: ClassVar[Callable[..., Any]]
    shares: ClassVar[Callable[..., Any]]
    quick: ClassVar[Callable[..., Any] | None] = None
    samples_in = 0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Close the derivatives over the class, then give it its ``call``."""
        if hasattr(cls, "native"):
            methods: dict[str, Callable[..., Any]] = {
                "forward": _forward(cls),
                "setup_context": _setup_context,
                "backward": _backward(cls),
                "jvp": _jvp(cls),
                "secant": _secant(cls),
            }
            for name, method in methods.items():
                setattr(cls, name, staticmethod(method))
        super().__init_subclass__(**kwargs)

    @staticmethod
    def rows(output: Tensor, args: tuple[Any, ...]) -> tuple[Tensor, Any]:
        """States ``(rows, D P)`` after each step, and the last cell states ``(D, N, H)`` if any."""
        return output.reshape(-1, output.shape[-1]), None

    @staticmethod
    def outputs(output: Tensor, x: Tensor, h0: Tensor, c0: Any) -> tuple[Tensor, Any]:
        """States ``(*, D P)`` in the layout of x, and the last cell states if any."""
        return output, None

    @staticmethod
    def packed(rows: Tensor, cells: Any, args: tuple[Any, ...]) -> Tensor:
        """The inverse of :meth:`rows`."""
        x = args[0]
        return rows.reshape(*x.shape[:-1], rows.shape[-1])

    @staticmethod
    def back_in_place(run: Run, errors: Tensor, cell_errors: Any) -> Back | None:
        """The gradient once more, for speed; ``None`` where it would gain nothing."""
        return None

    @classmethod
    def sample_factors(cls, grad_output: Tensor, args: tuple[Any, ...], output: Any) -> Factors:
        """Errors of the gates times what came into them; packed rows keep no samples apart."""
        x, sizes, *_ = args
        if output is None or (sizes is not None and len(sizes) > 1):
            return (None,) * len(args)
        (errors, cells), (rows, _) = cls.rows(grad_output, args), cls.rows(_first(output), args)
        found: list[Factor | None] = [None] * 5
        for d, part in enumerate(wide(errors).split(args[3].shape[-1], 1)):
            run = Run(args, rows, d)
            inner = cls.inner(run)
            of_cells = None if cells is None else wide(cells[d])
            back = cls.back(run, run.weights, cls.slopes(inner, inner), part, of_cells)
            found += _factors(back, run, x.shape[:-1])
        return tuple(found)

    @classmethod
    def relevance(
        cls, relevance: Tensor, rule: Rule, args: tuple[Any, ...], output: Any
    ) -> tuple[Tensor | None, ...]:
        """Gates scale and get none, the signal takes all (Arras et al. 2017)."""
        (rows, _), (arriving, cells) = cls.rows(_first(output), args), cls.rows(relevance, args)
        x, _, _, h0, c0, *weights = args
        of_x, of_h0, of_c0 = torch.zeros_like(x), [], []
        for d, part in enumerate(arriving.split(h0.shape[-1], 1)):
            run = Run(args, rows, d)
            cell = None if cells is None else cells[d]
            share, share_h, share_c = cls.shares(run, cls.inner(run), part, cell, rule)
            of_x = of_x + share.reshape(x.shape)
            of_h0.append(share_h)
            of_c0.append(share_c)
        initial = torch.stack(of_h0), None if c0 is None else torch.stack(of_c0)
        return of_x, None, None, *initial, *(None,) * len(weights)


def _forward(op: type[RecurrentLayer]) -> Callable[..., Any]:
    def forward(*args: Any) -> Any:
        if not torch.compiler.is_compiling() and any(map(_is_batched, args)):
            return op.packed(*_unrolled(op, args), args)
        return op.native(*args)

    return forward


def _is_batched(arg: Any) -> bool:
    return isinstance(arg, Tensor) and torch._C._functorch.is_batchedtensor(arg)


def _unrolled(op: type[RecurrentLayer], args: tuple[Any, ...]) -> tuple[Tensor, Any]:
    x, sizes, _, h0, c0, *weights = args
    rows, cells = [], []
    for d in range(h0.shape[0]):
        steps, own = steps_of(x, sizes, d), weights[d * N_WEIGHTS : (d + 1) * N_WEIGHTS]
        parts = steps.split(x.reshape(-1, x.shape[-1]))
        states, last = op.unrolled(parts, h0[d], None if c0 is None else c0[d], own)
        rows.append(steps.join(states))
        cells.append(last)
    return torch.cat(rows, 1), None if c0 is None else torch.stack(cells)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    output, *kept = output if isinstance(output, tuple) else (output,)
    ctx.constants, ctx.n_kept = inputs[1:3], len(kept)
    if kept:
        ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    tensors = (*kept, inputs[0], *inputs[3:], output)
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def _saved(ctx: Any) -> tuple[tuple[Any, ...], Tensor, Parts]:
    tensors, n = ctx.saved_tensors, ctx.n_kept
    return (tensors[n], *ctx.constants, *tensors[n + 1 : -1]), tensors[-1], tensors[:n]


def _first(output: Any) -> Tensor:
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result


def _backward(op: type[RecurrentLayer]) -> Callable[..., Any]:
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Any:
        if grad_output is None:
            return (None,) * len(ctx.needs_input_grad)
        args, output, kept = _saved(ctx)
        if op.quick is not None and may_write(grad_output) and wide(output) is output:
            found = op.quick(grad_output, args, output, kept, ctx.needs_input_grad)
            if found is not None:
                return found
        return _pull(op, grad_output, args, args, output, output, ctx.needs_input_grad)

    return backward


def _secant(op: type[RecurrentLayer]) -> Callable[..., Any]:
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        needs = tuple(isinstance(a, Tensor) for a in args)
        return _pull(op, multiplier, args, args0, _first(output), _first(output0), needs)

    return secant


def _pull(
    op: type[RecurrentLayer],
    multiplier: Tensor,
    args: tuple[Any, ...],
    args0: tuple[Any, ...],
    output: Tensor,
    output0: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Multipliers of every argument between two runs; with the same run twice, the gradients."""
    h0, same = args[3], args is args0
    (errors, cells), (rows, _) = op.rows(multiplier, args), op.rows(output, args)
    rows0 = rows if same else op.rows(output0, args0)[0]
    of_x: Any = None
    of_h0: list[Tensor] = []
    of_c0: list[Any] = []
    of_weights: list[Tensor | None] = []
    for d, part in enumerate(wide(errors).split(h0.shape[-1], 1)):
        run = Run(args, rows, d)
        ref = run if same else Run(args0, rows0, d)
        w = [midpoint(a, b) for a, b in zip(run.weights, ref.weights, strict=True)]
        of_cells = None if cells is None else wide(cells[d])
        back = op.back_in_place(run, part, of_cells) if same and may_write(part) else None
        if back is None:
            inner = op.inner(run)
            slopes = op.slopes(inner, inner if same else op.inner(ref))
            back = op.back(run, w, slopes, part, of_cells)
        if needs[0]:
            share = back.of_input_gates @ w[0]
            of_x = share if of_x is None else of_x + share
        of_h0.append(back.of_h0)
        of_c0.append(back.of_c0)
        first = 5 + d * N_WEIGHTS
        of_weights += _of_weights(back, run, ref, needs[first : first + N_WEIGHTS])
    results = [
        of_x.reshape(args[0].shape) if needs[0] else None,
        None,
        None,
        torch.stack(of_h0) if needs[3] else None,
        torch.stack(of_c0) if needs[4] else None,
        *of_weights,
    ]
    return tuple(None if r is None else r.to(a.dtype) for r, a in zip(results, args, strict=True))


def may_write(errors: Tensor) -> bool:
    """Whether nothing follows what backward does: neither autograd nor vmap nor a compiler."""
    return not (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._functorch.is_legacy_batchedtensor(errors)  # is_grads_batched
    )


def _of_weights(back: Back, run: Run, ref: Run, needs: Sequence[bool]) -> list[Tensor | None]:
    ih, hh, b_ih, b_hh, hr = needs
    of_input, of_state = back.of_input_gates, back.of_state_gates
    of_b_ih = of_input.sum(0) if b_ih or b_hh else None
    return [
        of_input.mT @ midpoint(run.x, ref.x) if ih else None,
        of_state.mT @ midpoint(run.before, ref.before) if hh else None,
        of_b_ih if b_ih else None,
        (of_b_ih if of_state is of_input else of_state.sum(0)) if b_hh else None,
        back.of_projection if hr else None,
    ]


def _factors(back: Back, run: Run, steps: Sequence[int]) -> list[Factor | None]:
    gates = [t.reshape(*steps, -1) for t in (back.of_input_gates, back.of_state_gates)]
    came = [t.reshape(*steps, -1) for t in (run.x, run.before)]
    biases = [
        None if b is None else Rows(g, b.shape, b)
        for g, b in zip(gates, run.weights[2:4], strict=True)
    ]
    return [Outer(gates[0], came[0]), Outer(gates[1], came[1]), *biases, None]


def _jvp(op: type[RecurrentLayer]) -> Callable[..., Any]:
    def jvp(ctx: Any, *tangents: Any) -> Any:
        args, output, kept = _saved(ctx)
        rows, _ = op.rows(output, args)
        # Absent tangents are zeros: forward mode is not the hot path.
        tangents = tuple(
            t if isinstance(t, Tensor) else torch.zeros_like(a) if isinstance(a, Tensor) else a
            for t, a in zip(tangents, args, strict=True)
        )
        states, cells = [], []
        for d in range(args[3].shape[0]):
            run, moved = Run(args, rows, d), Run(tangents, rows, d)
            inner = op.inner(run)
            after, last = op.ahead(run, moved, inner, op.slopes(inner, inner))
            states.append(run.steps.join(after))
            cells.append(last)
        t_cells = None if args[4] is None else torch.stack(cells)
        moved_output = op.packed(torch.cat(states, 1), t_cells, args).to(output.dtype)
        return (moved_output, *(None for _ in kept)) if kept else moved_output

    return jvp


def moved_gates(run: Run, moved: Run) -> tuple[Tensor, Tensor]:
    """Tangents of the two contributions to the gates, without what the states before add."""
    w_ih, t_ih, t_hh = run.weights[0], moved.weights[0], moved.weights[1]
    of_x = affine(moved.x, w_ih, moved.weights[2]) + affine(run.x, t_ih, None)
    return of_x, affine(run.before, t_hh, moved.weights[3])


def linear_share(
    arriving: Tensor, x: Tensor, weight: Any, bias: Any, z: Tensor, rule: Rule
) -> Tensor:
    """LRP of ``z = x Wᵀ + b``."""
    share = weighted(Linear, arriving, rule, (x, weight, bias), z)[0]
    assert share is not None
    return share


def linear_shares(
    arriving: Tensor, x: Tensor, h: Tensor, weights: Sequence[Any], z: Tensor, rule: Rule
) -> tuple[Tensor, Tensor]:
    """LRP of ``z = x Wᵀ + h Uᵀ + b``, as of one linear layer on both."""
    w_ih, w_hh, b_ih, b_hh = weights
    both, weight = torch.cat([x, h], 1), torch.cat([w_ih, w_hh], 1)
    share = linear_share(arriving, both, weight, None if b_ih is None else b_ih + b_hh, z, rule)
    of_x, of_h = share.split([x.shape[1], h.shape[1]], 1)
    return of_x, of_h


def sum_shares(arriving: Tensor, total: Tensor, parts: Parts, rule: Rule) -> list[Tensor]:
    """LRP of a sum: in proportion to the parts."""
    per_unit = quotient(arriving, total, rule.epsilon)
    return [part * per_unit for part in parts]
