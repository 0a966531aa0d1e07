"""Every op with its backward, forward mode and secant written out. Importing fills the registry."""

from torchbp.ops import (
    activation,
    arithmetic,
    bias_act,
    conv,
    cross_entropy,
    dropout,
    linear,
    loss,
    norm,
    pointwise,
    pool,
    reduce,
    shape,
    softmax,
)

__all__ = [
    "activation",
    "arithmetic",
    "bias_act",
    "conv",
    "cross_entropy",
    "dropout",
    "linear",
    "loss",
    "norm",
    "pointwise",
    "pool",
    "reduce",
    "shape",
    "softmax",
]
