from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import torchbp.functional as B
from torchbp.ops.activation import Sigmoid, Tanh
from torchbp.ops.activation_pieces import ReLU

NAMES = (
    "relu", "leaky_relu", "gelu", "silu", "tanh", "sigmoid", "softplus", "logsigmoid", "mish",
    "softsign", "tanhshrink", "elu", "celu", "selu", "hardtanh", "relu6", "hardsigmoid",
    "hardswish", "hardshrink", "softshrink",
)  # fmt: skip
PAIRS = {name: (getattr(F, name), getattr(B, name)) for name in NAMES}
PAIRS["threshold"] = tuple(partial(home.threshold, threshold=0.1, value=0.7) for home in (F, B))
IN_PLACE = (
    "relu", "leaky_relu", "silu", "mish", "elu", "celu", "selu", "hardtanh", "relu6",
    "hardsigmoid", "hardswish", "threshold",
)  # fmt: skip
SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, 30.0, -30.0]


def value_and_grad(function, x, grad_output):
    x = x.clone().requires_grad_()
    y = function(x)
    return y.detach(), torch.autograd.grad(y, x, torch.full_like(y, grad_output))[0]


@pytest.mark.parametrize("name", PAIRS)
def test_ends_and_kinks_pass_as_in_torch(name):
    ends = [0.0, -0.0, 1e-40, 30.0, -30.0, 3.0, -3.0, 6.0, 1.0, -1.0, 0.5, -0.5, 0.1]
    theirs, ours = (
        value_and_grad(f, torch.tensor(ends, dtype=torch.float64), 2.0) for f in PAIRS[name]
    )
    # torch's hardsigmoid multiplies with a sixth in float32.
    rtol = 1e-7 if name == "hardsigmoid" else 1e-12
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-79)


# The others of torch give other gradients of NaN, or of infinity, in the middle of a vector than
# at its end.
@pytest.mark.parametrize("grad_output", [2.0, math.inf, math.nan])
@pytest.mark.parametrize(
    "name",
    ["relu", "leaky_relu", "gelu", "silu", "tanh", "sigmoid", "softplus", "logsigmoid", "mish"],
)
def test_special_values_pass_as_in_torch(name, grad_output):
    theirs, ours = (
        value_and_grad(f, torch.tensor(SPECIAL, dtype=torch.float64), grad_output)
        for f in PAIRS[name]
    )
    # torch's Phi(-30) is 0, ours is not: the gradient of gelu there differs in its 198th place.
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-196, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_short_dtypes_round_once(name, create_graph, dtype):
    x = torch.linspace(-6, 6, 301).to(dtype)
    exact = x.double().requires_grad_()
    ours = x.clone().requires_grad_()
    theirs, function = PAIRS[name]
    (want,) = torch.autograd.grad(theirs(exact).sum(), exact)
    (got,) = torch.autograd.grad(function(ours).sum(), ours, create_graph=create_graph)
    assert got.dtype == dtype
    # tanh and sigmoid differentiate their rounded output, as torch does: absolute precision.
    torch.testing.assert_close(got.double(), want, rtol=torch.finfo(dtype).eps, atol=8e-3)
    if name in ("gelu", "silu", "softplus", "logsigmoid", "mish", "elu", "celu"):
        error = (got.double() - want).abs() - torch.finfo(dtype).eps * want.abs()
        assert error.max() <= torch.finfo(dtype).tiny + 1e-7


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_writes_into_the_input(name):
    leaf = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    x = leaf * 1
    result = PAIRS[name][1](x, inplace=True)
    assert result is x
    expected = PAIRS[name][1](leaf)
    assert torch.equal(x, PAIRS[name][0](leaf))
    for y in (result, expected):  # the first and the second derivative
        (grad,) = torch.autograd.grad((y * leaf).square().sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), leaf)
        if y is result:
            got = grad, second
    torch.testing.assert_close(got, (grad, second), rtol=1e-12, atol=1e-13)
    before = leaf.detach().clone()
    for spoiled in (leaf, leaf[0]):
        with pytest.raises(RuntimeError, match="leaf"):
            PAIRS[name][1](spoiled, inplace=True)
    assert torch.equal(leaf, before)


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_where_nothing_is_recorded_and_under_transforms(name):
    given = torch.randn(3, 4, dtype=torch.float64)
    expected = PAIRS[name][0](given)
    x = given.clone()
    assert PAIRS[name][1](x, inplace=True) is x
    assert torch.equal(x, expected)

    def total(x, inplace):
        return (PAIRS[name][1](x * 2, inplace=inplace) * x).sum()

    for transform in (torch.func.grad, torch.func.jacfwd):
        got, want = (transform(partial(total, inplace=b))(given) for b in (True, False))
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["relu", "hardtanh", "leaky_relu"])
def test_in_place_keeps_one_tensor(name):
    kept = []
    x = torch.randn(3, 4, requires_grad=True) * 1
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        PAIRS[name][1](x, inplace=True)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]


