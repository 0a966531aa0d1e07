"""Recurrent layers: against torch on odd settings, and against formulas written step by step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import torchbp
from torchbp.ops.gru import GRULayer
from torchbp.ops.lstm import LSTMLayer
from torchbp.ops.recurrent_steps import Steps
from torchbp.ops.relevance import Rule
from torchbp.ops.rnn import RNNReLULayer, RNNTanhLayer

KINDS = {
    "LSTM": nn.LSTM,
    "GRU": nn.GRU,
    "tanh": nn.RNN,
    "relu": lambda *a, **k: nn.RNN(*a, nonlinearity="relu", **k),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "deep": dict(num_layers=3),
    "both": dict(num_layers=2, bidirectional=True),
    "no bias": dict(bias=False, bidirectional=True),
    "batch_first": dict(batch_first=True, num_layers=2),
    "dropout": dict(num_layers=3, dropout=0.4),
}


def pair(kind: str, **settings: Any) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(2)
    theirs = KINDS[kind](3, 4, **settings).double()
    return torchbp.convert(copy.deepcopy(theirs)), theirs


def leaves(value: Any) -> list[Tensor]:
    if isinstance(value, PackedSequence):
        return [value.data]
    return [value] if isinstance(value, Tensor) else [t for v in value for t in leaves(v)]


def observed(module: nn.Module, *args: Any) -> list[Tensor]:
    """Outputs, then gradients of all that requires one."""
    module.zero_grad()
    torch.manual_seed(5)
    outputs = leaves(module(*args))
    given = [t for t in leaves([a for a in args if a is not None]) if t.requires_grad]
    errors = [torch.cos(torch.arange(o.numel())).to(o).reshape(o.shape) for o in outputs]
    grads = torch.autograd.grad(outputs, [*given, *module.parameters()], errors)
    return [*outputs, *grads]


def same(ours: nn.Module, theirs: nn.Module, *args: Any) -> None:
    for a, b in zip(observed(ours, *args), observed(theirs, *args), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_torchs(kind: str, setting: str) -> None:
    ours, theirs = pair(kind, **SETTINGS[setting])
    same(ours, theirs, torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("in_order", [False, True])
def test_packed_sequences_with_given_states(kind: str, both: bool, in_order: bool) -> None:
    ours, theirs = pair(kind, num_layers=2, bidirectional=both)
    x = torch.randn(5, 4, 3, dtype=torch.float64, requires_grad=True)
    lengths = [5, 3, 3, 1] if in_order else [3, 1, 5, 3]
    packed = pack_padded_sequence(x, lengths, enforce_sorted=in_order)
    state = torch.randn(4 if both else 2, 4, 4, dtype=torch.float64, requires_grad=True)
    hx = (state, state.detach().sin().requires_grad_()) if kind == "LSTM" else state
    same(ours, theirs, packed, hx)
    same(ours, theirs, packed, None)


@pytest.mark.parametrize("both", [False, True])
def test_projections(both: bool) -> None:
    ours, theirs = pair("LSTM", num_layers=2, proj_size=2, bidirectional=both)
    x = torch.randn(4, 3, 3, dtype=torch.float64, requires_grad=True)
    count = 4 if both else 2
    hx = torch.randn(count, 3, 2, dtype=torch.float64), torch.randn(count, 3, 4).double()
    same(ours, theirs, x, hx)
    same(ours, theirs, pack_sequence([x[:4, 0], x[:2, 1]]), None)


@pytest.mark.parametrize("kind", KINDS)
def test_one_sequence_without_a_batch(kind: str) -> None:
    for settings in (dict(), dict(batch_first=True, bidirectional=True)):
        ours, theirs = pair(kind, **settings)
        same(ours, theirs, torch.randn(5, 3, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("recording", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_bitwise_torchs(kind: str, recording: bool) -> None:
    torch.manual_seed(4)
    with torch.set_grad_enabled(recording):
        for width in [2] * 10 + [17] * 5:
            theirs = KINDS[kind](9, width, num_layers=2, bidirectional=True)
            ours, x = torchbp.convert(copy.deepcopy(theirs)), torch.randn(6, 3, 9)
            for a, b in zip(leaves(ours(x)), leaves(theirs(x)), strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("recording", [False, True])
def test_an_lstm_is_bitwise_torchs_with_either_kernel(recording: bool) -> None:
    """In grad mode oneDNN runs another kernel, whose last bits differ."""
    torch.manual_seed(4)
    for _ in range(40):
        x, h, c = torch.randn(2, 1, 2), torch.randn(1, 1, 2), torch.randn(1, 1, 2)
        weights = [torch.randn(*s, requires_grad=True) for s in ((8, 2), (8, 2), (8,), (8,))]
        args = x, (h, c), weights, True, 1, 0.0, True, False, False
        with torch.set_grad_enabled(recording):
            for a, b in zip(torchbp.functional.lstm(*args), torch.lstm(*args), strict=True):
                assert torch.equal(a, b)


def test_cells_are_bitwise_torchs() -> None:
    torch.manual_seed(4)
    for kind in (nn.LSTMCell, nn.GRUCell, nn.RNNCell):
        for n, h in ((1, 17), (3, 8), (5, 40)):
            theirs = kind(9, h)
            ours, x = torchbp.convert(copy.deepcopy(theirs)), torch.randn(n, 9)
            for a, b in zip(leaves(ours(x)), leaves(theirs(x)), strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_a_cell_refuses_states_of_another_batch(kind: Any) -> None:
    theirs = kind(3, 4)
    ours = torchbp.convert(copy.deepcopy(theirs))
    for n, m in ((3, 1), (1, 3)):
        x, h = torch.randn(n, 3), torch.randn(m, 4)
        for module in (ours, theirs):
            with pytest.raises(RuntimeError):
                module(x, (h, h) if kind is nn.LSTMCell else h)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells_are_torchs(kind: Any) -> None:
    for bias in (True, False):
        theirs = kind(3, 4, bias=bias).double()
        ours = torchbp.convert(copy.deepcopy(theirs))
        for shape in ((2, 3), (3,)):
            x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
            same(ours, theirs, x)
            state = torch.randn(*shape[:-1], 4, dtype=torch.float64, requires_grad=True)
            hx = (state, state.detach().cos().requires_grad_()) if kind is nn.LSTMCell else state
            same(ours, theirs, x, hx)


def test_a_cell_with_one_bias_only() -> None:
    x, h, w, u, b = (
        torch.randn(*s, dtype=torch.float64) for s in [(2, 3), (2, 4), (4, 3), (4, 4), (4,)]
    )
    for biases in ((b, None), (None, b)):
        got = torchbp.functional.rnn_tanh_cell(x, h, w, u, *biases)
        torch.testing.assert_close(got, torch.tanh(x @ w.T + h @ u.T + b))


def test_swapping_the_class_keeps_the_flat_weights() -> None:
    ours, theirs = pair("LSTM", num_layers=2)
    ours.flatten_parameters()
    ours.weight_hh_l0 = nn.Parameter(theirs.weight_hh_l0.detach() * 2)
    assert ours._flat_weights[1] is ours.weight_hh_l0
    theirs.weight_hh_l0 = nn.Parameter(theirs.weight_hh_l0.detach() * 2)
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    same(ours, theirs, x)
    other = {name: p * 0.5 for name, p in ours.named_parameters()}
    got, expected = (torch.func.functional_call(m, other, x)[0] for m in (ours, theirs))
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: m(x[0, 0]),
        lambda m, x: m(x[..., :2]),
        lambda m, x: m(x, torch.zeros(1, 4).double()),
        lambda m, x: m(x, torch.zeros(2, 2, 4).double()),
        lambda m, x: m(x.float()),
        lambda m, x: m(x[:0]),
        lambda m, x: m(pack_sequence([x[:, 0]]), torch.zeros(1, 1, 5).double()),
    ],
)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "tanh"])
def test_bad_input_is_refused_as_torch_does(kind: str, call: Any) -> None:
    x = torch.randn(5, 2, 3, dtype=torch.float64)

    def error(module: nn.Module) -> type[Exception] | None:
        try:
            call(_doubled(module, kind), x)
        except Exception as raised:
            return type(raised)
        return None

    ours, theirs = pair(kind)
    assert error(theirs) is not None
    assert error(ours) is error(theirs)


def _doubled(module: nn.Module, kind: str) -> Any:
    """The module, given one state for both of an LSTM's."""
    return lambda x, *h: module(x, *((h[0], h[0]) if kind == "LSTM" else h[0] for _ in h))


