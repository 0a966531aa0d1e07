"""Every op of torchbp under the name and signature it has in ``torch.nn.functional``."""

from torchbp.ops.activation import (
    gelu,
    logsigmoid,
    mish,
    sigmoid,
    silu,
    softplus,
    softsign,
    tanh,
    tanhshrink,
)
from torchbp.ops.activation_elu import celu, elu, selu
from torchbp.ops.activation_pairs import prelu, rrelu
from torchbp.ops.activation_pieces import (
    hardshrink,
    hardsigmoid,
    hardswish,
    hardtanh,
    leaky_relu,
    relu,
    relu6,
    softshrink,
    threshold,
)
from torchbp.ops.adaptive_max_pool import (
    adaptive_max_pool1d,
    adaptive_max_pool1d_with_indices,
    adaptive_max_pool2d,
    adaptive_max_pool2d_with_indices,
    adaptive_max_pool3d,
    adaptive_max_pool3d_with_indices,
    fractional_max_pool2d,
    fractional_max_pool2d_with_indices,
    fractional_max_pool3d,
    fractional_max_pool3d_with_indices,
)
from torchbp.ops.add_norm import add_norm
from torchbp.ops.alpha_dropout import alpha_dropout, feature_alpha_dropout
from torchbp.ops.arithmetic import div, matmul, mul
from torchbp.ops.attention import scaled_dot_product_attention
from torchbp.ops.avg_pool import (
    adaptive_avg_pool1d,
    adaptive_avg_pool2d,
    adaptive_avg_pool3d,
    avg_pool1d,
    avg_pool2d,
    avg_pool3d,
)
from torchbp.ops.batch_norm import batch_norm
from torchbp.ops.bias_act import bias_act
from torchbp.ops.bilinear import bilinear
from torchbp.ops.cells import gru_cell, lstm_cell, rnn_relu_cell, rnn_tanh_cell
from torchbp.ops.conv import conv1d, conv2d, conv3d
from torchbp.ops.conv_transpose import conv_transpose1d, conv_transpose2d, conv_transpose3d
from torchbp.ops.cross_entropy import cross_entropy
from torchbp.ops.ctc import ctc_loss
from torchbp.ops.distance import cosine_similarity, normalize, pairwise_distance
from torchbp.ops.dropout import dropout, dropout1d, dropout2d, dropout3d
from torchbp.ops.embedding import embedding
from torchbp.ops.embedding_bag import embedding_bag
from torchbp.ops.fold import fold, unfold
from torchbp.ops.gated import gated, glu
from torchbp.ops.group_norm import group_norm, instance_norm
from torchbp.ops.gru import gru
from torchbp.ops.layer_norm import layer_norm, rms_norm
from torchbp.ops.linear import add, linear
from torchbp.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_rows
from torchbp.ops.local_response import local_response_norm
from torchbp.ops.loss_binary import (
    binary_cross_entropy,
    binary_cross_entropy_with_logits,
    multilabel_soft_margin_loss,
    soft_margin_loss,
)
from torchbp.ops.loss_distribution import gaussian_nll_loss, kl_div, poisson_nll_loss
from torchbp.ops.loss_embedding import cosine_embedding_loss
from torchbp.ops.loss_margin import (
    hinge_embedding_loss,
    margin_ranking_loss,
    multi_margin_loss,
    multilabel_margin_loss,
)
from torchbp.ops.loss_regression import huber_loss, l1_loss, mse_loss, smooth_l1_loss
from torchbp.ops.loss_triplet import triplet_margin_loss, triplet_margin_with_distance_loss
from torchbp.ops.lp_pool import lp_pool1d, lp_pool2d, lp_pool3d
from torchbp.ops.lstm import lstm
from torchbp.ops.max_pool import (
    max_pool1d,
    max_pool1d_with_indices,
    max_pool2d,
    max_pool2d_with_indices,
    max_pool3d,
    max_pool3d_with_indices,
)
from torchbp.ops.max_unpool import max_unpool1d, max_unpool2d, max_unpool3d
from torchbp.ops.multi_head_attention import multi_head_attention_forward
from torchbp.ops.nll import nll_loss
from torchbp.ops.pad import pad
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
from torchbp.ops.reduce import amax, amin, logsumexp, maximum, minimum
from torchbp.ops.resample import interpolate, upsample
from torchbp.ops.rnn import rnn_relu, rnn_tanh
from torchbp.ops.shape import channel_shuffle, flatten, pixel_shuffle, pixel_unshuffle, unflatten
from torchbp.ops.softmax import log_softmax, softmax, softmin

