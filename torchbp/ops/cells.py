"""Recurrent cells: layers of a single step, with torch's kernels for those."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchbp.ops.activation_pieces import ReLU
from torchbp.ops.gru import GRULayer
from torchbp.ops.lstm import LSTMLayer
from torchbp.ops.recurrent import RecurrentLayer
from torchbp.ops.registry import Maker, Sample, register, sample
from torchbp.ops.rnn import RNNTanhLayer

Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


class LSTMCell(LSTMLayer):
    """One step of :class:`LSTMLayer`, which keeps its gates."""

    @staticmethod
    def native(x: Tensor, sizes: Any, _: bool, h0: Tensor, c0: Tensor, *weights: Any) -> Any:
        h, c = h0[0], c0[0]
        if x.is_cuda:
            return torch.cat([t.reshape(-1) for t in torch.lstm_cell(x, (h, c), *weights[:4])])
        gates = _contribution(h, weights[1], weights[3])
        gates += _contribution(x, weights[0], weights[2], h)
        i, f, g, o = gates.chunk(4, 1)
        for gate in (i, f, o):
            gate.sigmoid_()
        g.tanh_()
        c = (f * c).add_(i * g)
        return torch.cat([(o * c.tanh()).reshape(-1), c.reshape(-1)]), gates

    @staticmethod
    def quick(grad: Tensor, args: Any, output: Tensor, kept: Any, needs: Any) -> Any:
        if not kept:
            return None
        (gates,) = kept
        (_, cells), (dh, of_cells) = LSTMLayer.rows(output, args), LSTMLayer.rows(grad, args)
        i, f, g, o = gates.chunk(4, 1)
        tanh_c = cells[0].tanh()
        dc = torch.addcmul(o, o * tanh_c, tanh_c, value=-1).mul_(dh).add_(of_cells[0])
        slopes = torch.addcmul(gates, gates, gates, value=-1)
        of_i, of_f, of_g, of_o = slopes.chunk(4, 1)
        torch.addcmul(_one(g), g, g, value=-1, out=of_g)
        of_i.mul_(g).mul_(dc)
        of_f.mul_(args[4][0]).mul_(dc)
        of_g.mul_(i).mul_(dc)
        of_o.mul_(tanh_c).mul_(dh)
        return _gradients(args, needs, slopes, slopes, None, dc.mul_(f))


class GRUCell(GRULayer):
    """One step of :class:`GRULayer`, which keeps its gates."""

    @staticmethod
    def native(x: Tensor, sizes: Any, _: bool, h0: Tensor, __: None, *weights: Any) -> Any:
        h = h0[0]
        if x.is_cuda:
            return torch.gru_cell(x, h, *weights[:4])
        of_state = _contribution(h, weights[1], weights[3])
        of_input = _contribution(x, weights[0], weights[2], h)
        (r, z, q), (a_r, a_z, a_n) = of_state.chunk(3, 1), of_input.chunk(3, 1)
        r.add_(a_r).sigmoid_()
        z.add_(a_z).sigmoid_()
        n = (q * r).add_(a_n).tanh_()
        return (h - n).mul_(z).add_(n), of_state, n

    @staticmethod
    def quick(dh: Tensor, args: Any, output: Tensor, kept: Any, needs: Any) -> Any:
        if not kept:
            return None
        gates, n = kept
        r, z, q = gates.chunk(3, 1)
        dn = torch.addcmul(dh, dh, z, value=-1).mul_(torch.addcmul(_one(n), n, n, value=-1))
        of_state = torch.addcmul(gates, gates, gates, value=-1)
        of_r, of_z, of_q = of_state.chunk(3, 1)
        of_r.mul_(q).mul_(dn)
        of_z.mul_(args[3][0] - n).mul_(dh)
        torch.mul(dn, r, out=of_q)
        of_input = torch.cat([of_r, of_z, dn], 1)
        return _gradients(args, needs, of_input, of_state, dh * z, None)


class RNNTanhCell(RNNTanhLayer):
    """One step of :class:`RNNTanhLayer`."""

    @classmethod
    def native(cls, x: Tensor, sizes: Any, _: bool, h0: Tensor, __: None, *weights: Any) -> Tensor:
        return torch.rnn_tanh_cell(x, h0[0], *weights[:4])

    @classmethod
    def quick(cls, dh: Tensor, args: Any, output: Tensor, kept: Any, needs: Any) -> Any:
        da = cls.activation.tangent(dh, output)
        return _gradients(args, needs, da, da, None, None)


class RNNReLUCell(RNNTanhCell):
    """One step of :class:`RNNReLULayer`."""

    activation = ReLU

    @classmethod
    def native(cls, x: Tensor, sizes: Any, _: bool, h0: Tensor, __: None, *weights: Any) -> Tensor:
        return torch.rnn_relu_cell(x, h0[0], *weights[:4])


def _contribution(t: Tensor, weight: Tensor, bias: Any, state: Tensor | None = None) -> Tensor:
    """``t Wᵀ + b``; a batch of one must not broadcast."""
    if state is not None and t.shape[0] != state.shape[0]:
        raise RuntimeError(
            f"hx: expected {t.shape[0]} states, one for each input, got {len(state)}"
        )
    return F.linear(t, weight, bias)


def _one(like: Tensor) -> Tensor:
    return torch.ones((), dtype=like.dtype, device=like.device)


def _gradients(
    args: Any, needs: Any, of_input: Tensor, of_state: Tensor, direct: Tensor | None, dc: Any
) -> tuple[Tensor | None, ...]:
    """Gradients of every argument of a cell, from those of its gates."""
    x, _, _, h0, _, w_ih, w_hh, *_ = args
    needs_x, _, _, needs_h, needs_c, ih, hh, b_ih, b_hh, _ = needs
    dh = None
    if needs_h:
        dh = of_state @ w_hh if direct is None else torch.addmm(direct, of_state, w_hh)
    of_bias = of_input.sum(0) if b_ih or b_hh else None
    return (
        of_input @ w_ih if needs_x else None,
        None,
        None,
        None if dh is None else dh.unsqueeze(0),
        dc.unsqueeze(0) if needs_c else None,
        of_input.mT @ x if ih else None,
        of_state.mT @ h0[0] if hh else None,
        of_bias if b_ih else None,
        (of_bias if of_state is of_input else of_state.sum(0)) if b_hh else None,
        None,
    )


def _step(op: type[RecurrentLayer], x: Tensor, h: Tensor, c: Tensor | None, w: Weights) -> Tensor:
    """Call the cell as a layer of one step on ``N`` sequences."""
    w_ih, w_hh, b_ih, b_hh = w
    if (b_ih is None) != (b_hh is None):  # the layers have both biases or none
        b_ih = torch.zeros_like(b_hh) if b_ih is None else b_ih  # type: ignore[arg-type]
        b_hh = torch.zeros_like(b_ih) if b_hh is None else b_hh
    sizes, initial = (x.shape[0],), None if c is None else c.unsqueeze(0)
    result = op.call(
        x, sizes, torch.is_grad_enabled(), h.unsqueeze(0), initial, w_ih, w_hh, b_ih, b_hh, None
    )
    return result[0] if isinstance(result, tuple) else result


def _in_dtype_of_state(x: Tensor, h: Tensor, w: Weights) -> tuple[Tensor, Any]:
    """Autocast lists only what a cell is made of, and the state is handed on in its dtype."""
    if torch.is_autocast_enabled(x.device.type):
        return x.to(h.dtype), [None if t is None else t.to(h.dtype) for t in w]
    return x, w


def _samples(make: Maker, gates: int, cell: bool) -> Iterator[Sample]:
    def state(n: int) -> Any:
        return [make(n, 2), make(n, 2)] if cell else make(n, 2)

    g = 2 * gates
    yield sample(make(3, 3), state(3), make(g, 3), make(g, 2), make(g), make(g))
    yield sample(make(1, 2), state(1), make(g, 2), make(g, 2))
    yield sample(make(0, 2), state(0), make(g, 2), make(g, 2), make(g), make(g))


def _lstm_samples(make: Maker) -> Iterator[Sample]:
    yield from _samples(make, 4, True)


def _gru_samples(make: Maker) -> Iterator[Sample]:
    yield from _samples(make, 3, False)


def _rnn_samples(make: Maker) -> Iterator[Sample]:
    yield from _samples(make, 1, False)


@register(torch.lstm_cell, modules=[nn.LSTMCell], samples=_lstm_samples)
def lstm_cell(
    input: Tensor,
    hx: Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of an LSTM, as ``torch.lstm_cell``, which :class:`torch.nn.LSTMCell` calls.

    Args:
        input: ``(N, F)``.
        hx: state and cell state, each ``(N, H)``.
        w_ih: ``(4 H, F)``: the gates i, f, g, o, one below the other.
        w_hh: ``(4 H, H)``.
        b_ih: ``(4 H,)``, or ``None``.
        b_hh: likewise.

    Returns:
        The next state and cell state, each ``(N, H)``.

    Raises:
        RuntimeError: if a shape does not fit.
    """
    h, c = hx
    x, weights = _in_dtype_of_state(input, h, (w_ih, w_hh, b_ih, b_hh))
    flat = _step(LSTMCell, x, h, c, weights)
    states, cells = LSTMCell.outputs(flat, x, h.unsqueeze(0), c.unsqueeze(0))
    return states, cells[0]


