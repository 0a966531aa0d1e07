"""Wrong use: a clear error that names the argument, and no trace left on the model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import mlp
from torch import nn

from torchbp import BlameTracker, attribute


def hooks(model: nn.Module) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
        for m in model.modules()
    )


ATTRIBUTE = {
    "model": (dict(model=F.relu), TypeError, "model: expected a torch.nn.Module, got function"),
    "method": (dict(method="tailor"), ValueError, "unknown name 'tailor'; did you mean 'taylor'"),
    "layer": (dict(layers=["11"]), ValueError, "layers: unknown name '11'; did you mean '1'"),
    "shape": (dict(targets=torch.zeros(3).long()), ValueError, r"shape \(9,\), got \(3,\)"),
    "range": (dict(targets=torch.full((9,), 7)), ValueError, r"classes in \[0, 4\), got 7"),
    "inputs": (dict(inputs=[1.0]), TypeError, "inputs: expected a tensor"),
    "empty": (dict(inputs=torch.zeros(0, 6)), ValueError, "the batch is empty"),
    "steps": (dict(n_steps=0), ValueError, "n_steps: expected an integer >= 1, got 0"),
    "loss": (dict(loss_fn=3), TypeError, "loss_fn: expected a callable"),
    "baseline": (dict(method="secant", baseline=torch.zeros(5)), ValueError,
                 r"baseline: expected a shape that expands to the input's \(9, 6\), got \(5,\)"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), ATTRIBUTE.values(), ids=ATTRIBUTE.keys())
def test_attribute(change, error, message):
    model, x, y = mlp()
    given = dict(model=model, inputs=x, targets=y, loss_fn=F.cross_entropy, method="taylor")
    with pytest.raises(error, match=message):
        attribute(**(given | change))
    assert hooks(model) == 0


def test_a_model_without_layers():
    class Bare(nn.Module):
        def forward(self, x):
            return x * 2

    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flat, self.scale = nn.Flatten(), nn.Parameter(torch.ones(1))

        def forward(self, x):
            return self.flat(x) * self.scale

    x, y = torch.randn(3, 4), torch.zeros(3).long()
    with pytest.raises(ValueError, match="no layer to blame"):
        attribute(Functional(), x, y, F.cross_entropy, "taylor")
    for model in (Bare(), Functional()):
        with BlameTracker(model) as tracker:
            loss = F.cross_entropy(model(x.requires_grad_()), y)
            loss.backward()
            with pytest.raises(ValueError, match="no layer to blame"):
                tracker.step(loss, targets=y)
        assert hooks(model) == 0


def test_a_layer_that_did_not_run():
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "idle": nn.Linear(3, 2)})
    model.forward = model["used"].forward
    with pytest.raises(ValueError, match="'idle' did not run"):
        attribute(model, torch.randn(4, 3), torch.zeros(4).long(), F.cross_entropy, "taylor",
                  layers=["idle"])  # fmt: skip


def test_secant_names_a_function_without_rule():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x):
            return torch.digamma(self.fc(x))

    with pytest.raises(
        NotImplementedError, match=r"no rule for torch.*digamma, called in .*forward"
    ):
        attribute(Odd(), torch.randn(4, 3), torch.zeros(4).long(), F.cross_entropy, "secant")


def test_link_refuses_token_losses():
    model = nn.Conv1d(2, 3, 1)
    x, y = torch.randn(4, 2, 5), torch.randint(3, (4, 5))
    with pytest.raises(ValueError, match="'link' needs one loss term per sample"):
        attribute(model, x, y, F.cross_entropy, "link")
    with BlameTracker(model, method="link") as tracker:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        with pytest.raises(ValueError, match="'link' needs one loss term per sample"):
            tracker.step(loss, targets=y)


def test_nan_is_named_by_layer():
    model, x, y = mlp()
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="layer '3': its activation holds NaN"):
        attribute(model, x, y, F.cross_entropy, "taylor")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(method="tailor"), ValueError, "did you mean 'taylor'"),
        (dict(method="secant"), ValueError, "'secant' needs more than the training backward"),
        (dict(layers=["9"]), ValueError, "layers: unknown name '9'"),
        (dict(every=0), ValueError, "every: expected an integer >= 1, got 0"),
        (dict(log_every=-1), ValueError, "log_every: expected an integer >= 1, got -1"),
    ],
)
def test_tracker_arguments(options, error, message):
    model, _, _ = mlp()
    with pytest.raises(error, match=message):
        BlameTracker(model, **options)
    with pytest.raises(TypeError, match="model"):
        BlameTracker(model.state_dict())


STEPS = {
    "detached": (lambda loss, y: (loss.detach(), y), ValueError, "loss: it does not require grad"),
    "number": (lambda loss, y: (loss.item(), y), TypeError, "loss: expected a scalar tensor"),
    "vector": (lambda loss, y: (loss.expand(2), y), ValueError, r"loss: .* got shape \(2,\)"),
    "shape": (lambda loss, y: (loss, y[:3]), ValueError, r"targets: expected shape \(9,\)"),
    "range": (lambda loss, y: (loss, y + 4), ValueError, r"targets: expected classes in \[0, 4\)"),
    "other": (
        lambda loss, y: (loss, (y + 1) % 4),
        ValueError,
        "error signal at the model's output",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), STEPS.values(), ids=STEPS.keys())
def test_step_arguments(change, error, message):
    model, x, y = mlp()
    with BlameTracker(model) as tracker:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        given = change(loss, y)
        with pytest.raises(error, match=message):
            tracker.step(given[0], targets=given[1])
        loss = F.cross_entropy(model(x), y)  # and the tracker still works
        loss.backward()
        tracker.step(loss, targets=y)
    assert tracker.report().frame.samples == len(x)


@pytest.mark.parametrize("samples", [[1, 2], torch.rand(9), [-1] * 9], ids=["n", "float", "minus"])
def test_sample_ids(samples):
    model, x, y = mlp()
    with BlameTracker(model) as tracker:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        with pytest.raises(ValueError, match="samples: "):
            tracker.step(loss, targets=y, samples=samples)


def test_step_out_of_order():
    model, x, y = mlp()
    tracker = BlameTracker(model)
    with pytest.raises(RuntimeError, match="not active"):
        tracker.step(torch.ones(1, requires_grad=True), targets=y)
    with pytest.raises(RuntimeError, match="no step was tracked"):
        tracker.report()
    with tracker:
        with pytest.raises(RuntimeError, match="the model was not called"):
            tracker.step(torch.ones(1, requires_grad=True), targets=y)
        loss = F.cross_entropy(model(x), y)
        with pytest.raises(RuntimeError, match=r"call loss\.backward\(\) first"):
            tracker.step(loss, targets=y)
        for _ in range(2):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
        with pytest.raises(RuntimeError, match="2 backward passes"):
            tracker.step(loss, targets=y)
        with pytest.raises(RuntimeError, match="already entered"):
            tracker.__enter__()


def test_nan_is_reported_by_layer_and_step_and_training_goes_on():
    model, x, y = mlp()
    broken = x.clone()
    with BlameTracker(model) as tracker:
        for step in range(4):
            broken[0, 0] = float("nan") if step == 2 else 0.5
            loss = F.cross_entropy(model(broken), y)
            loss.backward()
            if step == 2:
                with pytest.warns(RuntimeWarning) as caught:
                    tracker.step(loss, targets=y)
                texts = [str(w.message) for w in caught]
                assert "layer '1', step 2: NaN or infinity in its activation" in texts[0]
                assert "layer '3', step 2" in texts[1] and "step 2: the loss is NaN" in texts[2]
            else:
                tracker.step(loss, targets=y)
    report = tracker.report()
    assert report.frame.samples == 3 * len(x)
    assert torch.isfinite(report.per_unit("1")).all()


def test_an_infinite_error_signal_spares_the_other_layers():
    model, x, y = mlp()
    factors = iter([1.0, 1e200])

    def amplify(module, args, output):
        factor = next(factors)
        output.register_hook(lambda error: error * factor * factor)

    model[1].register_forward_hook(amplify)  # before the tracker's hook, so that it sees the result
    with BlameTracker(model, method="taylor") as tracker:
        for step in range(2):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            if step == 1:
                with pytest.warns(RuntimeWarning, match="layer '1', step 1: .*error signal"):
                    tracker.step(loss, targets=y)
                assert tracker.frame.nonfinite == ("1",) and [*tracker.frame.layers] == ["3"]
            else:
                tracker.step(loss, targets=y)
    report = tracker.report()
    assert report.frame.samples == 2 * len(x)
    assert sorted(report.layer_names()) == ["1", "3"]


def test_an_exception_in_the_block_leaves_no_hook():
    class Writer:
        closed = False

        def __getattr__(self, name):
            return lambda *a, **k: None

        def close(self):
            self.closed = True

    model, x, y = mlp()
    writer = Writer()
    with pytest.raises(KeyError, match="boom"), BlameTracker(model, writer=writer) as tracker:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        tracker.step(loss, targets=y)
        model(x)
        raise KeyError("boom")
    assert hooks(model) == 0 and not writer.closed
    assert tracker.report().frame.samples == len(x)


class Positions(nn.Module):
    """Adds a learned table that is the same for every sample."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head((x + self.table(torch.arange(5))).mean(1))


def test_a_layer_whose_output_does_not_run_over_samples_is_left_out_or_named():
    model, x, y = Positions(), torch.randn(2, 5, 4), torch.randint(3, (2,))
    blame = attribute(model, x, y, F.cross_entropy, "secant", layers="all")
    assert [*blame] == ["input", "head"]
    with pytest.raises(ValueError, match=r"'table' returned \(5, 4\), whose first dimension"):
        attribute(model, x, y, F.cross_entropy, "taylor", layers=["table"])
