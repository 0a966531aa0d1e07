"""What the tracker knows after a step: the numbers, no policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor


def class_name(names: Sequence[str] | None, label: int) -> str:
    """Name of class ``label`` where it is known, else its number."""
    return str(names[label]) if names is not None and 0 <= label < len(names) else str(label)


def worst_class(per_class: Tensor | None, unit: int) -> int | None:
    """The true class whose loss a unit raises most; ``None`` if it raises none.

    Args:
        per_class: ``[C, U]`` blame by true class, or ``None`` where there are no classes.
        unit: which unit.
    """
    if per_class is None or not len(per_class):
        return None
    of_unit = per_class[:, unit]
    label = int(of_unit.argmax())
    return label if float(of_unit[label]) > 0 else None


@dataclass
class LayerFrame:
    """Statistics of one layer's units over the samples of a frame.

    Attributes:
        blame: ``[U]`` signed blame, summed over samples (in units of the loss).
        absolute: ``[U]`` sum over samples of ``|blame|``.
        square: ``[U]`` sum over samples of ``blame²``.
        zero: ``[U]`` fraction of activations that are exactly zero, in ``[0, 1]``.
        activation_rms: ``[U]`` root mean square of the activation.
        error_rms: ``[U]`` root mean square of the error signal ``∂l_n/∂a`` (un-averaged loss).
        per_class: ``[C, U]`` signed blame summed over the samples of each true class, or ``None``
            where the targets are not classes.
    """

    blame: Tensor
    absolute: Tensor
    square: Tensor
    zero: Tensor
    activation_rms: Tensor
    error_rms: Tensor
    per_class: Tensor | None = None


@dataclass
class Frame:
    """The blame of one step, or of many steps added up.

    Attributes:
        step: the training step (the last one of several).
        method: name of the blame method.
        samples: how many samples the sums run over.
        loss: mean of the per-sample losses.
        layers: by module name, in the order of the forward pass.
        class_names: names of the classes, where known.
        nonfinite: layers whose activations or error signals held NaN or infinity at this step;
            they are left out of ``layers``.
    """

    step: int
    method: str
    samples: int
    loss: float
    layers: dict[str, LayerFrame] = field(default_factory=dict)
    class_names: Sequence[str] | None = None
    nonfinite: tuple[str, ...] = ()
