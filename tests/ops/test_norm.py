from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchbp
import torchbp.functional as B
from torchbp.ops.batch_norm import BatchNorm
from torchbp.ops.group_norm import GroupNorm
from torchbp.ops.layer_norm import LayerNorm
from torchbp.ops.relevance import Rule


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("eps", [None, 1e-3])
def test_rms_norm_without_eps_takes_that_of_its_precision(dtype, eps):
    x, weight = (1e-3 * torch.randn(4, 6)).to(dtype), torch.randn(6).to(dtype)
    assert torch.equal(B.rms_norm(x, (6,), weight, eps), F.rms_norm(x, (6,), weight, eps))
    full = x.double()
    added = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    by_hand = full * (full.square().mean(-1, keepdim=True) + (eps or added)).rsqrt() * weight
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(
        B.rms_norm(x, (6,), weight, eps).double(), by_hand, rtol=tolerance, atol=tolerance
    )


NORMS = {
    "layer": lambda h, x, w, b: h.layer_norm(x, (6,), w[:1].repeat(6), b[:1].repeat(6)),
    "rms": lambda h, x, w, b: h.rms_norm(x, (6,), w[:1].repeat(6), 0.1),
    "batch": lambda h, x, w, b: h.batch_norm(x, None, None, w, b, True),
    "running": lambda h, x, w, b: h.batch_norm(x, b.detach(), w.detach() ** 2, w, b),
    "group": lambda h, x, w, b: h.group_norm(x, 2, w, b),
    "instance": lambda h, x, w, b: h.instance_norm(x, None, None, w, b),
}  # fmt: skip


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_the_kernel_gives_the_gradient_of_the_composition(name, layout):
    """First derivatives come from a kernel, differentiable ones from plain torch: they agree."""
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    leaves = [x, *(torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))]
    g = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    options = {"allow_unused": True, "materialize_grads": True}
    y = NORMS[name](B, *leaves)
    assert torch.equal(y, NORMS[name](F, *leaves))
    assert y.stride() == NORMS[name](F, *leaves).stride()
    lean = torch.autograd.grad(y, leaves, g, retain_graph=True, **options)
    full = torch.autograd.grad(y, leaves, g, create_graph=True, **options)
    theirs = torch.autograd.grad(NORMS[name](F, *leaves), leaves, g, **options)
    for a, b, c in zip(lean, full, theirs, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(b, c, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("training", [True, False])
def test_instance_norm_keeps_running_statistics_as_torch_does(training):
    x = torch.randn(3, 2, 4, 5)
    theirs = nn.InstanceNorm2d(2, affine=True, track_running_stats=True).train(training)
    ours = torchbp.convert(copy.deepcopy(theirs))
    for _ in range(2):
        assert torch.equal(ours(x), theirs(x))
        assert torch.equal(ours(x[0]), theirs(x[0]))
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-6, atol=0)


def test_instance_norm_tells_of_channels_that_do_not_fit():
    x = torch.randn(2, 3, 4)
    with pytest.warns(UserWarning, match="num_features=5"):
        torchbp.nn.InstanceNorm1d(5)(x)
    with pytest.raises(ValueError, match="num_features=5"):
        torchbp.nn.InstanceNorm1d(5, affine=True)(x)


def test_sync_batch_norm_is_batch_norm_in_one_process():
    x = torch.randn(4, 3, 2)
    theirs = nn.SyncBatchNorm(3)
    ours = torchbp.convert(copy.deepcopy(theirs))
    for mode in (True, False):
        assert torch.equal(ours.train(mode)(x), theirs.train(mode)(x))
    state = ours.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in theirs.state_dict().items())
    with pytest.raises(ValueError, match="non-zero"):
        torchbp.nn.SyncBatchNorm(0)(torch.randn(2, 0))


@pytest.mark.parametrize(("groups", "channels"), [(2, 3), (2, 5), (1, 1)])
def test_group_norm_refuses_what_torch_refuses(groups, channels):
    x = torch.randn(1, channels)
    kinds = []
    for home in (F, B):
        with pytest.raises(Exception) as caught:
            home.group_norm(x, groups)
        kinds.append(caught.type)
    assert kinds[0] is kinds[1]


def test_local_response_norm_by_hand():
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    square = F.pad(x.square(), (0, 0, 1, 1))
    mean = (square[:, :-2] + square[:, 1:-1] + square[:, 2:]) / 3
    got = B.local_response_norm(x, 3, alpha=0.3, beta=0.6, k=1.5)
    torch.testing.assert_close(got, x / (1.5 + 0.3 * mean) ** 0.6)


def test_relevance_of_norms_is_that_of_the_map_with_a_constant_deviation():
    """The same numbers from autograd, with the standard deviation detached."""
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    w, b, relevance = (torch.randn(s, dtype=torch.float64) for s in ((6,), (6,), (3, 6)))
    std = (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt().detach()
    y = (x - x.mean(1, keepdim=True)) / std * w + b
    (grad,) = torch.autograd.grad(y, x, relevance / y)
    rule, x = Rule(epsilon=0.0), x.detach()
    output = LayerNorm.forward(x, (6,), w, b, 1e-5)
    got = LayerNorm.relevance(relevance, rule, (x, (6,), w, b, 1e-5), output)[0]
    torch.testing.assert_close(got, x * grad)
    torch.testing.assert_close(got.sum(), relevance.sum() - (relevance * b / y).sum())
    # Group norm over one group of single positions is the same map.
    output = GroupNorm.forward(x, 1, w, b, 1e-5)
    got = GroupNorm.relevance(relevance, rule, (x, 1, w, b, 1e-5), output)[0]
    torch.testing.assert_close(got, x * grad)
    # So is batch norm with samples and channels exchanged, but for the affine part.
    args = (x.T, None, None, None, None, True, 0.1, 1e-5)
    got = BatchNorm.relevance(relevance.T, rule, args, BatchNorm.forward(*args))[0]
    output = LayerNorm.forward(x, (6,), None, None, 1e-5)
    same = LayerNorm.relevance(relevance, rule, (x, (6,), None, None, 1e-5), output)[0]
    torch.testing.assert_close(got.T, same)


@pytest.mark.parametrize("stride", [(12, 1, 4, 1), (12, 1, 4, 12), (12, 1, 4, 4)], ids=str)
def test_group_norm_takes_any_stride_of_a_dimension_of_size_one(stride):
    x = torch.randn(24).as_strided((2, 4, 3, 1), stride)
    y, expected = (h.group_norm(x, 2) for h in (B, F))
    assert torch.equal(y, expected)
    assert y.stride() == expected.stride()


def test_rms_norm_of_complex_numbers_is_torchs():
    leaves = [torch.randn(n, 6, dtype=torch.complex128, requires_grad=True) for n in (3, 1)]
    g = torch.randn(3, 6, dtype=torch.complex128)
    for eps in (None, 0.1):
        ours, theirs = (h.rms_norm(leaves[0], (6,), leaves[1][0], eps) for h in (B, F))
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)
        got, want = (torch.autograd.grad(y, leaves, g) for y in (ours, theirs))
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
