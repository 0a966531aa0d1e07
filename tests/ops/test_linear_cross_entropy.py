"""linear_cross_entropy in chunks, against torch's own composition and its autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchbp
from torchbp.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_rows

IGNORED, Z_LOSS = 2, 0.3
N, D, C = 13, 5, 11
CHUNK = nn.LinearCrossEntropyOptions(batch_chunk_size=4)  # three chunks of four rows and one of one
GRADIENTS = ("input", "weight", "bias")

if not torchbp.kernels.HAS_EXT:
    pytest.skip("chunks are cut for the compiled kernels", allow_module_level=True)


@pytest.fixture(autouse=True)
def only_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test that is meant for the chunks, and went through the composition."""

    def refuse(*_: Any) -> None:
        raise AssertionError("composed")

    monkeypatch.setattr("torchbp.ops.linear_cross_entropy.composed", refuse)


def make(dtype: torch.dtype = torch.float64, bias: bool = True) -> tuple[Any, ...]:
    torch.manual_seed(0)
    x, w = torch.randn(N, D).to(dtype), torch.randn(C, D).to(dtype)
    b = torch.randn(C).to(dtype).requires_grad_() if bias else None
    target = torch.randint(C, (N,))
    target[3] = target[7] = IGNORED
    return x.requires_grad_(), w.requires_grad_(), b, target


def torchs(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    smoothing: float,
    z_loss: float,
) -> Tensor:
    """Torch's composition; the z-loss of PaLM with the weight of the row's class."""
    z = F.linear(x, w, b)
    settings: Any = {"weight": weight, "ignore_index": IGNORED, "label_smoothing": smoothing}
    rows = F.cross_entropy(z, target, reduction="none", **settings)
    own = (target != IGNORED).to(z.dtype)
    if weight is not None:
        own = own * weight[target]
    rows = rows + z_loss * own * z.logsumexp(1) ** 2
    if reduction == "none":
        return rows
    return rows.sum() / own.sum() if reduction == "mean" else rows.sum()


