"""Forward and backward of every drop-in layer against its torch.nn twin.

``python benchmarks/layers.py [--layers NAME...] [--threads 2] [--pairs 7]``

Each is timed small, where the cost of the call shows, and large, where the arithmetic does.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from _paired import header, paired
from torch import Tensor, nn

import torchbp

Make = Callable[[], nn.Module]
Inputs = Callable[[], tuple[Tensor, ...]]
r = torch.randn


def _same(*shape: int) -> Inputs:
    return lambda: (r(*shape), r(*shape))


def _labels(n: int, classes: int) -> Inputs:
    return lambda: (r(n, classes), torch.randint(classes, (n,)))


def _odds(*shape: int) -> Inputs:
    return lambda: (torch.rand(*shape), torch.rand(*shape))


_FEATURES = (lambda: (r(32, 32),), lambda: (r(1024, 1024),))
_IMAGES = (lambda: (r(2, 8, 8, 8),), lambda: (r(8, 64, 56, 56),))

LAYERS: dict[str, tuple[Make, Inputs, Inputs]] = {
    "Linear": (lambda: nn.Linear(256, 256), lambda: (r(8, 256),), lambda: (r(2048, 256),)),
    "Bilinear": (lambda: nn.Bilinear(16, 16, 16), _same(8, 16), _same(512, 16)),
    "Conv1d": (lambda: nn.Conv1d(16, 16, 3), lambda: (r(2, 16, 16),), lambda: (r(16, 16, 2048),)),
    "Conv2d": (lambda: nn.Conv2d(64, 64, 3, padding=1), lambda: (r(1, 64, 8, 8),), _IMAGES[1]),
    "Conv2d 1x1": (lambda: nn.Conv2d(64, 64, 1), lambda: (r(1, 64, 8, 8),), _IMAGES[1]),
    "Conv2d depthwise": (lambda: nn.Conv2d(64, 64, 3, padding=1, groups=64),
                         lambda: (r(1, 64, 8, 8),), _IMAGES[1]),
    "Conv2d stem": (lambda: nn.Conv2d(3, 64, 7, 2, 3), lambda: (r(1, 3, 16, 16),),
                    lambda: (r(8, 3, 112, 112),)),
    "Conv3d": (lambda: nn.Conv3d(8, 8, 3), lambda: (r(1, 8, 5, 5, 5),),
               lambda: (r(4, 8, 16, 16, 16),)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(16, 16, 3, 2), lambda: (r(1, 16, 8, 8),),
                        lambda: (r(8, 16, 28, 28),)),
    **{name: (getattr(nn, name), *_FEATURES) for name in (
        "ReLU", "ReLU6", "LeakyReLU", "PReLU", "ELU", "SELU", "CELU", "GELU", "SiLU", "Mish",
        "Sigmoid", "LogSigmoid", "Tanh", "Softplus", "Softsign", "Hardsigmoid", "Hardswish",
        "Hardtanh", "Hardshrink", "Softshrink", "Tanhshrink", "GLU", "Dropout")},
    "Softmax": (lambda: nn.Softmax(-1), *_FEATURES),
    "LogSoftmax": (lambda: nn.LogSoftmax(-1), *_FEATURES),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(256), lambda: (r(8, 256),), lambda: (r(2048, 256),)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(64), lambda: (r(2, 64, 4, 4),), _IMAGES[1]),
    "LayerNorm": (lambda: nn.LayerNorm(256), lambda: (r(8, 256),), lambda: (r(2048, 256),)),
    "RMSNorm": (lambda: nn.RMSNorm(256), lambda: (r(8, 256),), lambda: (r(2048, 256),)),
    "GroupNorm": (lambda: nn.GroupNorm(8, 64), lambda: (r(2, 64, 4, 4),), _IMAGES[1]),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(64), lambda: (r(2, 64, 4, 4),), _IMAGES[1]),
    "LocalResponseNorm": (lambda: nn.LocalResponseNorm(5), *_IMAGES),
    "MaxPool2d": (lambda: nn.MaxPool2d(3, 2, 1), *_IMAGES),
    "AvgPool2d": (lambda: nn.AvgPool2d(2), *_IMAGES),
    "AdaptiveAvgPool2d 1": (lambda: nn.AdaptiveAvgPool2d(1), *_IMAGES),
    "AdaptiveAvgPool2d 7": (lambda: nn.AdaptiveAvgPool2d(7), *_IMAGES),
    "AdaptiveMaxPool2d 7": (lambda: nn.AdaptiveMaxPool2d(7), *_IMAGES),
    "LPPool2d": (lambda: nn.LPPool2d(2, 2), *_IMAGES),
    "ReflectionPad2d": (lambda: nn.ReflectionPad2d(1), *_IMAGES),
    "ZeroPad2d": (lambda: nn.ZeroPad2d(1), *_IMAGES),
    "Upsample bilinear": (lambda: nn.Upsample(scale_factor=2, mode="bilinear"), *_IMAGES),
    "PixelShuffle": (lambda: nn.PixelShuffle(2), *_IMAGES),
    "Embedding": (lambda: nn.Embedding(30000, 128), lambda: (torch.randint(30000, (4, 8)),),
                  lambda: (torch.randint(30000, (8, 128)),)),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(30000, 128), lambda: (torch.randint(30000, (4, 8)),),
                     lambda: (torch.randint(30000, (64, 32)),)),
    "LSTM": (lambda: nn.LSTM(64, 64), lambda: (r(4, 2, 64),), lambda: (r(64, 16, 64),)),
    "GRU": (lambda: nn.GRU(64, 64), lambda: (r(4, 2, 64),), lambda: (r(64, 16, 64),)),
    "RNN": (lambda: nn.RNN(64, 64), lambda: (r(4, 2, 64),), lambda: (r(64, 16, 64),)),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(128, 4, batch_first=True),
                           lambda: (r(2, 8, 128),) * 3, lambda: (r(8, 128, 128),) * 3),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(128, 4, 256, batch_first=True),
                                lambda: (r(2, 8, 128),), lambda: (r(8, 128, 128),)),
    "CosineSimilarity": (nn.CosineSimilarity, _same(32, 32), _same(1024, 1024)),
    "CrossEntropyLoss": (nn.CrossEntropyLoss, _labels(32, 10), _labels(1024, 1000)),
    "NLLLoss": (nn.NLLLoss, _labels(32, 10), _labels(1024, 1000)),
    "MSELoss": (nn.MSELoss, _same(32, 32), _same(1024, 1024)),
    "L1Loss": (nn.L1Loss, _same(32, 32), _same(1024, 1024)),
    "SmoothL1Loss": (nn.SmoothL1Loss, _same(32, 32), _same(1024, 1024)),
    "HuberLoss": (nn.HuberLoss, _same(32, 32), _same(1024, 1024)),
    "KLDivLoss": (lambda: nn.KLDivLoss(reduction="batchmean"), _odds(32, 32), _odds(1024, 1024)),
    "BCELoss": (nn.BCELoss, _odds(32, 32), _odds(1024, 1024)),
    "BCEWithLogitsLoss": (nn.BCEWithLogitsLoss, _odds(32, 32), _odds(1024, 1024)),
}  # fmt: skip


def step(module: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    """One forward and backward pass, with respect to the first input and the parameters."""
    given = [t.clone() for t in inputs]
    if given[0].is_floating_point():
        given[0].requires_grad_()
    wanted = [t for t in (given[0], *module.parameters()) if t.requires_grad]
    first: Any = module(*given)
    first = first[0] if isinstance(first, tuple) else first
    error = torch.randn_like(first)

    def call() -> None:
        output = module(*given)
        torch.autograd.grad(output[0] if isinstance(output, tuple) else output, wanted, error)

    return call


def main() -> None:
    """Print one row per layer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", nargs="+", choices=[*LAYERS], default=[*LAYERS])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(header(options.threads, options.pairs))
    print(
        "\n| layer | small: torch us | torchbp us | ratio | large: torch ms | torchbp ms | ratio |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|")
    for name in options.layers:
        make, *sizes = LAYERS[name]
        torch.manual_seed(0)
        theirs = make()
        ours = torchbp.convert(copy.deepcopy(theirs))
        row = f"| {name} "
        for size, unit in zip(sizes, (1e3, 1.0), strict=True):
            inputs = size()
            ratio, before, after = paired(
                step(theirs, inputs), step(ours, inputs), options.pairs, seconds=0.03
            )
            row += f"| {before * unit:.3g} | {after * unit:.3g} | {ratio:.2f} "
        print(row + "|", flush=True)


if __name__ == "__main__":
    main()
