from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from models import MODELS, cnn, mlp, residual
from torch import nn

from torchbp import BlameTracker, attribute, convert, kernels


def track(model, x, y, method="taylor", steps=3, scale=1.0, loss_fn=F.cross_entropy, **options):
    """Steps without learning, so that every step has the blame of `attribute`, times `steps`."""
    with BlameTracker(model, method=method, **options) as tracker:
        for _ in range(steps):
            loss = loss_fn(model(x), y) * scale
            loss.backward()
            tracker.step(loss, targets=y, samples=range(len(x)))
    return tracker


@pytest.mark.parametrize("method", ["gradient", "taylor", "link"])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("converted", [False, True], ids=["plain", "converted"])
def test_live_blame_equals_blame_after_the_fact(make, method, converted):
    model, x, y = make()
    blame = attribute(model, x, y, F.cross_entropy, method)
    if converted:
        convert(model)
    report = track(model, x, y, method).report()
    assert [*report.layer_names()] == [*blame]
    for name in blame:
        torch.testing.assert_close(report.per_unit(name), 3 * blame.per_unit(name))
        torch.testing.assert_close(report.per_class(name), 3 * blame.per_class(name))
        torch.testing.assert_close(report.per_sample(name), 3 * blame.per_sample(name))
        layer = report.frame.layers[name]
        torch.testing.assert_close(layer.absolute, 3 * blame[name].abs().sum(0))
        torch.testing.assert_close(layer.square, 3 * blame[name].square().sum(0))


@pytest.mark.parametrize("scale", [1 / 8, 65536.0], ids=["accumulation", "amp"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions_and_scales_are_undone(scale, reduction):
    model, x, y = mlp()
    expected = attribute(model, x, y, F.cross_entropy, "link")

    def loss_fn(z, y):
        return F.cross_entropy(z, y, reduction=reduction)

    report = track(model, x, y, "link", steps=1, scale=scale, loss_fn=loss_fn).report()
    for name in expected:
        torch.testing.assert_close(report.per_unit(name), expected.per_unit(name))


@pytest.mark.parametrize(
    "loss_fn",
    [
        F.mse_loss,
        F.binary_cross_entropy_with_logits,
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)),
        nn.CrossEntropyLoss(label_smoothing=0.2),
        nn.CrossEntropyLoss(ignore_index=1),
    ],
    ids=["mse", "bce", "weights", "smoothing", "ignore"],
)
def test_other_losses(loss_fn):
    model, x, y = mlp()
    known = loss_fn
    if not isinstance(loss_fn, nn.CrossEntropyLoss):
        y, known = torch.randint(2, (9, 4)).double(), None  # recognised without being told
    expected = attribute(model, x, y, loss_fn, "taylor")
    with BlameTracker(model, method="taylor", loss_fn=known) as tracker:
        loss = loss_fn(model(x), y)
        loss.backward()
        tracker.step(loss, targets=y)
    for name in expected:
        torch.testing.assert_close(tracker.report().per_unit(name), expected.per_unit(name))


def test_link_stays_first_order_where_batch_norm_couples_the_samples():
    model, x, y = cnn()
    model.train()
    model[8].eval()  # no dropout: all methods see one network
    with pytest.warns(UserWarning, match="first order") as caught:
        report = track(model, x, y, "link", steps=1, layers="all").report()
    assert "behind '0': method 'link'" in str(caught[0].message)
    taylor, link = (
        attribute(model, x, y, F.cross_entropy, m, layers="all") for m in ("taylor", "link")
    )
    for name in report.layer_names():
        expected = taylor if name == "0" else link
        torch.testing.assert_close(report.per_unit(name), expected.per_unit(name))
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        track(model, x, y, "link", steps=1)


def test_link_with_class_weights():
    model, x, y = mlp()
    loss_fn = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64))
    expected = attribute(model, x, y, loss_fn, "link")
    for told in (loss_fn, None):
        with BlameTracker(model, loss_fn=told) as tracker:
            loss = loss_fn(model(x), y)
            loss.backward()
            if told is None:
                with pytest.raises(ValueError, match="error signal at the model's output"):
                    tracker.step(loss, targets=y)
                continue
            tracker.step(loss, targets=y)
        for name in expected:
            torch.testing.assert_close(tracker.report().per_unit(name), expected.per_unit(name))


def test_frame_statistics_are_those_of_the_activations():
    model, x, y = mlp()
    tracker = track(model, x, y, steps=1)
    a = model[1](model[0](x)).detach()
    z = a.clone().requires_grad_()
    loss = F.cross_entropy(model[2:](z), y, reduction="sum")
    (delta,) = torch.autograd.grad(loss, z)
    layer = tracker.frame.layers["1"]
    torch.testing.assert_close(layer.zero, (a == 0).double().mean(0))
    torch.testing.assert_close(layer.activation_rms, a.square().mean(0).sqrt())
    torch.testing.assert_close(layer.error_rms, delta.square().mean(0).sqrt())
    torch.testing.assert_close(tracker.frame.loss, float(loss) / len(x))


