"""cross_entropy, its backward and the form in place: against the reference, and against torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap

from torchbp import kernels
from torchbp.functional import cross_entropy as functional
from torchbp.kernels.table import KERNELS

IGNORED, Z_LOSS = 1, 0.1
TOLERANCE = {
    torch.float64: 5e-13,  # torch's rounding: it adds up 70,001 shares of the smoothing
    torch.float32: 2e-6,
    torch.bfloat16: 2**-7,
    torch.float16: 2**-10,
}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
# One block of the kernel is 2048 classes.
SHAPES = [(0, 4), (1, 1), (5, 1), (31, 3), (33, 257), (7, 2048), (3, 2049), (1, 70_001)]
SETTINGS = [(False, 0.0, 0.0), (True, 0.0, 0.0), (False, 0.3, 0.0), (True, 0.3, Z_LOSS)]


def make(shape: tuple[int, int], dtype: torch.dtype, weighted: bool) -> tuple[Any, ...]:
    torch.manual_seed(sum(shape))
    z, target = (3 * torch.randn(shape)).to(dtype), torch.randint(shape[1], shape[:1])
    if shape[0] > 3:
        target[2] = IGNORED
    weight = (torch.rand(shape[1]) + 0.5).to(dtype) if weighted else None
    return z, target, weight


def exact(
    z: Tensor, target: Tensor, weight: Tensor | None, reduction: str, e: float, zeta: float
) -> Tensor:
    """Torch's, in float64, and the z-loss of PaLM."""
    z, weight = z.double(), None if weight is None else weight.double()
    settings: Any = {"weight": weight, "ignore_index": IGNORED, "label_smoothing": e}
    rows = F.cross_entropy(z, target, reduction="none", **settings)
    own = (z.new_ones(z.shape[1]) if weight is None else weight)[
        target.clamp(max=z.shape[1] - 1)
    ] * (target != IGNORED)
    rows = rows + zeta * own * z.logsumexp(1) ** 2
    if reduction == "none":
        return rows
    return rows.sum() / own.sum() if reduction == "mean" else rows.sum()


@dtypes
@pytest.mark.parametrize("reduction", kernels.REDUCTIONS)
@pytest.mark.parametrize("settings", SETTINGS, ids=["plain", "weight", "smooth", "all"])
def test_values_and_gradients_equal_torchs(settings, reduction, dtype):
    weighted, *numbers = settings
    tolerance = TOLERANCE[dtype]
    for shape in SHAPES:
        z, target, weight = make(shape, dtype, weighted)
        leaf = z.double().requires_grad_()
        want = exact(leaf, target, weight, reduction, *numbers)
        options = weight, reduction, IGNORED, *numbers
        loss, both = kernels.cross_entropy(z, target, *options)
        assert loss.dtype == dtype and loss.shape == want.shape
        size = max(1.0, want.detach().abs().max().item() if want.numel() else 0.0)
        torch.testing.assert_close(
            loss.double(), want.detach(), rtol=tolerance, atol=tolerance * size, equal_nan=True
        )
        g = torch.randn(loss.shape, dtype=both.dtype)
        grad = kernels.cross_entropy_backward(g, z, target, *options)
        assert grad.dtype == dtype and grad.is_contiguous()
        (expected,) = torch.autograd.grad(want, leaf, g.double())
        torch.testing.assert_close(grad.double(), expected, rtol=tolerance, atol=tolerance)
        if reduction == "mean":
            continue
        written = z.clone()
        again = kernels.cross_entropy_in_place(written, g, target, weight, IGNORED, *numbers)
        assert torch.equal(again, both) and torch.equal(written, grad)


