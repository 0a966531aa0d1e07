"""The blame methods, one file each, and the table of them."""

from __future__ import annotations

from torchbp.blame.methods.ablation import ABLATION
from torchbp.blame.methods.base import Method, Result
from torchbp.blame.methods.curvature import CURVATURE
from torchbp.blame.methods.logits import LOGITS
from torchbp.blame.methods.lrp import LRP
from torchbp.blame.methods.paths import CONDUCTANCE, INTERNAL_INFLUENCE, LAYER_IG
from torchbp.blame.methods.secant import SECANT
from torchbp.blame.methods.shapley import SHAPLEY
from torchbp.blame.methods.tangent import GRADIENT, LINK, TAYLOR

METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        *(GRADIENT, TAYLOR, LINK, LOGITS, CURVATURE, ABLATION),
        *(SECANT, CONDUCTANCE, LAYER_IG, INTERNAL_INFLUENCE, LRP, SHAPLEY),
    )
}

__all__ = ["METHODS", "Method", "Result"]
