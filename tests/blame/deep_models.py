"""Small float64 models with branches, attention, recurrence and reuse, with inputs and targets."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Problem = tuple[nn.Module, Tensor, Tensor]


class Block(nn.Module):
    """Two convolutions with batch norm around a skip connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.act1, self.act2 = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        branch = self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x)))))
        return self.act2(branch + x)


def residual_cnn() -> Problem:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), Block(4), nn.MaxPool2d(2),
        Block(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    ).double()  # fmt: skip
    for _ in range(3):  # running statistics other than 0 and 1
        model(torch.randn(6, 2, 6, 6, dtype=torch.float64))
    return model.eval(), torch.randn(4, 2, 6, 6, dtype=torch.float64), torch.randint(3, (4,))


class Attention(nn.Module):
    """Causal self-attention with two heads, spelled out."""

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        self.register_buffer("later", later)
        self.heads = (length, 2, width // 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).reshape(-1, *self.heads).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        scores = (q @ k.transpose(-1, -2)) * self.heads[2] ** -0.5
        weights = scores.masked_fill(self.later, float("-inf")).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(-1, self.heads[0], 2 * self.heads[2]))


class PreNorm(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, length)
        self.up, self.act, self.down = nn.Linear(width, 12), nn.GELU(), nn.Linear(12, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(self.act(self.up(self.norm2(x))))


class Swap(nn.Module):
    """``[N, T, C]`` to the ``[N, C, T]`` that cross-entropy takes for tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def causal_transformer() -> Problem:
    model = nn.Sequential(
        nn.Linear(5, 8), PreNorm(8, 6), PreNorm(8, 6), nn.LayerNorm(8), nn.Linear(8, 7), Swap()
    ).double()
    return model, torch.randn(3, 6, 5, dtype=torch.float64), torch.randint(7, (3, 6))


class Reused(nn.Module):
    """One Linear, three times."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.inner(x))
        x = x + torch.sigmoid(self.inner(x))
        return self.head(torch.relu(self.inner(x)))


def reused() -> Problem:
    return Reused().double(), torch.randn(5, 6, dtype=torch.float64), torch.randint(4, (5,))


class Last(nn.Module):
    """An LSTM of two layers and directions, and a Linear that reads its mean."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0].mean(1))


def lstm() -> Problem:
    return Last().double(), torch.randn(4, 5, 3, dtype=torch.float64), torch.randint(3, (4,))


class PlainLast(nn.Module):
    """The same as :class:`Last`, gate by gate, with a module for each layer and direction."""

    def __init__(self, model: Last, length: int) -> None:
        super().__init__()
        self.lstm, self.head, self.length = Unrolled(model.lstm, length), model.head, length

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x).mean(1))


class Unrolled(nn.Module):
    """``torch.nn.LSTM`` (two layers, two directions, batch first) as plain functions."""

    def __init__(self, lstm: nn.LSTM, length: int) -> None:
        super().__init__()
        self.length, self.hidden = length, lstm.hidden_size
        self.of_x, self.of_h = nn.ModuleDict(), nn.ModuleDict()
        for k in ("l0", "l0_reverse", "l1", "l1_reverse"):
            for kind, maps in (("ih", self.of_x), ("hh", self.of_h)):
                weight = getattr(lstm, f"weight_{kind}_{k}")
                maps[k] = nn.Linear(weight.shape[1], weight.shape[0])
                maps[k].weight, maps[k].bias = weight, getattr(lstm, f"bias_{kind}_{k}")
        self.whole = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for layer in ("l0", "l1"):
            ahead = self.direction(x, layer, range(self.length))
            back = self.direction(x, f"{layer}_reverse", range(self.length - 1, -1, -1))
            x = torch.cat([ahead, back], 2)
        return self.whole(x)

    def direction(self, x: Tensor, name: str, times: range) -> Tensor:
        outputs, h, c, d = {}, None, None, self.hidden
        for t in times:
            beside = self.of_h[name].bias if h is None else self.of_h[name](h)
            gates = self.of_x[name](x[:, t]) + beside
            i, f, o = (torch.sigmoid(gates[:, k * d : (k + 1) * d]) for k in (0, 1, 3))
            g = torch.tanh(gates[:, 2 * d : 3 * d])
            c = i * g if c is None else f * c + i * g
            h = outputs[t] = o * torch.tanh(c)
        return torch.stack([outputs[t] for t in range(self.length)], 1)


DEEP = {
    "residual cnn": residual_cnn,
    "causal transformer": causal_transformer,
    "reused linear": reused,
    "lstm": lstm,
}
