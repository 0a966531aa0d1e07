"""Recurrent layers and cells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from torchbp import functional as F


def _zeros(module: torch.nn.RNNBase, input: Tensor, n: Any) -> Any:
    """Initial states for ``n`` sequences, as torch.nn makes them."""
    count = module.num_layers * (2 if module.bidirectional else 1)
    h = input.new_zeros(count, n, module.proj_size or module.hidden_size)
    if module.mode != "LSTM":
        return h
    return h, input.new_zeros(count, n, module.hidden_size)


def _each(hx: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return change(hx) if isinstance(hx, Tensor) else tuple(map(change, hx))


def _recurrent(module: Any, function: Callable[..., Any], input: Any, hx: Any) -> Any:
    """What torch.nn does around a recurrent kernel: batches, packed sequences, checks."""
    module._update_flat_weights()
    settings = module.bias, module.num_layers, module.dropout, module.training, module.bidirectional
    if isinstance(input, PackedSequence):
        data, sizes, order, back = input
        given = _zeros(module, data, sizes[0]) if hx is None else module.permute_hidden(hx, order)
        if module.mode != "LSTM":
            module.check_forward_args(data, given, sizes)
        output, *final = function(data, sizes, given, module._flat_weights, *settings)
        states = module.permute_hidden(_as_given(final), back)
        return PackedSequence(output, sizes, order, back), states
    batch = 0 if module.batch_first else 1
    if input.dim() not in (2, 3):
        kind = type(module).__name__
        raise ValueError(f"{kind}: expected an input of 2 or 3 dimensions, got {input.dim()}")
    x = input if input.dim() == 3 else input.unsqueeze(batch)
    if hx is None:
        given = _zeros(module, x, x.shape[batch])
    else:
        given = hx if input.dim() == 3 else _each(hx, lambda h: h.unsqueeze(1))
    module.check_forward_args(x, given, None)
    output, *final = function(x, given, module._flat_weights, *settings, module.batch_first)
    states = _as_given(final)
    if input.dim() == 3:
        return output, states
    return output.squeeze(batch), _each(states, lambda h: h.squeeze(1))


def _as_given(final: list[Tensor]) -> Any:
    return final[0] if len(final) == 1 else tuple(final)


class RNN(torch.nn.RNN):
    """:class:`torch.nn.RNN` with its backward written out."""

    def forward(self, input: Any, hx: Tensor | None = None) -> Any:
        """``(T, N, F)``, ``(N, T, F)`` with ``batch_first``, ``(T, F)``, or a PackedSequence."""
        function = F.rnn_tanh if self.mode == "RNN_TANH" else F.rnn_relu
        return _recurrent(self, function, input, hx)


class LSTM(torch.nn.LSTM):
    """:class:`torch.nn.LSTM` with its backward written out."""

    def forward(self, input: Any, hx: tuple[Tensor, Tensor] | None = None) -> Any:
        """``(T, N, F)``, ``(N, T, F)`` with ``batch_first``, ``(T, F)``, or a PackedSequence."""
        return _recurrent(self, F.lstm, input, hx)


class GRU(torch.nn.GRU):
    """:class:`torch.nn.GRU` with its backward written out."""

    def forward(self, input: Any, hx: Tensor | None = None) -> Any:
        """``(T, N, F)``, ``(N, T, F)`` with ``batch_first``, ``(T, F)``, or a PackedSequence."""
        return _recurrent(self, F.gru, input, hx)


def _cell(module: Any, function: Callable[..., Any], input: Tensor, hx: Any) -> Any:
    """What torch.nn does around the kernel of a cell: checks, and a batch of one."""
    kind = type(module).__name__
    states = () if hx is None else (hx,) if isinstance(hx, Tensor) else hx
    for name, tensor in (("input", input), *(("hx", h) for h in states)):
        if tensor.dim() not in (1, 2):
            raise ValueError(f"{kind}: {name} must have 1 or 2 dimensions, got {tensor.dim()}")
    x = input if input.dim() == 2 else input.unsqueeze(0)
    if hx is None:
        hx = x.new_zeros(x.shape[0], module.hidden_size)
        hx = (hx, hx) if isinstance(module, torch.nn.LSTMCell) else hx
    elif input.dim() == 1:
        hx = _each(hx, lambda h: h.unsqueeze(0))
    new = function(x, hx, module.weight_ih, module.weight_hh, module.bias_ih, module.bias_hh)
    return new if input.dim() == 2 else _each(new, lambda h: h.squeeze(0))


class RNNCell(torch.nn.RNNCell):
    """:class:`torch.nn.RNNCell` with its backward written out."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """``(N, F)`` or ``(F,)``; the state likewise."""
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        function = F.rnn_tanh_cell if self.nonlinearity == "tanh" else F.rnn_relu_cell
        result: Tensor = _cell(self, function, input, hx)
        return result


class LSTMCell(torch.nn.LSTMCell):
    """:class:`torch.nn.LSTMCell` with its backward written out."""

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """``(N, F)`` or ``(F,)``; the states likewise."""
        result: tuple[Tensor, Tensor] = _cell(self, F.lstm_cell, input, hx)
        return result


class GRUCell(torch.nn.GRUCell):
    """:class:`torch.nn.GRUCell` with its backward written out."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """``(N, F)`` or ``(F,)``; the state likewise."""
        result: Tensor = _cell(self, F.gru_cell, input, hx)
        return result
