"""A training step of converted real models against the same models unconverted.

``python benchmarks/models.py [--models NAME...] [--threads 2] [--pairs 9]``
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from _paired import header, paired
from _zoo import MISSING, MODELS, Subject

import torchbp

#: Factor on the sizes that the checks use.
SCALE = {"vit_b_16": 2, "swin_t": 2, "convnext_tiny": 2}


def step(subject: Subject) -> Callable[[], object]:
    """One forward and backward pass in training mode."""
    subject.model.train()

    def call() -> None:
        subject.model.zero_grad(set_to_none=True)
        subject.run()[1].backward()

    return call


def main() -> None:
    """Print one row per model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=[*MODELS], default=[*MODELS])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(header(options.threads, options.pairs))
    print("\n| model | size | layers converted | torch ms | torchbp ms | ours / torch |")
    print("|---|---|--:|--:|--:|--:|")
    for name in options.models:
        torch.manual_seed(0)
        theirs = MODELS[name](SCALE.get(name, 4))
        ours = copy.deepcopy(theirs)
        torchbp.convert(ours.model)
        report = list(torchbp.conversion_report(ours.model))
        swapped = f"{sum(row[2] == 'torchbp' for row in report)}/{len(report)}"
        ratio, before, after = paired(step(theirs), step(ours), options.pairs, seconds=0.2)
        print(
            f"| {name} | {theirs.size} | {swapped} | {before:.1f} | {after:.1f} | {ratio:.2f} |",
            flush=True,
        )
    if MISSING:
        print(f"\nnot timed, for their packages are missing: {', '.join(MISSING)}")


if __name__ == "__main__":
    main()
