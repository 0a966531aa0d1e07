"""How well does each blame method predict what silencing a unit does to the loss?

Trains small networks on scikit-learn's digits, then compares every method with exact ablation:
Spearman's rank correlation over all hidden units, blame summed over the validation set. A second
table shows how exactly `secant` is conserved at every cut of the same networks.

    python experiments/faithfulness.py --quick     # the MLP, 3 seeds
    python experiments/faithfulness.py             # MLP, GELU MLP and CNN, 3 seeds
"""

from __future__ import annotations

import argparse
import statistics

import torch
import torch.nn.functional as F
from _digits import accuracy, load, make, train
from scipy.stats import spearmanr
from torch import Tensor, nn
from tqdm import tqdm

from torchbp import attribute
from torchbp.blame import Blame
from torchbp.tables import Table

METHODS = ("gradient", "taylor", "link", "logits", "secant")
SEGMENTS = (1, 8)
EPOCHS = 40


def units(blame: Blame) -> Tensor:
    """Blame of all hidden units, summed over samples: one long vector."""
    return torch.cat([blame.per_unit(layer) for layer in blame])


def correlations(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """Spearman correlation of each method with exact ablation."""
    truth = units(attribute(model, x, y, F.cross_entropy, method="ablation"))
    return {
        method: float(
            spearmanr(
                units(attribute(model, x, y, F.cross_entropy, method=method)), truth
            ).statistic
        )
        for method in METHODS
    }


def residuals(model: nn.Module, x: Tensor, y: Tensor) -> tuple[int, list[float]]:
    """Number of cuts, and the largest relative residual over them for 1 and 8 segments."""
    blames = [
        attribute(model, x, y, F.cross_entropy, "secant", layers="all", n_steps=k) for k in SEGMENTS
    ]
    return len(blames[0].residual), [max(b.residual.values()) for b in blames]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the MLP only")
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    options = parser.parse_args()
    torch.set_num_threads(2)
    names = ["mlp"] if options.quick else ["mlp", "gelu-mlp", "cnn"]
    rows, conserved = [], []
    progress = tqdm(total=len(names) * options.seeds, disable=None, desc="training and comparing")
    for name in names:
        found: dict[str, list[float]] = {m: [] for m in METHODS}
        reached = []
        for seed in range(options.seeds):
            training, validation = load(seed, torch.float64)
            model = make(name, seed, torch.float64)
            train(model, training, EPOCHS, seed)
            reached.append(accuracy(model, validation))
            for method, value in correlations(model, validation.x, validation.y).items():
                found[method].append(value)
            cuts, worst = residuals(model, validation.x, validation.y)
            conserved.append((name, seed, cuts, *worst))
            progress.update()
        for method, values in found.items():
            rows.append(
                (name, method, round(statistics.mean(values), 4), round(min(values), 4),
                 f"{100 * min(reached):.1f} %")
            )  # fmt: skip
    progress.close()
    title = (
        f"Spearman correlation with exact ablation, all hidden units, {options.seeds} seeds "
        f"(digits, {EPOCHS} epochs, float64)"
    )
    print(Table(("model", "method", "mean", "lowest", "accuracy >="), rows, title=title))
    columns = ("model", "seed", "cuts", *(f"{k} segments" for k in SEGMENTS))
    title = "largest relative error of sum(blame) = L(x) - L(0) over all cuts (secant, float64)"
    print(f"\n{Table(columns, conserved, title=title)}")


if __name__ == "__main__":
    main()
