"""Wrong use: a clear error that names the argument, and no trace left on the model."""

from __future__ import annotations

import inspect

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
    "twice": (dict(layers=["1", "3", "1"]), ValueError, "layers: '1' is given twice"),
    "none": (dict(layers=[]), ValueError, "layers: expected at least one name or module"),
    "kind": (dict(layers=[3]), TypeError, "layers: expected names or modules, got int"),
    "number": (dict(loss_fn=lambda z, y: 3.0), TypeError, "loss_fn: expected a tensor in return"),
    "terms": (dict(loss_fn=lambda z, y: z.flatten()), ValueError,
              r"one loss per sample of inputs \[\(9, 6\)\].*; got 36 losses"),
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

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.odd = Odd()

        def forward(self, x):
            return self.odd(x)

    line = inspect.getsourcelines(Odd.forward)[1] + 1
    for model, place in ((Odd(), "the model's own forward"), (Holder(), "module 'odd'")):
        with pytest.raises(NotImplementedError) as caught:
            attribute(model, torch.randn(4, 3), torch.zeros(4).long(), F.cross_entropy, "secant")
        said = str(caught.value)
        assert f"digamma, called in {place} (test_bad_input.py, line {line})" in said


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


def half(scale: list[float]) -> nn.Sequential:
    """Float16 layers, each multiplying by about one of ``scale``."""
    layers = [nn.Linear(4, 4, bias=False) for _ in scale]
    for layer, s in zip(layers, scale, strict=True):
        layer.weight.data = s * torch.eye(4)
    return nn.Sequential(*layers).half()


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        ([1, 300, 300, 300, 1e-3], "layer '2': its activation holds NaN or infinity; float16 ends"),
        ([1, 1, 300, 300], "loss: it holds NaN .* finite; float16 ends at 65504"),
        ([1e-4, 1e-4, 1e-2, 300, 300, 100], "layer '2': its blame holds NaN .* float16 ends"),
    ],
    ids=["activation", "loss", "error signal"],
)
def test_float16_overflow_is_named_by_where_it_begins(scale, message):
    model, x, y = half(scale), torch.ones(3, 4).half() + torch.arange(4).half(), torch.zeros(3)
    layers = [str(i) for i in range(len(scale) - 1)]
    with pytest.raises(FloatingPointError, match=message):
        attribute(model, x, y.long(), F.cross_entropy, "taylor", layers=layers)


@pytest.mark.parametrize("method", ["taylor", "curvature"])
def test_sums_of_halves_do_not_overflow(method):
    model = nn.Sequential(nn.Conv1d(1, 2, 1, bias=False), nn.Flatten(), nn.Linear(8000, 1)).half()
    model[0].weight.data = torch.tensor([16.0, -14.0]).half().view(2, 1, 1)
    model[2].weight.data.fill_(1 / 128)
    # The units add 500 and -438 to the output, which is 200 off: first-order blame is 200 000.
    x, y = torch.ones(3, 1, 4000).half(), torch.full((3, 1), -138.0).half()
    blame = attribute(model, x, y, F.mse_loss, method, layers=["0"])
    wide = attribute(model.float(), x.float(), y.float(), F.mse_loss, method, layers=["0"])
    torch.testing.assert_close(blame["0"], wide["0"], rtol=1e-2, atol=0)


def contrastive(z, y):
    z = F.normalize(z, dim=1)
    return F.cross_entropy(z @ z.T, torch.arange(len(z)), reduction="none")


@pytest.mark.parametrize("method", ["taylor", "ablation", "secant"])
@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda z, y: contrastive(z, y).mean(), "neither a sum nor a mean over samples"),
        (contrastive, "couples the samples of a batch"),
        (lambda z, y: (z - z.mean(0)).square(), "couples the samples of a batch"),
        (lambda z, y: F.cross_entropy(z, y, reduction="none").softmax(0), "couples the samples"),
    ],
    ids=["scalar", "one per sample", "centred", "weighted by the batch"],
)
def test_a_loss_that_couples_samples_is_named(loss_fn, message, method):
    model, x, y = mlp()
    with pytest.raises(ValueError, match=message):
        attribute(model, x, y, loss_fn, method)


def test_losses_that_cannot_be_cut_into_samples_are_taken_as_they_are():
    model, x, y = mlp()
    weight = torch.rand(9, dtype=torch.float64)

    def weighted(z, y):
        return weight * F.cross_entropy(z, y, reduction="none")

    found = attribute(model, x, y, weighted, "taylor", layers=["1"])
    plain = attribute(model, x, y, F.cross_entropy, "taylor", layers=["1"])
    torch.testing.assert_close(found["1"], weight[:, None] * plain["1"])


def test_batch_norm_in_training_mode_is_called_a_share():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    x, y = torch.randn(5, 4), torch.randint(3, (5,))
    with pytest.warns(UserWarning, match=r"1 \(BatchNorm1d\).* its share in the blame of this"):
        attribute(model, x, y, F.cross_entropy, "taylor")


RIVALS = {
    "type": (dict(rivals=1.0), TypeError, r"rivals: expected an integer or None, got 1\.0"),
    "many": (dict(rivals=4), ValueError, "rivals: expected 1 to 3 for an output of 4 classes"),
    "none": (dict(rivals=0), ValueError, "rivals: expected 1 to 3 .* got 0"),
    "targets": (dict(rivals=1, targets=torch.rand(9, 4).double()), ValueError,
                "rivals: expected targets that are class indices"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), RIVALS.values(), ids=RIVALS.keys())
def test_rivals(change, error, message):
    model, x, y = mlp()
    given = {"targets": y, "loss_fn": F.cross_entropy} | change
    with pytest.raises(error, match=message):
        attribute(model, x, method="logits", **given)


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