__all__ = [
    "abs",
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "adaptive_max_pool1d",
    "adaptive_max_pool1d_with_indices",
    "adaptive_max_pool2d",
    "adaptive_max_pool2d_with_indices",
    "adaptive_max_pool3d",
    "adaptive_max_pool3d_with_indices",
    "add",
    "add_norm",
    "alpha_dropout",
    "amax",
    "amin",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "batch_norm",
    "bias_act",
    "bilinear",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "celu",
    "channel_shuffle",
    "clamp",
    "clamp_max",
    "clamp_min",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "cos",
    "cosine_embedding_loss",
    "cosine_similarity",
    "cross_entropy",
    "ctc_loss",
    "div",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "elu",
    "embedding",
    "embedding_bag",
    "erf",
    "exp",
    "expm1",
    "feature_alpha_dropout",
    "flatten",
    "fold",
    "fractional_max_pool2d",
    "fractional_max_pool2d_with_indices",
    "fractional_max_pool3d",
    "fractional_max_pool3d_with_indices",
    "gated",
    "gaussian_nll_loss",
    "gelu",
    "glu",
    "group_norm",
    "gru",
    "gru_cell",
    "hardshrink",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "hinge_embedding_loss",
    "huber_loss",
    "instance_norm",
    "interpolate",
    "kl_div",
    "l1_loss",
    "layer_norm",
    "leaky_relu",
    "linear",
    "linear_cross_entropy",
    "linear_cross_entropy_rows",
    "local_response_norm",
    "log",
    "log1p",
    "log_softmax",
    "logsigmoid",
    "logsumexp",
    "lp_pool1d",
    "lp_pool2d",
    "lp_pool3d",
    "lstm",
    "lstm_cell",
    "margin_ranking_loss",
    "matmul",
    "max_pool1d",
    "max_pool1d_with_indices",
    "max_pool2d",
    "max_pool2d_with_indices",
    "max_pool3d",
    "max_pool3d_with_indices",
    "max_unpool1d",
    "max_unpool2d",
    "max_unpool3d",
    "maximum",
    "minimum",
    "mish",
    "mse_loss",
    "mul",
    "multi_head_attention_forward",
    "multi_margin_loss",
    "multilabel_margin_loss",
    "multilabel_soft_margin_loss",
    "nll_loss",
    "normalize",
    "pad",
    "pairwise_distance",
    "pixel_shuffle",
    "pixel_unshuffle",
    "poisson_nll_loss",
    "pow",
    "prelu",
    "reciprocal",
    "relu",
    "relu6",
    "rms_norm",
    "rnn_relu",
    "rnn_relu_cell",
    "rnn_tanh",
    "rnn_tanh_cell",
    "rrelu",
    "rsqrt",
    "scaled_dot_product_attention",
    "selu",
    "sigmoid",
    "silu",
    "sin",
    "smooth_l1_loss",
    "soft_margin_loss",
    "softmax",
    "softmin",
    "softplus",
    "softshrink",
    "softsign",
    "sqrt",
    "square",
    "tanh",
    "tanhshrink",
    "threshold",
    "triplet_margin_loss",
    "triplet_margin_with_distance_loss",
    "unflatten",
    "unfold",
    "upsample",
]
