"""Samples: every score against a loop over samples through autograd, in double precision."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from models import MODELS, cnn, mlp
from sample_models import SAMPLE_MODELS, looped_gradients
from test_untouched import fingerprint, same
from torch import nn

from torchbp import attribute
from torchbp.blame.samples import drivers, ranked, sample_blame

NAMES = ["cat", "dog", "owl", "<fox>"]


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("batch_size", [256, 2])
@pytest.mark.parametrize("make", SAMPLE_MODELS.values(), ids=SAMPLE_MODELS.keys())
def test_scores_equal_a_loop_over_samples(make, batch_size):
    model, x, y = make()
    train, valid = slice(0, 4), slice(4, None)
    gradients, losses = looped_gradients(model, x, y)
    blame = sample_blame(
        model, x[train], y[train], F.cross_entropy, (x[valid], y[valid]), batch_size=batch_size
    )
    close(blame["loss"], losses[train])
    close(blame.gradient_norm, gradients[train].norm(dim=1))
    close(blame.self_influence, gradients[train].square().sum(1))
    close(blame.influence, -gradients[train] @ gradients[valid].mean(0))


def test_a_step_on_a_culprit_raises_the_validation_loss():
    model, x, y = mlp()
    valid = x[5:], y[5:]
    blame = attribute(model, x, y, F.cross_entropy, of="samples", validation=valid)
    before = F.cross_entropy(model(valid[0]), valid[1])
    step = 1e-7
    for n in (int(blame.influence.argmax()), int(blame.influence.argmin())):
        grads = torch.autograd.grad(
            F.cross_entropy(model(x[n : n + 1]), y[n : n + 1]), [*model.parameters()]
        )
        moved = {k: p - step * g for (k, p), g in zip(model.named_parameters(), grads, strict=True)}
        after = F.cross_entropy(torch.func.functional_call(model, moved, valid[0]), valid[1])
        torch.testing.assert_close((after - before) / step, blame.influence[n], rtol=1e-4, atol=0)


def test_class_scores_by_their_definition():
    model, x, y = mlp()
    y[3] = -100  # ignored by the loss
    blame = sample_blame(model, x, y, F.cross_entropy)
    z = model(x).detach()
    for n in range(len(x)):
        if n == 3:
            assert blame.el2n[n].isnan() and blame.margin[n].isnan() and blame.loss[n] == 0
            continue
        error = z[n].softmax(0) - F.one_hot(y[n], 4)
        close(blame.el2n[n], error.square().sum().sqrt())
        others = [float(z[n, c]) for c in range(4) if c != y[n]]
        close(blame.margin[n], z[n, y[n]] - max(others))
    assert torch.equal(blame.margin.nan_to_num(1) < 0, (z.argmax(1) != y) & (y >= 0))
    assert 3 not in [row[0] for row in blame.suspects(9, by="margin")]


@pytest.mark.parametrize("ignored", [0, 255, -100])
def test_samples_that_the_loss_ignores_have_no_class_scores(ignored):
    model, x, y = mlp()
    plain = sample_blame(model, x, y, F.cross_entropy)
    counted = y != ignored
    y = y.clone()
    y[1], counted[1] = ignored, False
    loss_fn = partial(F.cross_entropy, ignore_index=ignored)
    found = sample_blame(model, x, y, loss_fn, class_names=NAMES)
    for name in ("el2n", "margin"):
        assert torch.equal(found[name].isnan(), ~counted)
        close(found[name][counted], plain[name][counted])
    blame = attribute(model, x, y, loss_fn, class_names=NAMES)
    assert len(drivers(blame, next(iter(blame)), 0, len(y)).rows) == len(y)


def test_soft_targets_have_an_error_but_no_margin():
    model, x, _ = mlp()
    soft = torch.rand(9, 4, dtype=torch.float64).softmax(1)
    blame = sample_blame(model, x, soft, F.cross_entropy)
    close(blame.el2n, (model(x).detach().softmax(1) - soft).norm(dim=1))
    assert blame.margin is None and "margin" not in blame


@pytest.mark.parametrize("loss_fn", [F.mse_loss, F.binary_cross_entropy_with_logits])
def test_losses_without_classes_have_no_class_scores(loss_fn):
    model, x, _ = mlp()
    blame = sample_blame(model, x, torch.rand(9, 4, dtype=torch.float64), loss_fn)
    assert blame.el2n is None and blame.margin is None and blame.influence is None
    assert [*blame] == ["loss", "gradient_norm", "self_influence"]
    assert [*blame.top(2).columns] == ["sample", *blame]
    with pytest.raises(ValueError, match="by: unknown name 'margin'"):
        blame.suspects(by="margin")
    with pytest.raises(KeyError, match="unknown name 'el2n'"):
        blame["el2n"]


def test_reductions_do_not_change_scores():
    model, x, y = mlp()
    mean = sample_blame(model, x, y, F.cross_entropy)
    summed = sample_blame(model, x, y, partial(F.cross_entropy, reduction="sum"))
    for score in mean:
        close(mean[score], summed[score])


def test_only_the_named_parameters_count():
    model, x, y = mlp()
    gradients, _ = looped_gradients(model, x, y, ["0.weight", "4.bias"])
    blame = sample_blame(model, x, y, F.cross_entropy, parameters=["0.weight", "4.bias"])
    close(blame.gradient_norm, gradients.norm(dim=1))


def test_tables_rank_and_name():
    model, x, y = mlp()
    blame = attribute(
        model, x, y, F.cross_entropy, of="samples", class_names=NAMES, validation=(x, y)
    )
    order = blame.loss.argsort(descending=True).tolist()
    rows = [*blame.suspects(3)]
    assert [row[0] for row in rows] == order[:3]
    predictions = model(x).argmax(1)
    assert rows[0][1:3] == (NAMES[int(y[order[0]])], NAMES[int(predictions[order[0]])])
    least = blame.margin.argsort().tolist()
    assert [row[0] for row in blame.suspects(4, by="margin")] == least[:4]
    assert [row[0] for row in blame.top(4, by="margin")] == least[::-1][:4]
    assert len(blame.suspects(100)) == len(blame.to_table()) == 9
    assert "influence" in blame.top().signed and "<fox>" not in blame._repr_html_()
    assert str(blame) == str(blame.suspects()) and "9 samples" in repr(blame)
    with pytest.raises(ValueError, match="k: expected an integer >= 1, got 0"):
        blame.suspects(0)


def test_nan_is_never_ranked():
    assert ranked(torch.tensor([1.0, float("nan"), 3.0]), 5) == [2, 0]


def test_drivers_of_a_unit():
    model, x, y = mlp()
    blame = attribute(model, x, y, F.cross_entropy, "taylor", class_names=NAMES)
    column = blame["3"][:, 2]
    order = column.abs().argsort(descending=True).tolist()
    rows = [*drivers(blame, "3", 2, k=4)]
    assert [row[0] for row in rows] == order[:4]
    n = order[0]
    part = 100 * float(column[n].abs() / column.abs().sum())
    predicted = NAMES[int(model(x)[n].argmax())]
    assert rows[0][1] == pytest.approx(float(column[n]))
    assert rows[0][2:] == (
        f"{part:.1f} %",
        pytest.approx(float(blame.losses[n])),
        NAMES[int(y[n])],
        predicted,
    )
    for unit in (7, (1, 1), -8):
        with pytest.raises(IndexError, match=r"layer '3' has units of shape \(7,\)"):
            drivers(blame, "3", unit)


def test_drivers_of_an_element():
    model, x, y = cnn()
    blame = attribute(model, x, y, F.cross_entropy, "taylor", of="elements")
    rows = [*drivers(blame, "2", (1, 3, 4), k=7)]
    found = {row[0]: row[1] for row in rows}
    assert found == pytest.approx(dict(enumerate(blame["2"][:, 1, 3, 4].tolist())))


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_nothing_changes(make):
    model, x, y = make()
    F.cross_entropy(model(x), y).backward()
    before = fingerprint(model, x)
    sample_blame(model, x, y, F.cross_entropy, (x, y), batch_size=3)
    assert same(before, fingerprint(model, x))


def test_bad_input_is_named():
    model, x, y = mlp()
    with pytest.raises(TypeError, match=r"validation: expected \(inputs, targets\), got Tensor"):
        sample_blame(model, x, y, F.cross_entropy, validation=x)
    with pytest.raises(ValueError, match="batch_size: expected an integer >= 1, got 0"):
        sample_blame(model, x, y, F.cross_entropy, batch_size=0)
    with pytest.raises(ValueError, match="inputs: the batch is empty"):
        sample_blame(model, x[:0], y[:0], F.cross_entropy)
    with pytest.raises(ValueError, match=r"unknown name '0.weigth'; did you mean '0.weight'"):
        sample_blame(model, x, y, F.cross_entropy, parameters=["0.weigth"])
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module"):
        sample_blame(nn.functional.relu, x, y, F.cross_entropy)
