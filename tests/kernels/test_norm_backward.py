"""The norms' backward kernels: against the reference, and against torch's autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchbp import kernels
from torchbp.kernels import reference

# A few units in the last place of the largest element.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 2**-7, torch.float16: 2**-9}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))


def sums_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_alike(got: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype and ours.stride() == theirs.stride()
        scale = max(1.0, theirs.abs().max().item()) if theirs.numel() else 1.0
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * scale)


ROWS = [
    ((1, 1), 1), ((3, 5), 1), ((130, 257), 1), ((71, 2, 33), 2), ((2, 9000), 1), ((0, 4), 1),
    ((4, 0), 1), ((6,), 1),
]  # fmt: skip


@dtypes
@pytest.mark.parametrize("centred", [True, False], ids=["layer", "rms"])
@pytest.mark.parametrize("weighted", [True, False], ids=["weight", "plain"])
def test_layer_norm_equals_reference(dtype, centred, weighted):
    kept = sums_dtype(dtype)
    for shape, dims in ROWS:
        g, x = torch.randn(shape).to(dtype), (torch.randn(shape) + 0.5).to(dtype)
        rows = shape[: len(shape) - dims]
        mean = torch.randn(rows, dtype=kept) if centred else None
        rstd = torch.rand(rows, dtype=kept) + 0.5
        weight = torch.randn(shape[len(rows) :], dtype=kept) if weighted else None
        args = g, x, mean, rstd, weight, dims
        expected = reference.layer_norm_backward(*args)
        assert_alike(kernels.layer_norm_backward(*args), expected, TOLERANCE[dtype])


def channels_last(t: Tensor) -> Tensor:
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": channels_last,
    "reversed": lambda t: t.permute(*reversed(range(t.dim()))).contiguous().permute(
        *reversed(range(t.dim()))
    ),
    "sliced": lambda t: torch.stack([t, t], -1)[..., 0],
}  # fmt: skip
SHAPES = [
    (4, 6), (1, 1), (4, 1), (300, 12), (2, 6, 5), (3, 6, 7, 7), (2, 600, 3, 3), (5, 1, 4, 4),
    (2, 6, 70, 70), (2, 4, 2, 3, 2), (0, 6, 2), (2, 6, 0), (3, 0, 2),
]  # fmt: skip


@dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("statistics", ["training", "constant", "1 group", "3 groups"])
def test_batch_norm_equals_reference(dtype, layout, statistics):
    kept, arrange = sums_dtype(dtype), LAYOUTS[layout]
    for shape in SHAPES:
        samples, channels = shape[:2]
        groups = int(statistics[0]) if "group" in statistics else 0
        if groups and (channels % groups or not channels):
            continue
        g, x = (arrange(torch.randn(shape).to(dtype)) for _ in range(2))
        size = (samples, groups) if groups else (channels,)
        mean, rstd = 0.1 * torch.randn(size, dtype=kept), torch.rand(size, dtype=kept) + 0.5
        for weight in (torch.randn(channels, dtype=kept), None):
            args = g, x, mean, rstd, weight, statistics != "constant"
            expected = reference.batch_norm_backward(*args)
            assert_alike(kernels.batch_norm_backward(*args), expected, TOLERANCE[dtype])


def test_a_gradient_of_another_layout():
    x = channels_last(torch.randn(2, 6, 4, 5))
    mean, rstd = torch.zeros(6), torch.ones(6)
    for g in (torch.randn(2, 6, 4, 5), torch.randn(1).expand(2, 6, 4, 5)):
        args = g, x, mean, rstd, None, True
        assert_alike(kernels.batch_norm_backward(*args), reference.batch_norm_backward(*args), 4e-6)


NORMS = {
    "layer": ((7, 3, 5), lambda x, w, b: F.layer_norm(x, (5,), w, b), 5),
    "rms": ((7, 3, 5), lambda x, w, b: F.rms_norm(x, (5,), w, 1e-5), 5),
    "batch": ((4, 5, 3, 2), lambda x, w, b: F.batch_norm(x, None, None, w, b, True), 5),
    "group": ((4, 6, 3, 2), lambda x, w, b: F.group_norm(x, 2, w, b), 6),
    "instance": ((4, 6, 3, 2), lambda x, w, b: F.group_norm(x, 6, w, b), 6),
}


def by_kernel(name: str, g: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """The statistics by hand, then the kernel."""
    if name in ("layer", "rms"):
        mean = x.mean(-1) if name == "layer" else None
        square = (x if mean is None else x - mean[..., None]).square().mean(-1)
        return kernels.layer_norm_backward(g, x, mean, torch.rsqrt(square + 1e-5), w)
    if name == "batch":
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    else:
        grouped = x.reshape(x.shape[0], 2 if name == "group" else x.shape[1], -1)
        mean, variance = grouped.mean(-1), grouped.var(-1, correction=0)
    return kernels.batch_norm_backward(g, x, mean, torch.rsqrt(variance + 1e-5), w)


@pytest.mark.parametrize("name", NORMS)
def test_equals_torchs_autograd(name):
    shape, function, channels = NORMS[name]
    x, w, b = (torch.randn(s, dtype=torch.float64) for s in (shape, (channels,), (channels,)))
    g = torch.randn(shape, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    expected = torch.autograd.grad(function(*leaves), leaves, g, allow_unused=True)
    got = by_kernel(name, g, x.detach(), w.detach())
    for ours, theirs in zip(got, expected, strict=True):
        if theirs is not None:  # the bias that rms norm has not
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_constant_statistics_keep_infinite_inputs_out_of_the_gradient():
    x = torch.full((2, 3, 4), float("inf"))
    g, ones = torch.randn(2, 3, 4), torch.ones(3)
    for arrange in (LAYOUTS["contiguous"], channels_last):
        grad = kernels.batch_norm_backward(g, arrange(x), ones, ones, None, False)[0]
        assert torch.equal(grad, g)


@pytest.mark.parametrize("shape", [(3001, 130), (40_000, 3), (5, 40_000)], ids=str)
def test_results_do_not_depend_on_threads(shape):
    rows, columns = shape
    g, x = torch.randn(shape), torch.randn(shape)
    image = torch.randn(8, 12, 41, 41)
    calls = {
        "layer": lambda: kernels.layer_norm_backward(g, x, torch.zeros(rows), torch.ones(rows)),
        "batch": lambda: kernels.batch_norm_backward(
            g, x, torch.zeros(columns), torch.ones(columns)
        ),
        "planes": lambda: kernels.batch_norm_backward(
            image, image, torch.zeros(12), torch.ones(12)
        ),
        "groups": lambda: kernels.batch_norm_backward(
            image, channels_last(image), torch.zeros(8, 3), torch.ones(8, 3)
        ),
    }
    for name, call in calls.items():
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(call())
        if kernels.HAS_EXT:
            for other in results[1:]:
                assert all(map(torch.equal, results[0], other)), name


X, S, R, C = torch.randn(4, 6), torch.ones(4), torch.ones(4), torch.ones(6)
BAD = {
    "dims": (lambda m: m.layer_norm_backward(X, X, S, R, C, 3), "dims: expected 1 to 2, got 3"),
    "no dims": (lambda m: m.layer_norm_backward(X, X, S, R, C, 0), "dims: expected 1 to 2, got 0"),
    "gradient": (
        lambda m: m.layer_norm_backward(X[:3], X, S, R, C, 1),
        "grad_output: expected the shape of x",
    ),
    "mean": (lambda m: m.layer_norm_backward(X, X, C, R, C, 1), "mean: expected 4 values, got 6"),
    "rstd": (lambda m: m.layer_norm_backward(X, X, S, C, C, 1), "rstd: expected 4 values, got 6"),
    "weight": (
        lambda m: m.layer_norm_backward(X, X, S, R, S, 1),
        "weight: expected 6 values, got 4",
    ),
    "statistics in half": (
        lambda m: m.layer_norm_backward(X.half(), X.half(), S, R.half(), C, 1),
        "rstd: expected .*[Ff]loat.*, got .*[Hh]alf|rstd: expected torch.float32",
    ),
    "integers": (
        lambda m: m.layer_norm_backward(X.int(), X.int(), S, R, C, 1),
        "x: expected float32",
    ),
    "vector": (
        lambda m: m.batch_norm_backward(C, C, C, C, None, True),
        "x: expected samples and channels",
    ),
    "channels": (
        lambda m: m.batch_norm_backward(X, X, S, C, None, True),
        "mean: expected 6 values, got 4",
    ),
    "groups": (
        lambda m: m.batch_norm_backward(X, X, torch.ones(4, 5), torch.ones(4, 5), None, True),
        "mean: expected samples x groups that divide the 6 channels of 4 samples, got 4 x 5",
    ),
    "constant groups": (
        lambda m: m.batch_norm_backward(X, X, torch.ones(4, 2), torch.ones(4, 2), None, False),
        "training: statistics of groups",
    ),
    "rstd of groups": (
        lambda m: m.batch_norm_backward(X, X, torch.ones(4, 2), torch.ones(4, 3), None, True),
        "rstd: expected the shape of mean",
    ),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("module", [kernels, reference], ids=["kernel", "reference"])
def test_bad_arguments_are_named(name, module):
    call, message = BAD[name]
    with pytest.raises(RuntimeError, match=message):
        call(module)


OPS = torch.ops.torchbp
IMAGE = torch.randn(2, 6, 3, 4)
CALLS = {
    "layer": (OPS.layer_norm_backward.default, (X, X, S, R, C, 1)),
    "rms": (OPS.layer_norm_backward.default, (IMAGE, IMAGE, None, S[:2], None, 3)),
    "batch": (OPS.batch_norm_backward.default, (IMAGE, IMAGE, C, C, C, True)),
    "constant": (
        OPS.batch_norm_backward.default,
        (channels_last(IMAGE), channels_last(IMAGE), C, C, None, False),
    ),
    "group": (
        OPS.batch_norm_backward.default,
        (IMAGE, LAYOUTS["reversed"](IMAGE), torch.ones(2, 3), torch.ones(2, 3), C, True),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    op, arguments = CALLS[name]
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("in_dims", [(0, 0), (None, 1)], ids=str)
def test_vmap_calls_once_for_every_entry(in_dims):
    g, x = (torch.randn(4, 6, 3).movedim(-1, d) if d is not None else X for d in in_dims)
    got = torch.func.vmap(lambda g, x: OPS.layer_norm_backward(g, x, S, R, C, 1), in_dims)(g, x)
    for i in range(3):
        one = [t if d is None else t.select(d, i) for t, d in zip((g, x), in_dims, strict=True)]
        expected = reference.layer_norm_backward(*one, S, R, C, 1)
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours[i], theirs)
