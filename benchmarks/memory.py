"""What layers save for backward, and the peak of a training step, against torch.nn.

``python benchmarks/memory.py [--layers NAME...] [--no-step]``

Saved bytes come from saved-tensor hooks: every storage once, without those of parameters and
buffers. "Beyond" leaves out the storages of the layer's inputs and output too, which mostly live
anyway. The peak is that of the allocator's events in one training step: the running sum of what is
allocated and freed (activations, gradients, temporary tensors), on top of the parameters.
"""

from __future__ import annotations

import argparse
import copy
import math
from typing import Any, NamedTuple

import torch
from _memory import peak_bytes
from layers import LAYERS, Inputs, Make
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import torchbp
from torchbp import kernels
from torchbp.nn import DROP_INS

r = torch.randn


def _like(name: str, inputs: Inputs, *settings: Any, **options: Any) -> tuple[Make, Inputs]:
    return lambda: getattr(nn, name)(*settings, **options), inputs


def _each(names: str, inputs: Inputs, *settings: Any, **options: Any) -> dict[str, Any]:
    return {name: _like(name, inputs, *settings, **options) for name in names.split()}


def _sequence() -> tuple[Tensor, ...]:
    return (r(8, 16, 128),)


def _image() -> tuple[Tensor, ...]:
    return (r(4, 16, 32, 32),)


def _volume() -> tuple[Tensor, ...]:
    return (r(2, 8, 12, 12, 12),)


def _matrix() -> tuple[Tensor, ...]:
    return (r(256, 256),)


def _signs() -> tuple[Tensor, ...]:
    return r(256, 64), torch.randint(2, (256, 64)) * 2.0 - 1


def _unpooled(dims: int) -> Inputs:
    def make() -> tuple[Tensor, ...]:
        x = r(4, 8, *[16] * dims)
        return getattr(nn.functional, f"max_pool{dims}d")(x, 2, return_indices=True)

    return make


CELLS = {name: _like(name, lambda: (r(64, 64),), 64, 64) for name in ("RNNCell", "GRUCell")}
PADS = ("Circular", "Constant", "Reflection", "Replication", "Zero")
BY_DIMS = ((1, _sequence), (2, _image), (3, _volume))

MORE: dict[str, tuple[Make, Inputs]] = {
    **CELLS,
    **_each("LSTMCell", lambda: (r(64, 64),), 64, 64),
    **{f"{pad}Pad{d}d": _like(f"{pad}Pad{d}d", x, 1, *([0.5] if pad == "Constant" else []))
       for pad in PADS for d, x in BY_DIMS},
    **{f"{pool}Pool{d}d": _like(f"{pool}Pool{d}d", x, 2)
       for pool in ("AdaptiveAvg", "AdaptiveMax", "Avg", "Max") for d, x in BY_DIMS},
    **{f"LPPool{d}d": _like(f"LPPool{d}d", x, 2, 2) for d, x in BY_DIMS},
    **{f"MaxUnpool{d}d": _like(f"MaxUnpool{d}d", _unpooled(d), 2) for d in (1, 2, 3)},
    **{f"{norm}Norm{d}d": _like(f"{norm}Norm{d}d", x, x()[0].shape[1])
       for norm in ("Batch", "Instance") for d, x in BY_DIMS},
    **{f"Dropout{d}d": _like(f"Dropout{d}d", x) for d, x in BY_DIMS},
    **_each("ConvTranspose1d", _sequence, 16, 16, 3),
    **_each("ConvTranspose3d", _volume, 8, 8, 3),
    **_each("FractionalMaxPool2d", _image, 2, output_size=9),
    **_each("FractionalMaxPool3d", _volume, 2, output_size=5),
    **_each("AlphaDropout", _matrix),
    **_each("FeatureAlphaDropout Softmax2d", _image),
    **_each("RReLU Identity", _matrix),
    **_each("Softmin", _matrix, -1),
    "NonDynamicallyQuantizableLinear": (
        lambda: nn.modules.linear.NonDynamicallyQuantizableLinear(256, 64), _matrix),
    **_each("Threshold", _matrix, 0.1, 2.0),
    **_each("Flatten", _image),
    **_each("Unflatten", _matrix, 1, (16, 16)),
    **_each("ChannelShuffle", _image, 4),
    **_each("PixelUnshuffle", _image, 2),
    **_each("Unfold", _image, 3),
    **_each("Fold", lambda: (r(4, 16 * 9, 900),), (32, 32), 3),
    **_each("UpsamplingBilinear2d UpsamplingNearest2d", _image, scale_factor=2),
    **_each("PairwiseDistance", lambda: (r(256, 64), r(256, 64))),
    **_each("SoftMarginLoss HingeEmbeddingLoss", _signs),
    **_each("MarginRankingLoss", lambda: (r(256), r(256), torch.ones(256))),
    **_each("CosineEmbeddingLoss", lambda: (r(256, 64), r(256, 64), torch.ones(256))),
    **_each("TripletMarginLoss TripletMarginWithDistanceLoss",
            lambda: (r(256, 64), r(256, 64), r(256, 64))),
    **_each("PoissonNLLLoss", lambda: (r(256, 64), torch.rand(256, 64))),
    **_each("GaussianNLLLoss", lambda: (r(256, 64), r(256, 64), torch.rand(256, 64) + 0.1)),
    **_each("MultiLabelMarginLoss", lambda: (r(64, 32), torch.randint(32, (64, 32)))),
    **_each("MultiLabelSoftMarginLoss", lambda: (r(64, 32), torch.rand(64, 32).round())),
    **_each("MultiMarginLoss", lambda: (r(64, 32), torch.randint(32, (64,)))),
    **_each("NLLLoss2d", lambda: (r(4, 8, 16, 16), torch.randint(8, (4, 16, 16)))),
    **_each("CTCLoss", lambda: (r(50, 8, 20).log_softmax(-1), torch.randint(1, 20, (8, 10)),
                                torch.full((8,), 50), torch.full((8,), 10))),
    **_each("AdaptiveLogSoftmaxWithLoss", lambda: (r(64, 32), torch.randint(100, (64,))),
            32, 100, [10, 50]),
    **_each("LinearCrossEntropyLoss", lambda: (r(64, 32), torch.randint(100, (64,))), 32, 100),
    **_each("TransformerDecoderLayer", lambda: (r(16, 4, 64),) * 2, 64, 4, 128),
    **_each("Transformer", lambda: (r(16, 4, 64), r(16, 4, 64)), 64, 4, 1, 1, 128),
    "TransformerEncoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128), 2),
        lambda: (r(16, 4, 64),)),
    "TransformerDecoder": (
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(64, 4, 128), 2),
        lambda: (r(16, 4, 64),) * 2),
}  # fmt: skip