def test_functionals_say_which_count_is_wrong() -> None:
    x, h = torch.randn(3, 2, 3), torch.zeros(1, 2, 4)
    weights = [p.detach() for p in nn.GRU(3, 4).parameters()]
    settings = True, 1, 0.0, False, False, False
    with pytest.raises(RuntimeError, match="expected 4 weights, got 3"):
        torchbp.functional.gru(x, h, weights[:3], *settings)
    with pytest.raises(RuntimeError, match=r"shape \(1, N, size\), got \(2, 2, 4\)"):
        torchbp.functional.gru(x, torch.zeros(2, 2, 4), weights, *settings)


def test_states_before_each_step() -> None:
    rows, initial = torch.arange(6.0).reshape(6, 1), -torch.arange(1.0, 4).reshape(3, 1)
    forth, back = Steps((3, 2, 1), False), Steps((3, 2, 1), True)
    assert forth.before(rows, initial).flatten().tolist() == [-1, -2, -3, 0, 1, 3]
    assert back.before(rows, initial).flatten().tolist() == [3, 4, -3, 5, -2, -1]


LAYERS = {"LSTM": LSTMLayer, "GRU": GRULayer, "tanh": RNNTanhLayer, "relu": RNNReLULayer}


def layer_call(kind: str, seed: int, projected: bool = False) -> tuple[Any, ...]:
    """Arguments of a layer in both directions on a packed sequence, without biases."""
    generator = torch.Generator().manual_seed(seed)

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    gates, p = {"LSTM": 4, "GRU": 3}.get(kind, 1), 2 if projected else 4
    weights = [
        make(4 * gates, 3),
        make(4 * gates, p),
        None,
        None,
        make(2, 4) if projected else None,
    ]
    weights += [
        make(4 * gates, 3),
        make(4 * gates, p),
        None,
        None,
        make(2, 4) if projected else None,
    ]
    c0 = make(2, 3, 4) if kind == "LSTM" else None
    return make(6, 3), (3, 2, 1), False, make(2, 3, p), c0, *weights


