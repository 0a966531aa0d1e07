"""gated and its backward: against the reference, and against torch and its autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchbp import kernels
from torchbp.kernels import GATES, KERNELS

TORCH = {
    "identity": lambda z: z,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
# One unit in the last place of a value near 8.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2**-5, torch.float16: 2**-8}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
acts = pytest.mark.parametrize("act", TORCH)
SHAPES = [(0,), (1,), (31,), (5, 0), (0, 5), (7, 1), (1, 33), (13, 257), (3, 2, 31), (2, 8200)]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).mul_(2).to(dtype)


def close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_the_activations_are_those_without_a_setting():
    assert set(GATES) == set(TORCH)


@acts
@dtypes
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "pair"])
def test_equals_the_reference(act, dtype, packed):
    for shape in SHAPES:
        a, b, g = (normal(*shape, dtype=dtype, seed=seed) for seed in range(3))
        given = (torch.cat([a, b], -1), None) if packed else (a, b)
        for name, arguments in (("gated", given), ("gated_backward", (g, *given))):
            got = getattr(kernels, name)(*arguments, act)
            expected = KERNELS[name].reference(*arguments, act)
            pairs = zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]
            for mine, want in pairs:
                close(mine, want, TOLERANCE[dtype])
                assert mine.stride() == want.stride()


@acts
@pytest.mark.parametrize("shape", [(31,), (13, 257), (3, 2, 31)], ids=str)
def test_equals_torch_and_autograd(act, shape):
    a, b, g = (normal(*shape, dtype=torch.float64, seed=seed) for seed in range(3))
    leaves = a.clone().requires_grad_(), b.clone().requires_grad_()
    y = leaves[0] * TORCH[act](leaves[1])
    expected = torch.autograd.grad(y, leaves, g)
    x = torch.cat([a, b], -1)
    close(kernels.gated(a, b, act), y.detach(), 1e-13)
    close(kernels.gated(x, None, act), y.detach(), 1e-13)
    for got, want in zip(kernels.gated_backward(g, a, b, act), expected, strict=True):
        close(got, want, 1e-12)
    close(kernels.gated_backward(g, x, None, act)[0], torch.cat(expected, -1), 1e-12)


@acts
def test_float32_is_accurate_over_the_whole_range(act):
    b = torch.linspace(-30, 30, 60_001)
    a, exact = torch.full_like(b, 1.5), b.double().requires_grad_()
    y = 1.5 * TORCH[act](exact)
    (slope,) = torch.autograd.grad(y.sum(), exact)
    y = y.detach()
    if act == "gelu":  # torch's own forms of these two cancel in the left tail
        y = 1.5 * b.double() * torch.special.erfc(-b.double() / 2**0.5) / 2
    torch.testing.assert_close(kernels.gated(a, b, act).double(), y, rtol=1e-6, atol=1e-6)
    of_value, of_gate = kernels.gated_backward(torch.ones_like(b), a, b, act)
    torch.testing.assert_close(of_value.double(), y / 1.5, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(of_gate.double(), slope, rtol=2e-6, atol=1e-6)


@acts
def test_special_values_follow_torch(act):
    b = torch.tensor([torch.nan, 0.0, -0.0, 1e4, -1e4, -1.0, 2.0] * 5)
    a = torch.tensor([1.0, torch.inf, -2.0, torch.nan, torch.inf] * 7)
    leaves = a.clone().requires_grad_(), b.clone().requires_grad_()
    y = leaves[0] * TORCH[act](leaves[1])
    expected = torch.autograd.grad(y, leaves, torch.ones_like(y))
    same = {"equal_nan": True, "rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(kernels.gated(a, b, act), y.detach(), **same)
    grads = kernels.gated_backward(torch.ones_like(b), a, b, act)
    torch.testing.assert_close(grads[0], expected[0], **same)
    finite = a.isfinite()  # infinity times a slope that rounds to 0 is a matter of the formula
    torch.testing.assert_close(grads[1][finite], expected[1][finite], **same)


def test_relu_lets_no_infinite_error_pass_where_it_is_flat():
    a, b = torch.tensor([torch.inf, 1.0]), torch.tensor([-1.0, 2.0])
    assert kernels.gated_backward(torch.ones(2), a, b, "relu")[1].tolist() == [0.0, 1.0]


LAYOUTS = {
    "transposed": lambda t: t.mT,
    "sliced": lambda t: t[..., ::2],
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "expanded": lambda t: t[:1].expand(t.shape),
    "halves": lambda t: t.chunk(2, -1)[1],
    "halves of rows": lambda t: t.chunk(2, 1)[0],
    "negative view": lambda t: torch._neg_view(t),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", ["as the value", "contiguous"])
def test_any_layout(layout, other):
    a = LAYOUTS[layout](normal(4, 6, 6, 6))
    b = LAYOUTS[layout](normal(4, 6, 6, 6, seed=1))
    b = b if other == "as the value" else b.contiguous()
    g = LAYOUTS[layout](normal(4, 6, 6, 6, seed=2))
    y = kernels.gated(a, b, "silu")
    close(y, a * F.silu(b), 1e-5)
    assert y.stride() == torch.empty_like(a).stride()
    wide = [t.double() for t in (g, a, b)]
    for grad, exact in ((g, wide[0]), (g.contiguous(), wide[0])):
        expected = KERNELS["gated_backward"].reference(exact, *wide[1:], "silu")
        for got, want in zip(kernels.gated_backward(grad, a, b, "silu"), expected, strict=True):
            torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-5)
    x = torch.cat([a, b], -1)
    close(kernels.gated(x.transpose(0, 1), None, "silu"), y.transpose(0, 1), 1e-5)
    assert torch.equal(
        kernels.gated_backward(g, x, None, "silu")[0],
        torch.cat(kernels.gated_backward(g, a.contiguous(), b.contiguous(), "silu"), -1),
    )


def test_scalar_tensors():
    assert kernels.gated(torch.tensor(2.0), torch.tensor(3.0), "identity") == 6
    grads = kernels.gated_backward(torch.tensor(1.0), torch.tensor(2.0), torch.tensor(3.0), "relu")
    assert [g.item() for g in grads] == [3.0, 2.0]


@pytest.mark.parametrize("shape", [(301, 1030), (1, 400_000), (40_000, 6)], ids=str)
def test_results_do_not_depend_on_threads(shape):
    x, g = normal(*shape), normal(shape[0], shape[1] // 2, seed=1)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append((kernels.gated(x), kernels.gated_backward(g, x)[0]))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert torch.equal(results[0][0], other[0]) and torch.equal(results[0][1], other[1])


@pytest.mark.parametrize("act", ["silu", "relu"])
def test_opcheck(act):
    a, b, g = (normal(3, 5, seed=seed) for seed in range(3))
    x = torch.cat([a, b], -1)
    for name, arguments in (("gated", ()), ("gated_backward", (g,))):
        for given in ((a, b), (x, None), (a.t(), b.t()) if not arguments else (a, b)):
            torch.library.opcheck(KERNELS[name].op, (*arguments, *given, act))


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "pair"])
def test_vmap(packed):
    x, g = normal(3, 4, 6), normal(3, 4, 3, seed=1)
    a, b = x.chunk(2, -1)
    if packed:
        got = torch.func.vmap(lambda g, x: kernels.gated_backward(g, x)[0], (0, 1))(
            g, x.transpose(0, 1)
        )
        assert torch.equal(got, kernels.gated_backward(g, x)[0])
        assert torch.equal(torch.func.vmap(kernels.gated, 1)(x), kernels.gated(x.transpose(0, 1)))
        return
    got = torch.func.vmap(kernels.gated_backward, (0, 0, None))(g, a, b[0])
    expected = kernels.gated_backward(g, a, b[:1].expand_as(a))
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3), torch.zeros(4), "silu"), "gate: expected the shape of value"),
        ((torch.zeros(3), torch.zeros(3).double(), "silu"), "gate: expected the dtype of value"),
        ((torch.zeros(3), None, "silu"), "value: expected a last dim of even size"),
        ((torch.tensor(0.0), None, "silu"), "value: expected a last dim of even size"),
        ((torch.zeros(4), None, "leaky_relu"), "act: expected .*, got leaky_relu"),
        ((torch.zeros(4), None, "swish"), "act: expected .*, got swish"),
        ((torch.zeros(4, dtype=torch.int64), None, "silu"), "value: expected float32"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        kernels.gated(*arguments)


def test_bad_gradients():
    a = torch.zeros(3, 4)
    for grad, message in ((torch.zeros(3, 4), "the shape of the result"),
                          (torch.zeros(3, 2).double(), "the dtype of value")):  # fmt: skip
        with pytest.raises(RuntimeError, match=f"grad_output: expected {message}"):
            kernels.gated_backward(grad, a)
