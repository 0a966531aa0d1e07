from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from torchbp.cli import main

MODULE = """
import torch

class Square(torch.autograd.Function):
    generate_vmap_rule = True
    factor = 2

    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @classmethod
    def example_inputs(cls):
        return [torch.tensor([[0.5, 2.0]])]

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad

class Wrong(Square):
    @staticmethod
    def backward(ctx, grad):
        return 3 * ctx.saved_tensors[0] * grad

def product(x, y):
    return x @ y

class Scale(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([2.0, 3.0]))

    def forward(self, x):
        return x * self.weight

class Sized(torch.nn.Module):
    def __init__(self, size):
        super().__init__()
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "their_functions.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "their_functions", raising=False)
    return tmp_path


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    return capsys.readouterr().err


def test_an_op(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "add"]) == 0
    header, row = capsys.readouterr().out.splitlines()[:2]
    assert header.split()[:2] == ["gradcheck", "gradgradcheck"]
    assert row.split()[:3] == ["add", "ok", "ok"]


def test_their_function(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = list(sys.path)
    assert main(["verify", "their_functions:Square", "--markdown", "table.md"]) == 0
    assert "| Square | ok |" in (here / "table.md").read_text()
    assert main(["verify", "their_functions:Wrong"]) == 1
    assert "FAIL Wrong, gradcheck" in capsys.readouterr().out
    assert sys.path == path


def test_their_function_and_module_with_shapes(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", "their_functions:product", "--inputs", "2x3,3x4"]) == 0
    assert main(["verify", "their_functions:Scale", "--inputs", "3x2"]) == 0
    assert capsys.readouterr().out.count("ok") >= 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "linea"], "did you mean linear"),
        (["verify", "add", "--inputs", "3"], "--inputs is for"),
        (["verify", "no_such_module:f"], "no_such_module"),
        (["verify", "their_functions:nothing"], "nothing"),
        (["verify", "their_functions:product"], "give --inputs"),
        (["verify", "their_functions:product", "--inputs", "3by4"], "expected shapes"),
        (["verify", "their_functions:product", "--inputs", "3x4,3x4"], "cannot be multiplied"),
        (["verify", "their_functions:Sized", "--inputs", "3"], "without arguments"),
        (["verify", ":"], ":"),
        (["no-such-command"], "no-such-command"),
        ([], "command"),
    ],
)
def test_bad_usage(
    arguments: list[str], message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(arguments, capsys)


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    from torchbp.doctor import doctor

    assert main(["doctor"]) == 0
    assert capsys.readouterr().out == doctor() + "\n"


def test_python_m() -> None:
    command = [sys.executable, "-m", "torchbp", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "verify" in result.stdout
