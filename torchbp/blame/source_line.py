"""Which line of the user's is being run: for errors and warnings that point at it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType

import torch

_OURS = str(Path(__file__).parents[1])
_TORCH = str(Path(torch.__file__).parent)
_PROBLEM = str(Path(__file__).with_name("problem.py"))


def user_line() -> str | None:
    """``model.py, line 12``: the innermost line of the model that is neither torch's nor ours.

    Returns:
        ``None`` where there is none: the function was called by a module of torch.nn in a
        Sequential, say. Lines outside the model, which called us, do not count.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != _PROBLEM:
        path = frame.f_code.co_filename
        if not path.startswith((_OURS, _TORCH)):
            return f"{Path(path).name}, line {frame.f_lineno}"
        frame = frame.f_back
    return None


def outside_level() -> int:
    """The ``stacklevel`` with which a warning of our caller points at the line that called us."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        frame, level = frame.f_back, level + 1
    return level
