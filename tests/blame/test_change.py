"""Loss change allocation: it closes, adds up, finds what was planted, and touches nothing."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from models import MODELS, cnn, mlp, residual
from sample_models import SAMPLE_MODELS, lstm, tied
from test_untouched import Trap, fingerprint, same, trapped
from torch import nn

from torchbp import convert
from torchbp.blame.change import LossChange, integrate
from torchbp.blame.step_change import per_unit

RULES = ["simpson", "secant"]


def steps(change, model, x, y, n=4, lr=0.2, loss_fn=F.cross_entropy):
    """Plain SGD in training mode, every step settled."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    with change:
        for _ in range(n):
            optimizer.zero_grad()
            loss_fn(model.train()(x), y).backward()
            optimizer.step()
            change.step()


def totals(step):
    return sum(step.layers.values()) + step.buffers


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "make", {**MODELS, **SAMPLE_MODELS}.values(), ids={**MODELS, **SAMPLE_MODELS}.keys()
)
@pytest.mark.filterwarnings("ignore:LossChange. step")
def test_shares_close_and_add_up(make, rule):
    model, x, y = make()
    probe_x, probe_y = x.clone(), y.roll(1, 0)
    before = F.cross_entropy(copy.deepcopy(model).eval()(probe_x), probe_y).detach()
    change = LossChange(model, probe_x, probe_y, F.cross_entropy, rule, tolerance=1e-4)
    steps(change, model, x, y)
    after = F.cross_entropy(model.eval()(probe_x), probe_y).detach()
    assert change.steps[0].before == pytest.approx(float(before), rel=1e-12)
    assert change.steps[-1].after == pytest.approx(float(after), rel=1e-12)
    for first, second in pairwise(change.steps):
        assert first.after == second.before
    for step in change.steps:
        assert totals(step) + step.residual == pytest.approx(step.change, rel=1e-9)
        size = max(abs(step.change), sum(map(abs, step.layers.values())))
        assert abs(step.residual) <= (1e-12 if rule == "secant" else 3e-3) * size
    by_layer = {name: sum(s.layers[name] for s in change.steps) for name in change.steps[0].layers}
    for name, share in change.shares.items():
        by_layer[name.rpartition(".")[0] or "(model)"] -= float(share.sum())
    assert max(map(abs, by_layer.values())) < 1e-12
    units = per_unit(model, change.shares)
    assert sum(float(u.sum()) for u in units.values()) == pytest.approx(
        sum(float(s.sum()) for s in change.shares.values()), rel=1e-9
    )


def test_a_quadratic_is_shared_exactly():
    """One output, squared error: by hand, both rules give Δw times the gradient midway."""
    model = nn.Linear(3, 1, bias=False).double()
    x, y = torch.randn(5, 3).double(), torch.randn(5, 1).double()
    old = model.weight.detach().clone()
    new = old + torch.tensor([[0.5, -1.0, 0.0]]).double()
    middle = ((old + new) / 2).requires_grad_()
    (slope,) = torch.autograd.grad(F.mse_loss(x @ middle.T, y), middle)
    for rule in RULES:
        with torch.no_grad():
            model.weight.copy_(old)
        with LossChange(model, x, y, F.mse_loss, rule) as change, torch.no_grad():
            model.weight.copy_(new)
            change.step()
        torch.testing.assert_close(change.shares["weight"], (new - old) * slope)
        assert abs(change.steps[0].residual) < 1e-14
        assert [*change.steps[0].layers] == ["(model)"]


