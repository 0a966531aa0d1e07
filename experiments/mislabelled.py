"""Does blame find wrong labels? Flip a tenth of them, train, and rank the samples.

    python experiments/mislabelled.py [--seeds 3] [--epochs 25]

Suspicion is the tracker's loss ledger: the mean loss of each sample over the training.
"""

from __future__ import annotations

import argparse

import torch
from _digits import MODELS, auroc, flip_labels, load, make, train_tracked

from torchbp import convert
from torchbp.tables import Table


def suspicion(name: str, seed: int, epochs: int) -> tuple[float, float]:
    """AUROC of the suspicion score, and the hit rate among as many suspects as were planted."""
    data, _ = load(seed)
    generator = torch.Generator().manual_seed(seed)
    flipped = flip_labels(data, generator)
    model = convert(make(name, seed))
    report = train_tracked(model, data, epochs, seed, desc=f"{name}, seed {seed}", method="taylor")
    score = report.suspicion
    planted = torch.zeros(len(data), dtype=torch.bool)
    planted[flipped] = True
    hits = planted[score.topk(len(flipped)).indices].double().mean()
    return auroc(score, planted), float(hits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--models", nargs="+", default=["mlp", "cnn"], choices=[*MODELS])
    options = parser.parse_args()
    torch.set_num_threads(2)
    rows = []
    for name in options.models:
        for seed in range(options.seeds):
            area, hits = suspicion(name, seed, options.epochs)
            rows.append((name, seed, round(area, 4), f"{100 * hits:.0f} %"))
    title = f"wrong labels (10 %) on digits, {options.epochs} epochs"
    print(Table(("model", "seed", "AUROC", "found"), rows, title=title))


if __name__ == "__main__":
    main()
