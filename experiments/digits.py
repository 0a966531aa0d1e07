"""Who is to blame? Train on handwritten digits with blame on, and ask.

python experiments/digits.py                  # MLP and CNN; logs for TensorBoard in runs/digits
python experiments/digits.py --plant-faults   # hide faults, and count how many blame finds
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from _digits import MODELS, Split, accuracy, auroc, flip_labels, load, make, train_tracked
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

import torchbp
from torchbp.blame import Blame, Report
from torchbp.findings import findings

DIGITS = [str(d) for d in range(10)]
DAMAGED = 5


def damage(model: nn.Sequential, data: Split, generator: torch.Generator) -> tuple[str, list[int]]:
    """Swap the sign of what five neurons send on; returns their layer and which they are.

    They are drawn from the more active half of the first fully connected hidden layer, for
    damage to a silent neuron changes nothing.
    """
    first, second = [m for m in model if isinstance(m, nn.Linear)][:2]
    names = {id(m): n for n, m in model.named_children()}
    layer = str(int(names[id(first)]) + 1)
    with torch.no_grad():
        activity = model[: int(layer) + 1](data.x).sum(0)
        active = activity.topk(len(activity) // 2).indices
        units = active[torch.randperm(len(active), generator=generator)[:DAMAGED]]
        second.weight[:, units] *= -1
    return layer, sorted(units.tolist())


def who_is_to_blame(name: str, model: nn.Module, report: Report, data: Split) -> None:
    """Layers, neurons, classes, the worst confusion and suspicious samples."""
    blame = torchbp.attribute(model, data.x, data.y, F.cross_entropy, "link", class_names=DIGITS)
    exact = torchbp.attribute(model, data.x, data.y, F.cross_entropy, "secant", layers="all")
    print(f"\n=== {name}: who is to blame for the loss on the validation set?\n")
    print(f"{blame.layers()}\n\n{blame.top(8)}\n")
    confusions(blame)
    print(f"\n{report.suspects(10)}\n")
    worst = max(exact.residual.values())
    print(
        f"conservation (secant, float32): at each of {len(exact.residual)} cuts the blame sums to "
        f"L(x) - L(0), largest relative error {worst:.1e}"
    )
    for finding in findings(report.frame)[:5]:
        print(f"- {finding}")


def confusions(blame: Blame) -> None:
    """The confusion that costs most, and the neurons behind it."""
    table = blame.confusions()
    if not len(table):
        print("no sample is confused")
        return
    true, predicted, count, loss = next(iter(table))
    print(f"worst confusion: {true} taken for {predicted} ({count} samples, loss {loss:.2f})")
    for layer in blame:
        units = blame.per_pair(layer, int(true), int(predicted))
        best = units.topk(3)
        culprits = ", ".join(
            f"{unit} ({value:+.2f})"
            for unit, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        )
        print(f"  layer {layer}: units {culprits}")


def count_found(
    model: nn.Sequential, report: Report, flipped: Tensor, data: Split, generator: torch.Generator
) -> None:
    """Print how many of the planted faults blame finds."""
    score = report.suspicion
    planted = torch.zeros(len(score), dtype=torch.bool)
    planted[flipped] = True
    suspects = score.topk(len(flipped)).indices
    hits = int(planted[suspects].sum())
    print(
        f"\nplanted {len(flipped)} wrong labels: {hits} are among the {len(flipped)} most "
        f"suspicious samples (AUROC {auroc(score, planted):.3f})"
    )
    broken = copy.deepcopy(model)
    layer, units = damage(broken, data, generator)
    print(f"damaged {DAMAGED} neurons of layer {layer}: {units}; "
          f"accuracy {accuracy(model, data):.3f} -> {accuracy(broken, data):.3f}")  # fmt: skip
    for method in ("link", "logits", "ablation"):
        blame = torchbp.attribute(
            broken, data.x, data.y, F.cross_entropy, method, layers=[layer]
        ).per_unit(layer)
        top = blame.topk(DAMAGED).indices.tolist()
        print(f"  {method:8} found {len({*top} & {*units})} of {DAMAGED}: most to blame are {top}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--plant-faults", action="store_true")
    parser.add_argument("--models", nargs="+", default=["mlp", "cnn"], choices=[*MODELS])
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--logdir", type=Path, default=Path("runs/digits"))
    options = parser.parse_args()
    torch.set_num_threads(2)
    started = time.strftime("%Y%m%d-%H%M%S")
    for name in options.models:
        training, validation = load(options.seed)
        generator = torch.Generator().manual_seed(options.seed)
        flipped = flip_labels(training, generator) if options.plant_faults else None
        model = torchbp.convert(make(name, options.seed))
        try:
            writer = SummaryWriter(str(options.logdir / f"{name}-{started}"))
        except OSError as problem:
            print(f"--logdir {options.logdir}: cannot be written ({problem})", file=sys.stderr)
            return 2
        report = train_tracked(
            model, training, options.epochs, options.seed,
            desc=f"training {name}", writer=writer, log_every=10, class_names=DIGITS,
        )  # fmt: skip
        writer.close()
        print(f"{name}: accuracy {accuracy(model, training):.3f} on the training set, "
              f"{accuracy(model, validation):.3f} on the validation set")  # fmt: skip
        who_is_to_blame(name, model, report, validation)
        if flipped is not None:
            count_found(model, report, flipped, validation, generator)
    print(f"\nSee it over time:  tensorboard --logdir {options.logdir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