def test_both_rules_agree_on_small_steps_and_path_integrals_match_a_fine_sum():
    found = {}
    for rule in RULES:
        torch.manual_seed(3)
        model, x, y = mlp()
        change = LossChange(model, x, y, F.cross_entropy, rule, tolerance=1e-9)
        start = {n: p.detach().clone() for n, p in model.named_parameters()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            steps(change, model, x, y, n=1, lr=1e-3)
        found[rule] = change.shares
    ends = {n: p.detach().clone() for n, p in model.named_parameters()}
    fine = {n: torch.zeros_like(p) for n, p in start.items()}
    for k in range(400):
        at = {n: torch.lerp(start[n], ends[n], (k + 0.5) / 400).requires_grad_() for n in start}
        loss = F.cross_entropy(torch.func.functional_call(model, at, x), y)
        for n, g in zip(at, torch.autograd.grad(loss, [*at.values()]), strict=True):
            fine[n] += g * (ends[n] - start[n]) / 400
    for name, share in fine.items():
        torch.testing.assert_close(found["simpson"][name], share, rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(found["secant"][name], share, rtol=1e-2, atol=1e-9)


def test_simpson_halves_until_it_closes():
    exact = torch.exp(torch.tensor(4.0).double()).item() - 1
    calls = []

    def slopes(points):
        calls.append(len(points))
        return {
            "w": torch.stack([4 * torch.exp(4 * torch.tensor(w).double()) for w in points]).mean()
        }

    shares, points = integrate(slopes, lambda t: abs(exact - sum(t)) < 1e-4 * exact)
    assert float(shares["w"]) == pytest.approx(exact, rel=1e-4) and points == sum(calls)
    assert calls == [2, 1, 2, 4, 8]
    h = torch.linspace(0, 1, 17).double()
    weights = torch.tensor([1, *[4, 2] * 7, 4, 1]).double() / 48
    assert float(shares["w"]) == pytest.approx(
        float((weights * 4 * (4 * h).exp()).sum()), rel=1e-12
    )
    _, points = integrate(slopes, lambda t: False)
    assert points == 2 + 63  # it gives up in the end


@pytest.mark.parametrize("rule", RULES)
def test_buffers_have_a_share_of_their_own(rule):
    model, x, y = cnn()
    change = LossChange(model, x, y, F.cross_entropy, rule)
    before = F.cross_entropy(model.eval()(x), y).detach()
    with change:
        with torch.no_grad():  # statistics move, parameters do not
            model.train()(3 * x + 1)
        change.step()
    after = F.cross_entropy(model.eval()(x), y).detach()
    (step,) = change.steps
    assert step.buffers == pytest.approx(float(after - before), rel=1e-9) and step.buffers != 0
    assert set(step.layers.values()) == {0.0} and not change.shares
    assert "(buffers)" in str(change.report()) and "(buffers)" in str(change.jump())


@pytest.mark.parametrize("rule", RULES)
def test_the_planted_layer_and_unit_are_found(rule):
    model, x, y = mlp()
    change = LossChange(model, x, y, F.cross_entropy, rule)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with change:
        for k in range(12):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            if k == 7:
                with torch.no_grad():
                    model[2].bias[3] += 30
            change.step()
    jump = change.jump()
    assert jump.step == 7 and jump.change > 0.1
    assert jump.layers["2"] == pytest.approx(jump.change, rel=0.02)
    assert jump.units[0][:2] == ("2", 3) and jump.weights[0][:2] == ("2.bias", (3,))
    assert int(change.per_unit("2").argmax()) == 3
    assert change.jump(7) is jump and change.jump(2) is change.steps[2]


def test_units_are_what_weights_lead_to():
    conv = nn.ConvTranspose2d(4, 6, 2, groups=2)
    model = nn.ModuleDict(
        {"up": conv, "rnn": nn.LSTM(3, 5), "fc": nn.Linear(3, 2), "n": nn.LayerNorm(4)}
    )
    shares = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    found = per_unit(model, shares)
    up = torch.zeros(6)
    for i in range(4):  # input i belongs to group i // 2, which makes outputs 3 g + j
        for j in range(3):
            up[3 * (i // 2) + j] += shares["up.weight"][i, j].sum()
    torch.testing.assert_close(found["up"], up + shares["up.bias"])
    rnn = sum(
        shares[f"rnn.{n}"].reshape(4, 5, -1).sum((0, 2))
        for n in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    )
    torch.testing.assert_close(found["rnn.l0"], rnn)
    torch.testing.assert_close(found["fc"], shares["fc.weight"].sum(1) + shares["fc.bias"])
    torch.testing.assert_close(found["n"], shares["n.weight"] + shares["n.bias"])
    assert found.keys() == {"up", "rnn.l0", "fc", "n"}


def test_layers_of_a_model_that_is_one_have_names():
    for model, name in ((nn.LSTM(4, 3), "l0"), (nn.GRUCell(4, 3), "(model)")):
        shares = {n: torch.ones_like(p) for n, p in model.named_parameters()}
        assert [*per_unit(model, shares)] == [name]


def test_parameters_that_do_not_fit_stand_alone():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.scale = (nn.Parameter(torch.ones(n)) for n in (3, 2, 3))

    model = Odd()
    found = per_unit(model, {n: p.detach() for n, p in model.named_parameters()})
    assert {n: tuple(f.shape) for n, f in found.items()} == {"(model)": (3,), "b": (2,)}
    assert float(found["(model)"].sum()) == 6


@pytest.mark.parametrize("rule", RULES)
def test_several_steps_settled_together(rule):
    model, x, y = mlp()
    change = LossChange(model, x, y, F.cross_entropy, rule, every=3)
    steps(change, model, x, y, n=8)
    assert [s.step for s in change.steps] == [2, 5, 7]  # the rest when the block ends
    assert change.jump(0) is change.steps[0] and change.jump(3) is change.steps[1]
    for step in change.steps:
        assert abs(step.residual) < 0.02 * abs(step.change)


def test_the_loss_is_what_users_see():
    model, x, y = tied()
    for loss_fn in (F.cross_entropy, partial(F.cross_entropy, reduction="sum", ignore_index=0)):
        for rule in RULES:
            change = LossChange(model, x, y, loss_fn, rule)
            steps(change, model, x, y, n=2, lr=1e-3)
            assert change.steps[-1].after == pytest.approx(
                float(loss_fn(model.eval()(x), y).detach())
            )
            step = change.steps[0]
            assert abs(step.residual) <= 0.01 * sum(map(abs, step.layers.values()))
    change = LossChange(model, x, y, partial(F.cross_entropy, reduction="none"))
    steps(change, model, x, y, n=1)
    assert change.steps[0].after == pytest.approx(float(F.cross_entropy(model(x), y).detach()))


def test_any_model_and_loss_with_simpson():
    """A loss that is no sum over samples, and random numbers in the forward: the same each time."""

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 4)

        def forward(self, x):
            return self.inner(x + torch.randn_like(x))

    model, x = Noisy().double(), torch.randn(9, 6).double()
    contrast = lambda z, _: torch.logsumexp(z @ z.T, 1).mean() - z.square().mean()  # noqa: E731
    change = LossChange(model, x, None, contrast)
    steps(change, model, x, None, n=3, lr=0.01, loss_fn=contrast)
    for first, second in pairwise(change.steps):
        assert first.after == second.before
    assert all(abs(s.residual) < 0.01 * abs(s.change) for s in change.steps)


def test_a_loss_that_is_not_finite_is_named_and_left_out():
    model, x, y = mlp()
    good = copy.deepcopy(model.state_dict())
    with pytest.warns(RuntimeWarning, match=r"step 1: the loss is nan after .*infinity in 2.bias"):
        with LossChange(model, x, y, F.cross_entropy) as change:
            with torch.no_grad():
                model[4].bias += 0.1 * torch.arange(4)
            change.step()
            with torch.no_grad():
                model[2].bias[1] = float("nan")
            change.step()
            model.load_state_dict(good)
            change.step()
            with torch.no_grad():
                model[4].bias += 0.1
                model[0].bias -= 0.1
            change.step()
    assert [bool(s.layers) for s in change.steps] == [True, False, False, True]
    assert all(bool(s.isfinite().all()) for s in change.shares.values())
    assert change.jump().step in (0, 3) and "nan" not in str(change.report()).split("\n", 1)[1]


class Tables(nn.Module):
    """A padded, tied embedding, and two whose gradients torch weighs otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4, padding_idx=0)
        self.rare = nn.Embedding(7, 4, scale_grad_by_freq=True)
        self.bag = nn.EmbeddingBag(7, 4, mode="mean", padding_idx=0, sparse=True)

    def forward(self, tokens):
        h = self.embed(tokens) + self.rare(tokens) + self.bag(tokens)[:, None]
        return (h @ self.embed.weight.T).transpose(1, 2)


@pytest.mark.parametrize("converted", [False, True])
def test_gradients_that_torch_withholds_are_counted(converted):
    model = Tables().double()
    model = convert(model) if converted else model
    tokens, y = torch.randint(7, (6, 5)), torch.randint(7, (6, 5))
    tokens[:, 0], tokens[:, 1] = 0, 3
    with LossChange(model, tokens, y, F.cross_entropy) as change:
        with torch.no_grad():
            for p in model.parameters():
                p += 0.1 * torch.randn_like(p)
        change.step()
    assert abs(change.steps[0].residual) < 0.01 * abs(change.steps[0].change)
    assert change.steps[0].evaluations <= 9
    assert not any(share.is_sparse for share in change.shares.values())


def test_a_jump_to_infinity_has_no_shares_and_hides_no_other():
    model, x, _ = mlp()
    change = LossChange(model, x, torch.zeros(9, 4).double(), F.mse_loss)
    with pytest.warns(RuntimeWarning, match=r"step 1: the loss is inf"), change, torch.no_grad():
        for bias in (1.0, 1e200, 1.0):
            model[4].bias[0] += bias
            change.step()
    assert change.jump().step == 0 and change.jump(1).layers == {}


def test_a_forward_that_writes_into_its_buffers_finds_them_fresh():
    class Counting(nn.Linear):
        def __init__(self):
            super().__init__(6, 4)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return super().forward(x) * self.calls

    model, x, y = Counting().double(), *mlp()[1:]
    change = LossChange(model, x, y, F.cross_entropy)
    steps(change, model, x, y, n=3)
    assert int(model.calls) == 3
    for n, step in enumerate(change.steps):
        z = (n + 2) * F.linear(x, model.weight, model.bias)
        if n == 2:
            assert step.after == pytest.approx(float(F.cross_entropy(z, y).detach()))
        assert step.buffers != 0 and abs(step.residual) < 0.01 * max(abs(step.change), 1e-3)


def test_what_stays_unaccounted_for_is_said():
    model, x, y = mlp()
    change = LossChange(model, x, y, F.cross_entropy, tolerance=1e-13)
    with pytest.warns(RuntimeWarning, match=r"LossChange: step \d: .* are not accounted for"):
        steps(change, model, x, y, n=3, lr=5.0)
    assert max(s.evaluations for s in change.steps) == 65


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("make", [cnn, lstm, residual])
def test_nothing_changes(make, rule):
    model, x, y = make()
    model.train()
    F.cross_entropy(model(x), y).backward()
    with LossChange(model, x, y, F.cross_entropy, rule) as change:
        with torch.no_grad():
            for p in model.parameters():
                p *= 1.01
        torch.rand(3)  # the probe's random numbers are no longer the next ones
        before = fingerprint(model, x)
        change.step()
        assert same(before, fingerprint(model, x))
    assert same(before, fingerprint(model, x))
    assert not any(t.requires_grad for t in change.shares.values())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_failure_changes_nothing(way, rule):
    free = Trap()
    with LossChange(*trapped(free), F.cross_entropy, rule) as change:
        move(change.model)
        change.step()
    for n in range(1 + (way == "forward"), free.passed[way] + 1):
        model, x, y = trapped(Trap(**{way: n}))
        model.train()
        with LossChange(model, x, y, F.cross_entropy, rule) as change:
            move(model)
            before = fingerprint(model, x)
            with pytest.raises(ZeroDivisionError):
                change.step()
            assert same(before, fingerprint(model, x))
            change._count = change._settled  # nothing left for the end of the block


def move(model):
    with torch.no_grad():
        for p in model.parameters():
            p += 0.01


def test_parameters_that_come_or_go_are_named():
    def grown(model):
        model.extra = nn.Linear(2, 2)

    def shrunk(model):
        model[0].bias = None

    for alter, name in ((grown, "extra.weight"), (shrunk, "0.bias")):
        model, x, y = mlp()
        with (
            pytest.raises(RuntimeError, match=f"'{name}'.*came, went or changed shape"),
            LossChange(model, x, y, F.cross_entropy) as change,
        ):
            alter(model)
            change.step()


def test_bad_input_is_named():
    model, x, y = mlp()
    with pytest.raises(ValueError, match="rule: unknown name 'simson'; did you mean 'simpson'"):
        LossChange(model, x, y, F.cross_entropy, "simson")
    with pytest.raises(ValueError, match="every: expected an integer >= 1, got 0"):
        LossChange(model, x, y, F.cross_entropy, every=0)
    with pytest.raises(ValueError, match="tolerance: expected a number > 0, got 0"):
        LossChange(model, x, y, F.cross_entropy, tolerance=0)
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got function"):
        LossChange(F.relu, x, y, F.cross_entropy)
    with pytest.raises(TypeError, match="loss_fn: expected a callable"):
        LossChange(model, x, y, "cross_entropy")
    with pytest.raises(ValueError, match="inputs: the batch is empty"):
        LossChange(model, x[:0], y[:0], F.cross_entropy)
    change = LossChange(model, x, y, F.cross_entropy)
    with pytest.raises(RuntimeError, match="it is not active; use `with LossChange"):
        change.step()
    with pytest.raises(RuntimeError, match="no step was settled yet"):
        change.report()
    steps(change, model, x, y, n=2)
    with pytest.raises(ValueError, match="step: expected 0 to 1, got 812"):
        change.jump(812)
    with pytest.raises(KeyError, match="unknown name '1'"):
        change.per_unit("1")
    assert change.per_unit("2").shape == (7,)


def test_tables_for_people():
    model, x, y = mlp()
    change = LossChange(model, x, y, F.cross_entropy)
    steps(change, model, x, y, n=3)
    rows = {row[0]: row[1:] for row in change.report()}
    assert [*rows] == ["0", "2", "4", "(not accounted for)"]
    for name in ("0", "2", "4"):
        assert rows[name][0] == pytest.approx(float(change.per_unit(name).sum()))
        assert rows[name][0] == pytest.approx(rows[name][1] + rows[name][2])
    step = change.jump(0)  # downhill: the largest decrease comes first
    values = [row[1] for row in step.tables()[0]]
    assert step.change < 0 and values == sorted(values)
    assert "step 0: loss" in repr(step) and "<table>" in step._repr_html_()
    name, index, value = step.weights[0]
    assert (
        float(change.steps[0].weights[0][2]) == value
        and len(index) == model.get_parameter(name).dim()
    )
