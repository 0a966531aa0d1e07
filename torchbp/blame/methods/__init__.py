"""The blame methods, one file each, and the table of them."""

from __future__ import annotations

from torchbp.blame.methods.ablation import ABLATION
from torchbp.blame.methods.base import Method, Result
from torchbp.blame.methods.logits import LOGITS
from torchbp.blame.methods.secant import SECANT
from torchbp.blame.methods.tangent import GRADIENT, LINK, TAYLOR

METHODS: dict[str, Method] = {m.name: m for m in (GRADIENT, TAYLOR, LINK, LOGITS, SECANT, ABLATION)}

__all__ = ["METHODS", "Method", "Result"]
