"""The scripts people run: they end well, say who is to blame, and fail clearly."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[2]


def run(script: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "experiments" / script), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=900)


def test_digits_names_the_culprits_and_fills_tensorboard(tmp_path):
    done = run("digits.py", "--plant-faults", "--epochs", "6", "--models", "mlp",
               "--logdir", str(tmp_path))  # fmt: skip
    assert done.returncode == 0, done.stderr
    for part in ("accuracy", "top blame (link: removal)", "worst confusion", "most suspicious",
                 "conservation", "tensorboard --logdir"):  # fmt: skip
        assert part in done.stdout
    hits, planted = map(int, re.search(r"(\d+) are among the (\d+) most", done.stdout).groups())
    assert planted == 120 and hits > 90
    assert len(re.findall(r"found \d of 5", done.stdout)) == 3
    (folder,) = tmp_path.iterdir()
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = events.Tags()
    assert {"blame/loss", "blame/total/1", "blame/total/3"} <= {*tags["scalars"]}
    assert {"blame/heatmap/1", "blame/heatmap/3"} <= {*tags["images"]}
    assert {"blame/units/1", "blame/units/3"} <= {*tags["distributions"]}
    assert any(tag.startswith("blame/top") for tag in tags["tensors"])
    steps = [e.step for e in events.Scalars("blame/loss")]
    assert steps == [*range(0, 114, 10), 113]


def test_a_log_directory_that_cannot_be_written_is_named(tmp_path):
    file = tmp_path / "file"
    file.write_text("in the way")
    done = run("digits.py", "--epochs", "1", "--models", "mlp", "--logdir", str(file / "runs"))
    assert done.returncode == 2
    assert "cannot be written" in done.stderr and "Traceback" not in done.stderr


def test_a_loss_jump_is_traced_to_its_step_layer_and_unit():
    done = run("loss_jump.py", "--steps", "16", "--step", "9")
    assert done.returncode == 0, done.stderr
    table = done.stdout[done.stdout.index("planted: step 9, layer 2, unit 5") :]
    rows = re.findall(r"^(learning rate|one unit) +(\w+) +(\d+) +(\w+) +(\d+)", table, re.MULTILINE)
    assert [row[:2] for row in rows] == [
        (fault, rule) for fault in ("learning rate", "one unit") for rule in ("simpson", "secant")
    ]
    assert {row[2:4] for row in rows} == {("9", "2")}
    assert {row[4] for row in rows if row[0] == "one unit"} == {"5"}
    done = run("loss_jump.py", "--step", "60")
    assert done.returncode == 2 and "--step: expected 0 to 59, got 60" in done.stderr


@pytest.mark.slow
def test_faithfulness_reaches_what_the_docs_say():
    done = run("faithfulness.py", "--quick", "--seeds", "1")
    assert done.returncode == 0, done.stderr
    pattern = r"^mlp +(\S.*?) +(?:torchbp|captum) +\S+ +(\S+) +\S+ +(\S+) +(\S+) +(\S+)$"
    rows = {row[0]: [*map(float, row[1:])] for row in re.findall(pattern, done.stdout, re.M)}
    ablation = {method: row[0] for method, row in rows.items()}
    assert ablation["link"] >= 0.97 and ablation["logits"] >= 0.995
    assert ablation["taylor"] == ablation["LayerGradientXActivation"] < ablation["link"]
    assert rows["secant, layer off, 8 segments"][1] >= 0.85  # with Shapley values
    for method in ("link", "logits", "curvature, 4 draws"):
        assert max(map(abs, rows[method][2:])) < 0.4  # weights anew, labels permuted


@pytest.mark.slow
def test_wrong_labels_are_found():
    done = run("mislabelled.py")
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^(?:mlp|cnn) +\d +([\d.]+)", done.stdout, re.MULTILINE)
    assert len(rows) == 6 and min(map(float, rows)) >= 0.97
