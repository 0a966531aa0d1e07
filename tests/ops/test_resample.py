from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import torchbp.functional as B
from torchbp.ops.resample import _BAND


def transposed(x: torch.Tensor, error: torch.Tensor, settings: dict) -> torch.Tensor:
    """``Aᵀ error`` with the matrix of torch's forward, made of one unit vector after the other."""
    units = torch.eye(x.numel(), dtype=x.dtype).reshape(-1, *x.shape)
    columns = torch.stack([F.interpolate(unit, **settings).flatten() for unit in units], 1)
    return (columns.mT @ error.flatten()).reshape(x.shape)


@pytest.mark.parametrize(
    "how",
    [dict(size=s) for s in (1, 2, 5, 7, 14, 30)]
    + [dict(scale_factor=s) for s in (1.0, 1.2, 1.3, 2.0, 2.3, 3.1)],
    ids=str,
)
@pytest.mark.parametrize(
    "settings",
    [
        dict(mode="nearest"),
        dict(mode="nearest-exact"),
        dict(mode="linear"),
        dict(mode="linear", align_corners=True),
        dict(mode="bicubic"),
        dict(mode="bicubic", align_corners=True),
        dict(mode="bilinear", antialias=True),
        dict(mode="bicubic", antialias=True),
    ],
    ids=str,
)
def test_backward_is_the_transpose(how, settings):
    # Not compared with torch's backward: where the size stays though a factor is given, that is
    # not the transpose of torch's forward in the cubic and the antialiased modes.
    flat = settings["mode"] in ("bilinear", "bicubic")
    if flat:
        how = {name: (value, 3 if name == "size" else 1.3) for name, value in how.items()}
    for size in (1, 2, 3, 7, 10):
        x = torch.randn(1, 1, size, *([2] * flat), dtype=torch.float64, requires_grad=True)
        y = B.interpolate(x, **settings, **how)
        error = torch.randn_like(y)
        (grad,) = torch.autograd.grad(y, x, error)
        torch.testing.assert_close(grad, transposed(x.detach(), error, {**settings, **how}))


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nearest_by_any_whole_number_and_its_inverse(mode, dims, dtype):
    for n_in, n_out in ((60, 60 * 41), (60, 60 * 7), (3, 3 * 49), (41 * 20, 20), (7 * 9, 9)):
        x = torch.randn(1, 1, *(1,) * (dims - 1), n_in, dtype=dtype, requires_grad=True)
        size = [*(1,) * (dims - 1), n_out]
        y = B.interpolate(x, size, mode=mode)
        places = torch.arange(n_in, dtype=dtype).reshape(x.shape)
        picked = F.interpolate(places, size, mode=mode).flatten().long()
        error = torch.randn_like(y)
        (grad,) = torch.autograd.grad(y, x, error)
        expected = torch.zeros(n_in, dtype=dtype).index_add(0, picked, error.flatten())
        torch.testing.assert_close(grad.flatten(), expected)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("how", [dict(size=311), dict(size=77), dict(scale_factor=2.3)], ids=str)
def test_long_maps_go_in_bands(mode, how):
    x = torch.randn(1, 1, 3 * _BAND + 5, dtype=torch.float64, requires_grad=True)
    y = B.interpolate(x, mode=mode, **how)
    error = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, x, error)
    torch.testing.assert_close(grad, transposed(x.detach(), error, dict(mode=mode, **how)))


def test_lanczos():
    x = torch.randn(1, 2, 12, 9, dtype=torch.float64, requires_grad=True)
    settings = dict(size=(5, 6), mode="lanczos", antialias=True)
    try:
        theirs = F.interpolate(x, **settings)
    except NotImplementedError:
        pytest.skip("this torch has no Lanczos filter")
    error = torch.randn_like(theirs)
    grads = [torch.autograd.grad(y, x, error)[0] for y in (B.interpolate(x, **settings), theirs)]
    torch.testing.assert_close(*grads)


def test_weights_are_kept_apart_by_dtype():
    for dtype in (torch.float32, torch.float64, torch.float32):
        x = torch.randn(1, 1, 5, dtype=dtype, requires_grad=True)
        (grad,) = torch.autograd.grad(B.interpolate(x, 7, mode="linear").sum(), x)
        assert grad.dtype is dtype


def test_upsample_is_interpolate():
    x = torch.randn(1, 2, 3, 4)
    settings = (None, 2, "bilinear", True)
    assert torch.equal(B.upsample(x, *settings), B.interpolate(x, *settings))


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ((1, 1, 4), dict()),
        ((1, 1, 4), dict(size=2, scale_factor=2)),
        ((1, 1, 4), dict(size=(2, 2))),
        ((1, 1, 4), dict(size=2, mode="bilinear")),
        ((1, 1, 4), dict(size=2, mode="nearest", align_corners=True)),
        ((1, 1, 4), dict(size=2, mode="area", align_corners=True)),
        ((1, 1, 4), dict(size=2, mode="area", recompute_scale_factor=True)),
        ((1, 1, 4), dict(size=2, mode="linear", antialias=True)),
        ((1, 1, 4), dict(size=2, mode="quintic")),
        ((1, 4), dict(size=2)),
        ((1, 1, 4), dict(scale_factor=0.1)),
    ],
)
def test_the_same_errors(shape, settings):
    kinds = []
    for function in (F.interpolate, B.interpolate):
        with pytest.raises(Exception) as caught:
            function(torch.randn(shape), **settings)
        kinds.append(caught.type)
    assert kinds[0] is kinds[1]
