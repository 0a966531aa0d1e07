"""Which layer, neuron, weight or sample is to blame for a network's loss, and by how much."""

from torchbp.blame import Blame, BlameTracker, attribute

try:
    from torchbp import functional, nn
    from torchbp.convert import conversion_report, convert, revert
except ImportError:
    convert = None
