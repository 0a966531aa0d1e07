"""Second-order removal equals Jacobians and Hessians that torch.func takes."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from models import cnn, mlp
from torch import Tensor, nn

import torchbp.functional as ours
from torchbp import attribute
from torchbp.blame.definitions import LossHead
from torchbp.blame.loss_curvature import RandomCurvature, second_derivatives

WEIGHT = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)


class Tokens(nn.Module):
    """``[N, T, D]`` to ``[N, C, T]``, mixing positions on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.act, self.head = nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.inner(x))
        return self.head(h + h.cumsum(1).square()).transpose(1, 2)


def tokens() -> tuple[nn.Module, Tensor, Tensor]:
    y = torch.randint(3, (4, 6))
    y[0, 1] = -100
    return Tokens().double(), torch.randn(4, 6, 4, dtype=torch.float64), y


def flattened(z, y):
    """The mean over a sample's tokens, as users write it."""
    return F.cross_entropy(z.transpose(1, 2).flatten(0, 1), y.flatten())


def two_tasks(z, y):
    return 0.3 * F.cross_entropy(z, y, reduction="sum") + F.mse_loss(
        z[:, 0], z.new_zeros(z[:, 0].shape), reduction="sum"
    )


def log_cosh(z, y):
    return (z - F.one_hot(y, z.shape[1])).cosh().log().sum(1)


CLASSES = torch.tensor([0, 2, 1, 1, 2])
SOFT = torch.randn(5, 3, dtype=torch.float64).softmax(1)
LOSSES = {
    "cross-entropy": (F.cross_entropy, CLASSES),
    "class weights": (nn.CrossEntropyLoss(WEIGHT), CLASSES),
    "smoothing": (nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.2, ignore_index=1), CLASSES),
    "probabilities": (F.cross_entropy, SOFT),
    "ours": (ours.cross_entropy, CLASSES),
    "squared error": (F.mse_loss, SOFT),
    "our squared error": (ours.mse_loss, SOFT),
    "multi-label": (
        functools.partial(F.binary_cross_entropy_with_logits, pos_weight=WEIGHT),
        (SOFT > 0.3).double(),
    ),
    "our multi-label": (ours.binary_cross_entropy_with_logits, (SOFT > 0.3).double()),
    "huber": (F.huber_loss, SOFT),
    "absolute": (F.l1_loss, SOFT),
    "own, a mean": (lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1), CLASSES),
    "own, per sample": (lambda z, y: 2 * F.cross_entropy(z, y, reduction="none"), CLASSES),
    "own, halved": (lambda z, y: F.mse_loss(z, y) / 2, SOFT),
    "own, two tasks": (two_tasks, CLASSES),
}


def exact_curvature(head: LossHead, z: Tensor, y: Tensor) -> Tensor:
    """``[N, K, K]`` by torch.func, sample by sample."""

    def loss(zn, yn):
        return head.per_sample(zn.reshape(1, *z.shape[1:]), yn[None])[0]

    size = z[0].numel()
    rows = [torch.func.hessian(functools.partial(loss, yn=yn))(zn.flatten())
            for zn, yn in zip(z, y, strict=True)]  # fmt: skip
    return torch.stack(rows).reshape(len(z), size, size)


@pytest.mark.parametrize(("loss_fn", "y"), LOSSES.values(), ids=LOSSES.keys())
def test_second_derivatives_of_losses(loss_fn, y):
    z, head = 2 * torch.randn(5, 3, dtype=torch.float64), LossHead.of(loss_fn)
    torch.testing.assert_close(second_derivatives(head, z, y), exact_curvature(head, z, y))


def covariance(random: RandomCurvature, samples: int, draws: int = 1000) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    g = torch.stack([random.draw(generator)[0].reshape(samples, -1) for _ in range(draws)])
    assert float(g.mean(0).abs().max()) <= 6 * float(g.std(0).max()) / draws**0.5
    return torch.einsum("dni,dnj->nij", g, g) / draws


