"""bias_act and its backward: against the reference, and against torch and its autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchbp import kernels
from torchbp.kernels import reference

SLOPE = 0.2
TORCH = {
    "identity": lambda z: z,
    "relu": F.relu,
    "leaky_relu": lambda z: F.leaky_relu(z, SLOPE),
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
# One unit in the last place of a value near 4.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}

acts = pytest.mark.parametrize("act", TORCH)
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
with_bias = pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "plain"])
SHAPES = [
    (0,),
    (1,),
    (31,),
    (5, 0),
    (0, 5),
    (7, 1),
    (1, 33),
    (130, 257),
    (3, 2, 31),
    (67, 1030),
    (300, 3),
]


def make(
    shape: tuple[int, ...], dtype: torch.dtype, bias: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    torch.manual_seed(sum(shape) + bias)
    x, g = 2 * torch.randn(shape), torch.randn(shape)
    return g.to(dtype), x.to(dtype), torch.randn(shape[-1]).to(dtype) if bias else None


def assert_close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def rounding_of_sum(terms: Tensor, dtype: torch.dtype) -> float:
    """What adding ``terms`` over all but the last dim may cost, in the dtype of the result."""
    largest = terms.abs().sum_to_size(terms.shape[-1:]).max().item() if terms.numel() else 0.0
    return TOLERANCE[dtype] * max(1.0, largest)


@acts
@dtypes
@with_bias
def test_forward_and_backward_equal_reference(act, dtype, with_bias):
    tolerance = TOLERANCE[dtype]
    for shape in SHAPES:
        g, x, b = make(shape, dtype, with_bias)
        y = kernels.bias_act(x, b, act, SLOPE)
        assert_close(y, reference.bias_act(x, b, act, SLOPE), tolerance)
        grad_x, grad_b = kernels.bias_act_backward(g, x, b, act, SLOPE)
        expected_x, expected_b = reference.bias_act_backward(g, x, b, act, SLOPE)
        assert_close(grad_x, expected_x, tolerance)
        atol = rounding_of_sum(expected_x.double(), dtype)
        torch.testing.assert_close(grad_b, expected_b, rtol=tolerance, atol=atol)


@acts
@with_bias
@pytest.mark.parametrize("shape", [(31,), (130, 257), (3, 2, 31)], ids=str)
def test_equals_torch_and_autograd(act, with_bias, shape):
    g, x, b = make(shape, torch.float64, with_bias)
    leaves = [t.requires_grad_() for t in (x, b) if t is not None]
    y = TORCH[act](x if b is None else x + b)
    expected = torch.autograd.grad(y, leaves, g)
    x, b = x.detach(), None if b is None else b.detach()
    assert_close(kernels.bias_act(x, b, act, SLOPE), y.detach(), 1e-13)
    grads = kernels.bias_act_backward(g, x, b, act, SLOPE)
    for got, want in zip(grads, expected, strict=False):
        assert_close(got, want, 1e-12)
    assert b is not None or grads[1].shape == (0,)


@acts
def test_float32_is_accurate_over_the_whole_range(act):
    x = torch.linspace(-110, 110, 200_001)
    z = x.double()
    exact = TORCH[act](z)
    if act == "gelu":  # torch's own forms of these two cancel in the left tail
        exact = z * torch.special.erfc(-z / 2**0.5) / 2
    if act == "gelu_tanh":
        exact = z * torch.sigmoid((8 / torch.pi) ** 0.5 * (z + 0.044715 * z**3))
    got = kernels.bias_act(x, None, act, SLOPE).double()
    # An exponent rounded to float32 costs digits where it is large: that of gelu_tanh is a cubic,
    # and only the compiled gelu keeps its square exact.
    rounded = act == "gelu_tanh" or (act == "gelu" and not kernels.HAS_EXT)
    relative = 3e-5 if rounded else 5e-7
    normal = exact.abs() > 1e3 * torch.finfo(torch.float32).tiny
    torch.testing.assert_close(got[normal], exact[normal], rtol=relative, atol=0)
    torch.testing.assert_close(got, exact, rtol=relative, atol=1e-7)


@acts
def test_float32_backward_is_accurate(act):
    x = torch.linspace(-30, 30, 60_001)
    exact = x.double().requires_grad_()
    (grad,) = torch.autograd.grad(TORCH[act](exact).sum(), exact)
    got, _ = kernels.bias_act_backward(torch.ones_like(x), x, None, act, SLOPE)
    torch.testing.assert_close(got.double(), grad, rtol=1e-6, atol=3e-7)


@acts
@dtypes
def test_special_values_follow_torch(act, dtype):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([nan, -nan, 0.0, -0.0, inf, -inf, 1e4, -1e4], dtype=dtype).repeat(9)
    got = kernels.bias_act(x, None, act, SLOPE)
    # In float64: torch's vectorised float32 gelu(inf) is nan.
    torch.testing.assert_close(
        got, TORCH[act](x.double()).to(dtype), equal_nan=True, rtol=1e-3, atol=1e-6
    )
    finite = x.isfinite() | x.isnan()
    leaf = x[finite].requires_grad_()
    (expected,) = torch.autograd.grad(TORCH[act](leaf), leaf, torch.ones_like(leaf))
    grad, _ = kernels.bias_act_backward(torch.ones_like(leaf), leaf.detach(), None, act, SLOPE)
    torch.testing.assert_close(grad, expected, equal_nan=True, rtol=1e-3, atol=1e-6)


@dtypes
def test_conversions_round_to_nearest_even(dtype):
    """``x + b`` in float32 rounded once: every binade, ties, overflow and subnormal results."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16).to(dtype)
    x = x[x.isfinite()]
    b = torch.tensor([0.0, 1.0, 2.0**-11, 3 * 2.0**-11, 6e-8, 1e-5, 30.0, 60000.0]).to(dtype)
    x = x[: len(x) // len(b) * len(b)].view(-1, len(b))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    got, expected = kernels.bias_act(x, b, "identity"), (x.to(wide) + b.to(wide)).to(dtype)
    assert torch.equal(got, expected)


STRIDED = {
    "transposed": lambda t: t.transpose(0, 1),
    "sliced": lambda t: t[:, ::2],
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "expanded": lambda t: t[:1].expand(t.shape),
    "negative view": lambda t: torch._neg_view(t),
}


@pytest.mark.parametrize("layout", STRIDED)
@with_bias
def test_any_layout_of_input_and_gradient(layout, with_bias):
    torch.manual_seed(0)
    x, g = STRIDED[layout](torch.randn(6, 6, 5, 7)), torch.randn(6, 6, 5, 7)
    g = g[:, :3] if layout == "sliced" else g
    b = torch.randn(14)[::2] if with_bias else None
    z = x if b is None else x + b
    for grad in (g, g[0, 0, 0, 0].expand(x.shape)):
        assert_close(kernels.bias_act(x, b, "silu"), F.silu(z), 1e-6)
        grad_x, grad_b = kernels.bias_act_backward(grad, x, b, "silu")
        wide = [None if t is None else t.double() for t in (grad, x, b)]
        want_x, want_b = reference.bias_act_backward(*wide, "silu", 0)
        assert_close(grad_x, want_x.float(), 1e-6)
        assert_close(grad_b, want_b.float(), 1e-4)
    if b is None:
        assert kernels.bias_act(x, b, "silu").stride() == torch.empty_like(x).stride()


def test_scalar_tensor():
    assert_close(kernels.bias_act(torch.tensor(-1.5), None, "relu"), torch.tensor(0.0), 0)


@pytest.mark.parametrize("shape", [(2001, 1031), (40_000, 3), (3, 40_000)], ids=str)
def test_bias_gradient_does_not_depend_on_threads(shape):
    g, x, b = make(shape, torch.float32, True)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(kernels.bias_act_backward(g, x, b, "gelu"))
    finally:
        torch.set_num_threads(threads)
    if kernels.HAS_EXT:
        for other in results[1:]:
            assert torch.equal(results[0][0], other[0]) and torch.equal(results[0][1], other[1])
    exact = reference.bias_act_backward(g.double(), x.double(), b.double(), "gelu", 0)[1]
    torch.testing.assert_close(results[0][1].double(), exact, rtol=1e-5, atol=1e-3)
