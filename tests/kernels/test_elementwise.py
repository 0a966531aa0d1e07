"""elementwise_backward and softmax_backward: against the reference, and against autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchbp import kernels
from torchbp.kernels import reference

# The settings tested, torch's function, and whether the kernel reads its output.
FUNCTIONS = {
    "relu": ((), F.relu, False),
    "leaky_relu": ((0.2,), lambda x: F.leaky_relu(x, 0.2), False),
    "gelu": ((), F.gelu, False),
    "gelu_tanh": ((), lambda x: F.gelu(x, approximate="tanh"), False),
    "silu": ((), F.silu, False),
    "tanh": ((), torch.tanh, True),
    "sigmoid": ((), torch.sigmoid, True),
    "softplus": ((1.5, 4.0), lambda x: F.softplus(x, 1.5, 4.0), False),
    "log_sigmoid": ((), F.logsigmoid, False),
    "mish": ((), F.mish, False),
    "softsign": ((), F.softsign, False),
    "tanhshrink": ((), F.tanhshrink, False),
    "elu": ((1.3,), lambda x: F.elu(x, 1.3), False),
    "celu": ((1.3,), lambda x: F.celu(x, 1.3), False),
    "selu": ((), F.selu, False),
    "threshold": ((0.4,), lambda x: F.threshold(x, 0.4, 7.0), False),
    "hardtanh": ((-0.5, 0.8), lambda x: F.hardtanh(x, -0.5, 0.8), True),
    "hardsigmoid": ((), F.hardsigmoid, False),
    "hardswish": ((), F.hardswish, False),
    "hardshrink": ((0.6,), lambda x: F.hardshrink(x, 0.6), False),
    "softshrink": ((0.6,), lambda x: F.softshrink(x, 0.6), True),
}
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}

functions = pytest.mark.parametrize("name", FUNCTIONS)
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))


def test_every_function_is_tested() -> None:
    assert [*FUNCTIONS] == [*reference.ELEMENTWISE]


@functions
@dtypes
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 2, 31), (130, 257)], ids=str)
def test_equals_reference(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(sum(shape))
    g, kept = torch.randn(shape).to(dtype), (2 * torch.randn(shape)).to(dtype)
    settings = FUNCTIONS[name][0]
    got = kernels.elementwise_backward(g, kept, name, *settings)
    numbered = (g, kept, [*FUNCTIONS].index(name), *settings, *[0.0] * (2 - len(settings)))
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(
        got, reference.elementwise_backward(*numbered), rtol=tolerance, atol=4 * tolerance
    )


@functions
def test_equals_autograd_from_end_to_end(name: str) -> None:
    settings, function, from_output = FUNCTIONS[name]
    # Without NaN: what torch makes of it here depends on where in a vector it stands.
    edges = torch.tensor([0.0, -0.0, 3.0, -3.0, 0.4, 0.6, -0.6, 0.8, -0.5, 300.0, -300.0])
    x = torch.cat([edges.double(), torch.linspace(-12, 12, 4001).double()]).requires_grad_()
    y = function(x)
    (expected,) = torch.autograd.grad(y.sum(), x)
    kept = (y if from_output else x).detach()
    got = kernels.elementwise_backward(torch.ones_like(kept), kept, name, *settings)
    # torch's hardsigmoid multiplies with a sixth in float32, its celu with 1 / alpha.
    rtol = 1e-6 if name in ("hardsigmoid", "celu") else 1e-12
    torch.testing.assert_close(got, expected, rtol=rtol, atol=1e-14)


@functions
def test_float32_keeps_its_digits_in_the_tails(name: str) -> None:
    settings, function, from_output = FUNCTIONS[name]
    if from_output:
        pytest.skip("the output has rounded already")
    x = torch.linspace(-20, 20, 40_001)
    exact = x.double().requires_grad_()
    (expected,) = torch.autograd.grad(function(exact).sum(), exact)
    got = kernels.elementwise_backward(torch.ones_like(x), x, name, *settings)
    relative = 1e-4 if "gelu" in name else 3e-6 if name == "mish" else 1e-6
    # Where the derivative changes sign it has no relative accuracy.
    torch.testing.assert_close(got.double(), expected, rtol=relative, atol=3e-7)


def test_any_layout_and_errors() -> None:
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    g = torch.randn(1).expand(x.shape)
    got = kernels.elementwise_backward(g, x, "silu")
    assert got.stride() == x.stride()
    torch.testing.assert_close(got, kernels.elementwise_backward(g + 0, x.contiguous(), "silu"))
    with pytest.raises(KeyError):
        kernels.elementwise_backward(g, x, "swish")
    op = torch.ops.torchbp.elementwise_backward.default
    for arguments, message in (
        ((g, x, 99, 0.0, 0.0), "function"),
        ((g[0], x, 0, 0.0, 0.0), "grad_output"),
        ((g.double(), x, 0, 0.0, 0.0), "grad_output"),
    ):
        for call in (op, reference.elementwise_backward):
            with pytest.raises(RuntimeError, match=message):
                call(*arguments)


def softmax_gradient(x: Tensor, g: Tensor, logarithm: bool) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = x.log_softmax(-1) if logarithm else x.softmax(-1)
    return y.detach(), torch.autograd.grad(y, x, g)[0]


@dtypes
@pytest.mark.parametrize("logarithm", [False, True], ids=["softmax", "log_softmax"])
@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (3, 0), (5, 7), (3, 2, 1000), (300, 65)])
def test_softmax(shape: tuple[int, ...], logarithm: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(sum(shape))
    x, g = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    y, expected = softmax_gradient(x, g, logarithm)
    got = kernels.softmax_backward(g, y, logarithm)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(got, expected, rtol=8 * tolerance, atol=8 * tolerance)
    torch.testing.assert_close(
        got, reference.softmax_backward(g, y, logarithm), rtol=tolerance, atol=8 * tolerance
    )


@pytest.mark.parametrize("logarithm", [False, True], ids=["softmax", "log_softmax"])
def test_softmax_of_other_layouts_and_masks(logarithm: bool) -> None:
    x = torch.randn(6, 4, 5, dtype=torch.float64)
    x[0, 0, 1:] = -torch.inf
    g = torch.randn(5, 4, 6, dtype=torch.float64).transpose(0, 2)
    y, expected = softmax_gradient(x.transpose(0, 1), g.transpose(0, 1), logarithm)
    got = kernels.softmax_backward(g.transpose(0, 1), y, logarithm)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_softmax_does_not_depend_on_threads() -> None:
    g, y = torch.randn(300, 1031), torch.randn(300, 1031).softmax(-1)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(kernels.softmax_backward(g, y))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("in_dims", [(0, 0), (1, None), (None, 2)], ids=str)
def test_vmap(in_dims: tuple[int | None, ...]) -> None:
    def batched(t: Tensor, dim: int | None) -> Tensor:
        return t if dim is None else torch.stack([t, 2 * t], dim)

    g, y = torch.randn(4, 5), torch.rand(4, 5)
    pair = batched(g, in_dims[0]), batched(y, in_dims[1])
    for call in (
        lambda g, y: kernels.elementwise_backward(g, y, "sigmoid"),
        kernels.softmax_backward,
    ):
        got = torch.func.vmap(call, in_dims)(*pair)
        for n in (0, 1):
            row = [t if d is None else t.select(d, n) for t, d in zip(pair, in_dims, strict=True)]
            torch.testing.assert_close(got[n], call(*row))


@pytest.mark.parametrize("shape", [(), (3,), (4, 5)], ids=str)
def test_opcheck(shape: tuple[int, ...]) -> None:
    g, y = torch.randn(shape), torch.rand(shape)
    ops = torch.ops.torchbp
    torch.library.opcheck(ops.elementwise_backward.default, (g, y, 4, 0.0, 0.0))
    torch.library.opcheck(ops.softmax_backward.default, (g, y, True))