@pytest.mark.parametrize(("loss_fn", "y"), LOSSES.values(), ids=LOSSES.keys())
def test_random_directions_have_the_loss_curvature(loss_fn, y):
    torch.manual_seed(0)
    z = (2 * torch.randn(5, 3, dtype=torch.float64)).requires_grad_()
    head = LossHead.of(loss_fn)
    found = covariance(RandomCurvature(head, z, y), 5)
    exact = second_derivatives(head, z, y)
    # An entry's standard deviation over draws is below sqrt(2) times the diagonal's size.
    size = exact.diagonal(dim1=1, dim2=2).amax(1)[:, None, None]
    assert bool(((found - exact).abs() <= 6 * size * (2 / 1000) ** 0.5 + 1e-12).all())


@pytest.mark.parametrize("loss_fn", [F.cross_entropy, flattened], ids=["tokens", "flattened"])
def test_random_directions_of_tokens_are_independent(loss_fn):
    torch.manual_seed(0)
    model, x, y = tokens()
    z = model(x)[1:, :, :3]  # without the ignored token: a mean of its own would be taken
    head, y = LossHead.of(loss_fn), y[1:, :3]
    found = covariance(RandomCurvature(head, z, y), 3)
    exact = exact_curvature(head, z.detach(), y)
    size = exact.diagonal(dim1=1, dim2=2).amax(1)[:, None, None]
    assert bool(((found - exact).abs() <= 6 * size * (2 / 1000) ** 0.5).all())


def by_definition(loss_fn, rest, a: Tensor, z: Tensor, y: Tensor, units) -> Tensor:
    """``t - u' H u / 2`` for ``units(values)``, which sums ``[N, K, *activation]`` to players."""
    head = LossHead.of(loss_fn)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda h: rest(h[None])[0].flatten()))(a)
    u = units(jacobian * a[:, None])  # [N, K, U]
    leaf = z.detach().requires_grad_()
    (delta,) = torch.autograd.grad(head.per_sample(leaf, y).sum(), leaf)
    hessian = exact_curvature(head, z.detach(), y)
    t = torch.einsum("nku,nk->nu", u, delta.flatten(1))
    return t - torch.einsum("nku,nkl,nlu->nu", u, hessian, u) / 2


@pytest.mark.parametrize(
    "loss_fn",
    [F.cross_entropy, nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1), log_cosh],
    ids=["cross-entropy", "smoothing", "own"],
)
def test_exact_from_its_definition(loss_fn):
    model, x, y = cnn()
    found = attribute(model, x, y, loss_fn, "curvature", layers=["2"], estimate="exact")
    a, z = model[:3](x).detach(), model(x).detach()
    expected = by_definition(loss_fn, model[3:], a, z, y, lambda v: v.flatten(3).sum(3))
    torch.testing.assert_close(found["2"], expected)


def test_exact_and_random_for_token_losses():
    model, x, y = tokens()
    a, z = model.act(model.inner(x)).detach(), model(x).detach()

    def rest(h):
        return model.head(h + h.cumsum(1).square()).transpose(1, 2)

    expected = by_definition(F.cross_entropy, rest, a, z, y, lambda v: v.sum(2))
    given = dict(method="curvature", layers=["act"])
    found = attribute(model, x, y, F.cross_entropy, **given, estimate="exact")
    torch.testing.assert_close(found["act"], expected)
    few = attribute(model, x, y, F.cross_entropy, **given)
    many = attribute(model, x, y, F.cross_entropy, **given, draws=3000, seed=1)
    error = (many["act"] - expected).abs().max()
    assert error < 0.1 * (few["act"] - expected).abs().max() and error < 0.05 * expected.abs().max()


def test_the_seed_decides_the_draws():
    model, x, y = tokens()
    given = dict(method="curvature", layers=["act"])
    first, again = (attribute(model, x, y, F.cross_entropy, **given, seed=3) for _ in range(2))
    other = attribute(model, x, y, F.cross_entropy, **given, seed=4)
    assert torch.equal(first["act"], again["act"]) and not torch.equal(first["act"], other["act"])


