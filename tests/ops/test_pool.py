"""Pooling against torch: odd settings, special numbers, random windows, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import torchbp.functional as B
from torchbp.ops import max_pool_offsets


@pytest.fixture(autouse=True, params=["few elements", "many"])
def _path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Max pooling uses its kernel for many elements only: here for few, too."""
    if request.param == "many":
        monkeypatch.setattr(max_pool_offsets, "_MANY", 0)


SIZES = {1: (11,), 2: (7, 8), 3: (5, 6, 4)}


def image(dims: int) -> Tensor:
    torch.manual_seed(dims)
    return torch.randn(2, 3, *SIZES[dims], dtype=torch.float64)


def gradient(function: Any, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = function(x, *args, **kwargs)
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    return y.detach(), torch.autograd.grad(y, x, weights)[0]


def equal(name: str, x: Tensor, *args: Any, **kwargs: Any) -> None:
    ours, theirs = (gradient(getattr(home, name), x, *args, **kwargs) for home in (B, F))
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-12, atol=1e-13, equal_nan=True)


WINDOWS: list[dict[str, Any]] = [
    {"kernel_size": 2}, {"kernel_size": (2, 3, 1), "stride": []}, {"kernel_size": [3], "stride": 2},
    {"kernel_size": 3, "stride": (2, 1, 3), "padding": 1}, {"kernel_size": 1, "stride": 3},
    {"kernel_size": 3, "stride": 2, "padding": (1, 0, 1), "ceil_mode": True},
    {"kernel_size": 4, "stride": 3, "padding": 2}, {"kernel_size": 4, "stride": 1, "padding": 1},
]  # fmt: skip

POOLS: list[tuple[str, dict[str, Any]]] = [
    ("max_pool", {}), ("max_pool", {"dilation": (1, 2, 1)}), ("avg_pool", {}),
    ("avg_pool", {"count_include_pad": False}), ("avg_pool", {"divisor_override": 5}),
    ("lp_pool", {"norm_type": 2}), ("lp_pool", {"norm_type": -math.inf}),
]  # fmt: skip


def cut(value: Any, dims: int) -> Any:
    """The settings of the first axes."""
    return value[:dims] if isinstance(value, (tuple, list)) else value


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("settings", WINDOWS, ids=str)
@pytest.mark.parametrize(("name", "extra"), POOLS, ids=str)
def test_windows_equal_torch(
    name: str, extra: dict[str, Any], settings: dict[str, Any], dims: int
) -> None:
    if dims == 1 and "divisor_override" in extra:
        return
    if name == "lp_pool":
        kernel = settings["kernel_size"]
        if "padding" in settings or kernel == [3]:
            return
        settings = {**settings, "kernel_size": 2 if dims == 1 else kernel}
    given = {key: cut(value, dims) for key, value in (settings | extra).items()}
    x = image(dims)
    equal(f"{name}{dims}d", x, **given)
    equal(f"{name}{dims}d", x[0], **given)
    if dims == 2:
        equal(f"{name}{dims}d", x.to(memory_format=torch.channels_last), **given)


@pytest.mark.parametrize("kind", ["avg", "max"])
@pytest.mark.parametrize("size", [1, (2, 4, 2), (3, 5, 3), (None, 3, 1), (19, 11, 9), (7, None, 4)])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_adaptive_windows_equal_torch(kind: str, size: Any, dims: int) -> None:
    wanted = cut(size, dims)
    if dims == 1 and wanted == (None,):
        return
    equal(f"adaptive_{kind}_pool{dims}d", image(dims), wanted)


SPECIAL = [
    ("max_pool2d", (3, 2, 1)), ("max_pool2d", (2,)), ("adaptive_max_pool2d", (3,)),
    ("avg_pool2d", (3, 2, 1)), ("adaptive_avg_pool2d", ((3, 5),)), ("lp_pool2d", (2, 3, 2)),
    ("lp_pool2d", (1, 2)), ("lp_pool2d", (3.0, 2)), ("lp_pool2d", (-1.0, 2)),
    ("lp_pool2d", (math.inf, 2)),
]  # fmt: skip


@pytest.mark.parametrize("value", [math.nan, -math.inf, 0.0])
@pytest.mark.parametrize(("name", "settings"), SPECIAL)
def test_special_numbers_and_ties_go_where_torch_sends_them(
    name: str, settings: tuple[Any, ...], value: float
) -> None:
    x = image(2)
    x[0, 0, 1:5, 2:6] = value  # whole windows of it, so ties as well
    x[1, 2, 3, 3] = value
    equal(name, x, *settings)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("avg_pool2d", (3, 2, 1)), ("adaptive_avg_pool2d", ((3, 5),)), ("max_pool2d", (3, 2))],
)
def test_an_error_that_is_no_number_stays_in_its_window(
    name: str, settings: tuple[Any, ...]
) -> None:
    grads = []
    for home in (B, F):
        x = image(2).requires_grad_()
        y = getattr(home, name)(x, *settings)
        g = torch.ones_like(y)
        g[0, 1, 1, 2] = math.nan
        grads.append(torch.autograd.grad(y, x, g)[0])
    assert grads[1].isnan().sum() < 20
    torch.testing.assert_close(*grads, equal_nan=True)


