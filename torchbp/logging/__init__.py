"""Writing blame where people look at it."""

from torchbp.logging.tensorboard import BlameLogger

__all__ = ["BlameLogger"]
