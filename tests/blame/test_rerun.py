"""Running the rest of a network again equals running a network that was changed by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import MODELS, residual
from torch import nn

from torchbp import attribute
from torchbp.blame.definitions import LossHead
from torchbp.blame.problem import Point, Problem
from torchbp.blame.rerun import rerun
from torchbp.blame.tape import SecantTape


def problem_of(model, inputs, targets, loss_fn=F.cross_entropy, layers="all") -> Problem:
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    return Problem(model, args, kwargs, targets, LossHead.of(loss_fn), layers)


def replaced_by_hand(model, module, wanted, new, *args, **kwargs):
    """The output with one call of one module replaced by a hook of our own."""
    seen = 0

    def hook(module, inputs, output):
        nonlocal seen
        seen += 1
        if seen != wanted:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = module.register_forward_hook(hook)
    output = model(*args, **kwargs)
    handle.remove()
    return output


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_every_layer_can_be_replaced_in_batches(make):
    model, x, y = make()
    problem = problem_of(model, (x,), y)
    with problem.session():
        run = problem.run()
        for name, call in run.calls.items():
            others = [torch.randn_like(call.output) for _ in range(3)]
            found = rerun(problem, name, call)(torch.cat(others), 3)
            for k, new in enumerate(others):
                if name == "input":
                    expected = model(new)
                else:
                    wanted = int(name.partition("#")[2] or 1)
                    expected = replaced_by_hand(model, call.module, wanted, new, x)
                torch.testing.assert_close(found[k * len(x) : (k + 1) * len(x)], expected)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_a_sequential_runs_only_what_follows(make):
    model, x, y = make()
    ran = []
    for name, module in model.named_children():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    problem = problem_of(model, (x,), y)
    with problem.session():
        calls = problem.run().calls
        name = [*calls][2]
        ran.clear()
        rerun(problem, name, calls[name])(calls[name].output, 1)
    in_order = [n for n, _ in model.named_children()]
    if isinstance(model, nn.Sequential):
        assert ran == in_order[in_order.index(name) + 1 :]
    else:
        assert ran[0] == "inner"


def test_hooks_on_a_container_are_not_skipped():
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.Tanh()), nn.Linear(4, 2)).double()
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.zeros(5).long()
    problem = problem_of(model, (x,), y)
    with problem.session():
        call = problem.run().calls["0.0"]
        found = rerun(problem, "0.0", call)(call.output, 1)
    torch.testing.assert_close(found, model(x))


def test_gradients_reach_the_activation():
    model, x, y = residual()
    problem = problem_of(model, (x,), y)
    with problem.session():
        call = problem.run().calls["inner"]
        new = torch.randn_like(call.output).requires_grad_()
        rest = rerun(problem, "inner", call)
        (found,) = torch.autograd.grad(rest(new, 1).square().sum(), new)
    replaced = replaced_by_hand(model, model.inner, 1, new, x)
    torch.testing.assert_close(found, torch.autograd.grad(replaced.square().sum(), new)[0])


class Many(nn.Module):
    """Keyword inputs, one of them no sample's, integers, and a layer that returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.lstm = nn.LSTM(4, 3, batch_first=True)
        self.head = nn.Linear(3, 2)

    def forward(self, ids, scale, extra, flag=True):
        hidden, (last, _) = self.lstm(self.embed(ids) * scale + extra[:, None])
        return self.head(hidden.mean(1) + last[0])


def test_tuples_keyword_and_shared_inputs():
    model = Many().double()
    ids, y = torch.randint(7, (5, 6)), torch.randint(2, (5,))
    scale, extra = torch.rand(6, 1).double(), torch.randn(5, 4).double()
    given = dict(ids=ids, scale=scale, extra=extra, flag=False)
    problem = problem_of(model, given, y)
    with problem.session():
        calls = problem.run().calls
        assert "lstm" in calls and "input#2" in calls
        for name in ("embed", "lstm", "input#2"):
            new = torch.randn_like(calls[name].output)
            found = rerun(problem, name, calls[name])(torch.cat([calls[name].output, new]), 2)
            if name == "input#2":
                expected = model(**(given | dict(extra=new)))
            else:
                expected = replaced_by_hand(model, calls[name].module, 1, new, **given)
            torch.testing.assert_close(found, torch.cat([model(**given), expected]))