def test_a_long_axis_takes_memory_in_proportion() -> None:
    # A matrix of averages would have 4e10 elements.
    x = torch.randn(1, 1, 200_001)
    for name, settings in (("avg_pool1d", (3, 2, 1)), ("adaptive_avg_pool1d", (70_000,))):
        ours, theirs = (gradient(getattr(home, name), x, *settings) for home in (B, F))
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("divisor", [None, 1])
def test_short_dtypes_accumulate_in_float32(divisor: int | None) -> None:
    x = torch.randn(1, 1, 40, 40).bfloat16()
    (_, ours), (_, exact) = (
        gradient(f, t, 9, stride=1, divisor_override=divisor)
        for f, t in ((B.avg_pool2d, x), (F.avg_pool2d, x.double()))
    )
    assert ours.dtype == torch.bfloat16
    scale = exact.abs().max().item()
    torch.testing.assert_close(ours.double(), exact, rtol=8e-3, atol=2e-3 * scale)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("extra", [{"output_size": 2}, {"output_ratio": (0.5, 0.6, 0.4)}], ids=str)
def test_random_windows_are_torchs(extra: dict[str, Any], batch: bool, dims: int) -> None:
    x = image(dims) if batch else image(dims)[0]
    extra = {key: cut(value, dims) for key, value in extra.items()}
    found = []
    for home in (B, F):
        torch.manual_seed(5)
        before = torch.get_rng_state()
        function = getattr(home, f"fractional_max_pool{dims}d")
        y, indices = function(x, 2, **extra, return_indices=True)
        found.append((y, indices, torch.get_rng_state()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not torch.equal(before, found[0][2])
    samples = torch.rand(2 if batch else 1, 3, dims, dtype=torch.float64)
    equal(f"fractional_max_pool{dims}d", x, 2, **extra, _random_samples=samples)


INDEXED = [f"{kind}max_pool{dims}d" for kind in ("", "adaptive_") for dims in (1, 2, 3)]


@pytest.mark.parametrize("name", INDEXED)
def test_positions_are_torchs_and_have_no_gradient(name: str) -> None:
    x = image(int(name[-2])).requires_grad_()
    values, indices = getattr(B, name)(x, 2, return_indices=True)
    assert torch.equal(indices, getattr(F, name)(x, 2, return_indices=True)[1])
    assert values.requires_grad and not indices.requires_grad
    again = getattr(B, f"{name}_with_indices")(x, 2)
    assert torch.equal(again[0], values) and torch.equal(again[1], indices)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_unpooling_puts_values_where_pooling_found_them(dims: int) -> None:
    x = image(dims)
    pooled, indices = getattr(F, f"max_pool{dims}d")(x, 2, return_indices=True)
    equal(f"max_unpool{dims}d", pooled, indices, 2, output_size=x.shape)
    equal(f"max_unpool{dims}d", pooled[1], indices[1], (2,) * dims, output_size=x.shape[2:])
    back = getattr(B, f"max_unpool{dims}d")(pooled, indices, 2, output_size=x.shape)
    assert torch.equal(back, torch.where(back != 0, x, 0)) and (back != 0).sum() == pooled.numel()
    # Windows that overlap choose some elements twice: each copy receives the error, as in torch.
    pooled, indices = getattr(F, f"max_pool{dims}d")(x, 3, 1, return_indices=True)
    equal(f"max_unpool{dims}d", pooled, indices, 3, 1)


def refused(name: str, *args: Any, **settings: Any) -> list[type[Exception]]:
    kinds = []
    for home in (F, B):
        with pytest.raises(Exception) as caught:
            getattr(home, name)(*args, **settings)
        kinds.append(caught.type)
    return kinds


@pytest.mark.parametrize("name", ["max_pool2d", "avg_pool2d", "lp_pool2d"])
@pytest.mark.parametrize(
    "settings",
    [{"kernel_size": 2, "stride": (1, 2, 3)}, {"kernel_size": 2, "padding": 2},
     {"kernel_size": 9}, {"kernel_size": 2, "stride": 0}, {"kernel_size": 2.5},
     {"kernel_size": (2, 2, 2)}, {"kernel_size": 2, "divisor_override": 0}],
    ids=str,
)  # fmt: skip
def test_windows_that_torch_refuses(name: str, settings: dict[str, Any]) -> None:
    if name == "lp_pool2d":
        settings = {"norm_type": 2, **settings}
    ours, theirs = refused(name, image(2), **settings)
    assert ours is theirs


@pytest.mark.parametrize(
    ("name", "args"),
    [("lp_pool1d", (image(1), 0, 2)), ("adaptive_avg_pool2d", (torch.ones(4), 2)),
     ("adaptive_avg_pool2d", (torch.ones(4), (2, 2))),
     ("adaptive_avg_pool2d", (image(2), (1, 2, 3))),
     ("adaptive_max_pool1d", (image(1), None)), ("fractional_max_pool2d", (image(2), 2)),
     ("fractional_max_pool2d", (image(2), 2, None, (0.5, 0.5, 0.5))),
     ("fractional_max_pool3d", (image(3), 2, 9)), ("max_pool3d", (image(1), 2)),
     ("max_unpool1d", (image(1), torch.zeros(2, 3, 11), 2)),
     ("max_unpool1d", (image(1), torch.full((2, 3, 11), 99), 2)),
     ("max_unpool1d", (image(1), torch.zeros(2, 3, 11, dtype=torch.int64), 2, 2, 0, (99,)))],
    ids=lambda a: a if isinstance(a, str) else "",
)  # fmt: skip
def test_arguments_that_torch_refuses(name: str, args: tuple[Any, ...]) -> None:
    ours, theirs = refused(name, *args)
    assert ours is theirs
