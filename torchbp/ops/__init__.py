"""Every op with its backward, forward mode and secant written out. Importing fills the registry."""

from torchbp.ops import (
    activation,
    bias_act,
    conv,
    cross_entropy,
    dropout,
    linear,
    loss,
    norm,
    pool,
    shape,
    softmax,
)

__all__ = [
    "activation",
    "bias_act",
    "conv",
    "cross_entropy",
    "dropout",
    "linear",
    "loss",
    "norm",
    "pool",
    "shape",
    "softmax",
]
