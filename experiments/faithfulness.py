"""How well does each blame method predict what silencing a unit does to the loss?

Trains small networks on scikit-learn's digits and a small transformer on text, and compares every
method with exact ablation (the truth of removal) and, on the MLP, with Shapley values (the truth
of allocation): Spearman's rank correlation over all hidden units, blame summed over the data.
Captum's layer methods stand beside ours. Two controls: a method that means anything must give
other scores once the labels are permuted, or the weights are drawn anew.

    python experiments/faithfulness.py --quick     # the MLP alone
    python experiments/faithfulness.py             # MLP, GELU MLP, two CNNs, transformer
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import _characters
import _digits
import _rivals
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn
from tqdm import tqdm

from torchbp import attribute
from torchbp.blame import Blame
from torchbp.blame.methods import METHODS
from torchbp.tables import Table

#: Our methods and their settings, by the name they have in the table.
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "gradient": ("gradient", {}),
    "taylor": ("taylor", {}),
    "link": ("link", {}),
    "logits": ("logits", {}),
    "curvature, 4 draws": ("curvature", dict(estimate="montecarlo", draws=4)),
    "secant": ("secant", {}),
    "secant, layer off": ("secant", dict(baseline="layer")),
    "secant, layer off, 8 segments": ("secant", dict(baseline="layer", n_steps=8)),
    "conductance": ("conductance", {}),
    "layer_ig": ("layer_ig", {}),
    "internal_influence": ("internal_influence", {}),
    "lrp": ("lrp", {}),
}
#: Methods for one loss term per sample, and one that runs the network 50 times for each layer.
NOT_FOR_TOKENS = ("link", "logits", "layer_ig")
SEGMENTS = (1, 8)
PERMUTATIONS = 400


@dataclass
class Subject:
    """A trained model, the data it is judged on, and the same model with fresh weights."""

    model: nn.Module
    fresh: nn.Module
    x: Tensor
    y: Tensor
    note: str


@dataclass
class Scores:
    """One method's correlations, one entry per seed."""

    tool: str
    question: str
    ablation: list[float] = field(default_factory=list)
    shapley: list[float] = field(default_factory=list)
    fresh: list[float] = field(default_factory=list)
    permuted: list[float] = field(default_factory=list)


def digits(name: str, seed: int) -> Subject:
    """A network trained on 1,000 digits, judged on 397 others."""
    training, validation = _digits.load(seed, torch.float64, train=1000, valid=397)
    model, fresh = (_digits.make(name, s, torch.float64) for s in (seed, seed + 1000))
    _digits.train(model, training, 40, seed, weight_decay=0.0)
    accuracy = f"{100 * _digits.accuracy(model, validation):.1f} %"
    return Subject(model, fresh.eval(), validation.x, validation.y, accuracy)


def characters(seed: int) -> Subject:
    """A causal transformer judged on text it was trained on."""
    x, y, classes = _characters.load(400)
    models = []
    for s in (seed, seed + 1000):
        torch.manual_seed(s)
        models.append(_characters.Characters(classes).double().eval())
    _characters.train(models[0], x, y, 1500, seed)
    x, y = x[:48], y[:48]
    with torch.no_grad():
        note = f"loss {float(F.cross_entropy(models[0](x), y)):.2f}"
    return Subject(models[0], models[1], x, y, note)


def units(blame: Blame) -> Tensor:
    """Blame of all hidden units, summed over samples: one long vector."""
    return torch.cat([blame.per_unit(layer) for layer in blame])


def correlation(a: Tensor, b: Tensor) -> float:
    return float(spearmanr(a, b).statistic)


