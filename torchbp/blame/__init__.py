"""Blame: signed contributions of units, classes and samples to the loss."""

from torchbp.blame.attribute import attribute
from torchbp.blame.frame import Frame, LayerFrame
from torchbp.blame.result import Blame

__all__ = ["Blame", "Frame", "LayerFrame", "attribute"]
