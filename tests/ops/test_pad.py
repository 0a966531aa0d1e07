from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import torchbp.functional as B

MODES = ["constant", "reflect", "replicate", "circular"]


def index_map(x: torch.Tensor, widths: tuple[int, ...], mode: str) -> torch.Tensor:
    """Where each padded element comes from; -1 for a constant."""
    places = torch.arange(x.numel(), dtype=torch.float64).reshape(x.shape)
    value = -1.0 if mode == "constant" else None
    return F.pad(places, widths, mode, value).long()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("shape", "widths"),
    [
        ((2, 3, 5), (2, 1)),
        ((2, 3, 5), (0, 3)),
        ((2, 3, 5), (-1, 2)),
        ((2, 3, 5), (-1, -2)),
        ((1, 2, 4, 5), (2, 1, 0, 3)),
        ((1, 2, 4, 5), (-1, 2, 1, -1)),
        ((1, 2, 3, 4, 5), (1, 2, 2, 0, 1, 1)),
    ],
)
def test_every_element_gets_back_what_its_copies_received(mode, shape, widths):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = B.pad(x, widths, mode)
    errors = torch.randn_like(y)
    (got,) = torch.autograd.grad(y, x, errors)
    at = index_map(x.detach(), widths, mode)
    real = at >= 0
    expected = torch.zeros(x.numel(), dtype=torch.float64)
    expected.index_add_(0, at[real], errors[real])
    torch.testing.assert_close(got, expected.reshape(shape))


def test_channels_last_stays():
    x = torch.randn(2, 3, 5, 6).to(memory_format=torch.channels_last).requires_grad_()
    for mode in MODES:
        y = B.pad(x, (1, 1, 1, 1), mode)
        theirs = F.pad(x, (1, 1, 1, 1), mode)
        assert torch.equal(y, theirs) and y.stride() == theirs.stride()
        errors = torch.randn_like(y)
        (grad,) = torch.autograd.grad(y, x, errors)
        (expected,) = torch.autograd.grad(theirs, x, errors)
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize(
    ("shape", "arguments"),
    [
        ((2, 3), ((1, 1), "mirror")),
        ((2, 3), ((1,),)),
        ((2, 3, 4), ((4, 0), "reflect")),
        ((2, 3, 4), ((1, 1), "reflect", 2.0)),
        ((2, 3, 4, 5), ((1, 1), "circular")),
        ((2, 3, 4), ((5, 5), "circular")),
        ((2, 3), (3,)),
    ],
)
def test_the_same_errors(shape, arguments):
    kinds = []
    for function in (F.pad, B.pad):
        with pytest.raises(Exception) as caught:
            function(torch.randn(shape), *arguments)
        kinds.append(caught.type)
    assert kinds[0] is kinds[1]


def test_integers_are_padded_too():
    x = torch.arange(6).reshape(2, 3)
    assert torch.equal(B.pad(x, (1, 0), value=7), F.pad(x, (1, 0), value=7))
