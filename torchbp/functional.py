"""Every op of torchbp under the name and signature it has in ``torch.nn.functional``."""

from torchbp.ops.activation import gelu, leaky_relu, relu, sigmoid, silu, softplus, tanh
from torchbp.ops.bias_act import bias_act
from torchbp.ops.conv import conv2d
from torchbp.ops.cross_entropy import cross_entropy
from torchbp.ops.dropout import dropout
from torchbp.ops.linear import add, linear
from torchbp.ops.loss import binary_cross_entropy_with_logits, mse_loss
from torchbp.ops.norm import batch_norm, layer_norm
from torchbp.ops.pool import adaptive_avg_pool2d, avg_pool2d, max_pool2d
from torchbp.ops.shape import flatten
from torchbp.ops.softmax import log_softmax, softmax

__all__ = [
    "adaptive_avg_pool2d",
    "add",
    "avg_pool2d",
    "batch_norm",
    "bias_act",
    "binary_cross_entropy_with_logits",
    "conv2d",
    "cross_entropy",
    "dropout",
    "flatten",
    "gelu",
    "layer_norm",
    "leaky_relu",
    "linear",
    "log_softmax",
    "max_pool2d",
    "mse_loss",
    "relu",
    "sigmoid",
    "silu",
    "softmax",
    "softplus",
    "tanh",
]
