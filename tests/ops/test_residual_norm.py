"""Norms computed by the forward kernels, and the residual chain of a transformer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import torchbp.functional as B
from torchbp import kernels
from torchbp.ops.add_norm import _composed

NORMS = pytest.mark.parametrize("norm", ["layer", "rms"])


def leaves(dtype: torch.dtype = torch.float64, *shape: int) -> list[Tensor]:
    shape = shape or (5, 7, 40)
    sizes = shape, shape, shape[-1:], shape[-1:]
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in sizes]


@NORMS
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("used", ["both", "norm", "sum"])
def test_equals_torchs_composition_with_the_same_seed(norm, p, used):
    torch.manual_seed(0)
    x, residual, weight, bias = leaves()
    outcomes = []
    for function in (B.add_norm, _composed):
        torch.manual_seed(7)
        y, total = function(x, residual, (40,), weight, bias, norm=norm, p=p)
        state = torch.get_rng_state()
        loss = (y.sin().sum() if used != "sum" else 0) + (
            total.cos().sum() if used != "norm" else 0
        )
        grads = torch.autograd.grad(
            loss, (x, residual, weight, bias), allow_unused=True, materialize_grads=True
        )
        outcomes.append((y, total, state, *grads))
    for ours, theirs in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    assert torch.equal(outcomes[0][1], outcomes[1][1])


@NORMS
def test_second_derivatives(norm):
    torch.manual_seed(0)
    given = leaves(torch.float64, 3, 6)

    def function(*args: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)
        return B.add_norm(*args[:2], (6,), *args[2:], norm=norm, p=0.3)

    assert torch.autograd.gradcheck(function, given)
    assert torch.autograd.gradgradcheck(function, given)


@pytest.mark.parametrize("wanted", range(4))
def test_one_gradient_alone(wanted):
    given = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(leaves())]
    torch.manual_seed(1)
    got = torch.autograd.grad(B.add_norm(*given[:2], (40,), *given[2:], p=0.2)[0].sin().sum(),
                              given[wanted])[0]  # fmt: skip
    torch.manual_seed(1)
    expected = torch.autograd.grad(
        _composed(*given[:2], (40,), *given[2:], p=0.2)[0].sin().sum(), given[wanted]
    )[0]
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.skipif(not kernels.HAS_EXT, reason="the parts save for themselves")
def test_it_saves_the_sum_and_a_bit_for_each_element():
    x, residual, weight, bias = leaves(torch.float32, 8, 40)
    sizes = []

    def pack(t: Tensor) -> Tensor:
        if not any(t is leaf for leaf in (weight, bias)):
            sizes.append(t.numel() * t.element_size())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y, _ = B.add_norm(x, residual, (40,), weight, bias, p=0.3)
    del y
    assert sorted(sizes) == [8 * 4, 8 * 4, 8 * 40 // 8, 8 * 40 * 4]


def test_unknown_norm_and_probability():
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match="norm must be layer or rms, but got 'batch'"):
        B.add_norm(x, x, (4,), norm="batch")
    with pytest.raises(ValueError, match="between 0 and 1, but got 2"):
        B.add_norm(x, x, (4,), p=2)
    with pytest.raises(RuntimeError):
        B.add_norm(x, x, (5,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 33), (1, 4096), (3, 16, 32)], ids=str)
def test_rms_norm_in_one_pass(shape, dtype):
    """Within two units in the last place of what the same in float64 gives, and its gradients."""
    torch.manual_seed(0)
    x, g = torch.randn(2, *shape).to(dtype)
    weight = torch.randn(shape[-1]).to(dtype)
    exact = [t.double().requires_grad_() for t in (x, weight)]
    expected = F.rms_norm(exact[0], shape[-1:], exact[1], 1e-6)
    given = [t.requires_grad_() for t in (x, weight)]
    got = B.rms_norm(given[0], shape[-1:], given[1], 1e-6)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), expected, rtol=2 * eps, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(got, given, g),
        torch.autograd.grad(expected, exact, g.double()),
        strict=True,
    ):
        scale = theirs.abs().max().item()
        torch.testing.assert_close(ours.double(), theirs, rtol=4 * eps, atol=8 * eps * scale)


def test_a_large_layer_norm():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2048, 1100), torch.randn(1100), torch.randn(1100)
    got, expected = (h.layer_norm(x, (1100,), weight, bias) for h in (B, F))
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=4e-6)
    assert B.layer_norm(x[:100], (1100,), weight, bias).equal(
        F.layer_norm(x[:100], (1100,), weight, bias)
    )


def test_a_large_rms_norm_under_transforms():
    x, weight = torch.randn(3, 40, 40), torch.randn(40)
    per_entry = torch.func.vmap(lambda x: B.rms_norm(x, (40,), weight))(x)
    torch.testing.assert_close(per_entry, F.rms_norm(x, (40,), weight), rtol=2e-6, atol=2e-6)
    tangent = torch.func.jvp(lambda x: B.rms_norm(x, (40,), weight), (x,), (x,))[1]
    expected = torch.func.jvp(lambda x: F.rms_norm(x, (40,), weight), (x,), (x,))[1]
    torch.testing.assert_close(tangent, expected, rtol=1e-4, atol=1e-5)
    double = x.double().requires_grad_()
    double = torch.randn(32, 32, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(
        lambda x: B.rms_norm(x, (32,), eps=0.1), double, fast_mode=True
    )