class BothOfATuple(nn.Module):
    def forward(self, found):
        hidden, (last, _) = found
        return hidden.mean(1) + last[0]


def sequentials():
    shared = nn.Linear(4, 4)
    yield nn.Sequential(shared, nn.Tanh(), shared, nn.Linear(4, 2)), torch.randn(5, 4), "0#2"
    lstm = nn.LSTM(4, 2, batch_first=True)
    yield nn.Sequential(lstm, BothOfATuple()), torch.randn(5, 3, 4), "0"


@pytest.mark.parametrize(("model", "x", "name"), sequentials(), ids=["reused", "tuple"])
def test_sequentials_that_are_no_chain_run_as_a_whole(model, x, name):
    model, x = model.double(), x.double()
    problem = problem_of(model, (x,), torch.zeros(5).long())
    with problem.session():
        call = problem.run().calls[name]
        new = torch.randn_like(call.output)
        found = rerun(problem, name, call)(torch.cat([new, call.output]), 2)
    expected = replaced_by_hand(model, call.module, int(name.partition("#")[2] or 1), new, x)
    torch.testing.assert_close(found, torch.cat([expected, model(x)]))


def test_another_state_and_another_input_can_be_used():
    model, x, y = MODELS["mlp"]()
    other, new = MODELS["mlp"]()[:2]
    problem = problem_of(model, (x,), y)
    with problem.session():
        calls = problem.run().calls
        for name in ("input", "1"):
            rest = rerun(problem, name, calls[name], Point((new,), state=other.state_dict()))
            found = rest(calls[name].output, 1)
            expected = other(x) if name == "input" else other[2:](calls[name].output)
            torch.testing.assert_close(found, expected)


def test_secants_pair_two_runs_of_the_rest():
    model, x, y = residual()
    problem, tape = problem_of(model, (x,), y), SecantTape()
    with problem.session():
        call = problem.run().calls["act"]
        rest = rerun(problem, "act", call)
        a0, a = (torch.randn_like(call.output).requires_grad_() for _ in range(2))
        outputs = []
        for value in (a0, a):
            tape.next_run([])
            with tape:
                outputs.append(rest(value, 1))
            tape.finish_run()
        (multiplier,) = torch.autograd.grad(outputs[1].sum(), a)
    change = (outputs[1] - outputs[0]).sum(1)
    torch.testing.assert_close((multiplier * (a - a0)).sum(1), change)


def test_in_place_models_leave_the_activation_and_the_inputs_alone():
    model = nn.Sequential(nn.ReLU(True), nn.Linear(4, 4), nn.ReLU(True), nn.Linear(4, 2)).double()
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.zeros(5).long()
    kept = x.clone()
    problem = problem_of(model, (x,), y)
    with problem.session():
        calls = problem.run().calls
        for name in ("input", "1"):
            new = torch.randn_like(calls[name].output)
            before = new.clone()
            rerun(problem, name, calls[name])(new, 1)
            torch.testing.assert_close(new, before, rtol=0, atol=0)
    assert torch.equal(x, kept)


def test_a_container_that_cannot_be_rebuilt_is_named():
    class Boxed(nn.Module):
        def forward(self, x):
            return {"value": x * 2}

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.boxed, self.head = Boxed(), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.boxed(x)["value"])

    problem = problem_of(Model(), (torch.randn(3, 4),), torch.zeros(3).long())
    with problem.session():
        call = problem.run().calls["boxed"]
        with pytest.raises(TypeError, match="layer 'boxed': its output stands in a dict"):
            rerun(problem, "boxed", call)(call.output, 1)


