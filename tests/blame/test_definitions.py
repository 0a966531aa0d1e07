from __future__ import annotations

import functools

import mpmath
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchbp.nn
from torchbp.blame.definitions import (
    LossHead,
    check_targets,
    log_odds_blame,
    one_term_reason,
    refuse_coupled,
    sample_weights,
    squared_error_blame,
)

LOSSES = {
    "function": F.cross_entropy,
    "module": nn.CrossEntropyLoss(),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "partial": functools.partial(F.cross_entropy, reduction="sum"),
    "lambda mean": lambda z, y: F.cross_entropy(z, y),
    "lambda sum": lambda z, y: F.cross_entropy(z, y, reduction="sum"),
    "per sample": lambda z, y: F.cross_entropy(z, y, reduction="none"),
}


@pytest.mark.parametrize("loss_fn", LOSSES.values(), ids=LOSSES.keys())
def test_per_sample_loss_is_the_unreduced_one(loss_fn):
    z, y = torch.randn(6, 4, dtype=torch.float64), torch.randint(4, (6,))
    expected = F.cross_entropy(z, y, reduction="none")
    torch.testing.assert_close(LossHead.of(loss_fn).per_sample(z, y), expected)


def test_terms_of_one_sample_are_added():
    z, y = torch.randn(6, 4, 5, dtype=torch.float64), torch.randint(4, (6, 5))
    expected = F.cross_entropy(z, y, reduction="none").sum(1)
    torch.testing.assert_close(LossHead.of(F.cross_entropy).per_sample(z, y), expected)
    target = torch.randn_like(z)
    expected = (z - target).square().flatten(1).sum(1)
    torch.testing.assert_close(LossHead.of(nn.MSELoss()).per_sample(z, target), expected)


def test_a_module_keeps_its_settings():
    weight = torch.rand(4, dtype=torch.float64)
    loss_fn = nn.CrossEntropyLoss(weight=weight, label_smoothing=0.1, ignore_index=2)
    z, y = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 2, 1])
    expected = F.cross_entropy(
        z, y, weight=weight, label_smoothing=0.1, ignore_index=2, reduction="none"
    )
    head = LossHead.of(loss_fn)
    torch.testing.assert_close(head.per_sample(z, y), expected)
    assert loss_fn.reduction == "mean"


def test_a_batch_coupled_loss_is_refused():
    def contrastive(z, y):
        return torch.logsumexp(z @ z.T, 1).mean()

    with pytest.raises(ValueError, match="neither a sum nor a mean over samples"):
        LossHead.of(contrastive).per_sample(torch.randn(5, 3), torch.zeros(5))


def test_a_coupled_loss_per_sample_is_found_out():
    z, y = torch.randn(6, 4), torch.randint(4, (6,))
    head = LossHead.of(lambda z, y: F.cross_entropy(z - z.mean(0), y, reduction="none"))
    with pytest.raises(ValueError, match="couples the samples of a batch"):
        refuse_coupled(head, z, y, head.per_sample(z, y))
    plain = LossHead.of(lambda z, y: F.cross_entropy(z, y, reduction="none"))
    refuse_coupled(plain, z, y, plain.per_sample(z, y))


def test_containers_of_a_loss_are_cut_into_samples_together():
    z, y = {"a": torch.randn(6, 4)}, [torch.randn(6, 4), "name"]
    plain = LossHead.of(lambda z, y: (z["a"] - y[0]).square())
    refuse_coupled(plain, z, y, plain.per_sample(z, y))
    coupled = LossHead.of(lambda z, y: (z["a"] - y[0]).square().cumsum(0))
    with pytest.raises(ValueError, match="couples the samples of a batch"):
        refuse_coupled(coupled, z, y, coupled.per_sample(z, y))


@pytest.mark.parametrize("samples", [2, 3, 6])
def test_lists_with_one_thing_per_sample_are_not_taken_apart(samples):
    z, y = torch.randn(samples, 3), [torch.randn(3) for _ in range(samples)]
    pairs = LossHead.of(lambda z, y: torch.stack([(a - b).sum() for a, b in zip(z, y)]))  # noqa: B905
    for targets in (y, {"boxes": y}):
        given = LossHead.of(lambda z, t: pairs.loss_fn(z, t["boxes"] if isinstance(t, dict) else t))
        refuse_coupled(given, z, targets, given.per_sample(z, targets))


def test_a_loss_of_the_users_own_formula_is_not_taken_for_its_base_class():
    class Focal(nn.CrossEntropyLoss):
        def forward(self, input, target):
            loss = F.cross_entropy(input, target, reduction="none")
            return (loss * (1 - torch.exp(-loss)) ** 2).mean()

    class Named(nn.CrossEntropyLoss):
        pass

    z, y = torch.randn(6, 4), torch.randint(4, (6,))
    head = LossHead.of(Focal())
    assert head.kind == "other" and LossHead.of(Named()).kind == "cross_entropy"
    assert LossHead.of(torchbp.nn.CrossEntropyLoss()).kind == "cross_entropy"
    torch.testing.assert_close(head.per_sample(z, y).mean(), Focal()(z, y))


def test_weights_of_classes_know_of_ignored_targets():
    head = LossHead.of(functools.partial(F.cross_entropy, weight=torch.rand(3), ignore_index=255))
    weights = sample_weights(head, torch.tensor([2, 255, 1]))
    assert torch.equal(weights[[0, 2]], head.settings["weight"][[2, 1]])


