"""Does a differentiable function do everything PyTorch may ask of it? See :func:`check`."""

from torchbp.verify.harness import PROPERTIES, check, verify, verify_entry
from torchbp.verify.report import Cell, Report, Row

__all__ = ["PROPERTIES", "Cell", "Report", "Row", "check", "verify", "verify_entry"]
