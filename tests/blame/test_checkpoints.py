from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from deep_models import DEEP
from models import MODELS, cnn, mlp
from torch import Tensor, nn

from torchbp.blame.checkpoints import CheckpointBlame, checkpoint_blame

CE = F.cross_entropy


def moved(model: nn.Module, size: float = 0.2) -> nn.Module:
    """The model with other parameters and statistics."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(size * torch.randn_like(p))
        for b in other.buffers():
            if b.is_floating_point():
                b.mul_(1 + 5 * size * torch.rand_like(b))
    return other


def total(blame: CheckpointBlame) -> Tensor:
    return sum(share.sum() for share in blame.shares.values())


def change(model: nn.Module, before: nn.Module, inputs: tuple, y: Tensor) -> Tensor:
    with torch.no_grad():
        losses, losses0 = (CE(m(*inputs), y, reduction="none") for m in (model, before))
    return (losses - losses0).sum()


@pytest.mark.parametrize("n_steps", [1, 3])
@pytest.mark.parametrize("make", {**MODELS, **DEEP}.values(), ids={**MODELS, **DEEP}.keys())
def test_the_shares_of_all_weights_sum_to_the_change(make, n_steps: int) -> None:
    model, x, y = make()
    before = moved(model)
    blame = checkpoint_blame(model, x, y, CE, before, n_steps=n_steps)
    assert blame.keys() >= {name for name, _ in model.named_parameters()}
    torch.testing.assert_close(total(blame), change(model, before, (x,), y), rtol=1e-10, atol=1e-12)
    blame.check(1e-10)


def test_each_weight_has_its_difference_times_the_midpoint_of_what_it_meets() -> None:
    model, x, y = mlp()
    before = moved(model)
    blame = checkpoint_blame(model, x, y, CE, before)
    with torch.no_grad():
        a, a0 = [x], [x]
        for module, module0 in zip(model, before, strict=True):
            a.append(module(a[-1]))
            a0.append(module0(a0[-1]))
        p, p0 = a[-1].softmax(1), a0[-1].softmax(1)
        mean = (p - p0) / (p / p0).log()
        m = mean / mean.sum(1, keepdim=True) - F.one_hot(y, 4)
        for k in reversed(range(5)):
            if k % 2:
                m = m * (a[k + 1] - a0[k + 1]) / (a[k] - a0[k])
                continue
            weight, weight0 = model[k].weight, before[k].weight
            share = (weight - weight0) * (m.T @ ((a[k] + a0[k]) / 2))
            torch.testing.assert_close(blame[f"{k}.weight"], share, rtol=1e-9, atol=1e-13)
            share = (model[k].bias - before[k].bias) * m.sum(0)
            torch.testing.assert_close(blame[f"{k}.bias"], share, rtol=1e-9, atol=1e-13)
            m = m @ (weight + weight0) / 2


@pytest.mark.parametrize("make", DEEP.values(), ids=DEEP.keys())
def test_near_each_other_it_is_gradient_times_difference(make) -> None:
    model, x, y = make()
    before = moved(model, 1e-7)
    blame = checkpoint_blame(model, x, y, CE, before)
    CE(model(x), y, reduction="sum").backward()
    largest = max(float(share.abs().max()) for share in blame.shares.values())
    for (name, p), p0 in zip(model.named_parameters(), before.parameters(), strict=True):
        expected = p.grad * (p - p0).detach()
        assert (blame[name] - expected).abs().max() <= 1e-5 * largest


def test_many_segments_tend_to_the_path_integral_of_the_gradient() -> None:
    model, x, y = mlp()
    before = moved(model)
    blame = checkpoint_blame(model, x, y, CE, before, n_steps=100)
    integral = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    state, state0 = model.state_dict(), before.state_dict()
    for k in range(100):
        w = (k + 0.5) / 100
        at = {n: (state0[n] + w * (state[n] - state0[n])).requires_grad_() for n in state}
        loss = CE(torch.func.functional_call(model, at, (x,)), y, reduction="sum")
        for name, grad in zip(at, torch.autograd.grad(loss, [*at.values()]), strict=True):
            integral[name] += grad * (state[name] - state0[name]) / 100
    for name, expected in integral.items():  # a unit's kink lies within one of the segments
        assert (blame[name] - expected).abs().sum() <= 1e-2 * expected.abs().sum()


def test_running_statistics_are_named_as_buffers() -> None:
    model, x, y = cnn()
    blame = checkpoint_blame(model, x, y, CE, moved(model))
    assert blame.buffers == ("1.running_mean", "1.running_var")
    only = {name: b * 1.5 for name, b in model.named_buffers() if b.is_floating_point()}
    alone = checkpoint_blame(model, x, y, CE, only)
    assert alone.keys() == {*blame.buffers}
    alone.check(1e-10)
    assert float(alone.expected.abs()) > 0.01


def test_statistics_of_a_layer_in_training_mode_have_no_part() -> None:
    model, x, y = cnn()
    model[1].train()
    with pytest.warns(UserWarning, match="training mode"):
        blame = checkpoint_blame(model, x, y, CE, moved(model))
    assert not blame["1.running_mean"].any()
    blame.check(1e-10)


class Functional(nn.Module):
    """Parameters as functions take them, views and all; two modules share one."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.rand(6))
        self.act, self.a, self.b = nn.PReLU(3), nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight
        self.norm = nn.GroupNorm(2, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.w * self.v
        x = F.linear(x, self.w.t() / (1 + self.v.exp())) + self.v[None]
        x = self.act(x.view(-1, 3, 2)).flatten(1)
        return self.b(self.norm(torch.tanh(self.a(x)))) * self.w.mean()


def test_parameters_in_functions_and_shared_ones_have_one_share_for_all_uses() -> None:
    model = Functional().double()
    x, y = torch.randn(5, 6).double(), torch.randint(6, (5,))
    before = moved(model)
    blame = checkpoint_blame(model, x, y, CE, before.state_dict())
    assert [*blame] == [name for name, _ in model.named_parameters()]
    assert "b.weight" in dict(model.named_parameters(remove_duplicate=False))
    torch.testing.assert_close(total(blame), change(model, before, (x,), y), rtol=1e-10, atol=1e-12)


class Sequence(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.embedding, self.layer, self.head = nn.Embedding(11, 6), layer, nn.LazyLinear(11)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        out = (
            self.layer(x, x, x) if isinstance(self.layer, nn.MultiheadAttention) else self.layer(x)
        )
        return self.head(out[0] if isinstance(out, tuple) else out).mean(1)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "LSTM": lambda: nn.LSTM(6, 5, 2, batch_first=True, bidirectional=True, proj_size=3),
    "GRU": lambda: nn.GRU(6, 5, batch_first=True),
    "RNN": lambda: nn.RNN(6, 5, batch_first=True),
    "attention": lambda: nn.MultiheadAttention(6, 2, batch_first=True),
    "transformer": lambda: nn.TransformerEncoderLayer(6, 2, 7, batch_first=True, dropout=0.0),
    "norms": lambda: nn.Sequential(nn.LayerNorm(6), nn.GELU(), nn.RMSNorm(6)),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_weights_of_sequence_layers(layer: Callable[[], nn.Module]) -> None:
    model = Sequence(layer()).eval()
    ids, y = torch.randint(11, (4, 5)), torch.randint(11, (4,))
    model(ids)
    model.double()
    before = moved(model)
    blame = checkpoint_blame(model, {"ids": ids}, y, CE, before)
    assert [*blame] == [name for name, _ in model.named_parameters()]
    expected = change(model, before, (ids,), y)
    torch.testing.assert_close(total(blame), expected, rtol=1e-10, atol=1e-12)
    for name, share in blame.items():
        unused = name.startswith("embedding") and share.abs().sum(1) == 0
        assert share.any() and (not isinstance(unused, Tensor) or unused.sum() < 11)


def test_a_tied_decoder() -> None:
    model = Sequence(nn.LayerNorm(6))
    model.head = nn.Linear(6, 11, bias=False)
    model.head.weight = model.embedding.weight
    model.double()
    ids, y = torch.randint(11, (4, 5)), torch.randint(11, (4,))
    before = moved(model)
    blame = checkpoint_blame(model, ids, y, CE, before)
    assert [*blame] == ["embedding.weight", "layer.weight", "layer.bias"]
    blame.check(1e-10)
    torch.testing.assert_close(total(blame), change(model, before, (ids,), y))
    split = {**before.state_dict(), "head.weight": torch.zeros(11, 6)}
    with pytest.raises(ValueError, match=r"one tensor for 'embedding\.weight' and 'head.weight'"):
        checkpoint_blame(model, ids, y, CE, split)


def test_two_checkpoints_that_are_both_not_the_model() -> None:
    model, x, y = mlp()
    before, after = moved(model), moved(model)
    blame = checkpoint_blame(model, x, y, CE, before.state_dict(), after)
    torch.testing.assert_close(total(blame), change(after, before, (x,), y))
    there = checkpoint_blame(model, x, y, CE, after, before)
    torch.testing.assert_close(total(there), -total(blame))
    same = checkpoint_blame(model, x, y, CE, model)
    assert len(same) == 0 and same.check().residual == {"all parameters": 0.0}


def test_the_model_stays_as_it_is() -> None:
    model, x, y = cnn()
    state = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    before = moved(model)
    torch.set_rng_state(random)
    checkpoint_blame(model, x, y, CE, before, n_steps=2)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(p.grad is not None for p in before.parameters())


def test_tables() -> None:
    model, x, y = mlp()
    blame = checkpoint_blame(model, x, y, CE, moved(model))
    assert [row[0] for row in blame.layers()] == ["0", "2", "4"]
    assert sum(row[2] for row in blame.layers()) == pytest.approx(float(blame.expected))
    torch.testing.assert_close(blame.per_unit("0.weight"), blame["0.weight"].sum(1))
    torch.testing.assert_close(blame.per_unit("0.weight", dim=1), blame["0.weight"].sum(0))
    best = max(float(blame.per_unit(name).max()) for name in blame)
    assert blame.top(1).rows[0][2] == pytest.approx(best)
    with pytest.raises(KeyError, match=r"did you mean '0.weight'"):
        blame["0.wieght"]


def test_a_lost_share_is_noticed() -> None:
    model, x, y = mlp()
    blame = checkpoint_blame(model, x, y, CE, moved(model))
    del blame.shares["2.bias"]
    with pytest.raises(RuntimeError, match="miss the change of the loss"):
        blame.check()


@pytest.mark.parametrize(
    ("before", "kind", "message"),
    [
        ({"0.wieght": torch.zeros(8, 6)}, ValueError, "before: .*did you mean '0.weight'"),
        ({"0.weight": torch.zeros(6, 8)}, ValueError, r"expected shape \(8, 6\), got \(6, 8\)"),
        ({"0.weight": torch.full((8, 6), torch.nan)}, ValueError, "expected finite values"),
        ({"0.weight": 3.0}, TypeError, r"before\['0.weight'\]: expected a tensor, got float"),
        ({}, ValueError, "before: expected parameters by name, got none"),
        (3, TypeError, "before: expected a state dict or a torch.nn.Module, got int"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(before, kind, message) -> None:
    model, x, y = mlp()
    with pytest.raises(kind, match=message):
        checkpoint_blame(model, x, y, CE, before)


def test_a_function_of_weights_without_a_rule_is_named() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ torch.digamma(self.weight.exp()).t()

    model = nn.Sequential(nn.Linear(4, 4), Inner())
    with pytest.raises(NotImplementedError, match=r"torch\.digamma, called in module '1'"):
        checkpoint_blame(model, torch.rand(2, 4), torch.tensor([0, 1]), CE, moved(model))


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_failure_changes_nothing(fails_at: int) -> None:
    model, x, y = cnn()
    before = moved(model)
    state = copy.deepcopy(model.state_dict())
    random, calls = torch.get_rng_state(), 0

    def fail(module: nn.Module, args: object, output: object) -> None:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise ZeroDivisionError

    handle = model[5].register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        checkpoint_blame(model, x, y, CE, before)
    handle.remove()
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(m.training for m in model.modules())
