"""Influence over checkpoints and in the run: against loops through autograd, and Captum."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from captum.influence import TracInCP
from models import mlp
from sample_models import SAMPLE_MODELS, looped_gradients
from test_untouched import Trap, fingerprint, same, trapped
from torch import nn
from torch.utils.data import TensorDataset

from torchbp.blame.influence import InRunInfluence, self_influence, tracin
from torchbp.blame.probe import evaluation

RATES = [0.3, 0.1, 0.05]


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def checkpoints_of(model: nn.Module) -> list[dict[str, torch.Tensor]]:
    """Three state dicts around the model's own."""
    found = []
    for seed in range(3):
        moved = copy.deepcopy(model)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in moved.parameters():
                p += 0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        found.append(moved.state_dict())
    return found


@pytest.mark.parametrize("batch_size", [256, 3])
@pytest.mark.parametrize("make", SAMPLE_MODELS.values(), ids=SAMPLE_MODELS.keys())
def test_tracin_equals_a_loop_over_samples_and_checkpoints(make, batch_size):
    model, x, y = make()
    states, before = checkpoints_of(model), fingerprint(model, x)
    train, test = (x[:4], y[:4]), (x[4:], y[4:])
    found = tracin(model, states, train, test, F.cross_entropy, RATES, batch_size=batch_size)
    own = self_influence(model, iter(states), train, F.cross_entropy, RATES, batch_size=batch_size)
    assert same(before, fingerprint(model, x))
    expected, squares = 0.0, 0.0
    for state, rate in zip(states, RATES, strict=True):
        model.load_state_dict(state)
        g, _ = looped_gradients(model, x, y)
        expected = expected - rate * g[:4] @ g[4:].T
        squares = squares + rate * g[:4].square().sum(1)
    close(found, expected)
    close(own, squares)


def test_tracin_equals_captum_with_the_sign_turned():
    model, x, y = mlp()
    states = checkpoints_of(model)
    theirs = TracInCP(
        copy.deepcopy(model),
        TensorDataset(x[:5], y[:5]),
        states,
        checkpoints_load_func=lambda m, state: (m.load_state_dict(state), 1.0)[1],
        loss_fn=nn.CrossEntropyLoss(reduction="none"),
        batch_size=2,
    )
    data = (x[:5], y[:5])
    ours = tracin(model, states, data, (x[5:], y[5:]), F.cross_entropy, 1.0)
    close(-ours, theirs.influence((x[5:], y[5:])).T)
    close(self_influence(model, states, data, F.cross_entropy, 1.0), theirs.self_influence())