def test_cross_entropy_of_a_single_number_is_refused():
    with pytest.raises(ValueError, match=r"output: cross-entropy expects .* got \(6,\)"):
        check_targets(LossHead.of(F.cross_entropy), torch.randn(6), torch.zeros(6).long())


def test_a_loss_must_return_a_tensor():
    with pytest.raises(TypeError, match="loss_fn: expected a tensor in return, got float"):
        LossHead.of(lambda z, y: 1.0).per_sample(torch.randn(2, 3), torch.zeros(2))


def test_loss_must_be_callable():
    with pytest.raises(TypeError, match="loss_fn"):
        LossHead.of("cross_entropy")


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.zeros(5, dtype=torch.long), r"expected shape \(6,\), got \(5,\)"),
        (torch.full((6,), 4), r"classes in \[0, 4\), got 4"),
        (torch.full((6,), -1), r"classes in \[0, 4\), got -1"),
        (torch.zeros(6, 3), r"expected shape \(6, 4\)"),
    ],
)
def test_wrong_targets_are_named(targets, message):
    with pytest.raises(ValueError, match=message):
        check_targets(LossHead.of(F.cross_entropy), torch.randn(6, 4), targets)


def exact_log_odds(t: float, l: float) -> float:
    """The definition in 60 digits: l - softplus(log(expm1(l)) - t / (1 - exp(-l)))."""
    with mpmath.workdps(60):
        t, l = mpmath.mpf(t), mpmath.mpf(l)
        s = mpmath.log(mpmath.expm1(l))
        return float(l - mpmath.log1p(mpmath.exp(s - t / (-mpmath.expm1(-l)))))


@pytest.mark.parametrize("loss", [1e-12, 1e-4, 0.3, 2.0, 30.0, 200.0])
@pytest.mark.parametrize("share", [-900.0, -3.0, -1e-3, -1e-9, 1e-9, 0.2, 2.0, 50.0])
def test_log_odds_blame_is_accurate_everywhere(loss, share):
    t = share * min(loss, 1.0)  # of the size an error signal of this loss can have
    l64 = torch.tensor([loss], dtype=torch.float64)
    value = float(log_odds_blame(torch.tensor([[t]], dtype=torch.float64), l64))
    assert value == pytest.approx(exact_log_odds(t, loss), rel=1e-9, abs=1e-300)
    single = log_odds_blame(torch.tensor([[t]]), torch.tensor([loss]))
    assert float(single) == pytest.approx(exact_log_odds(t, loss), rel=3e-4)


def test_log_odds_blame_of_a_perfect_sample_is_zero():
    assert log_odds_blame(torch.zeros(1, 3), torch.zeros(1)).tolist() == [[0, 0, 0]]


def test_log_odds_blame_is_exact_for_two_classes_and_a_linear_net():
    w, h = torch.randn(2, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    y = torch.randint(2, (6,))
    z = (h @ w.T).requires_grad_()
    loss = F.cross_entropy(z, y, reduction="none")
    (delta,) = torch.autograd.grad(loss.sum(), z)
    blame = log_odds_blame(h * (delta @ w), loss.detach())
    for unit in range(5):
        without = h.clone()
        without[:, unit] = 0
        removed = F.cross_entropy(without @ w.T, y, reduction="none")
        torch.testing.assert_close(blame[:, unit], loss.detach() - removed)


def test_class_weights_scale_the_link():
    t, loss = torch.randn(4, 3, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    weight = torch.tensor([0.5, 2.0, 1.0, 0.0], dtype=torch.float64)
    blame = log_odds_blame(t * weight[:, None], loss * weight, weight)
    torch.testing.assert_close(blame[:3], (log_odds_blame(t, loss) * weight[:, None])[:3])
    assert blame[3].tolist() == [0, 0, 0]


def test_squared_error_blame_is_exact_for_one_output():
    w, h = torch.randn(5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    y = torch.randn(6, dtype=torch.float64)
    error = h @ w - y
    blame = squared_error_blame(h * (2 * error)[:, None] * w, error.square())
    for unit in range(5):
        removed = (error - h[:, unit] * w[unit]).square()
        torch.testing.assert_close(blame[:, unit], error.square() - removed)


@pytest.mark.parametrize(
    ("loss_fn", "output", "targets", "reason"),
    [
        (F.cross_entropy, torch.randn(3, 4, 2), torch.zeros(3, 2).long(), "several loss terms"),
        (F.cross_entropy, torch.randn(3, 4), torch.rand(3, 4), "probabilities"),
        (nn.CrossEntropyLoss(label_smoothing=0.1), torch.randn(3, 4), torch.zeros(3).long(),
         "smoothing"),
        (F.mse_loss, torch.randn(3, 4), torch.randn(3, 4), "several loss terms"),
        (F.binary_cross_entropy_with_logits, torch.randn(3), torch.full((3,), 0.5), "soft"),
        (lambda z, y: (z - y).abs().sum(), torch.randn(3), torch.randn(3), "none of"),
    ],
)  # fmt: skip
def test_link_says_why_a_loss_does_not_suit_it(loss_fn, output, targets, reason):
    assert reason in one_term_reason(LossHead.of(loss_fn), output, targets)


def test_one_term_losses_suit_the_link():
    one, y = torch.randn(3), torch.zeros(3)
    assert one_term_reason(LossHead.of(F.mse_loss), one, y) is None
    assert one_term_reason(LossHead.of(nn.BCEWithLogitsLoss()), one, y) is None
    assert one_term_reason(LossHead.of(F.cross_entropy), torch.randn(3, 4), y.long()) is None