@pytest.mark.parametrize("of", ["units", "positions", "elements"])
def test_squared_error_and_a_linear_rest_are_ablation(of):
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4)).double()
    x, y = torch.randn(5, 2, 6, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    given = dict(layers=["1"], of=of, baseline="mean")
    exact = attribute(model, x, y, F.mse_loss, "ablation", **given)
    found = attribute(model, x, y, F.mse_loss, "curvature", **given, estimate="exact")
    torch.testing.assert_close(found["1"], exact["1"])
    many = attribute(model, x, y, F.mse_loss, "curvature", **given, draws=1000)
    assert (many["1"] - exact["1"]).abs().max() < 0.1 * exact["1"].abs().max()


def test_empirical_squares_each_positions_blame():
    model, x, y = tokens()
    given = dict(layers=["act"], estimate="empirical")
    found = attribute(model, x, y, F.cross_entropy, "curvature", **given)
    elements = attribute(model, x, y, F.cross_entropy, "taylor", layers=["act"], of="elements")
    expected = elements["act"].sum(1) - elements["act"].square().sum(1) / 2
    torch.testing.assert_close(found["act"], expected)
    model, x, y = cnn()  # one target per sample: the square of the whole
    found = attribute(model, x, y, F.cross_entropy, "curvature", **(given | dict(layers=["2"])))
    t = attribute(model, x, y, F.cross_entropy, "taylor", layers=["2"])["2"]
    torch.testing.assert_close(found["2"], t - t.square() / 2)


@pytest.mark.parametrize("estimate", ["exact", "montecarlo", "empirical"])
def test_halves(estimate):
    model, x, y = mlp()
    wide = attribute(model, x, y, F.cross_entropy, "curvature", ["1"], estimate=estimate)["1"]
    model, x = model.to(torch.bfloat16), x.to(torch.bfloat16)
    found = attribute(model, x, y, F.cross_entropy, "curvature", ["1"], estimate=estimate)["1"]
    assert found.dtype == torch.float32
    assert (found - wide).abs().max() < 0.05 * wide.abs().max()


def test_link_names_curvature_for_token_losses():
    model, x, y = tokens()
    with pytest.raises(ValueError, match="several loss terms per sample; use 'curvature'"):
        attribute(model, x, y, F.cross_entropy, "link")


def mixed(z, y):
    return F.cross_entropy(z, y, reduction="none") + z.square().sum(1)


def squared(z, y):
    return F.cross_entropy(z, y, reduction="none").square()


@pytest.mark.parametrize("loss_fn", [log_cosh, mixed, squared])
def test_random_directions_refuse_a_loss_they_do_not_understand(loss_fn):
    model, x, y = mlp()
    with pytest.raises(ValueError, match="estimate: 'montecarlo' needs a loss_fn that calls"):
        attribute(model, x, y, loss_fn, "curvature")
    found = attribute(model, x, y, loss_fn, "curvature", estimate="exact", layers=["1"])
    a, z = model[:2](x).detach(), model(x).detach()
    expected = by_definition(loss_fn, model[2:], a, z, y, lambda v: v)
    torch.testing.assert_close(found["1"], expected)


BAD = {
    "estimate": (dict(estimate="fisher"), ValueError, "estimate: expected one of montecarlo"),
    "draws": (dict(draws=0), ValueError, "draws: expected an integer >= 1, got 0"),
    "type": (dict(draws=2.0), TypeError, r"draws: expected an integer, got 2\.0"),
    "seed": (dict(seed="x"), TypeError, "seed: expected an integer, got 'x'"),
    "option": (dict(rivals=2), TypeError, "'curvature' has no option 'rivals'"),
}


@pytest.mark.parametrize(("options", "error", "message"), BAD.values(), ids=BAD.keys())
def test_options_are_checked(options, error, message):
    model, x, y = mlp()
    with pytest.raises(error, match=message):
        attribute(model, x, y, F.cross_entropy, "curvature", **options)


def test_exact_refuses_outputs_that_are_too_large(monkeypatch):
    model, x, y = mlp()
    monkeypatch.setattr("torchbp.blame.loss_curvature.HESSIAN_ELEMENTS", 9 * 16 - 1)
    with pytest.raises(ValueError, match=r"'exact' needs 4 backward passes and 9 x 4 x 4"):
        attribute(model, x, y, F.cross_entropy, "curvature", estimate="exact")