CLASS_WEIGHT = torch.linspace(0.5, 2, C, dtype=torch.float64)
SETTINGS = [
    (None, 0.0, 0.0),
    (CLASS_WEIGHT, 0.0, 0.0),
    (None, 0.2, 0.0),
    (CLASS_WEIGHT, 0.2, Z_LOSS),
    (None, 0.0, Z_LOSS),
]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("settings", SETTINGS, ids=["plain", "weight", "smooth", "all", "z"])
def test_equals_torch_and_autograd(settings, reduction, bias):
    weight, smoothing, z_loss = settings
    x, w, b, target = make(bias=bias)
    leaves = [t for t in (x, w, b) if t is not None]
    expected = torchs(x, w, b, target, weight, reduction, smoothing, z_loss)
    loss = linear_cross_entropy(
        x,
        w,
        target,
        linear_bias=b,
        weight=weight,
        reduction=reduction,
        ignore_index=IGNORED,
        label_smoothing=smoothing,
        options=CHUNK,
        z_loss=z_loss,
    )
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=1e-13)
    g = torch.randn(loss.shape, dtype=loss.dtype)
    want = torch.autograd.grad(expected, leaves, g)
    for _ in range(2):  # forward's own gradients, then those of a graph that was retained
        got = torch.autograd.grad(loss, leaves, g, retain_graph=True)
        for ours, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_second_derivatives(reduction):
    x, w, b, target = make()

    def loss(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear_cross_entropy(
            x,
            w,
            target,
            linear_bias=b,
            weight=CLASS_WEIGHT,
            ignore_index=IGNORED,
            label_smoothing=0.1,
            reduction=reduction,
            options=CHUNK,
            z_loss=Z_LOSS,
        )

    assert torch.autograd.gradcheck(loss, (x, w, b))
    assert torch.autograd.gradgradcheck(loss, (x, w, b))


@pytest.mark.parametrize("frozen", range(3), ids=GRADIENTS)
def test_gradients_nobody_asks_for(frozen):
    x, w, b, target = make()
    leaves = [x, w, b]
    leaves[frozen].requires_grad_(False)
    loss = linear_cross_entropy(x, w, target, linear_bias=b, options=CHUNK)
    loss.backward()
    want = [t for t in leaves if t.requires_grad]
    expected = torch.autograd.grad(F.cross_entropy(F.linear(x, w, b), target), want)
    assert leaves[frozen].grad is None
    for t, e in zip(want, expected, strict=True):
        torch.testing.assert_close(t.grad, e, rtol=1e-12, atol=1e-13)
    with torch.no_grad():
        again = linear_cross_entropy(x, w, target, linear_bias=b, options=CHUNK)
    assert torch.equal(again, loss.detach()) and not again.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_short_dtypes_are_as_accurate_as_the_composition(dtype):
    x, w, b, target = make(dtype)
    exact = [t.detach().double().requires_grad_() for t in (x, w, b)]
    want = F.linear(exact[0], exact[1], exact[2])
    want = torch.autograd.grad(F.cross_entropy(want, target), exact)
    theirs = torch.autograd.grad(F.cross_entropy(F.linear(x, w, b), target), (x, w, b))
    ours = linear_cross_entropy(x, w, target, linear_bias=b, options=CHUNK)
    assert ours.dtype == dtype
    for g, t, e in zip(torch.autograd.grad(ours, (x, w, b)), theirs, want, strict=True):
        assert g.dtype == dtype
        error, allowed = (g.double() - e).abs().max(), (t.double() - e).abs().max()
        assert error <= 1.5 * allowed + torch.finfo(dtype).eps / 8


def test_rows_give_losses_and_log_odds_of_certain_and_hopeless_predictions():
    x = torch.tensor([[1.0], [60.0], [300.0], [-300.0], [0.0]], dtype=torch.float32)
    w, target = torch.tensor([[1.0], [-1.0], [0.0]]), torch.tensor([0, 0, 0, 0, IGNORED])
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=2)
    for leaf in (x, x.clone().requires_grad_()):  # without and with gradients
        found = linear_cross_entropy_rows(leaf, w, target, ignore_index=IGNORED, options=options)
        z = F.linear(x, w).double()
        exact = z[:, 0] - z[:, 1:].logsumexp(1)
        torch.testing.assert_close(found.log_odds[:4].double(), exact[:4], rtol=1e-6, atol=0)
        losses = torch.log1p(torch.exp(-exact.abs())) - exact.clamp(max=0)
        torch.testing.assert_close(found.losses[:4].double(), losses[:4], rtol=1e-6, atol=1e-45)
        assert found.losses[4] == 0 and found.log_odds[4] == torch.inf
        torch.testing.assert_close(found.loss, found.losses[:4].mean())
        assert found.loss.requires_grad == leaf.requires_grad
        assert not found.losses.requires_grad and not found.log_odds.requires_grad


def test_threads_do_not_change_a_bit_of_the_losses():
    torch.manual_seed(0)
    z, target = torch.randn(37, 5003), torch.randint(5003, (37,))
    results, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            grad = z.clone()
            both = torchbp.kernels.cross_entropy_in_place(grad, torch.tensor(0.5), target)
            results.append((both, grad))
    finally:
        torch.set_num_threads(threads)
    for both, grad in results[1:]:
        assert torch.equal(both, results[0][0]) and torch.equal(grad, results[0][1])


def test_autocast_gives_the_loss_in_float32():
    x, w, b, target = make(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(x, w, target, linear_bias=b, options=CHUNK)
        theirs = F.cross_entropy(F.linear(x, w, b), target)
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)
    pairs = zip(*(torch.autograd.grad(t, (x, w, b)) for t in (ours, theirs)), strict=True)
    for g, e in pairs:
        assert g.dtype == torch.float32
        torch.testing.assert_close(g, e, rtol=2e-2, atol=2e-2)


