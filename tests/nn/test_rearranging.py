"""Drop-ins that PyTorch's module database has no inputs for."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from torchbp.nn import DROP_INS


def image(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


CASES = [
    (nn.Flatten(0, 1), (2, 3, 4)),
    (nn.Unflatten(1, (2, 3)), (2, 6)),
    (nn.Unflatten(-1, (-1, 2)), (2, 6)),
    (nn.Identity(7, some="argument"), (2, 6)),
    (nn.PixelShuffle(2), (2, 8, 3, 4)),
    (nn.PixelUnshuffle(2), (2, 2, 4, 6)),
    (nn.ChannelShuffle(3), (2, 6, 4, 4)),
    (nn.Fold((4, 5), (2, 3), padding=1, stride=2), (2, 12, 9)),
    (nn.Unfold((2, 3), dilation=2, padding=1, stride=2), (2, 3, 6, 7)),
    (nn.Upsample(scale_factor=2), (2, 3, 4)),
    (nn.Upsample((5, 7), mode="bilinear", align_corners=True), (2, 3, 4, 4)),
    (nn.Upsample(scale_factor=1.7, mode="bicubic"), (1, 2, 4, 4)),
    (nn.Upsample(scale_factor=1.7, mode="linear", recompute_scale_factor=True), (1, 2, 5)),
    (nn.Upsample((3, 4, 5), mode="trilinear"), (1, 2, 2, 3, 4)),
    (nn.UpsamplingNearest2d(scale_factor=3), (1, 2, 3, 4)),
    (nn.UpsamplingBilinear2d((5, 6)), (1, 2, 3, 4)),
]


@pytest.mark.parametrize(("theirs", "shape"), CASES, ids=lambda v: str(v))
def test_drop_in_equals_twin(theirs, shape):
    ours = copy.deepcopy(theirs)
    ours.__class__ = DROP_INS[type(theirs)]
    x = image(*shape).requires_grad_()
    y, expected = ours(x), theirs(x)
    assert torch.equal(y, expected) and repr(ours) == repr(theirs)
    error = torch.randn_like(y)
    grads = [torch.autograd.grad(out, x, error)[0] for out in (y, expected)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-13)


def test_identity_is_the_input_itself():
    x = image(2)
    assert DROP_INS[nn.Identity]()(x) is x


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Unflatten(1, (2, 4)), (2, 6)),
        (nn.PixelShuffle(2), (2, 3, 3, 4)),
        (nn.PixelUnshuffle(2), (2, 2, 3, 6)),
        (nn.ChannelShuffle(4), (2, 6, 4, 4)),
        (nn.Fold((4, 5), 2), (2, 12, 9)),
        (nn.Unfold(3), (2, 3, 2, 2)),
        (nn.Upsample(2, mode="bilinear"), (2, 3, 4)),
    ],
    ids=lambda v: str(v),
)
def test_the_same_errors(module, shape):
    kinds = []
    for kind in (type(module), DROP_INS[type(module)]):
        module.__class__ = kind
        with pytest.raises(Exception) as caught:
            module(image(*shape))
        kinds.append(caught.type)
    assert kinds[0] is kinds[1]