CASES: dict[str, tuple[Make, Inputs]] = {
    **{name: case for name, case in MORE.items() if name not in LAYERS},
    **{name: (make, large) for name, (make, _, large) in LAYERS.items()},
}
"""Every layer with the inputs it is measured on."""


class Saved(NamedTuple):
    """Bytes saved for backward: all, and those that are neither input nor output."""

    total: int
    beyond: int


def _storages(values: Any) -> dict[int, int]:
    tensors = [t for t in pytree.tree_leaves(values) if isinstance(t, Tensor)]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def saved_bytes(module: nn.Module, inputs: tuple[Any, ...]) -> Saved:
    """Count what one forward pass of ``module`` saves, with a gradient for the first input."""
    kept: list[Tensor] = []  # they stay alive, so that no address is met twice

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    copies = {id(t): t.clone() for t in inputs}  # what is one tensor stays one
    given = [copies[id(t)] for t in inputs]
    if given[0].is_floating_point():
        given[0].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = module(*given)
    own = _storages([*module.parameters(), *module.buffers()])
    every = {address: size for address, size in _storages(kept).items() if address not in own}
    around = _storages([given, output])
    return Saved(
        sum(every.values()), sum(size for where, size in every.items() if where not in around)
    )


def measure(name: str) -> tuple[str, Saved, Saved]:
    """The shape of the first input, and what the drop-in and what torch.nn's layer save."""
    make, sizes = CASES[name]
    torch.manual_seed(0)
    theirs, inputs = make(), sizes()
    ours = torchbp.convert(copy.deepcopy(theirs))
    shape = "x".join(map(str, inputs[0].shape))
    return shape, saved_bytes(ours, inputs), saved_bytes(theirs, inputs)


def uncovered() -> set[str]:
    """Drop-ins that no case measures."""
    measured = {type(make()).__name__ for make, _ in CASES.values()}
    return {kind.__name__ for kind in DROP_INS} - measured


def encoder_peaks(dropout: float) -> tuple[int, int, int]:
    """Peak of a training step of four encoder layers: converted, torch's; and the parameters."""
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(256, 4, 1024, dropout, batch_first=True) for _ in range(4)]
    theirs, x = nn.Sequential(*layers), r(8, 64, 256)
    peaks = []
    for model in (torchbp.convert(copy.deepcopy(theirs)), theirs):

        def step(model: nn.Module = model) -> None:
            model.zero_grad()
            model(x).square().mean().backward()

        step()
        model.zero_grad()
        peaks.append(peak_bytes(step))
    size = sum(p.numel() * p.element_size() for p in theirs.parameters())
    return peaks[0], peaks[1], size


def main() -> None:
    """Print one row per layer, then the training step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", nargs="+", choices=[*CASES], default=sorted(CASES))
    parser.add_argument("--no-step", action="store_true")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, kernels {kernels.status()['isa']}, float32; KiB\n")
    print("| layer | input | torch: beyond | in all | torchbp: beyond | in all | in all, ratio |")
    print("|---|---|--:|--:|--:|--:|--:|")
    for name in options.layers:
        shape, ours, theirs = measure(name)
        cells = [f"{size / 1024:.4g}" for size in (theirs.beyond, theirs.total, *reversed(ours))]
        ratio = ours.total / theirs.total if theirs.total else (math.inf if ours.total else 1.0)
        print(f"| {name} | {shape} | {' | '.join(cells)} | {ratio:.2f} |", flush=True)
    if options.no_step:
        return
    print(
        "\n| encoder step, 4 layers, d 256, 64 x 8 | torch MiB | torchbp MiB | ratio |"
        " with parameters |"
    )
    print("|---|--:|--:|--:|--:|")
    for dropout in (0.1, 0.0):
        ours_, theirs_, size = encoder_peaks(dropout)
        print(
            f"| dropout {dropout} | {theirs_ / 2**20:.1f} | {ours_ / 2**20:.1f} | "
            f"{ours_ / theirs_:.2f} | {(ours_ + size) / (theirs_ + size):.2f} |"
        )


if __name__ == "__main__":
    main()
