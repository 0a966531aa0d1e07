"""scikit-learn's handwritten digits, and the small networks the experiments train on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

from torchbp import BlameTracker
from torchbp.blame import Report


@dataclass
class Split:
    """Images ``[N, 64]`` in [0, 1] and labels ``[N]``."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)


def load(
    seed: int, dtype: torch.dtype = torch.float32, train: int = 1200, valid: int = 597
) -> tuple[Split, Split]:
    """Training and validation images, of 1,797 in all; ``seed`` shuffles."""
    digits = load_digits()
    x = torch.tensor(digits.data / 16.0, dtype=dtype)
    y = torch.tensor(digits.target, dtype=torch.int64)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    chosen, held = order[:train], order[train : train + valid]
    return Split(x[chosen], y[chosen]), Split(x[held], y[held])


def mlp(activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """64-64-64-10."""
    return nn.Sequential(
        nn.Linear(64, 64), activation(),
        nn.Linear(64, 64), activation(),
        nn.Linear(64, 10),
    )  # fmt: skip


def plain_cnn() -> nn.Sequential:
    """Two convolutions, max-pooling, and two linear layers."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(512, 64), nn.ReLU(),
        nn.Linear(64, 10),
    )  # fmt: skip


def cnn() -> nn.Sequential:
    """Two convolutions with batch norm, max-pooling, and two linear layers."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(512, 64), nn.ReLU(), nn.Dropout(0.2),
        nn.Linear(64, 10),
    )  # fmt: skip


MODELS: dict[str, Callable[[], nn.Sequential]] = {
    "mlp": mlp,
    "gelu-mlp": lambda: mlp(nn.GELU),
    "cnn": cnn,
    "plain-cnn": plain_cnn,
}


def make(name: str, seed: int, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """A model with reproducible initial weights."""
    torch.manual_seed(seed)
    return MODELS[name]().to(dtype)


def batches(n: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Positions of the samples of each batch of one epoch."""
    yield from torch.randperm(n, generator=generator).split(size)


def train(
    model: nn.Module,
    data: Split,
    epochs: int,
    seed: int,
    lr: float = 2e-3,
    batch: int = 64,
    weight_decay: float = 0.01,
) -> None:
    """Plain training, nothing tracked."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for index in batches(len(data), batch, generator):
            optimizer.zero_grad()
            F.cross_entropy(model(data.x[index]), data.y[index]).backward()
            optimizer.step()
    model.eval()


def train_tracked(
    model: nn.Module, data: Split, epochs: int, seed: int, desc: str, **options: Any
) -> Report:
    """Train with the tracker on at every step; ``options`` are the tracker's."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(data) // 64)
    model.train()
    with (
        BlameTracker(model, **options) as tracker,
        tqdm(total=steps, desc=desc, disable=None) as progress,
    ):
        for _ in range(epochs):
            for index in batches(len(data), 64, generator):
                loss = F.cross_entropy(model(data.x[index]), data.y[index])
                loss.backward()
                tracker.step(loss, targets=data.y[index], samples=index)
                optimizer.step()
                optimizer.zero_grad()
                progress.update()
    model.eval()
    return tracker.report()


@torch.no_grad()
def accuracy(model: nn.Module, data: Split) -> float:
    """Fraction of right answers, in the model's current mode."""
    return float((model(data.x).argmax(1) == data.y).double().mean())


def flip_labels(data: Split, generator: torch.Generator) -> Tensor:
    """Give a tenth of the samples a wrong label; returns which."""
    flipped = torch.randperm(len(data), generator=generator)[: len(data) // 10]
    shift = torch.randint(1, 10, (len(flipped),), generator=generator)
    data.y[flipped] = (data.y[flipped] + shift) % 10
    return flipped


def auroc(score: Tensor, positive: Tensor) -> float:
    """Probability that a positive scores higher than another sample (Mann-Whitney)."""
    ranks = score.argsort().argsort().double() + 1
    n = int(positive.sum())
    rest = len(score) - n
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * rest))
