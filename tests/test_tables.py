"""Tables, against text laid out by hand and against independent markdown and HTML parsers."""

import builtins
import html.parser

import numpy as np
import pytest
import torch

from torchbp.tables import Table, markdown_text

HOSTILE = "<img src=x onerror=alert(1)> a|b *c* _d_ [e](http://f) `g`"


def test_text_is_aligned():
    table = Table(
        ("layer", "unit", "blame"),
        [("fc1", 3, 0.123456), ("features.10", 1024, -2.0), ("x", None, 0.0)],
        title="Top",
        signed=("blame",),
    )
    assert str(table).splitlines() == [
        "Top",
        "layer        unit    blame",
        "-----------  ----  -------",
        "fc1             3  +0.1235",
        "features.10  1024       -2",
        "x               -        0",
    ]
    assert repr(table) == str(table)


def test_scalars_of_numpy_and_torch_are_numbers():
    table = Table(("a", "b"), [(np.float32(0.5), torch.tensor(7))], signed="a")
    assert table.rows == ((0.5, 7),)
    assert str(table).splitlines()[-1] == "+0.5  7"


def test_mixed_columns_and_booleans_are_text():
    table = Table(("mixed", "flag"), [(1, True), ("none", False)])
    assert str(table).splitlines()[2:] == ["1      True", "none   False"]


def test_nonfinite_numbers():
    table = Table(("v",), [(float("nan"),), (float("inf"),), (float("-inf"),)], signed=("v",))
    assert [line.strip() for line in str(table).splitlines()[2:]] == ["nan", "+inf", "-inf"]


def test_control_characters_stay_visible():
    assert str(Table(("c",), [("a\nb\x1b[31m",)])).splitlines()[2:] == ["a\\nb\\x1b[31m"]


def test_empty_table():
    table = Table(("a", "b"), [])
    assert len(table) == 0 and list(table) == []
    assert str(table) == "a  b\n-  -"
    assert table.markdown() == "| a | b |\n| --- | --- |"


def test_length_iteration_and_immutability():
    rows = [[1, 2], [3, 4]]
    table = Table(["a", "b"], rows)
    rows[0][0] = 99
    assert len(table) == 2 and list(table) == [(1, 2), (3, 4)]
    with pytest.raises(AttributeError):
        table.title = "other"


def test_bad_shapes_are_named():
    with pytest.raises(ValueError, match=r"rows\[1\] has 1 values, expected 2.*a, b"):
        Table(("a", "b"), [(1, 2), (3,)])
    with pytest.raises(ValueError, match=r"signed names \['c'\], expected some of \['a', 'b'\]"):
        Table(("a", "b"), [], signed=("c",))


class _Cells(html.parser.HTMLParser):
    """Texts and styles of the cells, and every tag met."""

    def __init__(self):
        super().__init__()
        self.cells, self.tags, self._style = [], set(), None

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag in ("td", "th"):
            self.cells.append(["", dict(attrs)["style"]])

    def handle_data(self, data):
        if self.cells:
            self.cells[-1][0] += data


def test_html_escapes_and_colours():
    rows = [(HOSTILE, 0.5), ("b", -0.5), ("c", 0.0), ("d", float("nan"))]
    table = Table(("name", "blame"), rows, title=HOSTILE, signed=("blame",))
    parser = _Cells()
    parser.feed(table._repr_html_())
    assert parser.tags == {"table", "caption", "thead", "tbody", "tr", "td", "th"}
    texts = [text for text, _ in parser.cells]
    assert texts == ["name", "blame", HOSTILE, "+0.5", "b", "-0.5", "c", "0", "d", "nan"]
    tints = [style.partition("rgba(")[2].split(",")[:3] for _, style in parser.cells[3::2]]
    red, _, blue = (int(channel) for channel in tints[0])
    assert red > blue, "a culprit is orange"
    red, _, blue = (int(channel) for channel in tints[1])
    assert red < blue, "a helper is blue"
    assert tints[2] == tints[3] == [""]


def test_markdown_shows_names_literally():
    render = pytest.importorskip("tensorboard.plugin_util").markdown_to_safe_html
    table = Table(("na|me", "blame"), [(HOSTILE, 0.5), ("__init__", -1.5)], signed=("blame",))
    parser = _PlainCells()
    parser.feed(render(table.markdown()))
    assert parser.tags <= {"table", "thead", "tbody", "tr", "td", "th"}
    assert parser.texts == ["na|me", "blame", HOSTILE, "+0.5", "__init__", "-1.5"]


class _PlainCells(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.texts, self.tags = [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag in ("td", "th"):
            self.texts.append("")

    def handle_data(self, data):
        if self.texts and data.strip():
            self.texts[-1] += data


def test_markdown_source_escapes_pipes():
    assert markdown_text("a|b\nc") == "a\\|b\\\\nc"
    line = Table(("a", "n"), [("x|y", 1)]).markdown().splitlines()
    assert line == ["| a | n |", "| --- | ---: |", "| x\\|y | 1 |"]


def test_to_pandas_keeps_values():
    pytest.importorskip("pandas")
    frame = Table(("a", "b"), [(1, "x"), (2, None)]).to_pandas()
    assert list(frame.columns) == ["a", "b"]
    assert frame["a"].tolist() == [1, 2]
    assert frame["b"][0] == "x" and frame["b"].isna().tolist() == [False, True]


def test_to_pandas_names_the_extra(monkeypatch):
    real = builtins.__import__

    def without_pandas(name, *args, **kwargs):
        if name == "pandas":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pandas)
    with pytest.raises(ImportError, match=r"torchbp\[pandas\]"):
        Table(("a",), []).to_pandas()
