"""What the tracker costs: a training step with it against the same step without.

    python benchmarks/tracker.py [--threads 2] [--pairs 11] [--only MODEL] [--layers torchbp]

Prints a markdown table. A ratio of 1.10 means that tracking makes the step 10 % longer. Both
sides train the same model with plain SGD; they alternate, and the median over pairs counts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from _paired import header, paired
from torch import Tensor, nn

from torchbp import BlameTracker, convert

Case = tuple[nn.Module, Tensor, Tensor]


def tiny_mlp() -> Case:
    sizes = [(64, 64), (64, 64)]
    layers = [m for i, o in sizes for m in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(64, 10)), torch.randn(64, 64), labels(64)


def mlp() -> Case:
    sizes = [(784, 1024)] + [(1024, 1024)] * 5
    layers = [m for i, o in sizes for m in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(1024, 10)), torch.randn(256, 784), labels(256)


def cnn() -> Case:
    layers: list[nn.Module] = []
    channels = [3, 32, 32, 64, 64, 128, 128, 128, 128]
    for i in range(8):
        layers += [nn.Conv2d(channels[i], channels[i + 1], 3, padding=1), nn.ReLU()]
        if i in (1, 3, 5):
            layers.append(nn.MaxPool2d(2))
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)]
    return nn.Sequential(*layers, *head), torch.randn(32, 3, 32, 32), labels(32)


class Encoder(nn.Module):
    """Four encoder layers over sequences of 64, one label per sequence."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, T, 256)`` to ``(N, 10)``."""
        return self.head(self.body(x).mean(1))


def transformer() -> Case:
    return Encoder(), torch.randn(8, 64, 256), labels(8)


def labels(n: int) -> Tensor:
    return torch.randint(10, (n,))


CASES: dict[str, tuple[str, Callable[[], Case]]] = {
    "tiny MLP": ("64-64-64-10, batch 64", tiny_mlp),
    "MLP": ("784-1024x6-10, batch 256", mlp),
    "CNN": ("8 conv layers, 32x32, batch 32", cnn),
    "transformer": ("4 layers, d 256, sequence 64, batch 8", transformer),
}

SOURCES = ("torch", "torchbp")


def step(model: nn.Module, x: Tensor, y: Tensor, tracker: BlameTracker | None) -> None:
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    if tracker is not None:
        tracker.step(loss, targets=y, samples=range(len(y)))
    with torch.no_grad():  # SGD written out: its own overhead must not hide the tracker's
        for p in model.parameters():
            p.sub_(p.grad, alpha=1e-4)
            p.grad = None


def measure(make: Callable[[], Case], converted: bool, every: int, pairs: int) -> tuple:
    torch.manual_seed(0)
    model, x, y = make()
    torch.manual_seed(0)
    twin, _, _ = make()
    if converted:
        convert(model)
        convert(twin)
    with BlameTracker(model, every=every) as tracker:
        # A multiple of `every` per call, so that each measurement holds its share of tracked steps.
        def tracked() -> None:
            for _ in range(every):
                step(model, x, y, tracker)

        def plain() -> None:
            for _ in range(every):
                step(twin, x, y, None)

        ratio, ms_plain, ms_tracked = paired(plain, tracked, pairs, seconds=0.3)
    return ratio, ms_plain / every, ms_tracked / every


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--only", choices=CASES, help="this model alone")
    parser.add_argument("--layers", choices=SOURCES, help="of torch alone, or converted alone")
    parser.add_argument("--every", type=int, help="track one step in this many; 1 and 10 if left")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{header(options.threads, options.pairs)}, method link\n")
    print("| model | size | layers of | every | without (ms) | with (ms) | ratio |")
    print("|---|---|---|---:|---:|---:|---:|")
    for name, (size, make) in CASES.items():
        if options.only not in (None, name):
            continue
        for source in [options.layers] if options.layers else SOURCES:
            for every in [options.every] if options.every else (1, 10):
                converted = source == "torchbp"
                ratio, plain, tracked = measure(make, converted, every, options.pairs)
                print(
                    f"| {name} | {size} | {source} | {every} | {plain:.2f} | {tracked:.2f} "
                    f"| {ratio:.3f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
