"""Rules that turn the numbers of a frame into sentences."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from torchbp.blame.frame import Frame, LayerFrame, class_name

Severity = Literal["info", "warning", "error"]

# "Concentrated": a sixteenth of the units carries half of the |blame|. Were blame normally
# distributed over the units, the largest sixteenth would carry 18 %; with a Laplace
# distribution, 24 %.
CONCENTRATED_UNITS = 1 / 16
CONCENTRATED_SHARE = 0.5
# Below 32 units a sixteenth is a unit or two, and half of the blame in one of them is no news.
CONCENTRATED_MIN_UNITS = 32

# "Culprit for a class": a fifth of what raises the loss of the class in a layer comes from one
# unit, and that unit carries at least four times an equal share (which guards narrow layers).
CLASS_SHARE = 0.2
CLASS_EQUAL_SHARES = 4.0

# Under one plain SGD learning rate such layers learn a thousand times slower or faster than the
# last one: no single rate serves both.
VANISHING_RATIO = 1e-3
EXPLODING_RATIO = 1e3


@dataclass(frozen=True)
class Finding:
    """One thing worth a look.

    Attributes:
        severity: ``"error"`` (the numbers are broken), ``"warning"`` (training is likely to
            suffer) or ``"info"``.
        layer: the module's name.
        unit: the unit's index, or ``None`` where the finding is about the layer.
        rule: name of the rule that found it.
        text: the finding in plain words, with its numbers.
    """

    severity: Severity
    layer: str
    unit: int | None
    rule: str
    text: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.text}"


def findings(frame: Frame, previous: Frame | None = None) -> list[Finding]:
    """Everything the rules find in a frame, the most severe first.

    Args:
        frame: the frame to look at.
        previous: an earlier frame of the same run; where given, changes since then are named.

    Returns:
        The findings: errors, warnings, infos; within each in the order of the forward pass.
    """
    found = [finding for rule in _RULES for finding in rule(frame, previous)]
    places = {name: place for place, name in enumerate(frame.layers)}
    severities = ("error", "warning", "info")
    return sorted(
        found, key=lambda f: (severities.index(f.severity), places.get(f.layer, len(places)))
    )


def nonfinite_layers(frame: Frame, previous: Frame | None) -> Iterator[Finding]:
    """Layers that were left out because NaN or infinity turned up in them."""
    for name in frame.nonfinite:
        yield Finding(
            "error",
            name,
            None,
            "nonfinite",
            f"layer {name}: activations or error signals held NaN or infinity at step "
            f"{frame.step}; the layer is left out of the blame.",
        )


def dead_units(frame: Frame, previous: Frame | None) -> Iterator[Finding]:
    """Units whose activation was exactly zero everywhere in the frame."""
    for name, layer in frame.layers.items():
        dead, total = _dead_count(layer), layer.zero.numel()
        if dead == 0:
            continue
        text = (
            f"layer {name}: {dead} of {total} units ({_percent(dead / total)}) were zero for all "
            f"{frame.samples} samples"
        )
        if previous is not None and name in previous.layers:
            change = dead - _dead_count(previous.layers[name])
            if change:
                more = f"{abs(change)} {'more' if change > 0 else 'fewer'}"
                text += f"; {more} than at step {previous.step}"
        unit = int((layer.zero >= 1).nonzero()[0]) if dead == 1 else None
        if unit is not None:
            text += f"; it is unit {unit}"
        yield Finding("warning", name, unit, "dead", text + ".")


def concentrated_blame(frame: Frame, previous: Frame | None) -> Iterator[Finding]:
    """Layers in which few units carry most of the absolute blame."""
    for name, layer in frame.layers.items():
        total = layer.blame.numel()
        if total < CONCENTRATED_MIN_UNITS:
            continue
        few = max(1, int(total * CONCENTRATED_UNITS))
        size = _numbers(layer.blame).abs()
        share = float(size.topk(few).values.sum() / size.sum())
        if share >= CONCENTRATED_SHARE:
            yield Finding(
                "info",
                name,
                None,
                "concentrated",
                f"layer {name}: {few} of {total} units carry {_percent(share)} of the absolute "
                "blame.",
            )


def class_culprits(frame: Frame, previous: Frame | None) -> Iterator[Finding]:
    """Per layer, the unit with the largest positive blame for one class, where it stands out."""
    for name, layer in frame.layers.items():
        if layer.per_class is None or layer.per_class.numel() == 0:
            continue
        raises = _numbers(layer.per_class).clamp(min=0)  # [C, U]
        units = raises.shape[1]
        label, unit = divmod(int(raises.argmax()), units)
        largest, whole = float(raises[label, unit]), float(raises[label].sum())
        if not largest > 0 or largest < max(CLASS_SHARE, CLASS_EQUAL_SHARES / units) * whole:
            continue
        yield Finding(
            "info",
            name,
            unit,
            "class_culprit",
            f"layer {name}: unit {unit} raises the loss of class "
            f"{class_name(frame.class_names, label)} most: "
            f"{largest:+.3g} over {frame.samples} samples, {_percent(largest / whole)} of all "
            "positive blame for this class in the layer.",
        )


def error_scale(frame: Frame, previous: Frame | None) -> Iterator[Finding]:
    """Layers whose error signal is far smaller or larger than that of the last layer."""
    scales = {name: layer_error_rms(layer) for name, layer in frame.layers.items()}
    if not scales:
        return
    last = list(scales)[-1]
    for name, scale in scales.items():
        if not scales[last] > 0:
            return
        ratio = scale / scales[last]
        if VANISHING_RATIO <= ratio <= EXPLODING_RATIO or ratio != ratio:
            continue
        rule = "vanishing" if ratio < 1 else "exploding"
        yield Finding(
            "warning",
            name,
            None,
            rule,
            f"layer {name}: the error signal is {rule}: its root mean square is {scale:.3g}, "
            f"{ratio:.2g} times that of the last layer, {last}.",
        )


_Rule = Callable[[Frame, "Frame | None"], Iterator[Finding]]
_RULES: tuple[_Rule, ...] = (
    nonfinite_layers,
    dead_units,
    error_scale,
    class_culprits,
    concentrated_blame,
)


def layer_error_rms(layer: LayerFrame) -> float:
    """Root mean square of the error signal over all units of a layer; 0 without units."""
    rms = _numbers(layer.error_rms)
    return float(rms.square().mean().sqrt()) if rms.numel() else 0.0


def _dead_count(layer: LayerFrame) -> int:
    return int((layer.zero >= 1).sum())


def _numbers(values: Tensor) -> Tensor:
    return values.detach().cpu().to(torch.float64)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
