"""Does blame find wrong labels? Flip a tenth of them, train, and rank the samples.

    python experiments/mislabelled.py [--seeds 3] [--epochs 25]

Suspicion is the tracker's loss ledger: the mean loss of each sample over the training. A second
table has the scores of the trained model beside it, gradient inner products with the validation
data (``influence``) among them.
"""

from __future__ import annotations

import argparse
from collections import defaultdict

import torch
import torch.nn.functional as F
from _digits import MODELS, auroc, flip_labels, load, make, train_tracked

from torchbp import attribute, convert
from torchbp.tables import Table

LEDGER = "loss over the training"


def suspicion(name: str, seed: int, epochs: int) -> dict[str, tuple[float, float]]:
    """Per score: its AUROC, and the hit rate among as many suspects as were planted."""
    data, valid = load(seed)
    generator = torch.Generator().manual_seed(seed)
    flipped = flip_labels(data, generator)
    model = convert(make(name, seed))
    report = train_tracked(model, data, epochs, seed, desc=f"{name}, seed {seed}", method="taylor")
    trained = attribute(
        model, data.x, data.y, F.cross_entropy, of="samples", validation=(valid.x, valid.y)
    )
    planted = torch.zeros(len(data), dtype=torch.bool)
    planted[flipped] = True
    found = {}
    for score, values in {LEDGER: report.suspicion, **trained}.items():
        values = -values if score == "margin" else values
        hits = planted[values.topk(len(flipped)).indices].double().mean()
        found[score] = auroc(values, planted), float(hits)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--models", nargs="+", default=["mlp", "cnn"], choices=[*MODELS])
    options = parser.parse_args()
    torch.set_num_threads(2)
    rows, areas = [], defaultdict(list)
    for name in options.models:
        for seed in range(options.seeds):
            found = suspicion(name, seed, options.epochs)
            area, hits = found[LEDGER]
            rows.append((name, seed, round(area, 4), f"{100 * hits:.0f} %"))
            for score, (area, hits) in found.items():
                areas[name, score].append((area, hits))
    title = f"wrong labels (10 %) on digits, {options.epochs} epochs"
    print(Table(("model", "seed", "AUROC", "found"), rows, title=title))
    means = []
    for (name, score), values in areas.items():
        area, hits = torch.tensor(values).mean(0).tolist()
        means.append((name, score, round(area, 4), f"{100 * hits:.0f} %"))
    title = "by score, mean over seeds; all but the first are of the trained model"
    print(f"\n{Table(('model', 'score', 'AUROC', 'found'), means, title=title)}")


if __name__ == "__main__":
    main()
