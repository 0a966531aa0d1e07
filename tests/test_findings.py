"""Findings: each rule on a frame made to trigger it, and on one next to its threshold."""

import pytest
import torch

from torchbp.blame.frame import Frame, LayerFrame
from torchbp.findings import findings


def layer(blame, zero=None, error_rms=1.0, per_class=None):
    blame = torch.as_tensor(blame, dtype=torch.float32)
    rms = torch.as_tensor(error_rms, dtype=torch.float32).expand_as(blame)
    return LayerFrame(
        blame=blame,
        absolute=blame.abs(),
        square=blame.square(),
        zero=torch.zeros_like(blame) if zero is None else torch.as_tensor(zero).float(),
        activation_rms=torch.ones_like(blame),
        error_rms=rms,
        per_class=None if per_class is None else torch.as_tensor(per_class).float(),
    )


def frame(step=7, samples=32, **layers):
    return Frame(step, "taylor", samples, 0.5, layers)


def test_a_healthy_frame_has_no_findings():
    spread = torch.linspace(-1, 1, 64)
    per_class = torch.stack([spread, -spread])
    assert findings(frame(fc1=layer(spread, per_class=per_class), fc2=layer([0.1, -0.1]))) == []


def test_dead_units_are_counted_per_layer():
    found = findings(frame(fc=layer([0.0, 0.0, 1.0, 1.0], zero=[1.0, 1.0, 0.999, 0.0])))
    assert [(f.severity, f.layer, f.unit, f.rule) for f in found] == [
        ("warning", "fc", None, "dead")
    ]
    assert found[0].text == "layer fc: 2 of 4 units (50 %) were zero for all 32 samples."


def test_a_single_dead_unit_is_named_and_changes_are_told():
    now = frame(step=20, fc=layer([0.0, 0.0, 1.0], zero=[0.0, 1.0, 0.0]))
    before = frame(step=10, fc=layer([0.0, 0.0, 1.0], zero=[0.0, 0.0, 0.0]))
    (found,) = findings(now, before)
    assert found.unit == 1
    assert found.text.endswith("32 samples; 1 more than at step 10; it is unit 1.")
    assert findings(before, now) == []


def test_fewer_dead_units_than_before():
    now = frame(step=20, fc=layer([0.0] * 4, zero=[1.0, 1.0, 0.0, 0.0]))
    before = frame(step=10, fc=layer([0.0] * 4, zero=[1.0, 1.0, 1.0, 0.0]))
    (found,) = findings(now, before)
    assert "1 fewer than at step 10" in found.text


@pytest.mark.parametrize(("large", "share"), [(60.0, "50 %"), (59.9, None)])
def test_concentrated_blame(large, share):
    # 4 of 64 units carry 4 * (large / 4) of large + 60.
    blame = torch.ones(64)
    blame[[5, 6]], blame[[40, 41]] = large / 4, -large / 4
    texts = [f.text for f in findings(frame(fc=layer(blame))) if f.rule == "concentrated"]
    expected = f"layer fc: 4 of 64 units carry {share} of the absolute blame."
    assert texts == ([expected] if share else [])


def test_class_culprit_uses_class_names():
    per_class = torch.full((3, 10), 0.1)
    per_class[1, 4] = 0.9
    per_class[2, 7] = -5.0
    bad = frame(fc=layer(torch.zeros(10), per_class=per_class))
    (found,) = findings(bad)
    assert (found.layer, found.unit, found.rule) == ("fc", 4, "class_culprit")
    assert "unit 4 raises the loss of class 1 most: +0.9 over 32 samples, 50 %" in found.text
    bad.class_names = ["cat", "dog", "owl"]
    (found,) = findings(bad)
    assert "class dog most" in found.text


def test_class_culprit_must_stand_out():
    per_class = torch.full((2, 10), 0.1)
    per_class[0, 3] = 0.5  # 36 %, under four times an equal share of ten units
    assert findings(frame(fc=layer(torch.zeros(10), per_class=per_class))) == []
    helpers = torch.full((2, 10), -1.0)
    assert findings(frame(fc=layer(torch.zeros(10), per_class=helpers))) == []


@pytest.mark.parametrize(
    ("scale", "rule"),
    [
        (0.9e-3, "vanishing"),
        (1.1e-3, None),
        (0.9e3, None),
        (1.1e3, "exploding"),
        (0.0, "vanishing"),
    ],
)
def test_error_signal_against_the_last_layer(scale, rule):
    found = findings(frame(a=layer([0.1, 0.1], error_rms=2 * scale), b=layer([0.1], error_rms=2.0)))
    assert [(f.layer, f.rule) for f in found] == ([("a", rule)] if rule else [])
    assert all("last layer, b" in f.text for f in found)


def test_nonfinite_layers_come_first():
    bad = frame(fc1=layer([0.0, 1.0], zero=[1.0, 0.0]))
    bad.nonfinite = ("fc2",)
    found = findings(bad)
    assert [(f.severity, f.layer) for f in found] == [("error", "fc2"), ("warning", "fc1")]
    assert "fc2" in found[0].text and "step 7" in found[0].text
    assert str(found[0]) == f"error: {found[0].text}"


def test_nan_and_empty_layers_do_not_break_the_rules():
    nan = float("nan")
    odd = layer([nan] * 64, error_rms=nan, per_class=[[nan] * 64])
    assert findings(frame(odd=odd, last=layer([0.1]))) == []
    assert findings(frame(empty=layer([]), zeros=layer(torch.zeros(64), error_rms=0.0))) == []
    assert findings(frame()) == []