@dtypes
@pytest.mark.parametrize("settings", SETTINGS, ids=["plain", "weight", "smooth", "all"])
def test_kernel_equals_reference(settings, dtype):
    weighted, *numbers = settings
    for shape in SHAPES:
        z, target, weight = make(shape, dtype, weighted)
        arguments = z, target, weight, 0, IGNORED, *numbers
        ours = KERNELS["cross_entropy"].op(*arguments)
        theirs = KERNELS["cross_entropy"].reference(*arguments)
        g = torch.randn_like(ours[1][0])
        ours += (KERNELS["cross_entropy_backward"].op(g, *arguments),)
        theirs += (KERNELS["cross_entropy_backward"].reference(g, *arguments),)
        for a, b in zip(ours, theirs, strict=True):
            tolerance = 5 * TOLERANCE[a.dtype]
            assert a.dtype == b.dtype and a.stride() == b.stride()
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_losses_and_log_odds_keep_their_digits():
    """Where the class is all but certain, or the logits large, up to the limits of float32."""
    gap = torch.tensor([-300.0, -80.0, -1.0, 0.0, 1.0, 20.0, 80.0, 103.0, 300.0])
    for offset in (0.0, 4096.0):
        z = torch.stack([gap + offset, torch.full_like(gap, offset)], 1)
        loss, both = kernels.cross_entropy(z, torch.zeros(len(gap), dtype=torch.long), None, "none")
        torch.testing.assert_close(both[1], gap)
        exact = torch.nn.functional.softplus(-gap.double(), threshold=torch.inf)
        torch.testing.assert_close(loss.double(), exact, rtol=3e-7, atol=2e-45)
    grad = kernels.cross_entropy_backward(
        torch.ones(len(gap)), z, torch.zeros(len(gap), dtype=torch.long), None, "none"
    )
    error = torch.sigmoid(-gap.double())
    normal = error > 1e-37
    torch.testing.assert_close(grad[normal, 0].double(), -error[normal], rtol=3e-6, atol=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_infinite_logits_and_nan_follow_torch(smoothing):
    inf, nan = float("inf"), float("nan")
    z = torch.tensor(
        [[inf, 0], [0, inf], [-inf, 1], [1, -inf], [-inf, -inf], [nan, 1], [1, nan]]
    ).requires_grad_()
    target = torch.zeros(len(z), dtype=torch.long)
    options: Any = {"reduction": "none", "label_smoothing": smoothing}
    want = F.cross_entropy(z, target, **options)
    (grad,) = torch.autograd.grad(want.sum(), z)
    loss, _ = kernels.cross_entropy(z.detach(), target, **options)
    torch.testing.assert_close(loss, want.detach(), equal_nan=True)
    ours = kernels.cross_entropy_backward(torch.ones(len(z)), z.detach(), target, **options)
    torch.testing.assert_close(ours, grad, equal_nan=True)


@pytest.mark.parametrize("bits", [0x7FC00001, 0x7FFFFFFF, -1], ids=hex)
@pytest.mark.parametrize("wide", [False, True], ids=["float32", "float64"])
def test_nan_of_any_bits_stays_nan(bits, wide):
    if wide and bits > 0:
        bits = 0x7FF8 << 48 | bits & 0xFFF
    z = torch.randn(3, 40).to(torch.float64 if wide else torch.float32)
    z.view(torch.int64 if wide else torch.int32)[1, 5] = bits
    target = torch.tensor([0, 1, 5])
    loss, both = kernels.cross_entropy(z, target, None, "none")
    grad = kernels.cross_entropy_backward(torch.ones_like(loss), z, target, None, "none")
    for t in (loss, both[1], grad[:, 0], grad[:, 39]):
        assert t.isnan().tolist() == [False, True, False]


def test_rows_without_a_class_to_count():
    z, target = torch.full((2, 3), torch.nan), torch.tensor([IGNORED, IGNORED])
    loss, both = kernels.cross_entropy(z, target, ignore_index=IGNORED)
    assert loss.isnan() and both.tolist() == [[0, 0], [torch.inf, torch.inf]]
    grad = kernels.cross_entropy_backward(torch.tensor(1.0), z, target, ignore_index=IGNORED)
    assert not grad.any()


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_any_layout(layout):
    torch.manual_seed(0)
    z, target, weight = torch.randn(12, 12), torch.randint(6, (12,)), torch.rand(12) + 0.5
    z = {"transposed": z.t(), "sliced": z[:, ::2], "expanded": z[:1].expand(12, 12)}[layout]
    weight = weight[: z.shape[1]] if layout == "transposed" else weight[::2].repeat(2)[: z.shape[1]]
    target = target.repeat_interleave(2)[::2]
    arguments = target, weight, "none"
    torch.testing.assert_close(
        kernels.cross_entropy(z, *arguments)[0],
        F.cross_entropy(z, *arguments[:2], reduction="none"),
    )
    g = torch.randn(1).expand(12)
    grad = kernels.cross_entropy_backward(g, z, *arguments)
    same = kernels.cross_entropy_backward(g.clone(), z.contiguous(), *arguments)
    assert torch.equal(grad, same)


@pytest.mark.parametrize("shape", [(300, 1001), (5, 40_000), (3000, 7)], ids=str)
def test_results_do_not_depend_on_threads(shape):
    z, target, weight = make(shape, torch.float32, True)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            options: Any = {"weight": weight, "label_smoothing": 0.1, "z_loss": 0.1}
            found = kernels.cross_entropy(z, target, **options)
            grad = kernels.cross_entropy_backward(torch.tensor(0.3), z, target, **options)
            results.append((*found, grad))
    finally:
        torch.set_num_threads(threads)
    if kernels.HAS_EXT:
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_opcheck_and_vmap():
    z, target, weight = make((6, 5), torch.float32, True)
    settings = 1, IGNORED, 0.1, 0.1
    one = torch.tensor(1.0)
    torch.library.opcheck(KERNELS["cross_entropy"].op, (z, target, weight, *settings))
    torch.library.opcheck(KERNELS["cross_entropy_backward"].op, (one, z, target, weight, *settings))
    torch.library.opcheck(
        KERNELS["cross_entropy_in_place"].op, (z.clone(), one, target, None, *settings[1:])
    )
    batch = torch.stack([z, 2 * z], 1)
    found = vmap(lambda z: kernels.cross_entropy(z, target, weight, "none"), 1)(batch)
    grad = vmap(lambda z: kernels.cross_entropy_backward(one, z, target, weight), 1)(batch)
    for i in range(2):
        for a, b in zip(
            found, kernels.cross_entropy(batch[:, i], target, weight, "none"), strict=True
        ):
            assert torch.equal(a[i], b)
        assert torch.equal(
            grad[i], kernels.cross_entropy_backward(one, batch[:, i], target, weight)
        )


Z, Y, ONE = torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), torch.tensor(1.0)
BAD = {
    "logits dims": (lambda: kernels.cross_entropy(Z[0], Y), "logits: expected rows x classes"),
    "no classes": (lambda: kernels.cross_entropy(Z[:, :0], Y), "logits: expected rows x classes"),
    "logits dtype": (lambda: kernels.cross_entropy(Z.int(), Y), "logits: expected float32"),
    "target rows": (lambda: kernels.cross_entropy(Z, Y[:3]), "target: expected one class for each"),
    "target dtype": (lambda: kernels.cross_entropy(Z, Y.int()), "target: expected int64"),
    "class": (
        lambda: kernels.cross_entropy(Z, Y + 1),
        r"target: expected classes in \[0, 3\), got 3",
    ),
    "negative": (lambda: kernels.cross_entropy(Z, Y - 1), r"classes in \[0, 3\), got -1"),
    "weight": (
        lambda: kernels.cross_entropy(Z, Y, Z[0, :2]),
        "weight: expected one value for each",
    ),
    "weight dtype": (
        lambda: kernels.cross_entropy(Z, Y, Z[0].double()),
        "weight: expected the dtype of logits",
    ),
    "gradient": (
        lambda: kernels.cross_entropy_backward(torch.ones(4), Z, Y),
        "grad_output: expected a scalar",
    ),
    "gradients": (
        lambda: kernels.cross_entropy_backward(ONE, Z, Y, None, "none"),
        "grad_output: expected one value per row",
    ),
    "gradient dtype": (
        lambda: kernels.cross_entropy_backward(ONE.double(), Z, Y),
        "grad_output: expected .*loat",
    ),
    "in place": (
        lambda: kernels.cross_entropy_in_place(Z.t(), ONE, Y[:3]),
        "logits: expected a contiguous tensor",
    ),
    "reduction": (
        lambda: KERNELS["cross_entropy"].op(Z, Y, None, 3, 0, 0.0, 0.0),
        "reduction: expected 0, 1 or 2, got 3",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    call, message = BAD[name]
    with pytest.raises(RuntimeError, match=message):
        call()


@dtypes
@pytest.mark.parametrize("reduction", kernels.REDUCTIONS)
@pytest.mark.parametrize("shape", [(1500,), (3, 1500), (2, 300, 2, 3), (4, 20)], ids=str)
def test_the_functional_with_few_and_many_classes(shape, reduction, dtype):
    torch.manual_seed(0)
    z = torch.randn(shape).to(dtype)
    if len(shape) == 4:
        z = z.to(memory_format=torch.channels_last)
    z.requires_grad_()
    target = torch.randint(
        shape[1 if len(shape) > 1 else 0], (shape[:1] + shape[2:])[: len(shape) - 1]
    )
    weight = (torch.rand(z.shape[1 if z.dim() > 1 else 0]) + 0.5).to(dtype)
    options: Any = {"reduction": reduction, "label_smoothing": 0.1}
    ours, theirs = (f(z, target, weight, **options) for f in (functional, F.cross_entropy))
    wide = z.detach().double().requires_grad_()
    exact = F.cross_entropy(wide, target, weight.double(), **options)
    tolerance = TOLERANCE[dtype]
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=tolerance)
    if weight.numel() < 256:
        assert torch.equal(ours, theirs)
    g = torch.randn(ours.shape).to(dtype)
    (grad,) = torch.autograd.grad(ours, z, g)
    (want,) = torch.autograd.grad(exact, wide, g.double())
    torch.testing.assert_close(grad.double(), want, rtol=tolerance, atol=tolerance)


def test_the_functional_with_many_classes_follows_transforms():
    torch.manual_seed(0)
    z, target = torch.randn(2, 3, 1500, dtype=torch.float64), torch.randint(1500, (3,))
    for f in (vmap, torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        x = z if f is vmap else z[0, :, :300].contiguous()
        y = target if f is vmap else target % 300
        if f is torch.func.hessian:
            x, y = x[:1], y[:1]
        ours, theirs = (
            f(lambda z, of=of, y=y: of(z, y))(x) for of in (functional, F.cross_entropy)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)
    with pytest.raises(IndexError, match="out of bounds"):
        functional(z[0], target + 1500)


@pytest.mark.parametrize("classes", [20, 300])
def test_the_functional_refuses_targets_of_another_shape(classes):
    z = torch.randn(4, classes)
    for shape in ((4, 1), (1, 4), (2, 2)):
        target = torch.zeros(shape, dtype=torch.int64)
        with pytest.raises((RuntimeError, ValueError)) as theirs:
            F.cross_entropy(z, target)
        with pytest.raises(theirs.type):
            functional(z, target)
    one = torch.zeros(1, dtype=torch.int64)
    ours, theirs = (f(z[0], one, reduction="none") for f in (functional, F.cross_entropy))
    assert ours.shape == theirs.shape


@pytest.mark.parametrize("reduction", kernels.REDUCTIONS)
def test_the_ignored_class_is_none_of_the_bytes(reduction):
    z = torch.randn(3, 200, requires_grad=True)
    target = torch.tensor([0, 156, 199], dtype=torch.uint8)  # -100 is 156 as a byte
    ours, theirs = (f(z, target, reduction=reduction) for f in (functional, F.cross_entropy))
    torch.testing.assert_close(ours, theirs)
    grad, want = (torch.autograd.grad(loss.sum(), z)[0] for loss in (ours, theirs))
    torch.testing.assert_close(grad, want)