def test_spoiled_inputs_are_noticed():
    x = torch.randn(4, requires_grad=True)
    y = B.silu(x * 1)
    z = y.square()  # keeps y
    B.relu(y, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_in_place_with_a_negative_slope_keeps_the_gradient():
    leaf = torch.randn(5, dtype=torch.float64, requires_grad=True)
    result = B.leaky_relu(leaf * 1, -0.5, inplace=True)
    (got,) = torch.autograd.grad(result.sum(), leaf)
    assert torch.equal(got, torch.where(leaf > 0, 1.0, -0.5))


def test_complex_gradients_are_conjugated_as_in_torch():
    x = torch.randn(5, dtype=torch.complex128)
    for name in ("tanh", "sigmoid", "softsign"):  # torch's own silu has no complex derivative
        theirs, ours = (value_and_grad(f, x, 1.5 - 2j) for f in PAIRS[name])
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bounds", [(0.1, 0.7), (-0.7, -0.1), (-1.0, 1.0), (0, 1000.5)], ids=str)
def test_hardtanh_stops_errors_at_bounds_that_a_short_dtype_rounds(bounds, dtype):
    x = torch.linspace(-2000, 2000, 81).to(dtype)
    theirs, ours = (
        value_and_grad(lambda x, f=f: f(x, *bounds), x, 2.0) for f in (F.hardtanh, B.hardtanh)
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lambd", [0.1, 0.7, -0.5])
def test_hardshrink_stops_errors_where_it_shrinks(lambd, dtype):
    x = torch.tensor([0.1, 0.7, -0.1, -0.7, 0.0, 2.0] * 8).to(dtype)
    theirs, ours = (
        value_and_grad(lambda x, f=f: f(x, lambd), x, 2.0) for f in (F.hardshrink, B.hardshrink)
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("op", [ReLU, Sigmoid, Tanh], ids=lambda op: op.__name__)
def test_secant_of_equal_infinities_is_the_gradient(op):
    x = torch.tensor([math.inf, -math.inf, 1.0])
    y = op.forward(x)
    (m,) = op.secant(torch.full_like(x, 2.0), (x,), (x.clone(),), y, y)
    torch.testing.assert_close(m, 2 * value_and_grad(op.call, x, 1.0)[1])


def test_gelu_names_the_approximation_it_does_not_know():
    with pytest.raises(RuntimeError, match=r"approximate.*'cubic'"):
        B.gelu(torch.zeros(2), approximate="cubic")


def test_bias_act_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"activation must be one of identity, relu.*'swish'"):
        B.bias_act(torch.zeros(2, 3), torch.zeros(3), "swish")
    with pytest.raises(ValueError, match=r"bias must have shape \(3,\).*\(2,\)"):
        B.bias_act(torch.zeros(2, 3), torch.zeros(2))
