"""Every op of torchbp under the name and signature it has in ``torch.nn.functional``."""

from torchbp.ops.activation import gelu, leaky_relu, relu, sigmoid, silu, softplus, tanh
from torchbp.ops.arithmetic import div, matmul, mul
from torchbp.ops.bias_act import bias_act
from torchbp.ops.conv import conv2d
from torchbp.ops.cross_entropy import cross_entropy
from torchbp.ops.dropout import dropout
from torchbp.ops.linear import add, linear
from torchbp.ops.loss import binary_cross_entropy_with_logits, mse_loss
from torchbp.ops.norm import batch_norm, layer_norm
from torchbp.ops.pointwise import (
    abs,
    clamp,
    clamp_max,
    clamp_min,
    cos,
    erf,
    exp,
    expm1,
    log,
    log1p,
    pow,
    reciprocal,
    rsqrt,
    sin,
    sqrt,
    square,
)
from torchbp.ops.pool import adaptive_avg_pool2d, avg_pool2d, max_pool2d
from torchbp.ops.reduce import amax, amin, logsumexp, maximum, minimum
from torchbp.ops.shape import flatten
from torchbp.ops.softmax import log_softmax, softmax

__all__ = [
    "abs",
    "adaptive_avg_pool2d",
    "add",
    "amax",
    "amin",
    "avg_pool2d",
    "batch_norm",
    "bias_act",
    "binary_cross_entropy_with_logits",
    "clamp",
    "clamp_max",
    "clamp_min",
    "conv2d",
    "cos",
    "cross_entropy",
    "div",
    "dropout",
    "erf",
    "exp",
    "expm1",
    "flatten",
    "gelu",
    "layer_norm",
    "leaky_relu",
    "linear",
    "log",
    "log1p",
    "log_softmax",
    "logsumexp",
    "matmul",
    "max_pool2d",
    "maximum",
    "minimum",
    "mse_loss",
    "mul",
    "pow",
    "reciprocal",
    "relu",
    "rsqrt",
    "sigmoid",
    "silu",
    "sin",
    "softmax",
    "softplus",
    "sqrt",
    "square",
    "tanh",
]
