from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import torchbp.functional as B

SETTINGS = [
    {"stride": s, "padding": p, "dilation": d, "groups": g}
    for s, p, d, g in [
        (1, 0, 1, 1), (2, 1, 1, 1), ((3, 2), (0, 2), 1, 2), ((2,), [1, 1], (2, 1), 4),
        (4, 3, 1, 1), (1, "same", 1, 2), (1, "same", (3, 2), 1), (3, "valid", 2, 1),
    ]
]  # fmt: skip


def gradients(function, tensors, **settings):
    leaves = [
        t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors
    ]
    y = function(*leaves, **settings)
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    return y, torch.autograd.grad(y, leaves, weights)


@pytest.mark.parametrize("kernel", [(3, 2), (2, 3), (1, 1)])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_gradients_equal_torch(settings, kernel):
    tensors = (
        torch.randn(3, 4, 9, 8, dtype=torch.float64),
        torch.randn(4, 4 // settings["groups"], *kernel, dtype=torch.float64),
        torch.randn(4, dtype=torch.float64),
    )
    for x in (tensors[0], tensors[0][0], tensors[0].to(memory_format=torch.channels_last)):
        y, ours = gradients(B.conv2d, (x, *tensors[1:]), **settings)
        y_torch, theirs = gradients(F.conv2d, (x, *tensors[1:]), **settings)
        assert torch.equal(y, y_torch) and y.stride() == y_torch.stride()
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_complex_gradients_are_conjugated_as_in_torch():
    tensors = [torch.randn(*s, dtype=torch.complex128) for s in ((2, 2, 4, 5), (3, 2, 2, 3), (3,))]
    ours, theirs = (gradients(f, tensors, stride=2)[1] for f in (B.conv2d, F.conv2d))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "settings",
    [{"stride": (1, 2, 3)}, {"stride": 0}, {"padding": -1}, {"padding": "full"}, {"groups": 3},
     {"padding": "same", "stride": 2}, {"dilation": 9}],
    ids=str,
)  # fmt: skip
def test_the_same_errors(settings):
    x, weight = torch.randn(1, 4, 6, 6), torch.randn(2, 4, 3, 3)
    kinds = []
    for function in (F.conv2d, B.conv2d):
        with pytest.raises(Exception) as caught:
            function(x, weight, **settings)
        kinds.append(caught.type)
    assert kinds[0] is kinds[1]