@register(torch.gru_cell, modules=[nn.GRUCell], samples=_gru_samples)
def gru_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """One step of a GRU, as ``torch.gru_cell``, which :class:`torch.nn.GRUCell` calls.

    Args:
        input: ``(N, F)``.
        hx: state ``(N, H)``.
        w_ih: ``(3 H, F)``: the gates r, z, n, one below the other.
        w_hh: ``(3 H, H)``.
        b_ih: ``(3 H,)``, or ``None``.
        b_hh: likewise.

    Returns:
        The next state ``(N, H)``.

    Raises:
        RuntimeError: if a shape does not fit.
    """
    x, weights = _in_dtype_of_state(input, hx, (w_ih, w_hh, b_ih, b_hh))
    return _step(GRUCell, x, hx, None, weights)


@register(torch.rnn_tanh_cell, modules=[nn.RNNCell], samples=_rnn_samples)
def rnn_tanh_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """``tanh(W_ih x + b_ih + W_hh h + b_hh)``, as ``torch.rnn_tanh_cell``.

    Args:
        input: ``(N, F)``.
        hx: state ``(N, H)``.
        w_ih: ``(H, F)``.
        w_hh: ``(H, H)``.
        b_ih: ``(H,)``, or ``None``.
        b_hh: likewise.

    Returns:
        The next state ``(N, H)``.

    Raises:
        RuntimeError: if a shape does not fit.
    """
    return _step(RNNTanhCell, input, hx, None, (w_ih, w_hh, b_ih, b_hh))


@register(torch.rnn_relu_cell, samples=_rnn_samples)
def rnn_relu_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """``max(W_ih x + b_ih + W_hh h + b_hh, 0)``, as ``torch.rnn_relu_cell``.

    Args:
        input: ``(N, F)``.
        hx: state ``(N, H)``.
        w_ih: ``(H, F)``.
        w_hh: ``(H, H)``.
        b_ih: ``(H,)``, or ``None``.
        b_hh: likewise.

    Returns:
        The next state ``(N, H)``.

    Raises:
        RuntimeError: if a shape does not fit.
    """
    return _step(RNNReLUCell, input, hx, None, (w_ih, w_hh, b_ih, b_hh))
