"""What blame after the fact costs, against a plain forward and backward of the same model.

    python benchmarks/attribution.py [--threads 2] [--pairs 7] [--without-captum]

Prints two markdown tables. In the first, a ratio of 1.10 means 10 % more time than one training
step's forward and backward (parameter gradients included, optimizer not). The second sets one call
of ours, for all layers at once, against Captum layer by layer: every pair times another layer,
and Captum's time is the median layer's times their number.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from _paired import header, paired
from captum import attr
from torch import Tensor, nn
from tracker import CASES

from torchbp import attribute
from torchbp.blame.sample_gradients import sample_gradients
from torchbp.blame.weights import weight_blame

Work = Callable[[nn.Module, Tensor, Tensor], object]


def blame(method: str, **options: object) -> Work:
    return lambda model, x, y: attribute(model, x, y, F.cross_entropy, method, **options)


def absolute(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    found = weight_blame(model, x, y, F.cross_entropy)
    return [found.absolute(name) for name in found]


WORK: dict[str, Work] = {
    "taylor": blame("taylor"),
    "link": blame("link"),
    "curvature, 4 draws": blame("curvature", estimate="montecarlo", draws=4),
    "lrp": blame("lrp"),
    "secant, 1 segment": blame("secant"),
    "secant, 4 segments": blame("secant", n_steps=4),
    "conductance, 50 nodes": blame("conductance", n_steps=50),
    "per-sample gradient norms": lambda model, x, y: sample_gradients(
        model, x, y, F.cross_entropy
    ).square_norms(),
    "absolute blame of every weight": absolute,
}
#: Long enough that a single call per measurement is plenty.
SLOW = ("conductance, 50 nodes",)


class Loss(nn.Module):
    """A classifier with its loss, as Captum takes it: it repeats inputs, so labels must follow."""

    def __init__(self, model: nn.Module, targets: Tensor) -> None:
        super().__init__()
        self.model, self.targets = model, targets

    def forward(self, x: Tensor) -> Tensor:
        """``[N]`` losses."""
        output = self.model(x)
        repeated = self.targets.repeat(len(output) // len(self.targets))
        return F.cross_entropy(output, repeated, reduction="none")


def captum(method: str, whole: nn.Module, layer: nn.Module, x: Tensor) -> object:
    if method == "secant":
        return attr.LayerDeepLift(whole, layer).attribute(x)
    return attr.LayerConductance(whole, layer).attribute(
        x, n_steps=50, internal_batch_size=8 * len(x)
    )


def plain(model: nn.Module, x: Tensor, y: Tensor) -> None:
    F.cross_entropy(model(x), y).backward()
    for p in model.parameters():
        p.grad = None


def against_plain(pairs: int, only: str) -> None:
    print("\n| model | size | what | plain ms | ours ms | ratio |\n|---|---|---|---:|---:|---:|")
    for name in ("MLP", "CNN", "transformer"):
        size, make = CASES[name]
        for label, work in WORK.items():
            if only not in label:
                continue
            torch.manual_seed(0)
            model, x, y = make()
            model.eval()
            ratio, ms_plain, ms = paired(
                lambda m=model, x=x, y=y: plain(m, x, y),
                lambda m=model, x=x, y=y, work=work: work(m, x, y),
                pairs,
                seconds=0.01 if label in SLOW else 0.3,
            )
            print(f"| {name} | {size} | {label} | {ms_plain:.1f} | {ms:.1f} | {ratio:.3g} |",
                  flush=True)  # fmt: skip


def against_captum(pairs: int) -> None:
    print("\n| model | layers | ours | ms | Captum ms | Captum / ours |\n|---|--:|---|--:|--:|--:|")
    for name in ("MLP", "CNN", "transformer"):
        torch.manual_seed(0)
        model, x, y = CASES[name][1]()
        model.eval()
        found = attribute(model, x, y, F.cross_entropy, "gradient", layers="all")
        # Captum attributes neither to the input as a layer nor to a layer that returns a tuple.
        names = [
            name
            for name in found
            if name != "input" and not isinstance(model.get_submodule(name), nn.MultiheadAttention)
        ]
        whole = Loss(model, y)
        for method, theirs in (("secant", "DeepLIFT"), ("conductance", "conductance")):
            layers = itertools.cycle([model.get_submodule(n) for n in names])
            try:  # Captum's DeepLIFT has no rule for some models
                ratio, ms, ms_layer = paired(
                    lambda m=model, x=x, y=y, method=method, names=names: attribute(
                        m, x, y, F.cross_entropy, method, layers=names
                    ),
                    lambda w=whole, x=x, method=method, layers=layers: captum(
                        method, w, next(layers), x
                    ),
                    pairs,
                    seconds=0.0,
                )
            except (RuntimeError, AssertionError) as error:
                print(f"| {name} | {len(names)} | {method} | - | {type(error).__name__} | - |")
                continue
            label = f"{method} / {theirs}"
            print(f"| {name} | {len(names)} | {label} | {ms:.0f} | {ms_layer * len(names):.0f} | "
                  f"{ratio * len(names):.3g} |", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--only", help="just the rows of the first table that hold this text")
    parser.add_argument("--without-captum", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(header(options.threads, options.pairs) + ", float32")
    against_plain(options.pairs, options.only or "")
    if not (options.without_captum or options.only):
        against_captum(options.pairs)


if __name__ == "__main__":
    main()
