"""conv_grad_weight: against the definition, in every layout, for any number of threads."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap

from torchbp import kernels
from torchbp.kernels import reference

OP = torch.ops.torchbp.conv_grad_weight.default

# Samples, inputs and outputs of a group, groups, size; kernel, stride, padding, dilation. Among
# them: blocks that are full, that are not and of one vector; taps as lanes, in several blocks, and
# not because of a dilation; one channel per group; strides that leave elements out; borders wider
# than the kernel; samples in several parts.
CASES: list[tuple[Any, ...]] = [
    (2, 32, 14, 1, (6, 5), (3, 3), (1, 1), (1, 1), (1, 1)),
    (1, 37, 29, 1, (5, 7), (2, 3), (1, 2), (0, 2), (2, 1)),
    (2, 12, 15, 2, (7,), (1,), (3,), (0,), (1,)),
    (2, 3, 5, 1, (9, 11), (3, 7), (2, 2), (1, 3), (1, 1)),
    (1, 7, 5, 1, (4, 12), (1, 9), (1, 2), (0, 1), (1, 1)),
    (1, 3, 5, 3, (9, 11), (3, 3), (1, 3), (2, 4), (1, 2)),
    (2, 2, 3, 1, (4, 5, 6), (2, 1, 3), (1, 2, 2), (1, 0, 1), (2, 1, 1)),
    (3, 1, 1, 5, (6, 9), (3, 3), (1, 1), (1, 1), (1, 1)),
    (2, 1, 3, 2, (15, 17), (7, 7), (2, 2), (3, 3), (1, 1)),
    (1, 1, 2, 1, (8, 30), (3, 2), (3, 4), (0, 5), (2, 3)),
    (2, 1, 1, 3, (3, 4, 19), (2, 1, 5), (1, 2, 1), (1, 0, 2), (1, 1, 2)),
    (1, 1, 1, 2, (2,), (3,), (1,), (4,), (1,)),
    (9, 40, 8, 1, (40, 40), (3, 3), (1, 1), (1, 1), (1, 1)),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)


def make(case: tuple[Any, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, list[Any]]:
    """grad_output, x, what autograd says, and the settings."""
    samples, inputs, outputs, groups, size, kernel, *steps = case
    torch.manual_seed(samples)
    x = torch.randn(samples, inputs * groups, *size, dtype=dtype)
    weight = torch.zeros(outputs * groups, inputs, *kernel, dtype=dtype, requires_grad=True)
    conv = (F.conv1d, F.conv2d, F.conv3d)[len(size) - 1]
    y = conv(x, weight, None, *steps, groups)
    grad = torch.randn_like(y)
    return grad, x, torch.autograd.grad(y, weight, grad)[0], [kernel, *steps, groups]


@cases
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_equals_torch(case, dtype):
    grad, x, expected, settings = make(case, dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    scale = expected.abs().max().item()
    for compute in (OP, reference.conv_grad_weight):
        got = compute(grad, x, *settings)
        assert got.is_contiguous()
        torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * scale)


LAYOUTS = {
    "contiguous": lambda t: t,
    "channels last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
    "every second": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "rows of a wider tensor": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "one value": lambda t: t[:1, :1, :1, :1].expand(t.shape),
}


@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[8]], ids=str)
@pytest.mark.parametrize("grad_layout, x_layout", [*itertools.product(LAYOUTS, LAYOUTS)])
def test_any_pair_of_layouts(case, grad_layout, x_layout):
    grad, x, _, settings = make(case, torch.float64)
    grad, x = LAYOUTS[grad_layout](grad), LAYOUTS[x_layout](x)
    expected = reference.conv_grad_weight(grad, x, *settings)
    torch.testing.assert_close(OP(grad, x, *settings), expected, rtol=1e-12, atol=1e-12)


@cases
def test_threads_do_not_matter_element_by_element(case):
    grad, x, _, settings = make(case, torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(OP(grad, x, *settings))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("shape", [(0, 4, 5, 5), (2, 0, 5, 5)], ids=str)
def test_a_sum_of_nothing_is_zero(shape):
    x, grad = torch.randn(shape), torch.randn(shape[0], 6, 3, 3)
    got = OP(grad, x, [3, 3], [1, 1], [0, 0], [1, 1], 1)
    assert got.shape == (6, shape[1], 3, 3) and not got.any()


def test_positions_may_ask_for_elements_beyond_the_end():
    """As "same" padding does, and a transposed convolution with an output padding."""
    for inputs in (3, 1):
        x, grad = torch.randn(2, inputs, 4, 4).double(), torch.randn(2, 5, 4, 4).double()
        weight = torch.zeros(5, inputs, 3, 2, dtype=torch.float64, requires_grad=True)
        y = F.conv2d(F.pad(x, (0, 1, 0, 2)), weight)
        (expected,) = torch.autograd.grad(y, weight, grad)
        settings = [3, 2], [1, 1], [0, 0], [1, 1], 1
        for compute in (OP, reference.conv_grad_weight):
            got = compute(grad, x, *settings)
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_infinity_stays_with_its_output():
    grad, x, _, settings = make(CASES[0], torch.float32)
    grad[0, 3, 2, 2] = float("inf")
    finite = OP(grad, x, *settings).isfinite().flatten(1).all(1)
    assert not finite[3] and finite[:3].all() and finite[4:].all()


@pytest.mark.parametrize("case", [CASES[0], CASES[6], CASES[8]], ids=str)
def test_opcheck(case):
    grad, x, _, settings = make(case, torch.float32)
    torch.library.opcheck(OP, (grad, x, *settings))


def test_vmap():
    grad, x, _, settings = make(CASES[7], torch.float64)
    got = vmap(lambda g: OP(g, x, *settings))(torch.stack([grad, 2 * grad]))
    expected = OP(grad, x, *settings)
    torch.testing.assert_close(got, torch.stack([expected, 2 * expected]))


G, X = torch.randn(2, 4, 3, 3), torch.randn(2, 6, 5, 5)
BAD = {
    "dims": ((G[0, 0], X[0, 0], [], [], [], [], 1), "x: expected 1 to 3 dims"),
    "samples": ((G[:1], X, [3, 3], [1, 1], [0, 0], [1, 1], 1), "grad_output: expected the dims"),
    "dtype": ((G.double(), X, [3, 3], [1, 1], [0, 0], [1, 1], 1), "grad_output: .* dtype"),
    "kernel": ((G, X, [3], [1, 1], [0, 0], [1, 1], 1), "kernel: expected 2 numbers from 1 on"),
    "stride": ((G, X, [3, 3], [0, 1], [0, 0], [1, 1], 1), "stride: expected 2 numbers from 1 on"),
    "padding": ((G, X, [3, 3], [1, 1], [0, -1], [1, 1], 1), "padding: expected 2 numbers from 0"),
    "dilation": ((G, X, [3, 3], [1, 1], [0, 0], [1, 0], 1), "dilation: expected 2 numbers from 1"),
    "groups": ((G, X, [3, 3], [1, 1], [0, 0], [1, 1], 4), "groups: expected a divisor of both"),
}  # fmt: skip


@pytest.mark.parametrize("compute", [OP, reference.conv_grad_weight], ids=["kernel", "reference"])
@pytest.mark.parametrize("name", BAD)
def test_arguments_are_checked(name, compute):
    arguments, message = BAD[name]
    with pytest.raises(RuntimeError, match=message):
        compute(*arguments)


@pytest.mark.skipif(not kernels.HAS_EXT, reason="the reference takes any dtype")
def test_other_dtypes_are_refused():
    with pytest.raises(RuntimeError, match="x: expected float32 or float64"):
        OP(G.half(), X.half(), [3, 3], [1, 1], [0, 0], [1, 1], 1)