def test_the_full_logits_never_exist():
    torch.manual_seed(0)
    rows, features, classes = 64, 8, 1000
    x = torch.randn(rows, features, requires_grad=True)
    w = torch.randn(classes, features, requires_grad=True)
    target, largest = torch.randint(classes, (rows,)), 0
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=4)
    with torch.profiler.profile(profile_memory=True) as recorded:
        linear_cross_entropy(x, w, target, options=options).backward()
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            largest = max(largest, event.nbytes())
    assert 0 < largest <= 4 * w.numel() < 4 * rows * classes


@pytest.mark.parametrize("how", ["vmap", "jvp", "compile", "grad"])
def test_transforms_go_through_the_composition(how, monkeypatch):
    monkeypatch.undo()
    x, w, _, target = make()

    def loss(x: Tensor) -> Tensor:
        return linear_cross_entropy(x, w.detach(), target, options=CHUNK)

    def expected(x: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, w.detach()), target)

    x = x.detach()
    if how == "vmap":
        batch = torch.stack([x, 2 * x])
        ours, theirs = torch.vmap(loss)(batch), torch.vmap(expected)(batch)
    elif how == "jvp":
        ours, theirs = (torch.func.jvp(f, (x,), (x,))[1] for f in (loss, expected))
    elif how == "grad":
        ours, theirs = torch.func.grad(loss)(x), torch.func.grad(expected)(x)
    else:
        ours = torch.compile(loss, backend="aot_eager", fullgraph=True)(x)
        theirs = expected(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_batch_of_gradients(reduction):
    x, w, b, target = make()
    options: Any = {"ignore_index": IGNORED, "reduction": reduction}
    ours = linear_cross_entropy(x, w, target, linear_bias=b, options=CHUNK, **options)
    theirs = F.cross_entropy(F.linear(x, w, b), target, **options)
    gradients = torch.randn(3, *ours.shape, dtype=ours.dtype)
    for g, e in zip(
        torch.autograd.grad(ours, (x, w, b), gradients, is_grads_batched=True),
        torch.autograd.grad(theirs, (x, w, b), gradients, is_grads_batched=True),
        strict=True,
    ):
        torch.testing.assert_close(g, e, rtol=1e-12, atol=1e-13)


def test_the_scale_of_the_loss_keeps_float16_gradients_from_vanishing():
    torch.manual_seed(0)
    rows, features, classes, scale = 8192, 4, 2000, 16384.0
    x, w = torch.randn(rows, features).half(), 0.2 * torch.randn(classes, features).half()
    x, w, target = x.requires_grad_(), w.requires_grad_(), torch.randint(classes, (rows,))
    target[3] = -100
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=2048)
    (scale * linear_cross_entropy(x, w, target, options=options).float()).backward()
    exact = [t.detach().double().requires_grad_() for t in (x, w)]
    (scale * F.cross_entropy(F.linear(*exact), target)).backward()
    for t, e in zip((x, w), exact, strict=True):
        error = (t.grad.double() - e.grad).norm() / e.grad.norm()
        assert error < 1e-3, float(error)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_where_every_row_is_ignored_gradients_are_zero(dtype):
    x, w, b, target = make(dtype)
    loss = linear_cross_entropy(x, w, target.fill_(-100), linear_bias=b, options=CHUNK)
    assert loss.isnan()
    loss.backward()
    assert not any(t.grad.any() for t in (x, w, b))


def test_a_class_that_is_not_there_is_named():
    x, w, _, target = make()
    target[0] = C
    with pytest.raises(IndexError, match=f"Target {C} is out of bounds"):  # torch's own
        linear_cross_entropy(x, w, target, options=CHUNK)
    with pytest.raises(RuntimeError, match=rf"expected classes in \[0, {C}\), got {C}"):
        linear_cross_entropy_rows(x, w, target, options=CHUNK)
    with pytest.raises(RuntimeError, match="linear_cross_entropy_rows: expected plain tensors"):
        linear_cross_entropy_rows(x, w, torch.randn(N, C))
