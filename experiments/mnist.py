"""A published CNN that errs on 15 of MNIST-5k's images: who is to blame for each mistake?

For every misread digit: the unit that `link` holds most responsible, what silencing it really does
(exact ablation), and where in the image `secant` sees the loss come from, as a picture.

    python experiments/mnist.py --picture mistakes.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from _pretrained import digit_cnn, mnist
from torch import Tensor, nn

from torchbp import attribute
from torchbp.blame import Blame
from torchbp.tables import Table


def mistakes(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Positions of the images the model misreads."""
    with torch.no_grad():
        said = torch.cat([model(part).argmax(1) for part in x.split(500)])
    return (said != y).nonzero().flatten()


def worst_units(blame: Blame, exact: Blame) -> Table:
    """Per mistake: the unit with the highest blame, and what silencing it would do."""
    said = blame.predictions().tolist()
    rows = []
    for n, true in enumerate(blame.targets.tolist()):
        best = max(((float(v[n].max()), int(v[n].argmax()), name) for name, v in blame.items()))
        value, unit, layer = best
        loss = float(blame.losses[n])
        without = loss - float(exact[layer][n, unit])
        rows.append((n, true, said[n], loss, layer, unit, value, without))
    columns = ("mistake", "true", "said", "loss", "layer", "unit", "blame", "loss without it")
    return Table(columns, rows, title="the worst culprit of each mistake (link)", signed=["blame"])


def picture(path: Path, x: Tensor, blame: Blame) -> None:
    """The misread digits with the blame of every pixel over them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("blame", ["#2178c8", "#ffffff", "#e66101"])
    said, values = blame.predictions(), blame["input"][:, 0]
    figure, axes = plt.subplots(3, 10, figsize=(12, 4.4))
    for axis in axes.flat:
        axis.axis("off")
    for n in range(min(len(x), 15)):
        left, right = axes[n // 5, 2 * (n % 5)], axes[n // 5, 2 * (n % 5) + 1]
        left.imshow(x[n, 0], cmap="gray_r")
        left.set_title(f"{int(blame.targets[n])}, read as {int(said[n])}", fontsize=9)
        top = float(values[n].abs().max())
        right.imshow(values[n], cmap=colours, vmin=-top, vmax=top)
        right.set_title(f"loss {float(blame.losses[n]):.2f}", fontsize=9)
    figure.suptitle("Pixels to blame: orange raises the loss, blue lowers it (secant)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--picture", type=Path, metavar="FILE", help="write a PNG of the mistakes")
    options = parser.parse_args()
    model, (x, y) = digit_cnn(), mnist()
    wrong = mistakes(model, x, y)
    print(f"{len(wrong)} of {len(x)} images are misread ({100 * len(wrong) / len(x):.1f} %)\n")
    x, y = x[wrong], y[wrong]
    print(attribute(model, x, y, F.cross_entropy, of="classes").top(8), "\n")
    blame = attribute(model, x, y, F.cross_entropy, "link")
    exact = attribute(model, x, y, F.cross_entropy, "ablation")
    print(worst_units(blame, exact), "\n")
    print(blame.top(8), "\n")
    pixels = attribute(model, x, y, F.cross_entropy, "secant", of="inputs", baseline=x.min())
    print(pixels.check().conservation())
    if options.picture:
        picture(options.picture, x, pixels)
        print(f"\nwrote {options.picture}")


if __name__ == "__main__":
    main()