def methods(tokens: bool) -> dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]]:
    """Functions from model and data to the scores of all hidden units."""
    found: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {}

    def ours(label: str) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
        method, settings = OURS[label]
        return lambda m, x, y: units(attribute(m, x, y, F.cross_entropy, method, **settings))

    def theirs(label: str) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
        def solve(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            layers = [*attribute(model, x[:1], y[:1], F.cross_entropy, "gradient")]
            return _rivals.scores(label, model, x, y, layers)

        return solve

    for label in OURS:
        if not (tokens and label in NOT_FOR_TOKENS):
            found[label] = ours(label)
    if not tokens:
        found |= {label: theirs(label) for label in _rivals.METHODS}
    return found


def compare(subject: Subject, table: dict[str, Scores], shapley: bool, seed: int) -> None:
    """Add one model's correlations to every method's."""
    x, y = subject.x, subject.y
    exact = units(attribute(subject.model, x, y, F.cross_entropy, "ablation"))
    fair = None
    if shapley:
        options = dict(n_permutations=PERMUTATIONS, seed=seed)
        fair = units(attribute(subject.model, x, y, F.cross_entropy, "shapley", **options))
    # One draw of labels: its share of accidental agreement is the same for all methods.
    shuffled = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))]
    for label, solve in methods(x.dtype == torch.int64).items():
        scores = solve(subject.model, x, y)
        row = table.setdefault(label, Scores(*_origin(label)))
        row.ablation.append(correlation(scores, exact))
        if fair is not None:
            row.shapley.append(correlation(scores, fair))
        row.fresh.append(correlation(scores, solve(subject.fresh, x, y)))
        row.permuted.append(correlation(scores, solve(subject.model, x, shuffled)))


def _origin(label: str) -> tuple[str, str]:
    if label in _rivals.METHODS:
        return "captum", "-"
    return "torchbp", METHODS[OURS[label][0]].question


def residuals(subject: Subject) -> tuple[int, list[float]]:
    """Number of cuts, and the largest relative residual over them for 1 and 8 segments."""
    blames = [
        attribute(subject.model, subject.x, subject.y, F.cross_entropy, layers="all", n_steps=k)
        for k in SEGMENTS
    ]
    return len(blames[0].residual), [max(b.residual.values()) for b in blames]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the MLP only")
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    options = parser.parse_args()
    torch.set_num_threads(2)
    names = ["mlp"] if options.quick else ["mlp", "gelu-mlp", "plain-cnn", "cnn", "characters"]
    rows, conserved = [], []
    progress = tqdm(total=len(names) * options.seeds, disable=None, desc="training and comparing")
    for name in names:
        table: dict[str, Scores] = {}
        notes = []
        for seed in range(options.seeds):
            subject = characters(seed) if name == "characters" else digits(name, seed)
            notes.append(subject.note)
            compare(subject, table, name == "mlp", seed)
            conserved.append((name, seed, subject.note, *_flat(residuals(subject))))
            progress.update()
        for label, found in table.items():
            rows.append(
                (name, label, found.tool, found.question, _mean(found.ablation),
                 round(min(found.ablation), 3), _mean(found.shapley), _mean(found.fresh),
                 _mean(found.permuted))
            )  # fmt: skip
    progress.close()
    columns = ("model", "method", "from", "question", "vs ablation", "lowest", "vs Shapley",
               "weights anew", "labels permuted")  # fmt: skip
    title = (
        f"Spearman correlation over all hidden units, {options.seeds} seeds, float64: with exact "
        f"ablation, with Shapley values ({PERMUTATIONS} permutations), and of a method with itself "
        "after its model's weights were drawn anew or its labels permuted"
    )
    print(Table(columns, rows, title=title))
    columns = ("model", "seed", "reached", "cuts", *(f"{k} segments" for k in SEGMENTS))
    title = "largest relative error of sum(blame) = L(x) - L(0) over all cuts (secant, float64)"
    print(f"\n{Table(columns, conserved, title=title)}")


def _mean(values: list[float]) -> float | None:
    return round(statistics.mean(values), 3) if values else None


def _flat(found: tuple[int, list[float]]) -> tuple[float, ...]:
    return (found[0], *found[1])


if __name__ == "__main__":
    main()