def test_positive_influence_raises_the_loss():
    model, x, y = mlp()
    found = tracin(model, [model.state_dict()], (x, y), (x, y), F.cross_entropy, 1e-6)
    assert bool((found.diagonal() < 0).all())  # a step on a sample lowers its own loss
    n, m = divmod(int(found.argmax()), 9)
    loss = F.cross_entropy(model(x[n : n + 1]), y[n : n + 1])
    loss.backward()
    other = F.cross_entropy(model(x[m : m + 1]), y[m : m + 1]).detach()
    with torch.no_grad():
        for p in model.parameters():
            p -= 1e-6 * p.grad
    change = F.cross_entropy(model(x[m : m + 1]), y[m : m + 1]) - other
    torch.testing.assert_close(change.detach(), found[n, m], rtol=1e-3, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_shares_of_a_step_sum_to_its_first_order_effect(reduction):
    model, x, y = mlp()
    train, valid = (x[:6], y[:6]), (x[6:], y[6:])
    loss_fn = nn.CrossEntropyLoss(reduction=reduction)
    influence = InRunInfluence(model, valid, loss_fn)
    share = influence.step(*train, samples=torch.arange(6), learning_rate=1e-6)
    before = F.cross_entropy(model(valid[0]), valid[1]).detach()
    loss_fn(model(train[0]), train[1]).backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 1e-6 * p.grad
    change = F.cross_entropy(model(valid[0]), valid[1]).detach() - before
    torch.testing.assert_close(share.sum(), change, rtol=1e-4, atol=0)


def test_outputs_of_a_class_of_the_users_are_taken():
    class Boxed(nn.Sequential):
        def forward(self, x):
            return type("Box", (), {"logits": super().forward(x)})

    model, x, y = mlp()
    share = [
        InRunInfluence(m, (x[4:], y[4:]), loss_fn).step(x[:4], y[:4], range(4), 0.1)
        for m, loss_fn in (
            (model, F.cross_entropy),
            (Boxed(*model), lambda o, y: F.cross_entropy(o.logits, y, reduction="none")),
        )
    ]
    close(*share)


@pytest.mark.parametrize("make", SAMPLE_MODELS.values(), ids=SAMPLE_MODELS.keys())
def test_shares_equal_a_loop_over_samples(make):
    model, x, y = make()
    g, losses = looped_gradients(model, x, y)
    influence = InRunInfluence(model, (x[4:], y[4:]), F.cross_entropy)
    model.train()  # as in a training loop: gradients are taken in evaluation mode all the same
    before = fingerprint(model, x)
    share = influence.step(x[:4], y[:4], samples=[0, 5, 2, 3], learning_rate=0.1)
    assert same(before, fingerprint(model, x))
    with evaluation(model):
        mean = F.cross_entropy(model(x[:4]), y[:4]).detach()
    close(share, -0.1 * mean / losses[:4].sum() * (g[:4] @ g[4:].mean(0)))


def test_scores_add_up_by_sample_and_can_be_resumed():
    model, x, y = mlp()
    influence = InRunInfluence(model, (x, y), F.cross_entropy, class_names=["a", "b", "c", "d"])
    first = influence.step(x[:3], y[:3], samples=[4, 0, 2], learning_rate=0.1)
    state = influence.state_dict()
    resumed = InRunInfluence(model, (x, y), F.cross_entropy)
    resumed.load_state_dict(state)
    second = resumed.step(x[1:3], y[1:3], samples=[0, 2], learning_rate=0.3)
    nan = float("nan")
    expected = [first[1] + second[0], nan, first[2] + second[1], nan, first[0]]
    torch.testing.assert_close(resumed.scores, torch.tensor(expected).double(), equal_nan=True)
    rows = [*influence.top(2)]
    order = first.argsort(descending=True).tolist()
    assert [row[0] for row in rows] == [[4, 0, 2][i] for i in order[:2]]
    assert rows[0][1] == "abcd"[int(y[order[0]])] and rows[0][4] == 1
    assert influence.top(9).signed == ("influence",) and len(influence.top(9)) == 3


def test_a_preconditioner_goes_in_as_the_learning_rate():
    model, x, y = mlp()
    influence = InRunInfluence(model, (x, y), F.cross_entropy)
    rates = {n: torch.rand_like(p) for n, p in model.named_parameters()}
    share = influence.step(x, y, samples=range(9), learning_rate=rates)
    g, _ = looped_gradients(model, x, y)
    flat = torch.cat([r.flatten() for r in rates.values()])
    close(share, -(g * flat) @ g.mean(0) / 9)
    del rates["2.bias"]
    with pytest.raises(ValueError, match=r"learning_rate: it has no entry for parameter '2.bias'"):
        influence.step(x, y, samples=range(9), learning_rate=rates)


def test_bad_input_is_named():
    model, x, y = mlp()
    states, data = checkpoints_of(model), (x, y)
    call = lambda c, r: tracin(model, c, data, data, F.cross_entropy, r)  # noqa: E731
    with pytest.raises(ValueError, match=r"learning_rates: 2 of them, and more checkpoints"):
        call(states, [0.1, 0.1])
    with pytest.raises(ValueError, match=r"learning_rates: 4 of them for 3 checkpoints"):
        call(states, [0.1] * 4)
    with pytest.raises(ValueError, match="checkpoints: there is none"):
        call([], 0.1)
    with pytest.raises(TypeError, match=r"checkpoints\[1\]: expected a state dict, got str"):
        call([states[0], "model.pt"], 0.1)
    with pytest.raises(ValueError, match=r"(?s)checkpoints\[1\]: .*Missing key\(s\).*0.weight"):
        call([states[0], {}], 0.1)
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got function"):
        tracin(F.relu, states, data, data, F.cross_entropy, 0.1)
    influence = InRunInfluence(model, data, F.cross_entropy)
    with pytest.raises(ValueError, match="samples: expected 9 integer ids"):
        influence.step(x, y, samples=[1, 2], learning_rate=0.1)
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got function"):
        InRunInfluence(F.relu, data, F.cross_entropy)


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_failure_changes_nothing(way):
    """Fail in the first pass, over the training batch, and in the last, over the validation."""
    free = Trap()
    step(*trapped(free))
    for n in (1, free.passed[way]):
        model, x, y = trapped(Trap(**{way: n}))
        model.train()
        before = fingerprint(model, x)
        with pytest.raises(ZeroDivisionError):
            step(model, x, y)
        assert same(before, fingerprint(model, x))


def step(model, x, y):
    influence = InRunInfluence(model, (x, y), F.cross_entropy)
    influence.step(x, y, samples=range(len(x)), learning_rate=0.1)
