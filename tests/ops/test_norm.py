from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchbp
import torchbp.functional as B


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (1e-4, 0.0), (0.0, 3.0), (1.0, 100.0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_running_statistics_are_torchs_bit_for_bit(dtype, scale, shift):
    x = (torch.randn(8, 3, 5, dtype=torch.float64) * scale + shift).to(dtype)
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    results = []
    for home in (F, B):
        mean, var = torch.full((3,), 0.5, dtype=kept), torch.full((3,), 2.0, dtype=kept)
        y = home.batch_norm(x, mean, var, training=True, momentum=0.3)
        results.append((y, mean, var))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_modules_keep_the_same_state(momentum):
    theirs = nn.BatchNorm2d(3, momentum=momentum)
    ours = torchbp.convert(copy.deepcopy(theirs))
    for _ in range(3):
        x = torch.randn(4, 3, 2, 2)
        assert torch.equal(theirs(x), ours(x))
    state = ours.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in theirs.state_dict().items())
    assert torch.equal(theirs.eval()(x), ours.eval()(x))


@pytest.mark.parametrize("large", [1e3, 1e6])
def test_a_large_mean_does_not_spoil_the_gradient(large):
    x = torch.randn(16, 4, dtype=torch.float64) + large
    weights = torch.randn(16, 4, dtype=torch.float64)
    for name, args in (("batch_norm", (None, None, None, None, True)), ("layer_norm", ((4,),))):
        grads = []
        for home in (F, B):
            leaf = x.clone().requires_grad_()
            y = getattr(home, name)(leaf, *args)
            grads.append(torch.autograd.grad((y * weights).sum(), leaf)[0])
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-12 * large, atol=1e-13 * large)


@pytest.mark.parametrize("name", ["batch_norm", "layer_norm"])
def test_mixed_precision_keeps_each_dtype(name):
    x = torch.randn(6, 4).bfloat16().requires_grad_()
    weight, bias = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
    grads = []
    for home in (F, B):
        if name == "batch_norm":
            y = home.batch_norm(x, None, None, weight, bias, True)
        else:
            y = home.layer_norm(x, (4,), weight, bias)
        grads.append(torch.autograd.grad(y.float().square().sum(), (x, weight, bias)))
    for got, want in zip(grads[1], grads[0], strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


X, ZEROS, ONES = torch.randn(4, 3, 5), torch.zeros(3), torch.ones(3)
BAD = [
    dict(training=True, eps=0.0),
    dict(running_mean=ZEROS, running_var=ONES, eps=-1.0),
    dict(training=True, weight=torch.ones(4)),
    dict(training=True, running_mean=torch.zeros(4), running_var=torch.ones(4)),
    dict(training=True, running_mean=ZEROS),
    dict(),
    dict(input=torch.randn(1, 3), training=True),
    dict(input=torch.randn(3), training=True),
]


@pytest.mark.parametrize("settings", BAD, ids=lambda s: ",".join(s) or "nothing")
def test_batch_norm_refuses_what_torch_refuses(settings):
    kinds = []
    for home in (F, B):
        given = {"input": X, "running_mean": None, "running_var": None, **settings}
        with pytest.raises(Exception) as caught:
            home.batch_norm(**given)
        kinds.append(caught.type)
    assert kinds[0] is kinds[1]
