"""The CUDA kernels' source, compiled for the CPU and run block by block, against the reference.

This shows that indices, barriers and sums are right; it says nothing about a real GPU.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from torchbp.kernels import reference

CPP = Path(__file__).parents[2] / "cpp"
COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # the order in simt.cpp
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
SLOPE = 0.2


@pytest.fixture(scope="module")
def simt(tmp_path_factory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("simt") / "simt.so"
    command = [
        str(COMPILER),
        "-std=c++20",
        "-O1",
        "-fPIC",
        "-shared",
        "-Wall",
        "-Wextra",
        "-Werror",
    ]
    command += ["-fsanitize=undefined", "-fno-sanitize-recover"]
    command += [f"-I{CPP}", f"-I{CPP / 'include'}", str(CPP / "tests" / "simt.cpp")]
    subprocess.run([*command, "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def pointer(t: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if t is None else t.data_ptr())


def integers(*values: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(v) for v in values]


def close(got: Tensor, expected: Tensor, scale: float = 1.0) -> None:
    tolerance = TOLERANCE[got.dtype]
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * scale)


@dtypes
@pytest.mark.parametrize("act", reference.ACTIVATIONS)
def test_bias_act(simt, dtype, act):
    torch.manual_seed(0)
    index = list(reference.ACTIVATIONS).index(act)
    kind, slope = (ctypes.c_int(DTYPES.index(dtype)), ctypes.c_int(index)), ctypes.c_double(SLOPE)
    rows, channels = 37, 43
    x, g = torch.randn(2, rows, channels).to(dtype)
    b = torch.randn(channels).to(dtype)
    for bias in (b, None):
        y = torch.full_like(x, float("nan"))
        simt.simt_forward(
            *kind, pointer(x), pointer(bias), pointer(y), *integers(x.numel(), channels), slope
        )
        close(y, reference.bias_act(x, bias, act, SLOPE))

    grad = torch.full_like(x, float("nan"))
    simt.simt_backward(
        *kind, pointer(g), pointer(x), pointer(grad), ctypes.c_int64(x.numel()), slope
    )
    close(grad, reference.bias_act_backward(g, x, None, act, SLOPE)[0])

    grad, grad_bias = torch.full_like(x, float("nan")), torch.full_like(b, float("nan"))
    tensors = [pointer(t) for t in (g, x, b, grad, grad_bias)]
    simt.simt_backward_bias(*kind, *tensors, *integers(rows, channels, 16), slope)
    expected, expected_bias = reference.bias_act_backward(g, x, b, act, SLOPE)
    close(grad, expected)
    close(grad_bias, expected_bias, scale=10.0)


@dtypes
@pytest.mark.parametrize("function", reference.ELEMENTWISE)
def test_elementwise(simt, dtype, function):
    torch.manual_seed(0)
    index, settings = [*reference.ELEMENTWISE].index(function), (0.7, 1.9)
    g, kept = torch.randn(2, 37, 43).to(dtype)
    grad = torch.full_like(kept, float("nan"))
    kind = ctypes.c_int(DTYPES.index(dtype)), ctypes.c_int(index)
    tensors = [pointer(t) for t in (g, kept, grad)]
    simt.simt_elementwise(
        *kind, *tensors, ctypes.c_int64(kept.numel()), *map(ctypes.c_double, settings)
    )
    close(grad, reference.elementwise_backward(g, kept, index, *settings))


@dtypes
@pytest.mark.parametrize("logarithm", [False, True], ids=["softmax", "log_softmax"])
@pytest.mark.parametrize("shape", [(7, 300), (5, 3), (1, 1)], ids=str)
def test_softmax(simt, shape, logarithm, dtype):
    torch.manual_seed(0)
    g, x = torch.randn(2, *shape).to(dtype)
    y = x.log_softmax(-1) if logarithm else x.softmax(-1)
    grad = torch.full_like(y, float("nan"))
    tensors = [pointer(t) for t in (g, y, grad)]
    kind = ctypes.c_int(DTYPES.index(dtype)), ctypes.c_bool(logarithm)
    simt.simt_softmax(*kind, *tensors, *integers(*shape))
    close(grad, reference.softmax_backward(g, y, logarithm))


# samples, positions, units; whether units or positions are contiguous
@pytest.mark.parametrize("shape", [(19, 1, 34), (5, 11, 34), (9, 70, 3)], ids=str)
@pytest.mark.parametrize("units_inner", [True, False], ids=["units", "positions"])
@pytest.mark.parametrize("gradient", [True, False], ids=["gradient", "product"])
@dtypes
def test_blame_reduce(simt, shape, units_inner, gradient, dtype):
    torch.manual_seed(0)
    samples, positions, units = shape
    a, delta = torch.randn(shape).relu().to(dtype), torch.randn(shape).to(dtype)
    if not units_inner:
        a, delta = (t.mT.contiguous().mT for t in (a, delta))
    sums_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    contribution = torch.full((samples, units), float("nan"), dtype=sums_dtype)
    stats = torch.full((3, units), float("nan"), dtype=sums_dtype)
    strides = (ctypes.c_int64 * 6)(*a.stride(), *delta.stride())
    simt.simt_blame_reduce(
        ctypes.c_int(DTYPES.index(dtype)),
        ctypes.c_bool(gradient),
        ctypes.c_bool(units_inner),
        *(pointer(t) for t in (a, delta, contribution, stats)),
        strides,
        *integers(samples, positions, units, 4),
    )
    expected = reference.blame_reduce(a, delta, -1, gradient)
    close(contribution, expected[0], scale=10.0)
    close(stats, expected[1], scale=10.0)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["float32", "float64"])
@pytest.mark.parametrize("kind", range(3), ids=reference.BLAME_KINDS)
@pytest.mark.parametrize("with_labels", [True, False], ids=["labels", "none"])
def test_blame_settle(simt, dtype, kind, with_labels):
    torch.manual_seed(0)
    sizes = [1, 40, 0, 26] + 70 * [1]  # more layers than one launch takes
    samples, units, n_classes = 21, sum(sizes), 11
    contribution = torch.randn(samples, units).to(dtype)
    losses = torch.linspace(-0.1, 6, samples).to(dtype)
    labels = torch.randint(-2, n_classes + 2, (samples,)) if with_labels else None
    layers = contribution.split(sizes, 1), contribution[:3].split(sizes, 1)
    expected = reference.blame_settle(*layers, losses, labels, n_classes, 0.5, [kind] * len(sizes))
    expected = (expected[0][:3], *expected[1:])
    results = [torch.full_like(t, float("nan")) for t in expected]
    results[1].zero_()
    simt.simt_blame_settle(
        ctypes.c_bool(dtype == torch.float64),
        ctypes.c_int(kind),
        *(pointer(t) for t in (contribution, losses, labels)),
        ctypes.c_double(0.5),
        (ctypes.c_int64 * len(sizes))(*sizes),
        *(pointer(t) for t in results),
        *integers(samples, units, n_classes, len(sizes)),
    )
    for got, want in zip(results, expected, strict=True):
        close(got, want, scale=10.0)
    if reference.BLAME_KINDS[kind] == "taylor":
        # To the bit: one thread adds up a class, in the order of samples. Two would race, which
        # this harness sees by the order of the terms alone.
        assert torch.equal(results[1], expected[1])


@pytest.mark.parametrize("logarithm", [False, True], ids=["expm1", "log1p"])
def test_float32_expm1_and_log1p(simt, logarithm):
    """Relative accuracy over the whole range, down to subnormal numbers."""
    tiny = torch.logspace(-42, -3, 100_001, dtype=torch.float64)
    if logarithm:
        x = torch.cat([tiny, -tiny, torch.logspace(-3, 37, 100_001), tiny[tiny > 6e-8] - 1])
        x = torch.cat([x, torch.linspace(-0.999, 3, 100_001, dtype=torch.float64)])
    else:
        x = torch.cat([tiny, -tiny, torch.linspace(-110, 88, 200_001), -tiny.reciprocal()])
    x = torch.cat([x.float(), torch.tensor([0.0, float("nan")])])
    y = torch.empty_like(x)
    simt.elementary_float(
        ctypes.c_bool(logarithm), pointer(x), pointer(y), ctypes.c_int64(x.numel())
    )
    exact = torch.log1p(x.double()) if logarithm else torch.expm1(x.double())
    torch.testing.assert_close(y.double(), exact, rtol=3e-7, atol=1e-44, equal_nan=True)
