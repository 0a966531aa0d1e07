"""What a verification found: rows of functions, columns of properties."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

Status = Literal["ok", "FAIL", "n/a"]
_STATUSES: tuple[Status, ...] = ("FAIL", "n/a", "ok")  # in the order of interest


@dataclass(frozen=True)
class Cell:
    """The verdict on one property of one function.

    Attributes:
        status: ``"ok"``, ``"FAIL"`` or ``"n/a"``.
        reason: why; for ``"ok"``, which samples were left out, if any, and why.
    """

    status: Status
    reason: str = ""


@dataclass(frozen=True)
class Row:
    """The verdicts on one function.

    Attributes:
        name: of the function.
        cells: property name to verdict, in the order of the columns.
    """

    name: str
    cells: dict[str, Cell] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether no cell failed."""
        return all(cell.status != "FAIL" for cell in self.cells.values())


@dataclass(frozen=True)
class Report:
    """A table of verdicts; printing it shows the table and the reasons below it.

    Attributes:
        rows: one per function.
    """

    rows: Sequence[Row]

    @property
    def passed(self) -> bool:
        """Whether no cell of any row failed."""
        return all(row.passed for row in self.rows)

    @property
    def failures(self) -> dict[tuple[str, str], str]:
        """The reason of every failed cell, by (function, property)."""
        return {(name, column): reason for name, column, reason in self._reasons("FAIL")}

    @property
    def columns(self) -> list[str]:
        """The properties, in order."""
        return list(dict.fromkeys(column for row in self.rows for column in row.cells))

    def _reasons(self, status: Status) -> Iterator[tuple[str, str, str]]:
        for row in self.rows:
            for column, cell in row.cells.items():
                if cell.status == status:
                    yield row.name, column, cell.reason

    def _table(self) -> list[list[str]]:
        missing = Cell("n/a")
        return [["", *self.columns]] + [
            [row.name, *(row.cells.get(column, missing).status for column in self.columns)]
            for row in self.rows
        ]

    def __str__(self) -> str:
        table = self._table()
        widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in table
        ]
        for name, column, reason in self._reasons("FAIL"):
            lines += ["", f"FAIL {name}, {column}: {reason}"]
        notes = [
            f"{status} {name}, {column}: {reason}"
            for status in _STATUSES[1:]
            for name, column, reason in self._reasons(status)
            if reason
        ]
        return "\n".join([*lines, *([""] if notes else []), *notes])

    def markdown(self) -> str:
        """The table and the reasons in GitHub's Markdown."""
        header, *rows = self._table()
        lines = [_pipes(header), _pipes(["---"] * len(header)), *map(_pipes, rows)]
        for status in _STATUSES:
            notes = [
                f"- {status} `{name}`, {column}: {_escape(reason)}"
                for name, column, reason in self._reasons(status)
                if reason
            ]
            lines += ["", *notes] if notes else []
        return "\n".join(lines) + "\n"

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(column)}</th>" for column in ["", *self.columns])
        body = "".join(
            f"<tr><th>{html.escape(row.name)}</th>"
            + "".join(_html_cell(row.cells.get(column, Cell("n/a"))) for column in self.columns)
            + "</tr>"
            for row in self.rows
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _pipes(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_escape(cell) for cell in cells) + " |"


def _escape(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|").replace("<", "&lt;")


def _html_cell(cell: Cell) -> str:
    # Orange and blue, as everywhere in the library: the culprit is orange.
    colour = {"ok": "#4477aa", "FAIL": "#ee7733", "n/a": "#888888"}[cell.status]
    title = html.escape(cell.reason, quote=True)
    return f'<td title="{title}" style="color:{colour}">{cell.status}</td>'
