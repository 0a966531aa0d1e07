from __future__ import annotations

import warnings
from decimal import Decimal, getcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from torchbp.ops.softmax import LogSoftmax, Softmax, log_mean, log_softmax, sato_vartia, softmax

getcontext().prec = 60
PAIRS = [(softmax, F.softmax), (log_softmax, F.log_softmax)]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def decimal_mean(log_a: float, log_b: float) -> Decimal:
    a, b = Decimal(log_a).exp(), Decimal(log_b).exp()
    return a if a == b else (a - b) / (Decimal(log_a) - Decimal(log_b))


@pytest.mark.parametrize("gap", [0.0, 1e-15, 1e-9, 1e-4, 0.1, 1.9, 2.0, 2.1, 30.0, 500.0])
@pytest.mark.parametrize("log_a", [0.0, -0.3, -40.0])
def test_log_mean_for_every_gap(log_a: float, gap: float) -> None:
    log_b = log_a - gap
    pair = torch.tensor([log_a, log_b], dtype=torch.float64)
    expected = decimal_mean(log_a, log_b)
    for a, b in (pair, pair.flip(0)):
        # exp itself rounds its argument: 40 * 2^-53 relative at most here.
        assert abs(Decimal(log_mean(a, b).item()) / expected - 1) < Decimal("2e-14")


def test_log_mean_of_zeros_is_zero() -> None:
    logs = torch.tensor([0.0, -torch.inf, -torch.inf])
    others = torch.tensor([-torch.inf, -1.0, -torch.inf])
    assert log_mean(logs, others).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("gap", [1e-7, 1e-2, 1.0, 50.0, 1000.0])
def test_sato_vartia_gives_the_change_of_logsumexp(gap: float) -> None:
    z, z0 = normal(6, 9), normal(6, 9) + gap * normal(6, 9, seed=1)
    q = sato_vartia(z, z0, 1)
    torch.testing.assert_close(q.sum(1), torch.ones(6, dtype=torch.float64))
    assert (q >= 0).all()
    change = z.logsumexp(1) - z0.logsumexp(1)
    scale = (q * (z - z0)).abs().sum(1)
    # Logits of order one carry rounding errors of order 1e-16, whatever their difference.
    assert (((q * (z - z0)).sum(1) - change).abs() <= 1e-13 * scale + 1e-15).all()


def test_sato_vartia_invariances() -> None:
    z, z0 = normal(4, 5), normal(4, 5, seed=1)
    q = sato_vartia(z, z0, 1)
    torch.testing.assert_close(sato_vartia(z + 3, z0 - 7, 1), q, rtol=1e-12, atol=0)
    torch.testing.assert_close(sato_vartia(z0, z, 1), q, rtol=1e-12, atol=0)
    torch.testing.assert_close(sato_vartia(z, z, 1), z.softmax(1), rtol=1e-14, atol=0)


def test_masked_entries_weigh_nothing() -> None:
    z, z0 = normal(2, 4), normal(2, 4, seed=1)
    mask = torch.tensor([False, True, False, False])
    inner = sato_vartia(z[:, ~mask], z0[:, ~mask], 1)
    q = sato_vartia(z.masked_fill(mask, -torch.inf), z0.masked_fill(mask, -torch.inf), 1)
    assert torch.equal(q[:, 1], torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(q[:, ~mask], inner)


def test_secant_of_masked_logits() -> None:
    z, z0, m = normal(3, 4), normal(3, 4, seed=1), normal(3, 4, seed=2)
    z[0, 1:3] = z0[0, 1:3] = -torch.inf
    s, s0 = z.softmax(1), z0.softmax(1)
    m_z, *_ = Softmax.secant(m, (z, 1, None), (z0, 1, None), s, s0)
    assert torch.equal(m_z[0, 1:3], torch.zeros(2, dtype=torch.float64))
    terms = m_z * (z - z0).nan_to_num(0)
    torch.testing.assert_close(terms.sum(), (m * (s - s0)).sum(), rtol=1e-13, atol=0)


@pytest.mark.parametrize("op", [Softmax, LogSoftmax])
@pytest.mark.parametrize("gap", [1e-3, 1.0, 100.0])
def test_secant_conserves_for_every_gap(op: Any, gap: float) -> None:
    z, z0, m = normal(3, 7), normal(3, 7) + gap * normal(3, 7, seed=1), normal(3, 7, seed=2)
    out, out0 = op.forward(z, 1, None), op.forward(z0, 1, None)
    m_z, *_ = op.secant(m, (z, 1, None), (z0, 1, None), out, out0)
    before, after = m_z * (z - z0), m * (out - out0)
    scale = before.abs().sum() + after.abs().sum()
    assert (before.sum() - after.sum()).abs() <= 1e-12 * scale


def test_secant_in_bfloat16_is_computed_in_float32() -> None:
    z, z0, m = (normal(2, 5, seed=i).bfloat16() for i in range(3))
    args, args0 = (z, 1, None), (z0, 1, None)
    got, *_ = Softmax.secant(m, args, args0, z.softmax(1), z0.softmax(1))
    wide, *_ = Softmax.secant(
        m.float(), (z.float(), 1, None), (z0.float(), 1, None), z.float().softmax(1), z0.float()
    )
    assert torch.equal(got, wide.bfloat16())


@pytest.mark.parametrize(("ours", "torchs"), PAIRS)
def test_partly_masked_rows_have_torchs_gradients(ours: Any, torchs: Any) -> None:
    x = normal(3, 4).masked_fill(torch.tensor([False, True, False, False]), -torch.inf)
    grads = []
    for function in (ours, torchs):
        leaf = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(function(leaf, 1)[:, [0, 2, 3]], leaf, normal(3, 3, seed=1))
        grads.append(g)
    torch.testing.assert_close(*grads, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(("ours", "torchs"), PAIRS)
@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4)])
def test_implicit_dimension_and_its_warning(ours: Any, torchs: Any, shape: Any) -> None:
    x = normal(*shape)
    results, messages = [], []
    for function in (ours, torchs):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results.append(function(x))
        messages.append([(str(w.message), w.filename) for w in caught])
    assert torch.equal(*results)
    assert messages[0] == messages[1]
    assert messages[0][0][1] == __file__
    compiled = torch.compile(lambda t: ours(t), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), results[0])


@pytest.mark.parametrize(("ours", "torchs"), PAIRS)
def test_dtype_argument(ours: Any, torchs: Any) -> None:
    x = normal(3, 4).half()
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        got = ours(x, 1, dtype=dtype)
        assert torch.equal(got, torchs(x, 1, dtype=dtype))
        assert got.dtype == dtype
    # torch.softmax has the dtype where the functional has _stacklevel.
    assert ours(x, 1, torch.float64).dtype == torch.float64
    leaf = x.clone().requires_grad_()
    ours(leaf, 1, dtype=torch.float64).square().sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.dtype == torch.float16


@pytest.mark.parametrize(("ours", "torchs"), PAIRS)
def test_errors_are_torchs(ours: Any, torchs: Any) -> None:
    for arguments in [(normal(3), 1), (torch.tensor([1, 2]), 0)]:
        with pytest.raises((RuntimeError, IndexError)) as theirs:
            torchs(*arguments)
        with pytest.raises(type(theirs.value), match=str(theirs.value).split("(")[0][:30]):
            ours(*arguments)