def test_frames_between_logs_add_up_and_do_not_disturb_each_other():
    class Frames:
        def __init__(self) -> None:
            self.seen = []

        def log(self, frame):
            self.seen.append(frame)

        def close(self):
            pass

    model, x, y = mlp()
    tracker, frames = BlameTracker(model, method="taylor", log_every=3), Frames()
    tracker._logger = frames
    with tracker:
        for _ in range(5):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            tracker.step(loss, targets=y)
    blame = attribute(model, x, y, F.cross_entropy, "taylor")
    assert [f.step for f in frames.seen] == [0, 3, 4]
    for frame, steps in zip(frames.seen, (1, 3, 1), strict=True):
        assert frame.samples == steps * len(x)
        layer = frame.layers["1"]
        torch.testing.assert_close(layer.blame, steps * blame.per_unit("1"))
        torch.testing.assert_close(layer.per_class, steps * blame.per_class("1"))


def test_every_tracks_one_step_in_that_many():
    model, x, y = mlp()
    report = track(model, x, y, steps=7, every=3).report()
    assert report.frame.samples == 3 * len(x)


def test_batches_of_several_sizes():
    model, x, y = mlp()
    parts = [slice(0, len(x)), slice(0, 3), slice(1, len(x)), slice(0, len(x))]
    with BlameTracker(model) as tracker:
        for part in parts:
            loss = F.cross_entropy(model(x[part]), y[part])
            loss.backward()
            tracker.step(loss, targets=y[part])
    for name, got in tracker.report().frame.layers.items():
        steps = [attribute(model, x[p], y[p], F.cross_entropy, "link") for p in parts]
        torch.testing.assert_close(got.blame, sum(s.per_unit(name) for s in steps).double())


def test_a_late_backward_of_an_earlier_step_changes_nothing():
    model, x, y = mlp()
    expected = attribute(model, x, y, F.cross_entropy, "link")
    with BlameTracker(model) as tracker:
        late = F.cross_entropy(3 * model(x.flip(0)), y)
        with pytest.raises(RuntimeError, match="no error signal"):
            tracker.step(late, targets=y)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        late.backward()
        tracker.step(loss, targets=y)
    for name in expected:
        torch.testing.assert_close(tracker.report().per_unit(name), expected.per_unit(name))


def test_results_are_written_where_those_of_the_step_before_were(monkeypatch):
    addresses: list[list[int]] = []
    into = kernels.blame_reduce_into

    def noted(*args):
        addresses[-1] += [t.data_ptr() for t in args[-2:]]
        into(*args)

    monkeypatch.setattr(kernels, "blame_reduce_into", noted)
    model, x, y = mlp()
    with BlameTracker(model) as tracker:
        for _ in range(3):
            addresses.append([])
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            tracker.step(loss, targets=y)
    assert addresses[2] == addresses[1] and len(set(addresses[2])) == len(addresses[2])


def test_validation_passes_are_not_tracked():
    model, x, y = mlp()
    with BlameTracker(model, method="taylor") as tracker:
        for _ in range(2):
            with torch.no_grad():
                model(x)
            model(2 * x)  # with gradients, but never followed by a backward
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            tracker.step(loss, targets=y)
    expected = attribute(model, x, y, F.cross_entropy, "taylor")
    for name in expected:
        torch.testing.assert_close(tracker.report().per_unit(name), 2 * expected.per_unit(name))


def test_training_is_the_same_with_the_tracker_on():
    def run(tracked: bool) -> list[torch.Tensor]:
        torch.manual_seed(1)
        model, x, y = cnn()
        model.train()
        optimizer = torch.optim.Adam(model.parameters())
        tracker = BlameTracker(model)
        if tracked:
            tracker.__enter__()
        for _ in range(5):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            if tracked:
                tracker.step(loss, targets=y)
            optimizer.step()
            optimizer.zero_grad()
        if tracked:
            tracker.__exit__(None, None, None)
        return [*model.state_dict().values(), torch.get_rng_state()]

    for plain, tracked in zip(run(False), run(True), strict=True):
        assert torch.equal(plain, tracked)


def test_in_place_layers_are_copied_when_announced_and_reported_when_not():
    model, x, y = mlp()
    expected = attribute(model, x, y, F.cross_entropy, "taylor", layers=["0", "1"])
    model[1].inplace = True
    report = track(model, x, y, steps=1, layers=["0", "1"]).report()
    torch.testing.assert_close(report.per_unit("0"), expected.per_unit("0"))

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, x):
            return self.net[2:](torch.relu_(self.net[0](x)))

    model[1].inplace = False
    hidden = Hidden()
    with pytest.warns(UserWarning, match=r"'net\.0' was overwritten in place"):
        report = track(hidden, x, y, steps=3, layers=["net.0", "net.2"]).report()
    torch.testing.assert_close(report.per_unit("net.0"), 2 * expected.per_unit("0"))


