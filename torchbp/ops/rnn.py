"""Plain recurrent layers (Elman 1990)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchbp.ops.activation import Tanh
from torchbp.ops.activation_pieces import ReLU
from torchbp.ops.elementwise import Elementwise
from torchbp.ops.recurrent import (
    Back,
    RecurrentLayer,
    Run,
    affine,
    linear_shares,
    moved_gates,
    through,
)
from torchbp.ops.recurrent_stack import layer_samples, run_layers
from torchbp.ops.recurrent_steps import Parts, exchange, fit, initial_of
from torchbp.ops.registry import Maker, Sample, register
from torchbp.ops.relevance import Rule


class RNNTanhLayer(RecurrentLayer):
    """``h_t = tanh(W_ih x + b_ih + W_hh h_(t-1) + b_hh)``.

    Back: ``∂a = ∂h (1 - h²)``, ``∂h_(t-1) = W_hhᵀ ∂a``. Secant: the same with the secant slope.
    """

    autocast = {"cpu": "low", "cuda": "low"}
    activation: ClassVar[type[Elementwise]] = Tanh
    kernel: ClassVar[Callable[..., Any]] = torch.rnn_tanh

    @classmethod
    def native(cls, x: Tensor, sizes: Any, _: bool, h0: Tensor, __: None, *weights: Any) -> Tensor:
        given = [w for w in weights if w is not None]
        setting = weights[2] is not None, 1, 0.0, False, h0.shape[0] == 2
        if sizes is None:
            return cls.kernel(x, h0, given, *setting, False)[0]
        return cls.kernel(x, torch.tensor(sizes), h0, given, *setting)[0]

    @classmethod
    def unrolled(
        cls, xs: Parts, h0: Tensor, _: None, weights: list[Any]
    ) -> tuple[list[Tensor], None]:
        w_ih, w_hh, b_ih, b_hh, _ = weights
        h, states = h0, []
        for x in xs:
            h = cls.activation.forward(affine(x, w_ih, b_ih) + affine(fit(h, x, h0), w_hh, b_hh))
            states.append(h)
        return states, None

    @staticmethod
    def inner(run: Run) -> Run:
        return run

    @classmethod
    def slopes(cls, now: Run, ref: Run) -> Tensor:
        one = torch.ones_like(now.out)
        if now is ref:  # the output is enough: tangents of tanh and ReLU are written in it
            return cls.activation.tangent(one, now.out)
        pre, pre0 = now.all_gates(), ref.all_gates()
        return through(cls.activation, one, (pre, now.out), (pre0, ref.out))

    @staticmethod
    def back(run: Run, w: list[Any], slopes: Tensor, errors: Tensor, _: None) -> Back:
        parts = [run.steps.split(t) for t in (errors, slopes)]
        left: list[Tensor] = []
        gates, dh = [], parts[0][-1]
        for k in range(len(parts[0]) - 1, -1, -1):
            gates.append(dh * parts[1][k])
            if k == 0:
                dh = gates[-1] @ w[1]
                break
            arriving = parts[0][k - 1]
            back = torch.addmm(fit(arriving, gates[-1]), gates[-1], w[1])
            dh = exchange(back, arriving, left)
        of_gates = run.steps.join(gates[::-1])
        return Back(of_gates, of_gates, initial_of(dh, left))

    @staticmethod
    def ahead(run: Run, moved: Run, inner: Run, slopes: Tensor) -> tuple[list[Tensor], None]:
        split, w_hh = run.steps.split, run.weights[1]
        states, th = [], moved.h0
        direct = torch.add(*moved_gates(run, moved))
        for given, slope in zip(split(direct), split(slopes), strict=True):
            th = (given + fit(th, given, moved.h0) @ w_hh.mT) * slope
            states.append(th)
        return states, None

    @staticmethod
    def shares(
        run: Run, inner: Run, arriving: Tensor, _: None, rule: Rule
    ) -> tuple[Tensor, Tensor, None]:
        parts = [run.steps.split(t) for t in (arriving, run.x, run.before, run.all_gates())]
        left: list[Tensor] = []
        of_x, rh = [], parts[0][-1]
        for k in range(len(parts[0]) - 1, -1, -1):
            x, before, pre = (p[k] for p in parts[1:])
            share, rh = linear_shares(rh, x, before, run.weights[:4], pre, rule)
            of_x.append(share)
            if k:
                rh = exchange(fit(parts[0][k - 1], rh) + rh, parts[0][k - 1], left)
        return run.steps.join(of_x[::-1]), initial_of(rh, left), None


class RNNReLULayer(RNNTanhLayer):
    """``h_t = max(W_ih x + b_ih + W_hh h_(t-1) + b_hh, 0)``; likewise."""

    activation = ReLU
    kernel = torch.rnn_relu


def _samples(make: Maker) -> Iterator[Sample]:
    yield from layer_samples(make, gates=1, cell=False, projection=False)


@register(torch.rnn_tanh, modules=[nn.RNN], samples=_samples)
def rnn_tanh(input: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Recurrent layers with tanh, as ``torch.rnn_tanh``, which :class:`torch.nn.RNN` calls.

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
    return run_layers(RNNTanhLayer, input, *args)


@register(torch.rnn_relu, samples=_samples)
def rnn_relu(input: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Recurrent layers with ReLU, as ``torch.rnn_relu``, which :class:`torch.nn.RNN` calls.

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
    return run_layers(RNNReLULayer, input, *args)
