"""Losses at their edges: kinks, cut-offs, ignored rows, empty batches, bad input."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchbp
from torchbp import functional as ours
from torchbp.ops.loss_binary import BCE
from torchbp.ops.loss_distribution import GaussianNLL, KLDiv, PoissonNLL
from torchbp.ops.loss_margin import HingeEmbedding, MultiLabelMargin, MultiMargin
from torchbp.ops.loss_regression import L1, Huber, SmoothL1
from torchbp.ops.loss_triplet import TripletMargin

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def compare(name: str, *args: Any, **options: Any) -> list[Tensor | None]:
    """Values bitwise torch's, gradients torch's to rounding; the gradients are returned."""
    results = []
    for home in (ours, F):
        copies = [
            a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a
            for a in args
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = getattr(home, name)(*copies, **options)
        leaves = [a for a in copies if isinstance(a, Tensor) and a.requires_grad]
        error = normal(*out.shape, seed=9)
        results.append((out, torch.autograd.grad(out, leaves, error, allow_unused=True)))
    (got, grads), (expected, expected_grads) = results
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    for g, e in zip(grads, expected_grads, strict=True):
        if e is None:  # no gradient and a gradient of zeros mean the same
            assert g is None or not g.any()
        else:
            torch.testing.assert_close(g, e, rtol=1e-12, atol=1e-13, equal_nan=True)
    return list(grads)


def conserved(op: Any, args: tuple[Any, ...], args0: tuple[Any, ...]) -> list[Tensor | None]:
    """Contributions sum to the change of the loss; the multipliers are returned, all finite."""
    out, out0 = op.forward(*args), op.forward(*args0)
    error = normal(*out.shape, seed=5)
    multipliers = op.secant(error, args, args0, out, out0)
    terms = [
        (m * (a - a0)).sum()
        for m, a, a0 in zip(multipliers, args, args0, strict=True)
        if m is not None
    ]
    assert all(m.isfinite().all() for m in multipliers if m is not None)
    torch.testing.assert_close(sum(terms), (error * (out - out0)).sum(), rtol=1e-11, atol=1e-11)
    return list(multipliers)


WITH_FLAGS = {
    "l1_loss": (normal(3, 4), normal(3, 4, seed=1)),
    "smooth_l1_loss": (normal(3, 4), normal(3, 4, seed=1)),
    "binary_cross_entropy": (normal(3, 4).sigmoid(), normal(3, 4, seed=1).sigmoid()),
    "soft_margin_loss": (normal(3, 4), normal(3, 4, seed=1).sign()),
    "multilabel_soft_margin_loss": (normal(3, 4), normal(3, 4, seed=1).sigmoid()),
    "kl_div": (normal(3, 4), normal(3, 4, seed=1).softmax(1)),
    "poisson_nll_loss": (normal(3, 4), normal(3, 4, seed=1)),
    "nll_loss": (normal(3, 4), torch.tensor([0, 3, 1])),
    "margin_ranking_loss": (normal(3), normal(3, seed=1), normal(3, seed=2).sign()),
    "hinge_embedding_loss": (normal(3, 4), normal(3, 4, seed=1).sign()),
    "multi_margin_loss": (normal(3, 4), torch.tensor([0, 3, 1])),
    "multilabel_margin_loss": (normal(1, 4), torch.tensor([[2, 0, -1, 1]])),
    "cosine_embedding_loss": (normal(3, 4), normal(3, 4, seed=1), torch.tensor([1, -1, 1])),
    "triplet_margin_loss": (normal(3, 4), normal(3, 4, seed=1), normal(3, 4, seed=2)),
}


@pytest.mark.parametrize("name", WITH_FLAGS)
def test_superseded_flags(name: str) -> None:
    for flags in (
        {},
        {"size_average": False},
        {"size_average": True},
        {"reduce": False},
        {"reduce": True},
        {"size_average": False, "reduce": True},
    ):
        results, warned = [], []
        for home in (ours, F):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                results.append(getattr(home, name)(*WITH_FLAGS[name], **flags))
            warned.append(len(caught))
            assert all(w.filename == __file__ for w in caught) or home is F
        assert torch.equal(*results), flags
        assert warned[0] == warned[1], flags


@pytest.mark.parametrize("name", ["mse_loss", "huber_loss", "cross_entropy", "nll_loss"])
def test_the_oldest_name_of_the_mean(name: str) -> None:
    """Taken for another reduction, it would give the gradient of the sum."""
    x = normal(4, 3).requires_grad_()
    classes = name in ("cross_entropy", "nll_loss")
    target = torch.tensor([0, 2, 1, 1]) if classes else normal(4, 3, seed=1)
    compare(name, x, target, reduction="elementwise_mean")


@pytest.mark.parametrize("weight", [None, normal(3).abs()])
@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss"])
def test_classes_as_bytes(name: str, weight: Tensor | None) -> None:
    classes = torch.tensor([0, 2, 1, 1], dtype=torch.uint8)
    compare(name, normal(4, 3).requires_grad_(), classes, weight)


def test_absolute_error_of_complex_numbers_in_forward_mode() -> None:
    x, y, t = (torch.complex(normal(4, seed=k), normal(4, seed=k + 3)) for k in range(3))
    found, expected = (
        torch.func.jvp(lambda x, f=home.l1_loss: f(x, y), (x,), (t,)) for home in (ours, F)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["l1_loss", "mse_loss", "smooth_l1_loss", "huber_loss"])
def test_broadcasting_warns_once(name: str) -> None:
    x, y = normal(3, 1).requires_grad_(), normal(4, seed=1).requires_grad_()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        getattr(ours, name)(x, y)
    assert ["target is (4,), input (3, 1)" in str(w.message) for w in caught] == [True]
    assert caught[0].filename == __file__
    compare(name, x, y, reduction="sum")


ONES = torch.ones(3, 4, dtype=F64)
REFUSED: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("l1_loss", (ONES, ONES), {"weight": ONES[0]}),
    ("l1_loss", (ONES, ONES), {"weight": ONES, "reduction": "median"}),
    ("l1_loss", (ONES, ONES), {"reduction": "median"}),
    ("smooth_l1_loss", (ONES, ONES), {"beta": -1.0}),
    ("huber_loss", (ONES, ONES), {"delta": 0.0}),
    ("huber_loss", (ONES, ONES), {"weight": ONES[0]}),
    ("huber_loss", (ONES, ONES[:, :3]), {}),
    ("binary_cross_entropy", (ONES, ONES[0]), {}),
    ("binary_cross_entropy", (2 * ONES, ONES), {}),
    ("binary_cross_entropy", (ONES, ONES, ONES.clone().requires_grad_()), {}),
    ("soft_margin_loss", (ONES, ONES[:, :3]), {}),
    ("soft_margin_loss", (ONES, ONES.clone().requires_grad_()), {}),
    ("multilabel_soft_margin_loss", (ONES, ONES), {"reduction": "median"}),
    ("kl_div", (ONES, ONES), {"reduction": "median"}),
    ("poisson_nll_loss", (ONES, ONES), {"reduction": "median"}),
    ("gaussian_nll_loss", (ONES, ONES, -ONES), {}),
    ("gaussian_nll_loss", (ONES, ONES, -1.0), {}),
    ("gaussian_nll_loss", (ONES, ONES, ONES[:, :3]), {}),
    ("gaussian_nll_loss", (ONES, ONES, ONES[0]), {}),
    ("gaussian_nll_loss", (ONES, ONES, ONES), {"reduction": "median"}),
    ("nll_loss", (ONES, torch.tensor([0, 1, 4])), {}),
    ("nll_loss", (ONES, torch.tensor([0, 1])), {}),
    ("nll_loss", (ONES, torch.tensor([0, 1, 2]), ONES[0, :3]), {}),
    ("nll_loss", (ONES, torch.tensor([0, 1, 2]), ONES[0].clone().requires_grad_()), {}),
    ("margin_ranking_loss", (ONES, ONES, ONES[0]), {}),
    ("hinge_embedding_loss", (ONES, ONES[:, :3]), {}),
    ("multi_margin_loss", (ONES, torch.tensor([0, 1, 2])), {"p": 3}),
    ("multi_margin_loss", (ONES, torch.tensor([0, 1, 2]), 1, 1.0, ONES), {}),
    ("multi_margin_loss", (ONES, torch.tensor([0, 1, 9])), {}),
    ("multi_margin_loss", (ONES, torch.tensor([0, 1])), {}),
    ("multilabel_margin_loss", (ONES, torch.zeros(3, 3, dtype=torch.long)), {}),
    ("cosine_embedding_loss", (ONES, ONES[:, :3], ONES[:, 0]), {}),
    ("cosine_embedding_loss", (ONES, ONES, ONES), {}),
    ("triplet_margin_loss", (ONES, ONES, ONES[0]), {}),
    ("triplet_margin_loss", (ONES, ONES, ONES), {"margin": 0.0}),
    ("triplet_margin_with_distance_loss", (ONES, ONES, ONES[0]), {}),
    ("triplet_margin_with_distance_loss", (ONES, ONES, ONES), {"margin": -1.0}),
    ("triplet_margin_with_distance_loss", (ONES, ONES, ONES), {"reduction": "median"}),
    ("linear_cross_entropy", (ONES[None], ONES, torch.tensor([0])), {}),
    ("linear_cross_entropy", (ONES, ONES[0], torch.tensor([0])), {}),
    ("linear_cross_entropy", (ONES, ONES[:, :3], torch.tensor([0])), {}),
    ("linear_cross_entropy", (ONES, ONES, torch.tensor([0])), {"linear_bias": ONES[0]}),
    ("linear_cross_entropy", (ONES, ONES, ONES[:, :3]), {"ignore_index": 1}),
    ("linear_cross_entropy", (ONES[0], ONES[:, None], torch.tensor([0])), {}),
    ("ctc_loss", (ONES[:, None], torch.ones(1, 2).long(), (3,), (2,)), {"reduction": "median"}),
    ("ctc_loss", (ONES[:, None], torch.ones(1, 2).long(), (4,), (2,)), {}),
    ("ctc_loss", (ONES[:, None], torch.ones(1, 2).long(), (3,), (2,)), {"blank": 4}),
    ("ctc_loss", (ONES[:, None], torch.ones(2, 2).long(), (3,), (2,)), {}),
]


@pytest.mark.filterwarnings("ignore:Using a target|.*broadcast against")
@pytest.mark.parametrize(("name", "args", "options"), REFUSED)
def test_bad_input_is_refused_as_torch_does(name: str, args: Any, options: Any) -> None:
    with pytest.raises((RuntimeError, ValueError, IndexError)) as theirs:
        getattr(F, name)(*args, **options)
    with pytest.raises(type(theirs.value)):
        getattr(ours, name)(*args, **options)


@pytest.mark.parametrize(("op", "settings"), [(L1, ()), (Huber, (0.7,)), (SmoothL1, (0.7,))])
def test_secant_across_the_kinks_is_the_mean_of_the_slopes(op: Any, settings: Any) -> None:
    # Some pairs are almost equal, on two sides of a kink.
    ends = torch.tensor([-2, -0.7 - 1e-7, -0.7 + 1e-7, -0.3, -1e-7, 1e-7, 0.2, 0.7, 1.5], dtype=F64)
    x, x0 = torch.meshgrid(ends, ends, indexing="ij")
    zero = torch.zeros_like(x)
    m, m_y, *_ = conserved(op, (x, zero, *settings, "none"), (x0, zero, *settings, "none"))
    error = normal(9, 9, seed=5)
    steps = (torch.arange(20000, dtype=F64) + 0.5) / 20000
    points = x0[..., None] + steps * (x - x0)[..., None]
    expected = op.of_difference(torch.ones_like(points), points.clone(), *settings).mean(-1)
    torch.testing.assert_close(m, error * expected, rtol=0, atol=2e-4)
    torch.testing.assert_close(m_y, -m)


def test_bce_at_certainty() -> None:
    p = torch.tensor([0.0, 0.0, 1.0, 1.0, 1e-20, 0.3], dtype=F64).requires_grad_()
    y = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.5, 0.5], dtype=F64)
    compare("binary_cross_entropy", p, y, reduction="none")
    # The loss is linear in the target, with finite slopes; torch's slopes are infinite here.
    p, target = p.detach(), y.clone().requires_grad_()
    slope = torch.autograd.grad(ours.binary_cross_entropy(p, target, reduction="sum"), target)[0]
    ends = [F.binary_cross_entropy(p, torch.full_like(p, t), reduction="none") for t in (1, 0)]
    torch.testing.assert_close(slope, ends[0] - ends[1])
    conserved(BCE, (p, y, None, "none"), (p.flip(0), y, None, "none"))
    m, *_ = BCE.secant(torch.ones(6, dtype=F64), (p, y, None, "none"), (p, y, None, "none"), 0, 0)
    torch.testing.assert_close(m, BCE.slope(0, torch.ones(6, dtype=F64), p, y, None))


def test_kl_of_impossible_events() -> None:
    y = torch.tensor([0.0, 0.4, 0.6], dtype=F64)
    compare("kl_div", normal(3).requires_grad_(), y, reduction="sum")
    conserved(KLDiv, (normal(3), y, False, "none"), (normal(3, seed=1), y.flip(0), False, "none"))
    conserved(KLDiv, (normal(3), y, False, "none"), (normal(3, seed=1), y, False, "none"))


def test_poisson_where_stirling_begins() -> None:
    y, y0 = (torch.tensor(v, dtype=F64) for v in ([0.0, 1.0, 1.1, 3.0], [1.5, 1 + 1e-7, 0.9, 4.0]))
    x = normal(4).requires_grad_()
    compare("poisson_nll_loss", x, y, full=True)
    rest = (True, True, 1e-8, "none")
    conserved(PoissonNLL, (x.detach(), y, *rest), (normal(4, seed=1), y0, *rest))


def test_gaussian_variance_below_the_least() -> None:
    x, y = normal(4).requires_grad_(), normal(4, seed=1)
    var = torch.tensor([0.0, 0.01, 0.2, 3.0], dtype=F64).requires_grad_()
    compare("gaussian_nll_loss", x, y, var, eps=0.1, reduction="none")
    rest = (False, 0.1, "none")
    seconds = []
    for function in (ours.gaussian_nll_loss, F.gaussian_nll_loss):
        loss = function(x, y, var, eps=0.1, reduction="sum")
        first = torch.autograd.grad(loss, (x, var), create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in first), (x, var)))
    torch.testing.assert_close(*seconds)
    var, x = var.detach(), x.detach()
    now, ref = (x, y, var, *rest), (y, x, torch.tensor([0.05, 0.3, 0.02, 1], dtype=F64), *rest)
    multipliers = conserved(GaussianNLL, now, ref)
    assert multipliers[2] is not None and multipliers[2][0] == 0


@pytest.mark.parametrize("p", [1, 2])
def test_margins_that_are_just_met(p: int) -> None:
    x = torch.tensor([[1.0, 0.0, 2.0], [0.0, -1.0, -3.0]], dtype=F64).requires_grad_()
    compare("multi_margin_loss", x, torch.tensor([0, 0]), p=p)
    compare("margin_ranking_loss", x, x.detach().flip(1).requires_grad_(), torch.ones_like(x))
    compare("hinge_embedding_loss", x, torch.tensor([[-1, 1, -1], [1, -1, 0]]), margin=1.0)
    x = x.detach()
    rest = (torch.tensor([0, 0]), None, p, 1.0, "mean")
    conserved(MultiMargin, (x, *rest), (normal(2, 3), *rest))
    signs = torch.tensor([[-1, 1, -1], [1, -1, 0]])
    conserved(HingeEmbedding, (x, signs, 1.0, "none"), (2 - x, signs, 1.0, "none"))


def labels(rows: int, classes: int) -> Tensor:
    """Random labels, some named twice, then -1 and some that do not count."""
    draw = torch.Generator().manual_seed(3)
    y = torch.randint(classes, (rows, classes), generator=draw)
    return y.masked_fill(torch.rand(y.shape, generator=draw) < 0.25, -1)


def test_multilabel_margin_with_many_labels() -> None:
    x, y = normal(40, 9).requires_grad_(), labels(40, 9)
    for reduction in ("none", "sum", "mean"):
        compare("multilabel_margin_loss", x, y, reduction=reduction)
    rounded = (2 * normal(40, 9)).round().div(2).requires_grad_()  # many pairs just at the margin
    compare("multilabel_margin_loss", rounded, y)
    conserved(MultiLabelMargin, (x.detach(), y, "mean"), (normal(40, 9, seed=1), y, "mean"))


def test_multilabel_margin_compiled_is_that_of_eager_mode() -> None:
    x, y = normal(6, 5), labels(6, 5)
    torch._dynamo.reset()
    compiled = torch.compile(ours.multilabel_margin_loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, y), F.multilabel_margin_loss(x, y))


@pytest.mark.parametrize("name", ["multi_margin_loss", "multilabel_margin_loss"])
def test_margins_of_nothing(name: str) -> None:
    x = torch.zeros(0, 4, requires_grad=True)
    target = torch.zeros((0,) if name == "multi_margin_loss" else (0, 4), dtype=torch.long)
    total = getattr(ours, name)(x, target, reduction="sum")
    assert total == 0
    assert getattr(ours, name)(x, target).isnan()
    assert torch.autograd.grad(total, x)[0].shape == (0, 4)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.5, 1.0, 2.0, torch.inf])
def test_triplets_of_equal_points(p: float, swap: bool) -> None:
    x = normal(3, 4).requires_grad_()
    same = x.detach().clone().requires_grad_()
    other = normal(3, 4, seed=1).requires_grad_()
    compare("triplet_margin_loss", x, same, other, p=p, eps=0.0, swap=swap, margin=9.0)
    if p == 2:
        rest = (1.0, p, 0.0, swap, "mean")
        points = (x.detach(), same.detach(), same.detach())
        conserved(TripletMargin, (*points, *rest), (*points[:2], other.detach(), *rest))


def test_triplets_with_a_distance_of_the_users() -> None:
    a, p, n = (normal(5, 3, seed=s).requires_grad_() for s in (0, 1, 2))

    def distance(x: Tensor, y: Tensor) -> Tensor:
        return 1 - F.cosine_similarity(x, y)

    options = {"distance_function": distance, "swap": True}
    compare("triplet_margin_with_distance_loss", a, p, n, **options)
    compare("triplet_margin_with_distance_loss", a, p, n, reduction="none", margin=0.1)


def test_cosine_of_nothing() -> None:
    zero, x = torch.zeros(2, 3, dtype=F64).requires_grad_(), normal(2, 3).requires_grad_()
    compare("cosine_embedding_loss", zero, x, torch.tensor([1, -1]), margin=-0.5)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("weight", [None, torch.tensor([0.0, 2.0, 1.5], dtype=F64)])
@pytest.mark.parametrize(
    "target", [[[-100, -100], [-100, -100]], [[0, 0], [-100, 0]], [[2, 0], [1, -100]]]
)
def test_rows_that_do_not_count(reduction: str, weight: Tensor | None, target: Any) -> None:
    x, index = normal(2, 3, 2).requires_grad_(), torch.tensor(target)
    compare("nll_loss", x, index, weight, reduction=reduction)
    compare("cross_entropy", x, index, weight, reduction=reduction)
    compare("nll_loss", x[..., 0], index[:, 0], weight, reduction=reduction)


Twin = Callable[[], nn.Module]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "target", [[0, 9, 3, 5, 4, 0], [1, 2, 0, 1, 1, 2], [9, 8, 9, 7, 9, 8], [], 6]
)
def test_adaptive_softmax(bias: bool, target: Any) -> None:
    torch.manual_seed(0)
    theirs = nn.AdaptiveLogSoftmaxWithLoss(8, 10, [3, 6], 2.0, head_bias=bias).double()
    index = torch.tensor(target, dtype=torch.long)
    x = normal(*index.shape, 8)
    results = []
    for module in (theirs, torchbp.convert(theirs)):
        leaf = x.clone().requires_grad_()
        output, loss = module(leaf, index)
        wrt = [leaf, *module.parameters()]
        results.append([output, loss, *torch.autograd.grad(loss, wrt, allow_unused=True)])
    assert type(theirs) is torchbp.nn.AdaptiveLogSoftmaxWithLoss
    for kind, (e, g) in enumerate(zip(*results, strict=True)):
        if kind < 2:
            torch.testing.assert_close(g, e, rtol=0, atol=0, equal_nan=True)
        elif e is not None and g is not None:
            torch.testing.assert_close(g, e, rtol=1e-12, atol=1e-14, equal_nan=True)
        else:
            assert (e is None) == (g is None)


@pytest.mark.parametrize(
    ("shape", "target"),
    [
        ((2, 8), [0, 10]),
        ((2, 8), [-1, 0]),
        ((3, 8), [0, 1]),
        ((8,), [0]),
        ((2, 8), 0),
        ((2, 8), [[0]]),
    ],
)
def test_adaptive_softmax_refuses(shape: Any, target: Any) -> None:
    for kind in (nn.AdaptiveLogSoftmaxWithLoss, torchbp.nn.AdaptiveLogSoftmaxWithLoss):
        module = kind(8, 10, [3, 6])
        with pytest.raises(RuntimeError):
            module(torch.zeros(shape), torch.tensor(target))


def test_the_older_name_is_converted() -> None:
    with pytest.warns(FutureWarning):
        module = nn.NLLLoss2d(torch.tensor([1.0, 2.0]), ignore_index=1)
    converted = torchbp.convert(module)
    assert type(converted) is torchbp.nn.NLLLoss2d
    x, y = torch.randn(2, 2, 3, 3), torch.randint(2, (2, 3, 3))
    assert torch.equal(converted(x, y), F.nll_loss(x, y, module.weight, ignore_index=1))
