"""Say at the end how much of PyTorch's module database was compared."""

from __future__ import annotations

import sys
from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    database = sys.modules.get("test_module_db")
    if database is None or not database.COUNTS:
        return
    counts = ", ".join(f"{number} {what}" for what, number in database.COUNTS.items())
    terminalreporter.write_line(
        f"module_db: {len(database.SEEN)} of {len(database.INFOS)} modules compared "
        f"({len(database.EXCLUDED)} excluded); {counts}"
    )
