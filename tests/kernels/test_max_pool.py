"""max_pool and its gradient: against torch in every layout, dtype and for any number of threads."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap

import torchbp.functional as B
from torchbp import kernels
from torchbp.kernels.max_pool import positions
from torchbp.ops import max_pool_offsets

FORWARD = torch.ops.torchbp.max_pool.default
BACKWARD = torch.ops.torchbp.max_pool_backward.default
POOL = {1: F.max_pool1d_with_indices, 2: F.max_pool2d_with_indices, 3: F.max_pool3d_with_indices}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))

# Shape, kernel, stride, padding, dilation, ceil_mode. Among them: windows that tile, overlap and
# leave gaps; planes that fit one block together, that are cut in rows, and in columns; windows of
# more taps than a byte counts; strides beyond the kernel, and beyond the plane.
CASES: list[tuple[Any, ...]] = [
    ((2, 3, 8, 8), (2, 2), (2, 2), (0, 0), (1, 1), False),
    ((2, 65, 7, 9), (3, 3), (2, 2), (1, 1), (1, 1), False),
    ((1, 3, 33, 31), (3, 3), (1, 1), (1, 1), (1, 1), True),
    ((3, 257), (2,), (2,), (1,), (1,), True),
    ((2, 2, 31), (5,), (3,), (2,), (2,), False),
    ((1, 1, 1, 1), (1, 1), (1, 1), (0, 0), (1, 1), False),
    ((1, 1, 260, 300), (3, 2), (2, 3), (1, 1), (1, 2), True),
    ((1, 1, 70000), (3,), (2,), (1,), (1,), False),
    ((1, 1, 3, 40, 500), (2, 3, 3), (1, 2, 2), (1, 1, 0), (1, 1, 2), False),
    ((2, 3, 5, 6, 7), (3, 2, 1), (4, 3, 2), (1, 0, 0), (1, 2, 1), True),
    ((2, 2, 20, 21), (17, 18), (2, 1), (3, 9), (1, 1), False),
    ((2, 1, 9, 10), (2, 2), (5, 4), (0, 0), (1, 1), False),
    ((1, 2, 5, 6), (2, 3), (10**6, 10**6), (1, 1), (2, 1), False),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)


def channels_last(t: Tensor) -> Tensor:
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


LAYOUTS = {
    "contiguous": lambda t: t,
    "channels last": channels_last,
    "half of the channels": lambda t: channels_last(torch.cat([t, t], 1))[:, : t.shape[1]],
    "every second channel": lambda t: channels_last(t.repeat_interleave(2, 1))[:, ::2],
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "rows of a wider tensor": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "one value": lambda t: t.flatten()[:1].reshape((1,) * t.dim()).expand(t.shape),
}  # fmt: skip


def make(case: tuple[Any, ...], dtype: torch.dtype, special: bool = True) -> Tensor:
    """Values of which many are equal, some of them NaN and infinite."""
    torch.manual_seed(len(str(case)))
    x = (torch.randn(case[0]) * 3).round().to(dtype)
    if special:
        x[torch.rand(case[0]) < 0.05] = math.inf
        x[torch.rand(case[0]) < 0.05] = -math.inf
        x[torch.rand(case[0]) < 0.02] = math.nan
    return x


def bits(t: Tensor) -> Tensor:
    return t.nan_to_num(nan=12345.0, posinf=23456.0, neginf=-23456.0)


@cases
@dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_torch(case, dtype, layout):
    x = LAYOUTS[layout](make(case, dtype))
    kernel, *settings, ceil_mode = case[1:]
    y, indices = POOL[len(kernel)](x, kernel, *settings, ceil_mode)
    got, offsets = FORWARD(x, kernel, *settings, ceil_mode)
    assert torch.equal(bits(got), bits(y)) and got.stride() == y.stride()
    assert offsets.dtype == (torch.uint8 if math.prod(kernel) <= 256 else torch.int32)
    # Of windows that hold nothing but -infinity, torch's own kernels take one element or another.
    some = y > -math.inf
    some |= y.isnan()
    at = positions(offsets, x.shape[-len(kernel) :], kernel, *settings)
    assert torch.equal(at[some], indices[some])

    g = LAYOUTS[layout](torch.randn(y.shape).to(dtype))
    grad = BACKWARD(g, offsets, x.shape, kernel, *settings)
    flat = torch.zeros(*x.shape[: -len(kernel)], math.prod(x.shape[-len(kernel) :])).double()
    flat.scatter_add_(-1, at.flatten(-len(kernel)), g.double().flatten(-len(kernel)))
    tolerance = {8: 1e-14, 4: 1e-6, 2: 1e-2}[dtype.itemsize]
    expected = flat.reshape(x.shape)
    torch.testing.assert_close(grad.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_of_minus_infinity_alone_the_first_element_is_taken(layout):
    x = LAYOUTS[layout](torch.full((1, 2, 4, 5), -math.inf))
    y, offsets = FORWARD(x, (3, 3), (2, 2), (1, 1), (1, 1), False)
    assert (y == -math.inf).all()
    expected = torch.tensor([[4, 3, 3], [1, 0, 0]], dtype=torch.uint8)
    assert (offsets == expected).all()


@pytest.mark.parametrize("taps", [256, 257])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_a_byte_counts_256_taps(layout, taps):
    x = LAYOUTS[layout](torch.arange(600.0).expand(1, 2, 600).clone())
    _, offsets = FORWARD(x, (taps,), (1,), (0,), (1,), False)
    assert (offsets == taps - 1).all()
    assert offsets.dtype == (torch.uint8 if taps == 256 else torch.int32)


@cases
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_threads_do_not_matter(case, layout):
    x = LAYOUTS[layout](make(case, torch.float32, special=False))
    settings = case[1:-1]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y, offsets = FORWARD(x, *settings, case[-1])
            g = torch.linspace(-1, 2, y.numel()).reshape(y.shape)
            results.append((y, offsets, BACKWARD(g, offsets, x.shape, *settings)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("case", [CASES[1], CASES[4], CASES[9], CASES[10]], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_opcheck(case, layout):
    x = LAYOUTS[layout](make(case, torch.float32, special=False))
    y, offsets = FORWARD(x, *case[1:])
    torch.library.opcheck(FORWARD, (x, *case[1:]))
    torch.library.opcheck(BACKWARD, (torch.randn_like(y), offsets, list(x.shape), *case[1:-1]))


def test_vmap():
    x = torch.randn(3, 2, 4, 6, 7)
    settings = (3, 2), (2, 2), (1, 0), (1, 1)
    y, offsets = vmap(lambda t: FORWARD(t, *settings, False))(x)
    expected = FORWARD(x.flatten(0, 1), *settings, False)
    assert torch.equal(y.flatten(0, 1), expected[0])
    assert torch.equal(offsets.flatten(0, 1), expected[1])
    grad = vmap(lambda g, o: BACKWARD(g, o, x.shape[1:], *settings))(y, offsets)
    assert torch.equal(grad.flatten(0, 1), BACKWARD(*expected, (6, *x.shape[2:]), *settings))


X = torch.randn(2, 3, 6, 6)
SETTINGS = [2, 2], [2, 2], [0, 0], [1, 1]
Y, OFFSETS = FORWARD(X, *SETTINGS, False)


def bad() -> Iterator[tuple[Any, tuple[Any, ...], str]]:
    kernel, stride, padding, dilation = SETTINGS
    yield FORWARD, (X, [], [], [], [], False), "kernel: expected 1 to 3 numbers, got 0"
    yield FORWARD, (X[0, 0], *SETTINGS, False), "x: expected 3 or 4 dims, got 2"
    yield FORWARD, (X, [2, 0], stride, padding, dilation, False), "kernel: expected 2 numbers"
    yield FORWARD, (X, kernel, [2], padding, dilation, False), "stride: expected 2 numbers from 1"
    yield FORWARD, (X, kernel, stride, [0, -1], dilation, False), "padding: expected 2 numbers"
    yield FORWARD, (X, kernel, stride, padding, [0, 1], False), "dilation: expected 2 numbers"
    yield FORWARD, (X, kernel, stride, [2, 0], dilation, False), "padding: expected at most half"
    yield FORWARD, (X[..., :1], *SETTINGS, False), "x: expected room for a window, got 1"
    yield FORWARD, (X.int(), *SETTINGS, False), "x: expected float32, float64"
    yield BACKWARD, (Y, OFFSETS[:1], X.shape, *SETTINGS), "offsets: expected the shape"
    yield BACKWARD, (Y, OFFSETS.int(), X.shape, *SETTINGS), "offsets: expected "
    yield BACKWARD, (Y, OFFSETS, (1, 3, 6, 6), *SETTINGS), "grad_output: expected the samples"
    yield BACKWARD, (Y, OFFSETS, (6, 6), *SETTINGS), "x: expected 3 or 4 dims, got 2"
    yield BACKWARD, (Y, OFFSETS, (2, 3, 9, 6), *SETTINGS), "expected 4 windows along dim 2, got 3"
    yield BACKWARD, (Y, OFFSETS, (2, 3, 6, 4), *SETTINGS), "expected 2 windows along dim 3, got 3"


@pytest.mark.parametrize("op, arguments, message", [*bad()])
def test_arguments_are_checked(op, arguments, message):
    with pytest.raises(RuntimeError, match=message):
        op(*arguments)


@pytest.fixture
def _few_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let layers use the kernel for the few elements of a test."""
    monkeypatch.setattr(max_pool_offsets, "_MANY", 0)


@pytest.mark.usefixtures("_few_are_enough")
def test_the_layer_saves_a_byte_per_window():
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = B.max_pool2d(x, 2)
    if kernels.HAS_EXT:
        assert [t.dtype for t in saved] == [torch.uint8]
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad.sum((-1, -2)), torch.full((2, 3), 16.0))


@pytest.mark.usefixtures("_few_are_enough")
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_second_derivative_of_the_layer(layout):
    x = LAYOUTS[layout](torch.randn(1, 2, 5, 6, dtype=torch.float64)).requires_grad_()

    def function(x: Tensor) -> Tensor:
        return B.max_pool2d(x, 3, 2, 1) ** 2

    assert torch.autograd.gradcheck(function, x) and torch.autograd.gradgradcheck(function, x)
