"""Drop-in layers: each is its torch.nn namesake, with the backward pass written out.

They subclass their twins and override ``forward`` alone, so constructors, parameters,
``state_dict``, ``repr``, pickling and ``isinstance`` are torch's.
"""

from __future__ import annotations

import torch

from torchbp.nn.activation import (
    GELU,
    LeakyReLU,
    LogSoftmax,
    ReLU,
    Sigmoid,
    SiLU,
    Softmax,
    Softplus,
    Tanh,
)
from torchbp.nn.conv import Conv2d
from torchbp.nn.dropout import Dropout
from torchbp.nn.linear import Add, Linear
from torchbp.nn.loss import BCEWithLogitsLoss, CrossEntropyLoss, MSELoss
from torchbp.nn.norm import BatchNorm1d, BatchNorm2d, LayerNorm
from torchbp.nn.pool import AdaptiveAvgPool2d, AvgPool2d, MaxPool2d
from torchbp.nn.shape import Flatten

__all__ = [
    "GELU",
    "AdaptiveAvgPool2d",
    "Add",
    "AvgPool2d",
    "BCEWithLogitsLoss",
    "BatchNorm1d",
    "BatchNorm2d",
    "Conv2d",
    "CrossEntropyLoss",
    "Dropout",
    "Flatten",
    "LayerNorm",
    "LeakyReLU",
    "Linear",
    "LogSoftmax",
    "MSELoss",
    "MaxPool2d",
    "ReLU",
    "SiLU",
    "Sigmoid",
    "Softmax",
    "Softplus",
    "Tanh",
]

#: From each torch.nn class to its drop-in.
DROP_INS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    twin: ours
    for ours in (globals()[name] for name in __all__)
    if (twin := ours.__bases__[0]) is not torch.nn.Module
}
