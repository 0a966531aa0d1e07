from __future__ import annotations

from pathlib import Path

from torchbp.cli import main
from torchbp.ops.registry import OPS
from torchbp.verify.catalogue import catalogue


def test_every_functional_has_a_row_with_its_rules() -> None:
    rows = {row[0]: row[1:] for row in catalogue()}
    assert [*rows] == [*OPS]
    assert all(secant and rule for name, (_, ops, secant, rule) in rows.items() if ops)
    assert rows["conv1d"] == ("Conv1d", "Conv1d", "yes", "weighted")
    assert rows["relu"][3] == "passes" and rows["flatten"][3] == "routes"
    assert "loss" in str(rows["mse_loss"][3])


def test_the_command_prints_it_and_writes_it(tmp_path: Path, capsys) -> None:
    assert main(["ops", "--markdown", str(tmp_path / "ops.md")]) == 0
    assert "cross_entropy" in capsys.readouterr().out
    assert "| linear | Linear |" in (tmp_path / "ops.md").read_text()
