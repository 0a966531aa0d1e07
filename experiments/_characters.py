"""English text that ships with scikit-learn, and a small causal transformer that reads it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn import datasets
from torch import Tensor, nn

LENGTH = 32


def text() -> str:
    """The descriptions of scikit-learn's data sets: some 15,000 characters of prose and tables."""
    names = ("iris", "digits", "wine", "breast_cancer", "diabetes", "linnerud")
    return "".join(getattr(datasets, f"load_{name}")().DESCR for name in names)


def load(windows: int) -> tuple[Tensor, Tensor, int]:
    """Windows ``[windows, 32]`` of characters, those that follow, and the number of letters."""
    content = text()
    letters = sorted(set(content))
    ids = torch.tensor([letters.index(c) for c in content])
    starts = torch.arange(windows) * ((len(ids) - LENGTH - 1) // windows)
    x = torch.stack([ids[s : s + LENGTH] for s in starts.tolist()])
    y = torch.stack([ids[s + 1 : s + LENGTH + 1] for s in starts.tolist()])
    return x, y, len(letters)


class Block(nn.Module):
    """Pre-norm attention and MLP (Radford et al. 2019)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.act, self.down = (
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        shape = (n, t, self.heads, width // self.heads)
        q, k, v = (p.view(shape).transpose(1, 2) for p in self.qkv(self.norm1(x)).chunk(3, 2))
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mix(seen.transpose(1, 2).reshape(n, t, width))
        return x + self.down(self.act(self.up(self.norm2(x))))


class Characters(nn.Module):
    """Tokens ``[N, T]`` to logits ``[N, classes, T]`` of the next character."""

    def __init__(self, classes: int, width: int = 32, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(classes, width)
        self.place = nn.Parameter(torch.randn(LENGTH, width) * 0.1)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.blocks(self.embed(tokens) + self.place[: tokens.shape[1]])
        return self.out(self.norm(x)).transpose(1, 2)


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int, seed: int) -> None:
    """Plain training in batches of 32 windows."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        index = torch.randint(len(x), (32,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x[index]), y[index]).backward()
        optimizer.step()
    model.eval()
