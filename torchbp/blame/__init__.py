"""Blame: signed contributions of units, classes and samples to the loss."""

from torchbp.blame.attribute import attribute
from torchbp.blame.frame import Frame, LayerFrame
from torchbp.blame.report import Report
from torchbp.blame.result import Blame
from torchbp.blame.tracker import BlameTracker

__all__ = ["Blame", "BlameTracker", "Frame", "LayerFrame", "Report", "attribute"]
