"""Long short-term memory (Hochreiter and Schmidhuber 1997; forget gate: Gers et al. 2000)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchbp.ops.activation import Sigmoid, Tanh
from torchbp.ops.base import midpoint
from torchbp.ops.recurrent import (
    Back,
    RecurrentLayer,
    Run,
    affine,
    linear_share,
    linear_shares,
    moved_gates,
    sum_shares,
    through,
)
from torchbp.ops.recurrent_stack import in_dtype, layer_samples, run_layers
from torchbp.ops.recurrent_steps import Parts, exchange, fit, initial_of
from torchbp.ops.registry import Maker, Sample, register
from torchbp.ops.relevance import Rule


class Inner(NamedTuple):
    """Gates before and after their activations, cell states, and ``m``: what is projected."""

    gates: Parts
    i: Tensor
    f: Tensor
    g: Tensor
    o: Tensor
    c_before: Tensor
    c: Tensor
    tanh_c: Tensor
    m: Any


class Slopes(NamedTuple):
    """``c' = f c + Σ cell_k a_k`` and ``m' = out f c + Σ hidden_k a_k`` in the gates ``a``."""

    f: Tensor
    out: Tensor
    cell: Tensor
    hidden: Tensor
    projected: Any


class LSTMLayer(RecurrentLayer):
    """``c_t = f c_(t-1) + i g``, ``h_t = o tanh c_t``, projected by ``W_hr`` if there is one.

    ``i, f, o = σ(a)``, ``g = tanh(a)`` with ``a = W_ih x + b_ih + W_hh h + b_hh`` in the order
    i, f, g, o. With ``A = o (1 - tanh² c)`` going back a step is ::

        ∂c += A ∂h;  ∂a_i = ∂c g i';  ∂a_f = ∂c c_(t-1) f';  ∂a_g = ∂c i g';
        ∂a_o = ∂h tanh(c) o';  ∂c_(t-1) = f ∂c;  ∂h_(t-1) = W_hhᵀ ∂a

    Secant: the same, with secant slopes of σ and tanh and each factor of a product midway between
    the runs. The output is flat: the states of all steps, then the last cell states.
    """

    autocast = {"cuda": "low"}

    @staticmethod
    def rows(output: Tensor, args: tuple[Any, ...]) -> tuple[Tensor, Any]:
        x, _, _, h0, c0, *_ = args
        n, width = x.numel() // max(x.shape[-1], 1), h0.shape[0] * h0.shape[-1]
        return output[: n * width].reshape(n, width), output[n * width :].reshape(c0.shape)

    @staticmethod
    def outputs(output: Tensor, x: Tensor, h0: Tensor, c0: Any) -> tuple[Tensor, Any]:
        rows, cells = LSTMLayer.rows(output, (x, None, None, h0, c0))
        return rows.reshape(*x.shape[:-1], rows.shape[-1]), cells

    @staticmethod
    def packed(rows: Tensor, cells: Any, args: tuple[Any, ...]) -> Tensor:
        return torch.cat([rows.reshape(-1), cells.reshape(-1)])

    @staticmethod
    def native(
        x: Tensor, sizes: Any, recording: bool, h0: Tensor, c0: Tensor, *weights: Any
    ) -> Tensor:
        given = [w for w in weights if w is not None]
        setting = weights[2] is not None, 1, 0.0, False, h0.shape[0] == 2
        if recording and not torch.compiler.is_compiling():
            # oneDNN has another kernel for training, whose last bits differ.
            x, h0, c0, *given = (t.detach() for t in (x, h0, c0, *given))
            with torch.enable_grad():
                states, _, cells = _lstm(x, sizes, (h0, c0), given, setting)
        else:
            states, _, cells = _lstm(x, sizes, (h0, c0), given, setting)
        return torch.cat([states.reshape(-1), cells.reshape(-1)])

    @staticmethod
    def unrolled(
        xs: Parts, h0: Tensor, c0: Tensor, weights: list[Any]
    ) -> tuple[list[Tensor], Tensor]:
        w_ih, w_hh, b_ih, b_hh, w_hr = weights
        h, c, states, left = h0[: xs[0].shape[0]], c0[: xs[0].shape[0]], [], []
        for x in xs:
            left.append(c[x.shape[0] :])
            h, c = fit(h, x, h0), fit(c, x, c0)
            i, f, g, o = (affine(x, w_ih, b_ih) + affine(h, w_hh, b_hh)).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            h = h if w_hr is None else h @ w_hr.mT
            states.append(h)
        return states, torch.cat([c, *left[::-1]])

    @staticmethod
    def inner(run: Run) -> Inner:
        gates = run.all_gates().chunk(4, 1)
        i, f, o = (torch.sigmoid(gates[k]) for k in (0, 1, 3))
        g = torch.tanh(gates[2])
        c0 = run.c0
        split = run.steps.split
        before, after, c = [], [], c0
        for forget, new in zip(split(f), split(i * g), strict=True):
            before.append(fit(c, new, c0))
            c = torch.addcmul(new, forget, before[-1])
            after.append(c)
        c = run.steps.join(after)
        tanh_c = torch.tanh(c)
        m = None if run.weights[4] is None else o * tanh_c
        return Inner(gates, i, f, g, o, run.steps.join(before), c, tanh_c, m)

    @staticmethod
    def slopes(now: Inner, ref: Inner) -> Slopes:
        def gate(op: Any, v: Tensor, k: int, name: int) -> Tensor:
            a = now.gates[k], now[name]
            return through(op, v, a, a if now is ref else (ref.gates[k], ref[name]))

        i, f, g, o, before, _, tanh_c, m = (
            midpoint(a, b) for a, b in zip(now[1:], ref[1:], strict=True)
        )
        c = now.c, now.tanh_c
        out = through(Tanh, o, c, c if now is ref else (ref.c, ref.tanh_c))
        of_i, of_f, of_g = gate(Sigmoid, g, 0, 1), gate(Sigmoid, before, 1, 2), gate(Tanh, i, 2, 3)
        of_o = gate(Sigmoid, tanh_c, 3, 4)
        cell = torch.stack([of_i, of_f, of_g, torch.zeros_like(of_o)], 1)
        hidden = torch.stack([out * of_i, out * of_f, out * of_g, of_o], 1)
        return Slopes(f, out, cell, hidden, m)

    @staticmethod
    def back(run: Run, w: list[Any], slopes: Slopes, errors: Tensor, cell_errors: Tensor) -> Back:
        _, w_hh, _, _, w_hr = w
        parts = [run.steps.split(t) for t in (errors, *slopes[:4])]
        left_h: list[Tensor] = []
        left_c: list[Tensor] = []
        gates, errors_h = [], []
        dh, dc = parts[0][-1], cell_errors[: parts[0][-1].shape[0]]
        last = len(parts[0]) - 1
        for k in range(last, -1, -1):
            _, f, out, cell, hidden = (p[k] for p in parts)
            dm = dh if w_hr is None else dh @ w_hr
            da = torch.addcmul(dm.unsqueeze(1) * hidden, dc.unsqueeze(1), cell)
            da = da.reshape(da.shape[0], w_hh.shape[0])
            dc = torch.addcmul(dc, dm, out) * f
            gates.append(da)
            errors_h.append(dh)
            if k == 0:
                dh = da @ w_hh
                break
            arriving = parts[0][k - 1]
            dh = exchange(torch.addmm(fit(arriving, da), da, w_hh), arriving, left_h)
            dc = exchange(dc, cell_errors[: arriving.shape[0]], left_c)
        of_gates = run.steps.join(gates[::-1])
        of_projection = None
        if w_hr is not None:
            of_projection = run.steps.join(errors_h[::-1]).mT @ slopes.projected
        return Back(
            of_gates, of_gates, initial_of(dh, left_h), initial_of(dc, left_c), of_projection
        )

    @staticmethod
    def back_in_place(run: Run, errors: Tensor, cell_errors: Any) -> Back | None:
        """The gradient once more, in as few passes over memory as it takes."""
        n = run.h0.shape[0]
        if run.weights[4] is not None or run.steps.sizes[-1] != n or not n:
            return None
        gates = run.all_gates().reshape(-1, 4, cell_errors.shape[-1])
        i, f, g, o = gates.unbind(1)
        gates[:, :2].sigmoid_()
        g.tanh_()
        o.sigmoid_()
        split = run.steps.split
        states = [run.c0, *split(i * g)]
        for k, forget in enumerate(split(f)):
            states[k + 1].addcmul_(forget, states[k])
        before, tanh_c = run.steps.join(states[:-1]), run.steps.join(states[1:]).tanh_()
        # What multiplies ∂c in the gates i, f and g, and ∂h in o; then what ∂h adds to ∂c.
        slopes = torch.addcmul(gates, gates, gates, value=-1)
        torch.addcmul(
            torch.ones((), dtype=g.dtype, device=g.device), g, g, value=-1, out=slopes[:, 2]
        )
        for gate, factor in enumerate((g, before, i, tanh_c)):
            slopes[:, gate].mul_(factor)
        out = torch.addcmul(o, before.copy_(o).mul_(tanh_c), tanh_c, value=-1)
        w_hh = run.weights[1]
        flat = slopes.reshape(-1, w_hh.shape[0])
        parts = zip(
            *(split(t)[::-1] for t in (f, out, slopes[:, :3], slopes[:, 3], flat)),
            (*split(errors)[-2::-1], errors.new_zeros(n, errors.shape[1])),
            strict=True,
        )
        dh, dc = split(errors)[-1], cell_errors.clone()
        for forget, slope, of_c, of_h, of_gates, arriving in parts:
            dc.addcmul_(dh, slope)
            of_c.mul_(dc.unsqueeze(1))
            of_h.mul_(dh)
            dc.mul_(forget)
            dh = torch.addmm(arriving, of_gates, w_hh)
        return Back(flat, flat, dh, dc)

    @staticmethod
    def ahead(run: Run, moved: Run, inner: Inner, slopes: Slopes) -> tuple[list[Tensor], Tensor]:
        w_hh, w_hr, t_hr = run.weights[1], run.weights[4], moved.weights[4]
        split = run.steps.split
        direct = split(torch.add(*moved_gates(run, moved)))
        t_projected = None if w_hr is None else split(slopes.projected @ t_hr.mT)
        parts = zip(direct, *(split(t) for t in slopes[:4]), strict=True)
        first = direct[0].shape[0]
        th, tc, states, left = moved.h0[:first], moved.c0[:first], [], []
        for k, (given, f, out, cell, hidden) in enumerate(parts):
            left.append(tc[given.shape[0] :])
            th, tc = fit(th, given, moved.h0), fit(tc, given, moved.c0)
            ta = (given + th @ w_hh.mT).reshape(hidden.shape)
            kept = f * tc
            tc = kept + (cell * ta).sum(1)
            th = out * kept + (hidden * ta).sum(1)
            if t_projected is not None:
                th = th @ w_hr.mT + t_projected[k]
            states.append(th)
        return states, torch.cat([tc, *left[::-1]])

    @staticmethod
    def shares(
        run: Run, inner: Inner, arriving: Tensor, cell: Tensor, rule: Rule
    ) -> tuple[Tensor, Tensor, Tensor]:
        w_ih, w_hh, b_ih, b_hh, w_hr = run.weights
        n = w_hh.shape[0] // 4
        of_g = slice(2 * n, 3 * n)
        weights = [None if t is None else t[of_g] for t in (w_ih, w_hh, b_ih, b_hh)]
        tensors = (arriving, run.x, run.before, run.out, inner.gates[2], inner.c,
                   inner.i * inner.g, inner.f * inner.c_before)  # fmt: skip
        parts = [run.steps.split(t) for t in tensors]
        projected = () if inner.m is None else run.steps.split(inner.m)
        left_h: list[Tensor] = []
        left_c: list[Tensor] = []
        of_x = []
        rh, rc = parts[0][-1], cell[: parts[0][-1].shape[0]]
        for k in range(len(parts[0]) - 1, -1, -1):
            _, x, before, out, pre, c, new, kept = (p[k] for p in parts)
            if w_hr is not None:
                rh = linear_share(rh, projected[k], w_hr, None, out, rule)
            rg, rc = sum_shares(rc + rh, c, (new, kept), rule)
            share, rh = linear_shares(rg, x, before, weights, pre, rule)
            of_x.append(share)
            if k:
                earlier = parts[0][k - 1]
                rh = exchange(fit(earlier, rh) + rh, earlier, left_h)
                rc = exchange(rc, cell[: earlier.shape[0]], left_c)
        return run.steps.join(of_x[::-1]), initial_of(rh, left_h), initial_of(rc, left_c)


def _lstm(x: Tensor, sizes: Any, hx: Any, weights: Any, setting: tuple[Any, ...]) -> Any:
    kernel: Any = torch.lstm
    if sizes is None:
        return kernel(x, hx, weights, *setting, False)
    return kernel(x, torch.tensor(sizes), hx, weights, *setting)


def _samples(make: Maker) -> Iterator[Sample]:
    yield from layer_samples(make, gates=4, cell=True, projection=True)


@register(torch.lstm, modules=[nn.LSTM], samples=_samples)
def lstm(input: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Long short-term memory, as ``torch.lstm``, which :class:`torch.nn.LSTM` calls.

    Args:
        input: ``(T, N, F)``, ``(N, T, F)`` with ``batch_first``, or the packed rows ``(rows, F)``.
        *args: ``hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first``;
            for packed rows ``batch_sizes, hx, params, has_biases, num_layers, dropout, train,
            bidirectional``. ``hx`` is ``[h0 (L D, N, P), c0 (L D, N, H)]``.

    Returns:
        States of the last layer ``(T, N, D P)`` (as ``input`` is laid out), final states, final
        cell states.

    Raises:
        RuntimeError: if a shape does not fit.
    """
    if not torch.is_autocast_enabled(input.device.type):
        return run_layers(LSTMLayer, input, *args)
    hx = args[1] if isinstance(args[0], Tensor) else args[0]
    cast = _autocast_dtype(input, args)
    *states, cells = run_layers(LSTMLayer, *in_dtype(cast, input, args))
    return *states, cells.to(hx[1].dtype) if _is_projected(hx) else cells


def _is_projected(hx: Sequence[Tensor]) -> bool:
    return hx[0].shape[-1] != hx[1].shape[-1]


def _autocast_dtype(input: Tensor, args: tuple[Any, ...]) -> torch.dtype:
    """Autocast lists oneDNN's kernel, which takes no ragged or empty batches nor projections.

    Otherwise the states are handed on in their own dtype, unless a projection makes them.
    """
    packed = isinstance(args[0], Tensor)
    hx = args[1] if packed else args[0]
    ragged = packed and bool((args[0] != args[0][0]).any())
    if (ragged or not input.numel()) and not _is_projected(hx):
        return hx[0].dtype
    return torch.get_autocast_dtype(input.device.type)
