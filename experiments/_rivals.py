"""Captum's layer methods, asked the same question: blame of every unit for the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from captum import attr
from torch import Tensor, nn

from torchbp.blame.capture import per_unit, unit_dim


class Loss(nn.Module):
    """A classifier with its loss: ``[N]`` losses of ``[N, ...]`` inputs.

    Captum evaluates several points of a path at once, so labels are repeated as often.
    """

    def __init__(self, model: nn.Module, targets: Tensor) -> None:
        super().__init__()
        self.model, self.targets = model, targets

    def forward(self, x: Tensor) -> Tensor:
        output = self.model(x)
        repeated = self.targets.repeat(len(output) // len(self.targets))
        return F.cross_entropy(output, repeated, reduction="none")


METHODS: dict[str, Callable[[nn.Module, nn.Module], attr.LayerAttribution]] = {
    "LayerGradientXActivation": attr.LayerGradientXActivation,
    "LayerDeepLift": attr.LayerDeepLift,
    "LayerConductance": attr.LayerConductance,
    "LayerIntegratedGradients": attr.LayerIntegratedGradients,
    "InternalInfluence": attr.InternalInfluence,
}


def scores(method: str, model: nn.Module, x: Tensor, y: Tensor, layers: Sequence[str]) -> Tensor:
    """Attribution of every unit, summed over samples and positions: the layers' one after another.

    Args:
        method: a key of :data:`METHODS`.
        model: the model.
        x: inputs.
        y: labels.
        layers: names of the layers, as ``model.named_modules()`` gives them.
    """
    whole = Loss(model, y)
    found = []
    for name in layers:
        layer = model.get_submodule(name)
        values = METHODS[method](whole, layer).attribute(x)
        values = (values[0] if isinstance(values, tuple) else values).detach()
        found.append(per_unit(values, unit_dim(layer, values, None)).sum(0))
    return torch.cat(found)
