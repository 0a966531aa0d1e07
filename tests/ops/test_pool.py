from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import torchbp.functional as B
from torchbp.ops.pool import MaxPool2d


def gradient(function, x, *args, **kwargs):
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = function(x, *args, **kwargs)
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    return y.detach(), torch.autograd.grad(y, x, weights)[0]


WINDOWS = [
    {"kernel_size": 2}, {"kernel_size": (2, 3), "stride": []}, {"kernel_size": [3], "stride": 2},
    {"kernel_size": 3, "stride": (2, 1), "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": (1, 0), "ceil_mode": True},
]  # fmt: skip


@pytest.mark.parametrize("settings", WINDOWS, ids=str)
@pytest.mark.parametrize(
    ("name", "extra"),
    [("max_pool2d", {}), ("max_pool2d", {"dilation": (1, 2)}), ("avg_pool2d", {}),
     ("avg_pool2d", {"count_include_pad": False}), ("avg_pool2d", {"divisor_override": 5})],
)  # fmt: skip
def test_windows_equal_torch(name, extra, settings):
    image = torch.randn(2, 3, 7, 8, dtype=torch.float64)
    for x in (image, image[0], image.to(memory_format=torch.channels_last)):
        ours, theirs = (gradient(getattr(m, name), x, **settings, **extra) for m in (B, F))
        assert torch.equal(ours[0], theirs[0])
        torch.testing.assert_close(ours[1], theirs[1], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("size", [1, (2, 4), (3, 5), (None, 3), (9, 11), (7, None)], ids=str)
def test_adaptive_windows_equal_torch(size):
    x = torch.randn(2, 3, 7, 8, dtype=torch.float64)
    ours, theirs = (gradient(m.adaptive_avg_pool2d, x, size) for m in (B, F))
    assert torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-12, atol=1e-13)


def test_short_dtypes_accumulate_in_float32():
    x = torch.randn(1, 1, 40, 40).bfloat16()
    (_, ours), (_, exact) = (
        gradient(f, t, 9, stride=1) for f, t in ((B.avg_pool2d, x), (F.avg_pool2d, x.double()))
    )
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.double(), exact, rtol=8e-3, atol=8e-3)


def test_a_moving_maximum_splits_its_multiplier_in_fixed_proportion():
    # One window; the maximum moves from the second element (3) to the first (5):
    # a = 5 - 2 = 3, b = 3 - 1 = 2, so 3/5 go to the first and 2/5 to the second.
    x, x0 = torch.tensor([[[5.0, 2.0]]]), torch.tensor([[[1.0, 3.0]]])
    settings = ((1, 2), (1, 2), 0, 1, False)
    output, output0 = (MaxPool2d.forward(t, *settings) for t in (x, x0))
    multiplier = MaxPool2d.secant(
        torch.ones(1, 1, 1), (x, *settings), (x0, *settings), output, output0
    )[0]
    torch.testing.assert_close(multiplier, torch.tensor([[[0.6, 0.4]]]))


def test_indices_are_torchs_and_have_no_gradient():
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    values, indices = B.max_pool2d(x, 2, return_indices=True)
    assert torch.equal(indices, F.max_pool2d(x, 2, return_indices=True)[1])
    assert values.requires_grad and not indices.requires_grad


@pytest.mark.parametrize("name", ["max_pool2d", "avg_pool2d"])
@pytest.mark.parametrize(
    "settings",
    [{"kernel_size": 2, "stride": (1, 2, 3)}, {"kernel_size": 2, "padding": 2},
     {"kernel_size": 9}, {"kernel_size": 2, "stride": 0}, {"kernel_size": 2.5}],
    ids=str,
)  # fmt: skip
def test_the_same_errors(name, settings):
    kinds = []
    for home in (F, B):
        with pytest.raises(Exception) as caught:
            getattr(home, name)(torch.randn(2, 3, 6, 6), **settings)
        kinds.append(caught.type)
    assert kinds[0] is kinds[1]