@pytest.mark.parametrize("kind", LAYERS)
def test_relevance_is_conserved_through_time(kind: str) -> None:
    """Without biases all relevance arrives at inputs and initial states."""
    for projected in (False, True) if kind == "LSTM" else (False,):
        op, args = LAYERS[kind], layer_call(kind, 1, projected)
        output = op.forward(*args)
        arriving = torch.rand_like(output) * (output != 0)
        shares = op.relevance(arriving, Rule(epsilon=1e-12), args, output)
        total = sum(s.sum() for s in shares if s is not None)
        torch.testing.assert_close(total, arriving.sum(), rtol=1e-6, atol=1e-6)
        assert all(s is None for s in shares[5:])


def test_relevance_of_one_lstm_step_by_hand() -> None:
    """Signal takes all (Arras et al. 2017): gates get none, the candidate as a linear layer."""
    x, w, u = (torch.randn(*s, dtype=torch.float64) for s in [(1, 1, 3), (8, 3), (8, 2)])
    h, c = torch.randn(2, 1, 1, 2, dtype=torch.float64)
    args = (x, None, False, h, c, w, u, None, None, None)
    output = LSTMLayer.forward(*args)
    arriving = torch.rand(4, dtype=torch.float64)
    got_x, _, _, got_h, got_c, *_ = LSTMLayer.relevance(arriving, Rule(epsilon=0), args, output)
    a = x[0, 0] @ w.T + h[0, 0] @ u.T
    i, f, g = a[:2].sigmoid(), a[2:4].sigmoid(), a[4:6].tanh()
    cell = f * c[0, 0] + i * g
    at_c = arriving[:2] + arriving[2:]
    at_g = at_c * i * g / cell
    torch.testing.assert_close(got_c[0, 0], at_c * f * c[0, 0] / cell)
    torch.testing.assert_close(got_x[0, 0], (at_g / a[4:6]) @ (w[4:6] * x[0, 0]))
    torch.testing.assert_close(got_h[0, 0], (at_g / a[4:6]) @ (u[4:6] * h[0, 0]))


@pytest.mark.parametrize("kind", LAYERS)
def test_secant_between_packed_runs_is_exact(kind: str) -> None:
    op, args, args0 = LAYERS[kind], layer_call(kind, 1), layer_call(kind, 2)
    output, output0 = op.forward(*args), op.forward(*args0)
    m = torch.rand_like(output)
    found = op.secant(m, args, args0, output, output0)
    terms = [f * (a - b) for f, a, b in zip(found, args, args0, strict=True) if f is not None]
    after = m * (output - output0)
    scale = sum(t.abs().sum() for t in (*terms, after))
    assert abs(sum(t.sum() for t in terms) - after.sum()) <= 1e-13 * scale


def test_the_quick_backward_is_the_differentiable_one() -> None:
    args = layer_call("LSTM", 3)
    x, steps = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True), None
    weights = [w if w is None else w.requires_grad_() for w in args[5:]]
    h, c = torch.randn(2, 2, 2, 4, dtype=torch.float64)
    output = LSTMLayer.call(x, steps, True, h, c, *weights)
    wrt = [x, *(w for w in weights if w is not None)]
    quick = torch.autograd.grad(output.sin().sum(), wrt, retain_graph=True)
    slow = torch.autograd.grad(output.sin().sum(), wrt, create_graph=True)
    for a, b in zip(quick, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
