"""Why did the loss jump, and through whom? Plant a fault at one step of a training and ask.

    python experiments/loss_jump.py [--step 40] [--model mlp]

Two faults, each in one layer at one step: its learning rate is 1000 times too high, or the weights
of one of its units are overwritten with noise. Loss change allocation then names step, layer and
unit, with Simpson's rule along the path and with the secants between the two sets of weights.
"""

from __future__ import annotations

import argparse
import copy
from itertools import chain, count, islice

import torch
import torch.nn.functional as F
from _digits import Split, batches, load, make
from _digits import train as pretrain
from torch import nn
from tqdm import tqdm

from torchbp.blame.change import RULES, LossChange
from torchbp.tables import Table

LAYERS = {"mlp": "2", "gelu-mlp": "2", "cnn": "9", "plain-cnn": "7"}
UNIT = 5
SPIKE = 1000.0


def plant(model: nn.Sequential, layer: str, generator: torch.Generator) -> None:
    """Overwrite the weights of one unit with noise."""
    weight = model.get_submodule(layer).weight
    with torch.no_grad():
        noise = torch.randn(weight.shape[1:], generator=generator)
        weight[UNIT] = 5 * noise


def train(
    model: nn.Sequential, data: Split, fault: str, options: argparse.Namespace, rule: str
) -> LossChange:
    """Fine-tune with SGD, the fault at its step, every step's change of the loss allocated."""
    layer = LAYERS[options.model]
    chosen = [p for n, p in model.named_parameters() if n.startswith(f"{layer}.")]
    others = [p for n, p in model.named_parameters() if not n.startswith(f"{layer}.")]
    optimizer = torch.optim.SGD(
        [{"params": chosen}, {"params": others}], lr=options.lr, momentum=0.9
    )
    generator = torch.Generator().manual_seed(options.seed)
    probe = slice(0, 256)
    model.train()
    indices = chain.from_iterable(batches(len(data), 64, generator) for _ in count())
    with LossChange(model, data.x[probe], data.y[probe], F.cross_entropy, rule=rule) as change:
        progress = tqdm(islice(indices, options.steps), total=options.steps, disable=None)
        for step, index in enumerate(progress):
            optimizer.zero_grad()
            F.cross_entropy(model(data.x[index]), data.y[index]).backward()
            here = step == options.step
            optimizer.param_groups[0]["lr"] = (
                options.lr * SPIKE if here and fault == "learning rate" else options.lr
            )
            optimizer.step()
            if here and fault == "one unit":
                plant(model, layer, generator)
            change.step()
    return change


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="mlp", choices=[*LAYERS])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--step", type=int, default=40, help="where the fault is planted")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not 0 <= options.step < options.steps:
        parser.error(f"--step: expected 0 to {options.steps - 1}, got {options.step}")
    torch.set_num_threads(1)
    data, _ = load(options.seed)
    start = make(options.model, options.seed)
    pretrain(start, data, 5, options.seed)
    rows = []
    for fault in ("learning rate", "one unit"):
        for rule in RULES:
            change = train(copy.deepcopy(start), data, fault, options, rule)
            jump = change.jump()
            print(f"\n{fault}, rule {rule}\n\n{change.report()}\n\n{jump}")
            layer, unit, _ = jump.units[0]
            worst = max(abs(s.residual) for s in change.steps)
            part = f"{jump.layers[layer]:+.3f} of {jump.change:+.3f}"
            rows.append((fault, rule, jump.step, layer, unit, part, worst))
    columns = ("fault", "rule", "found step", "layer", "unit", "layer's share", "worst residual")
    planted = f"step {options.step}, layer {LAYERS[options.model]}, unit {UNIT} of 'one unit'"
    print(f"\n{Table(columns, rows, title=f'planted: {planted}')}")


if __name__ == "__main__":
    main()
