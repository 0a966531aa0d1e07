"""One small table for everything the library prints: terminal, notebook, markdown, pandas."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

# A tint behind the text leaves the page's own text colour: light and dark pages can be read.
_CULPRIT_TINT = "rgba(230, 97, 1, 0.30)"
_HELPER_TINT = "rgba(33, 120, 200, 0.30)"

_MARKDOWN_SPECIAL = re.compile(r"([\\`*_\[\]|~])")


def plain_text(value: object) -> str:
    """Text of ``value`` on one line; control characters are shown as escapes, not obeyed."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value)
    )


def markdown_text(value: object) -> str:
    """Text of ``value`` that markdown shows literally: no table cell, emphasis, link or HTML."""
    escaped = html.escape(plain_text(value), quote=False)
    return _MARKDOWN_SPECIAL.sub(r"\\\1", escaped)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _python_scalar(value: Any) -> object:
    """NumPy scalars and tensors of one element as Python numbers, anything else as it is."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return value.item()
    return value


@dataclass(frozen=True, repr=False)
class Table:
    """Rows under named columns. Immutable; iterating yields the rows.

    Columns that hold only numbers are aligned right. Floats show four significant digits.

    Attributes:
        columns: the column names.
        rows: the rows, each with one value per column; ``None`` is shown as ``-``.
        title: shown above the table where not empty.
        signed: names of the columns whose sign is the message: numbers carry ``+`` or ``-``, and
            HTML tints culprits (positive) orange and helpers (negative) blue.

    Raises:
        ValueError: if a row has another number of values than there are columns, or ``signed``
            names a column that does not exist.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    title: str = ""
    signed: Sequence[str] = ()

    def __post_init__(self) -> None:
        columns = tuple(str(column) for column in self.columns)
        rows = tuple(tuple(_python_scalar(value) for value in row) for row in self.rows)
        signed = (self.signed,) if isinstance(self.signed, str) else tuple(self.signed)
        for index, row in enumerate(rows):
            if len(row) != len(columns):
                raise ValueError(
                    f"rows[{index}] has {len(row)} values, expected {len(columns)}, "
                    f"one per column: {', '.join(columns)}"
                )
        unknown = [name for name in signed if name not in columns]
        if unknown:
            raise ValueError(f"signed names {unknown}, expected some of {list(columns)}")
        for name, value in (("columns", columns), ("rows", rows), ("signed", signed)):
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Sequence[object]]:
        return iter(self.rows)

    def _cell(self, value: object, column: str) -> str:
        if value is None:
            return "-"
        if not _is_number(value):
            return plain_text(value)
        sign = "+" if column in self.signed and value != 0 and value == value else ""
        return format(value, f"{sign}.4g") if isinstance(value, float) else format(value, sign)

    def _cells(self) -> list[list[str]]:
        return [
            [self._cell(value, column) for value, column in zip(row, self.columns, strict=True)]
            for row in self.rows
        ]

    def _numeric(self) -> list[bool]:
        """Per column: does it hold numbers, and nothing but numbers and gaps?"""
        numeric = []
        for index in range(len(self.columns)):
            values = [row[index] for row in self.rows if row[index] is not None]
            numeric.append(bool(values) and all(_is_number(value) for value in values))
        return numeric

    def __str__(self) -> str:
        """The table in aligned monospace text."""
        lines = [[plain_text(column) for column in self.columns], *self._cells()]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        lines.insert(1, ["-" * width for width in widths])
        numeric = self._numeric()
        text = [
            "  ".join(
                cell.rjust(width) if right else cell.ljust(width)
                for cell, width, right in zip(line, widths, numeric, strict=True)
            ).rstrip()
            for line in lines
        ]
        return "\n".join([plain_text(self.title), *text] if self.title else text)

    __repr__ = __str__

    def _tint(self, value: Any, column: str) -> str:
        if column not in self.signed or not _is_number(value) or value == 0 or math.isnan(value):
            return ""
        return f"; background: {_CULPRIT_TINT if value > 0 else _HELPER_TINT}"

    def _repr_html_(self) -> str:
        """The table for notebooks: escaped, with styles that work on light and dark pages."""
        align = ["right" if right else "left" for right in self._numeric()]

        def line(tag: str, cells: Sequence[str], tints: Sequence[str]) -> str:
            return "<tr>{}</tr>".format(
                "".join(
                    f'<{tag} style="text-align: {side}{tint}">{html.escape(cell)}</{tag}>'
                    for cell, side, tint in zip(cells, align, tints, strict=True)
                )
            )

        head = line("th", [plain_text(column) for column in self.columns], [""] * len(align))
        body = "".join(
            line("td", cells, [self._tint(v, c) for v, c in zip(row, self.columns, strict=True)])
            for cells, row in zip(self._cells(), self.rows, strict=True)
        )
        title = plain_text(self.title)
        caption = f"<caption>{html.escape(title)}</caption>" if self.title else ""
        return f"<table>{caption}<thead>{head}</thead><tbody>{body}</tbody></table>"

    def markdown(self) -> str:
        """The table in GitHub's markdown; names with markup in them are shown literally."""
        lines = [
            [markdown_text(column) for column in self.columns],
            ["---:" if right else "---" for right in self._numeric()],
            *([markdown_text(cell) for cell in cells] for cells in self._cells()),
        ]
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"**{markdown_text(self.title)}**\n\n{text}" if self.title else text

    def to_pandas(self) -> Any:
        """The table as a ``pandas.DataFrame``, values unformatted.

        Raises:
            ImportError: if pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                "Table.to_pandas needs pandas: pip install 'torchbp[pandas]'"
            ) from error
        return pandas.DataFrame([list(row) for row in self.rows], columns=list(self.columns))
