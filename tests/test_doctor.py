from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys

import pytest
import torch

from torchbp import doctor, kernels


@pytest.fixture
def table() -> dict[str, tuple[str, str]]:
    return {name: (value, why_not) for name, value, why_not in doctor.rows()}


def test_versions(table):
    assert table["torch"][0] == torch.__version__
    assert table["python"][0] == platform.python_version()


def test_kernels_are_described_as_they_are(table):
    value, why_not = table["compiled kernels"]
    assert value.startswith("built with torch") == kernels.HAS_EXT
    assert bool(why_not) != kernels.HAS_EXT
    assert (table["CUDA kernels"][0] == "yes") == kernels.status()["cuda"]
    if kernels.HAS_EXT:
        assert table["instruction set"][0] == kernels.status()["isa"]


def test_missing_things_say_why(table, monkeypatch):
    monkeypatch.setattr(doctor, "OPTIONAL_PACKAGES", ("torch", "no_such_package"))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    found = {name: (value, why_not) for name, value, why_not in doctor.rows()[-3:]}
    assert found["torch"] == (importlib.metadata.version("torch"), "")
    assert found["no_such_package"] == ("none", "optional, not installed")
    assert found["C++ compiler"][0] == "none" and found["C++ compiler"][1]


def test_the_text_holds_every_row_in_columns():
    lines = doctor.doctor().splitlines()
    assert len(lines) == len(doctor.rows())
    starts = set()
    for line, (name, value, why_not) in zip(lines, doctor.rows(), strict=True):
        assert line.startswith(name) and line == line.rstrip()
        assert line.endswith(f"({why_not})" if why_not else value)
        starts.add(line.index(value, len(name)))
    assert len(starts) == 1


def test_the_reason_for_reference_kernels_is_given():
    run = subprocess.run(
        [sys.executable, "-c", "from torchbp.doctor import doctor; print(doctor())"],
        env={**os.environ, "TORCHBP_REFERENCE": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    (line,) = [text for text in run.stdout.splitlines() if text.startswith("compiled kernels")]
    assert "(TORCHBP_REFERENCE=1)" in line
