"""Varied float64 models with inputs and an objective, ours and Captum's way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from models import cnn, mlp, residual
from torch import Tensor, nn

from torchbp import attribute, convert


@dataclass
class Case:
    model: nn.Module
    inputs: tuple[Tensor, ...]
    y: Tensor
    loss: bool = True  # attribute the loss, or the logit y
    baselines: tuple[Any, ...] | None = None
    extra: tuple[Any, ...] = ()  # further arguments, which do not move
    skipped: tuple[str, ...] = ()  # layers that run twice, or return what Captum cannot read

    def forward(self, *args: Any) -> Tensor:
        output = self.model(*args)
        y = self.y.repeat(len(output) // len(self.y))
        if self.loss:
            return F.cross_entropy(output, y, reduction="none")
        return output[torch.arange(len(output)), y]

    def blame(self, method: str, **settings: Any) -> Any:
        def logit(z: Tensor, y: Tensor) -> Tensor:
            return z[torch.arange(len(z)), y]

        if method in ("conductance", "layer_ig", "internal_influence", "secant"):
            given = self.baselines or (0,) * len(self.inputs)
            settings["baseline"] = (*given, *self.extra)
        return attribute(
            self.model, (*self.inputs, *self.extra), self.y,
            F.cross_entropy if self.loss else logit, method,
            layers=settings.pop("layers", "all"), of="elements", **settings,
        )  # fmt: skip

    def layers(self, blame: Any) -> list[str]:
        alone = {name.partition("#")[0] for name in blame} - {*self.skipped} - {"input"}
        return [name for name in blame if name in alone]


def x(*shape: int) -> Tensor:
    return torch.randn(*shape)


def labels(n: int, classes: int) -> Tensor:
    return torch.randint(classes, (n,))


def smooth_mlp() -> Case:
    model = nn.Sequential(
        nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Softplus(), nn.Linear(7, 6), nn.ELU(),
        nn.Linear(6, 4), nn.Sigmoid(), nn.Linear(4, 3),
    )  # fmt: skip
    model(x(20, 5) * 2 + 1)
    return Case(model.eval(), (x(6, 5),), labels(6, 3), loss=False, baselines=(x(1, 5),))


def conv1d() -> Case:
    model = nn.Sequential(
        nn.Conv1d(4, 6, 3, groups=2, dilation=2), nn.GroupNorm(2, 6), nn.Hardswish(),
        nn.MaxPool1d(2), nn.Conv1d(6, 4, 2, stride=2), nn.Mish(), nn.AdaptiveAvgPool1d(2),
        nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip
    return Case(model, (x(5, 4, 14),), labels(5, 3), baselines=(0.3,))


ATTENTION = ("encoder.layers.0.self_attn", "encoder.layers.1.self_attn")


class Encoder(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, **settings)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(tokens).mean(1))


def encoder() -> Case:
    model = Encoder(activation="gelu", norm_first=False).eval()
    return Case(model, (x(4, 5, 8),), labels(4, 3), skipped=ATTENTION)


def encoder_norm_first() -> Case:
    model = Encoder(norm_first=True).eval()
    return Case(model, (x(4, 5, 8),), labels(4, 3), loss=False, skipped=ATTENTION)


class Recurrent(nn.Module):
    def __init__(self, kind: Any, **settings: Any) -> None:
        super().__init__()
        self.enter = nn.Linear(3, 4)
        self.rnn = kind(4, 5, batch_first=True, **settings)
        self.head = nn.Linear(10 if settings.get("bidirectional") else 5, 3)

    def forward(self, sequence: Tensor) -> Tensor:
        return self.head(self.rnn(self.enter(sequence).tanh())[0].mean(1))


def lstm() -> Case:
    return Case(Recurrent(nn.LSTM, num_layers=2), (x(4, 6, 3),), labels(4, 3), skipped=("rnn",))


def gru() -> Case:
    model = Recurrent(nn.GRU, bidirectional=True)
    return Case(model, (x(4, 6, 3),), labels(4, 3), loss=False, skipped=("rnn",))


class Attending(nn.Module):
    """Functional attention with a floating mask, which is an argument but no input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.head = nn.Linear(6, 4), nn.Linear(6, 8), nn.Linear(4, 3)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        q, (k, v) = self.q(tokens), self.kv(tokens).chunk(2, -1)
        weights = (q @ k.mT * 0.5 + mask).softmax(-1)
        return self.head(F.silu(weights @ v).amax(1))


def attending() -> Case:
    mask = torch.zeros(4, 5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), -50.0)
    return Case(Attending(), (x(4, 5, 6),), labels(4, 3), extra=(mask,))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.both = nn.Linear(3, 4), nn.Linear(2, 4), nn.Bilinear(4, 4, 5)
        self.act, self.head = nn.LeakyReLU(), nn.Linear(5, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.head(self.act(self.both(self.a(left).relu(), self.b(right))))


def two_inputs() -> Case:
    return Case(Two(), (x(5, 3), x(5, 2)), labels(5, 3), baselines=(0.5, x(5, 2)))


def plain(make: Callable[..., Any], **settings: Any) -> Callable[[], Case]:
    def made() -> Case:
        model, inputs, y = make()
        return Case(model, (inputs,), y, **settings)

    return made


def converted(make: Callable[[], Case]) -> Callable[[], Case]:
    def made() -> Case:
        case = make()
        convert(case.model)
        return case

    return made


CASES: dict[str, Callable[[], Case]] = {
    "mlp": plain(mlp),
    "cnn": plain(cnn, loss=False),
    "residual": plain(residual, skipped=("inner",)),
    "smooth_mlp": smooth_mlp,
    "conv1d": conv1d,
    "encoder": encoder,
    "encoder_norm_first": encoder_norm_first,
    "lstm": lstm,
    "gru": gru,
    "attending": attending,
    "two_inputs": two_inputs,
    "converted_cnn": converted(plain(cnn)),
    "converted_encoder": converted(encoder),
    "converted_lstm": converted(lstm),
}


def close(ours: Tensor, other: Any, tolerance: float) -> None:
    other = other[0] if isinstance(other, tuple) else other
    torch.testing.assert_close(
        ours, other.detach(), rtol=tolerance, atol=tolerance * float(other.detach().abs().max())
    )
