"""Blame in TensorBoard's standard dashboards, through the user's own ``SummaryWriter``."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from torchbp.blame.frame import Frame, LayerFrame, class_name, worst_class
from torchbp.findings import findings, layer_error_rms
from torchbp.logging.heatmap import Array, History, draw
from torchbp.tables import Table, markdown_text

QUANTITIES = {
    "total": "signed blame per sample",
    "culprits": "blame of units that raise the loss",
    "helpers": "blame of units that lower the loss",
    "dead": "fraction of units that were always zero",
    "error_rms": "root mean square of the error signal",
}

# All lines of one run share a colour in TensorBoard's custom charts and are told apart by markers
# only, of which there are few.
_LAYERS_PER_CHART = 6
_HISTOGRAM_BINS = 64
_MOST_FINDINGS = 40


class BlameLogger:
    """Writes frames of blame as scalars, histograms, heat maps and tables.

    Scalars and histograms are written at every call of :meth:`log`. Heat maps and texts are larger
    and TensorBoard keeps few of them, so they are written at the first call, then every
    ``image_every`` calls, and from ``10 * image_every`` calls on whenever the number of calls has
    grown by a tenth. ``docs/tensorboard.md`` says what stands under which tag.

    A failing disk does not stop a training: after an ``OSError`` of the writer there is one
    ``UserWarning``, and nothing more is written.

    Args:
        writer: a ``torch.utils.tensorboard.SummaryWriter``, or anything with its ``add_scalar``,
            ``add_histogram``, ``add_image``, ``add_text``, ``add_custom_scalars`` and ``flush``.
            It stays the caller's: it is never closed here.
        image_every: fewest calls between two heat maps of a layer, at least 1.
        max_steps_in_heatmap: most columns of a heat map, even and at least 2. Each unit costs 4
            bytes of memory per column.
        max_units_in_heatmap: most rows of a heat map, at least 1.
        top: rows of the table of units, at least 1.

    Raises:
        ValueError: if one of the numbers is out of range.
    """

    def __init__(
        self,
        writer: Any,
        *,
        image_every: int = 10,
        max_steps_in_heatmap: int = 256,
        max_units_in_heatmap: int = 48,
        top: int = 20,
    ) -> None:
        for name, value in (
            ("image_every", image_every),
            ("max_units_in_heatmap", max_units_in_heatmap),
            ("top", top),
        ):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        if max_steps_in_heatmap < 2 or max_steps_in_heatmap % 2:
            raise ValueError(
                f"max_steps_in_heatmap is {max_steps_in_heatmap}, expected an even number from 2 on"
            )
        self._writer = writer
        self._image_every = image_every
        self._max_columns = max_steps_in_heatmap
        self._max_rows = max_units_in_heatmap
        self._top = top
        self._tags: dict[str, str] = {}
        self._histories: dict[str, History] = {}
        self._calls = 0
        self._next_pictures = 0
        self._last: Frame | None = None
        self._pictured: Frame | None = None
        self._draws = True
        self._writes = True

    def log(self, frame: Frame) -> None:
        """Writes one frame.

        Args:
            frame: the frame; it must not be changed afterwards.

        Raises:
            ValueError: if its step is not larger than that of the frame before. TensorBoard's
                loader drops the history of a tag whose steps repeat or fall.
        """
        if self._last is not None and frame.step <= self._last.step:
            raise ValueError(
                f"frame.step is {frame.step} after step {self._last.step}, "
                "expected steps that increase strictly"
            )
        first = self._last is None
        self._last = frame = replace(
            frame, layers={name: _on_cpu(layer) for name, layer in frame.layers.items()}
        )
        self._safely(lambda: self._write(frame, first))

    def flush(self) -> None:
        """Writes the heat maps and texts of the last frame, where due, and flushes the writer."""
        self._safely(self._write_rest)

    def close(self) -> None:
        """The same as :meth:`flush`; the writer stays open."""
        self.flush()

    def _safely(self, write: Callable[[], None]) -> None:
        if not self._writes:
            return
        try:
            # Sums of infinities are NaN, which is what the pictures are to show.
            with np.errstate(invalid="ignore", over="ignore"):
                write()
        except OSError as error:
            self._writes = False
            warnings.warn(
                f"blame is no longer logged, the event writer failed with "
                f"{type(error).__name__}: {error}",
                UserWarning,
                stacklevel=3,
            )

    def _write(self, frame: Frame, first: bool) -> None:
        self._name_tags([*frame.layers, *frame.nonfinite])
        if first:
            self._writer.add_custom_scalars(_layout(self._tags.values()))
        self._writer.add_scalar("blame/loss", frame.loss, global_step=frame.step)
        for name, layer in frame.layers.items():
            self._write_layer(frame, name, layer)
        for name in frame.nonfinite:
            if name in self._histories:
                history = self._histories[name]
                history.add(frame.step, np.full(history.units, np.nan), frame.samples)
        if self._calls >= self._next_pictures:
            self._write_pictures(frame)
            self._next_pictures = self._calls + max(self._image_every, self._calls // 10)
        self._calls += 1

    def _write_layer(self, frame: Frame, name: str, layer: LayerFrame) -> None:
        blame, tag = _array(layer.blame), self._tags[name]
        if not blame.size:
            return
        for quantity, value in layer_scalars(layer, frame.samples).items():
            self._writer.add_scalar(f"blame/{quantity}/{tag}", value, global_step=frame.step)
        per_sample = blame / max(frame.samples, 1)
        finite = per_sample[np.isfinite(per_sample)]
        if finite.size:
            self._writer.add_histogram(
                f"blame/units/{tag}", finite, global_step=frame.step, bins=_bins(finite)
            )
        history = self._histories.get(name)
        if history is None or history.units != blame.size:
            history = self._histories[name] = History(blame.size, self._max_columns)
        history.add(frame.step, blame, frame.samples)

    def _write_pictures(self, frame: Frame) -> None:
        self._writer.add_text("blame/top", top_units(frame, self._top).markdown(), frame.step)
        found = [
            f"- **{finding.severity}** {markdown_text(finding.text)}"
            for finding in findings(frame, self._pictured)
        ]
        if len(found) > _MOST_FINDINGS:
            found[_MOST_FINDINGS:] = [f"- and {len(found) - _MOST_FINDINGS} more"]
        text = "\n".join(found) or "Nothing stands out."
        self._writer.add_text("blame/findings", text, frame.step)
        for name in self._histories:
            if name in frame.layers or name in frame.nonfinite:
                self._write_heatmap(frame, name)
        self._pictured = frame

    def _write_heatmap(self, frame: Frame, name: str) -> None:
        if not self._draws:
            return
        try:
            picture = draw(self._histories[name], name or "(model)", self._max_rows)
        except ImportError:
            self._draws = False
            warnings.warn(
                "heat maps of blame are left out, they need Pillow: "
                "pip install 'torchbp[tensorboard]'",
                UserWarning,
                stacklevel=7,
            )
            return
        self._writer.add_image(
            f"blame/heatmap/{self._tags[name]}",
            picture,
            global_step=frame.step,
            dataformats="HWC",
        )

    def _write_rest(self) -> None:
        if self._last is not None and self._last is not self._pictured:
            self._write_pictures(self._last)
        self._writer.flush()

    def _name_tags(self, names: Iterable[str]) -> None:
        """Gives every layer a tag of its own, even if two names differ only in odd characters."""
        for name in names:
            if name in self._tags:
                continue
            clean = re.sub(r"[^\w.#-]", "_", name) or "(model)"
            tag, count = clean, 1
            while tag in self._tags.values():
                count += 1
                tag = f"{clean}-{count}"
            self._tags[name] = tag


def layer_scalars(layer: LayerFrame, samples: int) -> dict[str, float]:
    """The scalars of one layer, by the names in ``QUANTITIES``.

    A culprit is a unit whose blame over the frame is positive, a helper one whose blame is
    negative, so culprits and helpers add up to the total.
    """
    blame = _array(layer.blame) / max(samples, 1)
    return {
        "total": float(blame.sum()),
        "culprits": float(blame[blame > 0].sum()),
        "helpers": float(blame[blame < 0].sum()),
        "dead": float((_array(layer.zero) >= 1).mean()),
        "error_rms": layer_error_rms(layer),
    }


def top_units(frame: Frame, count: int) -> Table:
    """The units with the largest absolute blame over all layers of a frame.

    Args:
        frame: the frame.
        count: most rows.

    Returns:
        A table: layer, unit, blame per sample, share of the absolute blame of the layer's units
        in per cent, and the class whose loss the unit raises most, where there is one.
    """
    rows: list[tuple[float, str, int]] = []
    for name, layer in frame.layers.items():
        blame = _array(layer.blame)
        largest = np.argsort(-np.nan_to_num(np.abs(blame)), kind="stable")[:count]
        rows += [(float(blame[unit]), name, int(unit)) for unit in largest]
    rows.sort(key=lambda row: -np.nan_to_num(abs(row[0])))
    whole = {name: np.nansum(np.abs(_array(layer.blame))) for name, layer in frame.layers.items()}
    return Table(
        ("layer", "unit", "blame per sample", "share of layer (%)", "worst class"),
        [
            (
                name,
                unit,
                blame / max(frame.samples, 1),
                100 * abs(blame) / whole[name] if whole[name] else 0.0,
                _worst_class(frame, name, unit),
            )
            for blame, name, unit in rows[:count]
        ],
        title=f"Largest blame at step {frame.step}, {frame.samples} samples ({frame.method})",
        signed=("blame per sample",),
    )


def _worst_class(frame: Frame, name: str, unit: int) -> str | None:
    label = worst_class(frame.layers[name].per_class, unit)
    return None if label is None else class_name(frame.class_names, label)


def _layout(tags: Iterable[str]) -> Mapping[str, Mapping[str, list[object]]]:
    """Charts with one line per layer, for ``add_custom_scalars``."""
    names = list(tags)
    charts: dict[str, list[object]] = {}
    for quantity, meaning in QUANTITIES.items():
        for start in range(0, len(names), _LAYERS_PER_CHART):
            some = names[start : start + _LAYERS_PER_CHART]
            title = f"{quantity}: {meaning}"
            if len(names) > _LAYERS_PER_CHART:
                title += f" (layers {start + 1} to {start + len(some)})"
            # TensorBoard matches each entry as a regular expression from the start of a tag.
            lines = [f"^{re.escape(f'blame/{quantity}/{tag}')}$" for tag in some]
            charts[title] = ["Multiline", lines]
    return {"blame": charts}


def _bins(values: Array) -> Array:
    """Edges of histogram bins, narrow around zero, where most units lie.

    With edges of equal width one outlier would put all other units into a single bin.
    """
    limit = float(np.abs(values).max()) or 1.0
    roots = np.linspace(-1, 1, _HISTOGRAM_BINS + 1)
    return limit * np.sign(roots) * roots**2


def _on_cpu(layer: LayerFrame) -> LayerFrame:
    """The layer with what every call needs on the CPU; ``per_class`` is larger and waits."""
    return replace(
        layer,
        blame=layer.blame.detach().cpu(),
        zero=layer.zero.detach().cpu(),
        error_rms=layer.error_rms.detach().cpu(),
    )


def _array(values: Tensor) -> Array:
    return np.asarray(values.detach().cpu().double().numpy())
