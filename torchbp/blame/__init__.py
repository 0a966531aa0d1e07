"""Blame: signed contributions of units, classes and samples to the loss."""
