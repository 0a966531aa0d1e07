"""A training step of a converted model against the same model in eager PyTorch, and compiled.

    python benchmarks/steps.py [--threads 2] [--pairs 9] [--without-compile] [--only MODEL]

Prints a markdown table. A ratio below 1 means that the converted model is faster. All train with
plain SGD on the same batch, and alternate; the median over pairs counts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from _paired import header, paired
from torch import nn
from tracker import CASES, Case, Encoder, labels, step

from torchbp import convert


def small_mlp() -> Case:
    layers = [nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)]
    return nn.Sequential(*layers), torch.randn(32, 32), labels(32)


def transformer_with_dropout() -> Case:
    return Encoder(dropout=0.1), torch.randn(8, 64, 256), labels(8)


MODELS: dict[str, tuple[str, Callable[[], Case]]] = {
    "small MLP": ("32-32-10, batch 32", small_mlp),
    "MLP": CASES["MLP"],
    "CNN": CASES["CNN"],
    "transformer": CASES["transformer"],
    "transformer, dropout 0.1": (CASES["transformer"][0], transformer_with_dropout),
}


def trained(make: Callable[[], Case], change: Callable[[nn.Module], object]) -> Callable[[], None]:
    torch.manual_seed(0)
    model, x, y = make()
    changed = change(model)
    assert isinstance(changed, nn.Module)
    return lambda: step(changed, x, y, None)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--without-compile", action="store_true")
    parser.add_argument("--only", default="", help="the models whose names begin so")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(header(options.threads, options.pairs) + "\n")
    print("| model | size | eager ms | ours ms | ours / eager | ours / compiled |")
    print("|---|---|--:|--:|--:|--:|")
    for name, (size, make) in MODELS.items():
        if not name.startswith(options.only):
            continue
        ours, eager = trained(make, convert), trained(make, lambda model: model)
        ratio, ms_eager, ms = paired(eager, ours, options.pairs, seconds=0.3)
        beside = "-"
        if not options.without_compile:
            compiled = trained(make, torch.compile)
            beside = f"{paired(compiled, ours, options.pairs, seconds=0.3)[0]:.3f}"
        print(
            f"| {name} | {size} | {ms_eager:.3f} | {ms:.3f} | {ratio:.3f} | {beside} |", flush=True
        )


if __name__ == "__main__":
    main()
