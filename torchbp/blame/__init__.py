"""Blame: signed contributions of units, weights, classes, samples and steps to the loss."""

from torchbp.blame.attribute import attribute
from torchbp.blame.change import LossChange
from torchbp.blame.checkpoints import CheckpointBlame, checkpoint_blame
from torchbp.blame.classes import ClassBlame, class_blame
from torchbp.blame.edge_graph import EdgeFlow
from torchbp.blame.edges import edge_flow
from torchbp.blame.frame import Frame, LayerFrame
from torchbp.blame.influence import InRunInfluence, self_influence, tracin
from torchbp.blame.report import Report
from torchbp.blame.result import Blame
from torchbp.blame.sample_gradients import SampleGradients, sample_gradients
from torchbp.blame.samples import SampleBlame, drivers, sample_blame
from torchbp.blame.tokens import TokenBlame, token_blame
from torchbp.blame.tracker import BlameTracker
from torchbp.blame.weights import WeightBlame, weight_blame
from torchbp.ops.relevance import Rule

__all__ = [
    "Blame",
    "BlameTracker",
    "CheckpointBlame",
    "ClassBlame",
    "EdgeFlow",
    "Frame",
    "InRunInfluence",
    "LayerFrame",
    "LossChange",
    "Report",
    "Rule",
    "SampleBlame",
    "SampleGradients",
    "TokenBlame",
    "WeightBlame",
    "attribute",
    "checkpoint_blame",
    "class_blame",
    "drivers",
    "edge_flow",
    "sample_blame",
    "sample_gradients",
    "self_influence",
    "token_blame",
    "tracin",
    "weight_blame",
]
