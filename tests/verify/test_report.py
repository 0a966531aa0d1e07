from __future__ import annotations

from torchbp.verify import Cell, Report, Row

REPORT = Report(
    [
        Row("good", {"gradcheck": Cell("ok"), "vmap": Cell("ok", "not sample 1: no batch")}),
        Row("bad", {"gradcheck": Cell("FAIL", "a | b < c"), "vmap": Cell("n/a", "no vmap")}),
    ]
)


def test_passed_and_failures() -> None:
    assert [row.passed for row in REPORT.rows] == [True, False]
    assert not REPORT.passed
    assert Report(REPORT.rows[:1]).passed
    assert REPORT.failures == {("bad", "gradcheck"): "a | b < c"}
    assert REPORT.columns == ["gradcheck", "vmap"]


def test_text() -> None:
    assert str(REPORT).splitlines() == [
        "      gradcheck  vmap",
        "good  ok         ok",
        "bad   FAIL       n/a",
        "",
        "FAIL bad, gradcheck: a | b < c",
        "",
        "n/a bad, vmap: no vmap",
        "ok good, vmap: not sample 1: no batch",
    ]


def test_markdown() -> None:
    assert REPORT.markdown().splitlines() == [
        "|  | gradcheck | vmap |",
        "| --- | --- | --- |",
        "| good | ok | ok |",
        "| bad | FAIL | n/a |",
        "",
        r"- FAIL `bad`, gradcheck: a \| b &lt; c",
        "",
        "- n/a `bad`, vmap: no vmap",
        "",
        "- ok `good`, vmap: not sample 1: no batch",
    ]


def test_html() -> None:
    page = REPORT._repr_html_()
    assert page.count("<tr>") == 3
    assert 'title="a | b &lt; c"' in page
    assert ">FAIL</td>" in page
