from __future__ import annotations

import inspect
import warnings

import torch

import torchbp.blame.problem
from torchbp.blame.source_line import outside_level, user_line


def called_from(path: str, inner):
    """What ``inner`` returns when a function in the file ``path`` calls it."""
    names: dict = {}
    exec(compile("def outer(inner):\n    return inner()", path, "exec"), names)
    return names["outer"](inner)


def here() -> int:
    return inspect.currentframe().f_back.f_lineno


def test_the_innermost_line_that_is_neither_torchs_nor_ours():
    assert user_line() == f"test_source_line.py, line {here()}"
    calls = inspect.getsourcelines(called_from)[1] + 4
    assert called_from(torch.nn.__file__, user_line) == f"test_source_line.py, line {calls}"


def test_lines_outside_the_model_do_not_count():
    ours, torchs = torchbp.blame.problem.__file__, torch.nn.__file__
    assert called_from(ours, lambda: called_from(torchs, user_line)) is not None  # the lambda
    within = {"user_line": user_line, "called_from": called_from}
    code = compile("def inner():\n    return user_line()", torchs, "exec")
    exec(code, within)
    assert called_from(ours, within["inner"]) is None


def test_warnings_point_at_the_line_that_called_us():
    names = {"outside_level": outside_level, "warn": warnings.warn}
    code = "def inner():\n    warn('x', stacklevel=outside_level())\ndef outer():\n    inner()"
    exec(compile(code, torchbp.blame.problem.__file__, "exec"), names)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        line = here() + 1
        names["outer"]()
    assert (caught[0].filename, caught[0].lineno) == (__file__, line)
