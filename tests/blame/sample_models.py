"""Models for the tests of samples, and their gradients by a loop over samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from models import cnn, mlp
from torch import Tensor, nn


class Tied(nn.Module):
    """A small language model whose decoder is its embedding, padding left out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5, padding_idx=0)
        self.norm = nn.LayerNorm(5)
        self.mix = nn.Linear(5, 5)
        self.decode = nn.Linear(5, 7, bias=False)
        self.decode.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.norm(self.embed(tokens))
        return self.decode(torch.tanh(self.mix(h)) + h).transpose(1, 2)


class Recurrent(nn.Module):
    """An LSTM and a classifier on its last step."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def tied() -> tuple[nn.Module, Tensor, Tensor]:
    tokens = torch.randint(7, (6, 5))
    tokens[:, -1] = 0
    return Tied().double(), tokens, tokens.roll(-1, 1)


def lstm() -> tuple[nn.Module, Tensor, Tensor]:
    x = torch.randn(6, 4, 4, dtype=torch.float64)
    return Recurrent().double(), x, torch.randint(3, (6,))


SAMPLE_MODELS = {"mlp": mlp, "cnn": cnn, "tied": tied, "lstm": lstm}


def looped_gradients(
    model: nn.Module, x: Tensor, y: Tensor, names: Sequence[str] | None = None
) -> tuple[Tensor, Tensor]:
    """``[N, parameters]`` gradients and ``[N]`` losses, one sample at a time through autograd."""
    parameters = [p for n, p in model.named_parameters() if names is None or n in names]
    rows, losses = [], []
    for n in range(len(x)):
        loss = F.cross_entropy(model(x[n : n + 1]), y[n : n + 1], reduction="sum")
        grads = torch.autograd.grad(loss, parameters)
        rows.append(torch.cat([g.flatten() for g in grads]))
        losses.append(loss.detach())
    return torch.stack(rows), torch.stack(losses)
