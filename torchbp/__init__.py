"""Which layer, neuron, weight or sample is to blame for a network's loss, and by how much."""

from torchbp import functional, nn, verify
from torchbp.blame import Blame, BlameTracker, LossChange, attribute, checkpoint_blame
from torchbp.convert import conversion_report, convert, revert

__version__ = "0.1.0"

__all__ = [
    "Blame",
    "BlameTracker",
    "LossChange",
    "attribute",
    "checkpoint_blame",
    "conversion_report",
    "convert",
    "functional",
    "nn",
    "revert",
    "verify",
]
