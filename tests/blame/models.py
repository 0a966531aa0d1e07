"""Small float64 models that the blame tests share, with inputs and targets."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def mlp() -> tuple[nn.Sequential, Tensor, Tensor]:
    model = nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.GELU(), nn.Linear(7, 4)
    ).double()
    return model, torch.randn(9, 6, dtype=torch.float64), torch.randint(4, (9,))


def cnn() -> tuple[nn.Sequential, Tensor, Tensor]:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 5, 3), nn.SiLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Dropout(0.3),
        nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3),
    ).double()  # fmt: skip
    for _ in range(3):  # running statistics other than 0 and 1
        model(torch.randn(5, 2, 9, 9, dtype=torch.float64))
    return model.eval(), torch.randn(7, 2, 9, 9, dtype=torch.float64), torch.randint(3, (7,))


class Residual(nn.Module):
    """A skip connection, a functional call, and a Linear that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.act, self.head = nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.act(self.inner(x))
        return self.head(torch.nn.functional.silu(self.inner(x)) * 0.5 + x)


def residual() -> tuple[nn.Module, Tensor, Tensor]:
    return Residual().double(), torch.randn(8, 6, dtype=torch.float64), torch.randint(3, (8,))


MODELS = {"mlp": mlp, "cnn": cnn, "residual": residual}