def test_a_layer_that_is_skipped_the_second_time_is_named():
    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.once, self.head, self.calls = nn.Linear(4, 4), nn.Linear(4, 2), 0

        def forward(self, x):
            self.calls += 1
            return self.head(self.once(x) if self.calls == 1 else x)

    problem = problem_of(Fickle(), (torch.randn(3, 4),), torch.zeros(3).long())
    with problem.session():
        call = problem.run().calls["once"]
        with pytest.raises(RuntimeError, match=r"layer 'once' was called .* control"):
            rerun(problem, "once", call)(call.output, 1)


class Gated(nn.Module):
    """Takes what does not run over samples first, or only by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x, state=None, mask=None, more=None):
        x = x if more is None else x + more["bias"][:, None]
        h = self.rnn(x, state)[0]
        return self.head((h if mask is None else mask @ h).sum(1).tanh())


def asserted(z, t):
    assert len(z) == 6
    return F.cross_entropy(z, t, reduction="none")


def awkward():
    """Inputs, targets and losses that cannot, or not simply, be held several times by one pass."""
    x, y = torch.randn(6, 6, 4).double(), torch.randint(3, (6,))
    weight, many = torch.rand(6).double(), [*F.one_hot(y, 3).double()]
    yield "state", dict(x=x, state=torch.randn(1, 6, 5).double()), y, F.cross_entropy
    yield "square mask", dict(x=x, mask=torch.rand(6, 6).double()), y, F.cross_entropy
    yield "nested", (x, None, None, {"bias": torch.randn(6, 4).double()}), y, F.cross_entropy
    yield "weights", (x,), y, lambda z, t: F.cross_entropy(z, t, reduction="none") * weight
    yield (
        "list", (x,), many,
        lambda z, t: torch.stack([(a - b).square().sum() for a, b in zip(z, t, strict=False)]),
    )  # fmt: skip
    yield "asserted", (x,), y, asserted
    yield "weighted", (x,), torch.stack(many), nn.BCEWithLogitsLoss(weight=weight[:, None])


@pytest.mark.parametrize(
    ("inputs", "targets", "loss_fn"), [c[1:] for c in awkward()], ids=[c[0] for c in awkward()]
)
def test_what_one_pass_cannot_hold_twice_is_run_once_each(inputs, targets, loss_fn):
    model = Gated().double()
    blame = attribute(model, inputs, targets, loss_fn, "ablation", ["rnn"])
    alone = attribute(model, inputs, targets, loss_fn, "ablation", ["rnn"], memory=1)
    torch.testing.assert_close(blame["rnn"], alone["rnn"])
    for method, options in (
        ("conductance", {"n_steps": 300}), ("layer_ig", {"n_steps": 30}),
        ("shapley", {"n_permutations": 2}),
    ):  # fmt: skip
        found = attribute(model, inputs, targets, loss_fn, method, ["rnn"], **options)
        assert max(found.residual.values(), default=0.0) < 0.05
    found = attribute(model, inputs, targets, loss_fn, "logits", ["head"])
    torch.testing.assert_close(
        found["head"], attribute(model, inputs, targets, loss_fn, "ablation", ["head"])["head"]
    )


class WritesItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.stem(x.mul_(2).sub_(0.5)).tanh())


class LeavesItsInput(WritesItsInput):
    def forward(self, x):
        return self.head(self.stem(x * 2 - 0.5).tanh())


@pytest.mark.parametrize(
    ("method", "baseline"), [("ablation", None), ("layer_ig", None), ("secant", "layer")]
)
def test_a_model_may_write_into_its_input(method, baseline):
    writes, leaves = WritesItsInput().double(), LeavesItsInput().double()
    leaves.load_state_dict(writes.state_dict())
    x, y = torch.randn(6, 4).double(), torch.randint(3, (6,))
    given = dict(layers=["input", "stem"], baseline=baseline)
    found, expected = (
        attribute(m, x, y, F.cross_entropy, method, **given) for m in (writes, leaves)
    )
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])
