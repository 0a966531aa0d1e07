"""Gated recurrent units (Cho et al. 2014), in the variant that resets after the product."""

from __future__ import annotations

from collections.abc import Iterator
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
    moved_gates,
    sum_shares,
    through,
)
from torchbp.ops.recurrent_stack import in_dtype, layer_samples, run_layers
from torchbp.ops.recurrent_steps import Parts, exchange, fit, initial_of
from torchbp.ops.registry import Maker, Sample, register
from torchbp.ops.relevance import Rule


class Inner(NamedTuple):
    """Gates before (``pre_*``) and after their activations; ``q`` is what r scales."""

    pre_r: Tensor
    pre_z: Tensor
    pre_n: Tensor
    r: Tensor
    z: Tensor
    n: Tensor
    q: Tensor
    before: Tensor
    pre_x: Tensor


class Slopes(NamedTuple):
    """``h' = keep h + Σ of_k a_k``, the gates' sums of r and z, n's two terms apart."""

    keep: Tensor
    of_state_gates: Tensor
    of_n: Tensor


class GRULayer(RecurrentLayer):
    """``h_t = (1 - z) n + z h_(t-1)``, ``n = tanh(a_n + r q)``, ``r, z = σ(a)``.

    ``a = W_ih x + b_ih`` (r and z: plus that of the state), ``q = W_hn h_(t-1) + b_hn``. Back::

        ∂a_n = ∂h (1 - z) n';  ∂q = r ∂a_n;  ∂a_r = q r' ∂a_n;  ∂a_z = ∂h (h_(t-1) - n) z';
        ∂h_(t-1) = z ∂h + W_hhᵀ (∂a_r, ∂a_z, ∂q)

    Secant: the same, with secant slopes of σ and tanh and each factor of a product midway between
    the runs.
    """

    autocast = {"cuda": "low"}

    @staticmethod
    def native(x: Tensor, sizes: Any, _: bool, h0: Tensor, __: None, *weights: Any) -> Tensor:
        given = [w for w in weights if w is not None]
        setting = weights[2] is not None, 1, 0.0, False, h0.shape[0] == 2
        if sizes is None:
            return torch.gru(x, h0, given, *setting, False)[0]
        return torch.gru(x, torch.tensor(sizes), h0, given, *setting)[0]

    @staticmethod
    def unrolled(xs: Parts, h0: Tensor, _: None, weights: list[Any]) -> tuple[list[Tensor], None]:
        w_ih, w_hh, b_ih, b_hh, _ = weights
        h, states = h0, []
        for x in xs:
            h = fit(h, x, h0)
            a_r, a_z, a_n = affine(x, w_ih, b_ih).chunk(3, 1)
            s_r, s_z, q = affine(h, w_hh, b_hh).chunk(3, 1)
            n = torch.tanh(a_n + torch.sigmoid(a_r + s_r) * q)
            h = n + torch.sigmoid(a_z + s_z) * (h - n)
            states.append(h)
        return states, None

    @staticmethod
    def inner(run: Run) -> Inner:
        of_x, of_h = (t.chunk(3, 1) for t in run.gates())
        pre_r, pre_z = of_x[0] + of_h[0], of_x[1] + of_h[1]
        r, z = torch.sigmoid(pre_r), torch.sigmoid(pre_z)
        pre_n = torch.addcmul(of_x[2], r, of_h[2])
        return Inner(pre_r, pre_z, pre_n, r, z, torch.tanh(pre_n), of_h[2], run.before, of_x[2])

    @staticmethod
    def slopes(now: Inner, ref: Inner) -> Slopes:
        def gate(op: Any, v: Tensor, k: int) -> Tensor:
            a = now[k], now[k + 3]
            return through(op, v, a, a if now is ref else (ref[k], ref[k + 3]))

        r, z, n, q, before, _ = (midpoint(a, b) for a, b in zip(now[3:], ref[3:], strict=True))
        of_n = gate(Tanh, 1 - z, 2)
        gates = torch.stack([gate(Sigmoid, of_n * q, 0), gate(Sigmoid, before - n, 1), of_n * r], 1)
        return Slopes(z, gates, of_n)

    @staticmethod
    def back(run: Run, w: list[Any], slopes: Slopes, errors: Tensor, _: None) -> Back:
        w_hh = w[1]
        parts = [run.steps.split(t) for t in (errors, slopes.keep, slopes.of_state_gates)]
        left: list[Tensor] = []
        gates, states, dh = [], [], parts[0][-1]
        for k in range(len(parts[0]) - 1, -1, -1):
            keep, of_gates = (p[k] for p in parts[1:])
            states.append(dh)
            of_gates = dh.unsqueeze(1) * of_gates
            gates.append(of_gates.reshape(of_gates.shape[0], w_hh.shape[0]))
            if k == 0:
                dh = torch.addmm(dh * keep, gates[-1], w_hh)
                break
            arriving = parts[0][k - 1]
            kept = torch.addcmul(fit(arriving, dh), dh, keep)
            dh = exchange(torch.addmm(kept, gates[-1], w_hh), arriving, left)
        of_state = run.steps.join(gates[::-1])
        of_n = run.steps.join(states[::-1]) * slopes.of_n
        of_input = torch.cat([of_state[:, : -of_n.shape[1]], of_n], 1)
        return Back(of_input, of_state, initial_of(dh, left))

    @staticmethod
    def ahead(run: Run, moved: Run, inner: Inner, slopes: Slopes) -> tuple[list[Tensor], None]:
        w_hh, split = run.weights[1], run.steps.split
        of_x, of_h = (t.unflatten(1, (3, -1)) for t in moved_gates(run, moved))
        gates, of_n = slopes.of_state_gates, slopes.of_n
        # What does not come from the state before: the inputs' share of n is not scaled by r.
        given = (gates * of_h).sum(1) + (gates[:, :2] * of_x[:, :2]).sum(1) + of_n * of_x[:, 2]
        states, th = [], moved.h0
        for own, keep, of_gates in zip(split(given), split(slopes.keep), split(gates), strict=True):
            th = fit(th, own, moved.h0)
            ta = (th @ w_hh.mT).reshape(of_gates.shape)
            th = own + keep * th + (of_gates * ta).sum(1)
            states.append(th)
        return states, None

    @staticmethod
    def shares(
        run: Run, inner: Inner, arriving: Tensor, _: None, rule: Rule
    ) -> tuple[Tensor, Tensor, None]:
        w_ih, w_hh, b_ih, b_hh, _ = (None if w is None else w.chunk(3)[2] for w in run.weights)
        new, kept, scaled = (1 - inner.z) * inner.n, inner.z * run.before, inner.r * inner.q
        tensors = (arriving, run.x, run.before, run.out, new, kept, inner.pre_n, inner.pre_x,
                   scaled, inner.q)  # fmt: skip
        parts = [run.steps.split(t) for t in tensors]
        left: list[Tensor] = []
        of_x, rh = [], parts[0][-1]
        for k in range(len(parts[0]) - 1, -1, -1):
            x, before, out, new, kept, pre_n, pre_x, scaled, q = (p[k] for p in parts[1:])
            rn, direct = sum_shares(rh, out, (new, kept), rule)
            rx, rq = sum_shares(rn, pre_n, (pre_x, scaled), rule)
            of_x.append(linear_share(rx, x, w_ih, b_ih, pre_x, rule))
            rh = direct + linear_share(rq, before, w_hh, b_hh, q, rule)
            if k:
                rh = exchange(fit(parts[0][k - 1], rh) + rh, parts[0][k - 1], left)
        return run.steps.join(of_x[::-1]), initial_of(rh, left), None


def _samples(make: Maker) -> Iterator[Sample]:
    yield from layer_samples(make, gates=3, cell=False, projection=False)


@register(torch.gru, modules=[nn.GRU], samples=_samples)
def gru(input: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Gated recurrent units, as ``torch.gru``, which :class:`torch.nn.GRU` calls.

    Args:
        input: ``(T, N, F)``, ``(N, T, F)`` with ``batch_first``, or the packed rows ``(rows, F)``.
        *args: ``hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first``;
            for packed rows ``batch_sizes, hx, params, has_biases, num_layers, dropout, train,
            bidirectional``. ``hx`` is ``(L D, N, H)``.

    Returns:
        States of the last layer ``(T, N, D H)`` (as ``input`` is laid out), final states.

    Raises:
        RuntimeError: if a shape does not fit.
    """
    if torch.is_autocast_enabled(input.device.type):
        hx = args[0] if isinstance(args[2], bool) else args[1]
        return run_layers(GRULayer, *in_dtype(hx.dtype, input, args))
    return run_layers(GRULayer, input, *args)