def test_samples_and_suspects():
    model, x, y = mlp()
    with BlameTracker(model, class_names="abcd") as tracker:
        for ids in ([0, 1, 2], [3, 4, 2]):
            loss = F.cross_entropy(model(x[ids]), y[ids])
            loss.backward()
            tracker.step(loss, targets=y[ids], samples=torch.tensor(ids) + 5)
    report = tracker.report()
    losses = F.cross_entropy(model(x), y, reduction="none").detach()
    assert report.suspicion[:5].isnan().all()
    torch.testing.assert_close(report.suspicion[5:], losses[:5])
    first = next(iter(report.suspects(2)))
    assert first[0] == int(losses[:5].argmax()) + 5
    assert first[1] == "abcd"[int(y[first[0] - 5])]


def test_state_survives_saving_and_loading(tmp_path):
    model, x, y = mlp()
    whole = track(model, x, y, steps=4)
    half = track(model, x, y, steps=2)
    torch.save(half.state_dict(), tmp_path / "state.pt")
    resumed = BlameTracker(model, method="taylor")
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    with resumed:
        for _ in range(2):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            resumed.step(loss, targets=y, samples=range(len(x)))
    assert resumed.steps == 4
    for name in whole.report().layer_names():
        torch.testing.assert_close(resumed.report().per_unit(name), whole.report().per_unit(name))
    torch.testing.assert_close(resumed.report().suspicion, whole.report().suspicion)
    with pytest.raises(ValueError, match="method"):
        BlameTracker(model, method="link").load_state_dict(half.state_dict())


def test_a_model_may_be_tracked_again():
    model, x, y = residual()
    tracker = BlameTracker(model, method="taylor")
    for _ in range(2):
        with tracker:
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            tracker.step(loss, targets=y)
    expected = attribute(model, x, y, F.cross_entropy, "taylor")
    for name in expected:
        torch.testing.assert_close(tracker.report().per_unit(name), 2 * expected.per_unit(name))


def test_reduced_precision_training():
    model, x, y = mlp()
    expected = attribute(model, x, y, F.cross_entropy, "taylor")
    model = copy.deepcopy(model).bfloat16()
    report = track(model, x.bfloat16(), y, steps=1).report()
    for name in expected:
        found, exact = report.per_unit(name), expected.per_unit(name)
        assert (found - exact).abs().max() < 0.05 * exact.abs().max()


def test_autocast_training():
    model, x, y = mlp()
    expected = attribute(model, x, y, F.cross_entropy, "taylor")
    model = copy.deepcopy(model).float()
    with BlameTracker(model, method="taylor") as tracker:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(x.float()), y)
        (1024 * loss).backward()
        tracker.step(loss, targets=y)
    for name in expected:
        found, exact = tracker.report().per_unit(name), expected.per_unit(name)
        assert (found - exact).abs().max() < 0.05 * exact.abs().max()


def test_layers_of_two_dtypes():
    class Wide(nn.Linear):
        def forward(self, x):
            return super().forward(x.double())

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 6), nn.ReLU(), Wide(6, 7).double(), nn.Tanh(), Wide(7, 4).double()
    )
    x, y = torch.randn(9, 5), torch.randint(4, (9,))
    expected = attribute(model, x, y, F.cross_entropy, "link")
    report = track(model, x, y, "link", steps=1).report()
    for name in expected:
        torch.testing.assert_close(
            report.per_unit(name), expected.per_unit(name), check_dtype=False
        )


def test_earlier_reports_and_states_do_not_change_when_training_goes_on():
    model, x, y = mlp()
    with BlameTracker(model, method="taylor") as tracker:
        kept = []
        for _ in range(3):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            tracker.step(loss, targets=y, samples=range(len(x)))
            kept.append((tracker.frame, tracker.report(), tracker.state_dict()))
    expected = attribute(model, x, y, F.cross_entropy, "taylor")
    for steps, (frame, report, state) in enumerate(kept, 1):
        blame = expected.per_unit("1")
        torch.testing.assert_close(frame.layers["1"].blame, blame)
        torch.testing.assert_close(report.per_unit("1"), steps * blame)
        torch.testing.assert_close(state["sums"][0]["rows"][0, : len(blame)], steps * blame)
        resumed = BlameTracker(model, method="taylor")
        resumed.load_state_dict(state)
        torch.testing.assert_close(resumed.report().per_unit("1"), steps * blame)


def test_nothing_warns_in_ordinary_training():
    model, x, y = mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        track(model, x, y, "link", steps=3)
