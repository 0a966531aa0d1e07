"""Per-sample gradients of convolutions, in the form of :mod:`torchbp.ops.sample_factors`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchbp.ops.base import wide
from torchbp.ops.conv_gradients import grad_weight, windows
from torchbp.ops.sample_factors import Factor, Layout, fewer_products, ghost_norms


class Windows(Factor):
    """A convolution's: errors times windows of the input, summed over positions.

    Args:
        errors: ``(N, O, *positions)``, of what the windows were multiplied into.
        x: ``(N, C, *size)``, what the windows are cut from.
        weight: ``(O, C / groups, *kernel)``.
        settings: stride, padding before the first element, dilation, groups.
    """

    def __init__(self, errors: Tensor, x: Tensor, weight: Tensor, settings: Sequence[Any]) -> None:
        self.errors, self.x, self.settings = wide(errors), wide(x), settings
        self.shape, self.like = tuple(weight.shape), self.errors

    def arranged(self, layout: Layout) -> Factor | None:
        if layout.dim != 0 or self.x.dim() != len(self.shape):
            return None
        self.samples = layout.samples
        if len(self.x) == self.samples:
            self.errors, self.x = self.errors[:, None], self.x[:, None]
        else:
            self.errors, self.x = layout.first(self.errors), layout.first(self.x)
        return self

    def cost(self) -> int:
        positions = math.prod(self.errors.shape[3:]) * self.errors.shape[1]
        fan_in = self.x.shape[2] * math.prod(self.shape[2:])
        return super().cost() + positions * fan_in

    def pair(self, part: slice) -> tuple[Tensor, Tensor]:
        """Errors ``[n, groups, O / groups, P]`` and windows ``[n, groups, C K / groups, P]``."""
        *geometry, groups = self.settings
        errors, x, dims = self.errors[part], self.x[part], len(self.shape) - 2
        n, times = errors.shape[:2]
        cut = windows(x.flatten(0, 1), self.shape[2:], errors.shape[3:], *geometry)
        cut = cut.unflatten(0, (n, times)).unflatten(2, (groups, -1))
        # Positions last: rows of an image are copied whole.
        order = (0, 2, 3, *range(4 + dims, 4 + 2 * dims), 1, *range(4, 4 + dims))
        cut = cut.permute(order).reshape(n, groups, math.prod(self.shape[1:]), -1)
        errors = errors.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, *range(4, 4 + dims))
        return errors.reshape(n, groups, self.shape[0] // groups, -1), cut

    def tile(self, part: slice) -> Tensor:
        errors, x = self.errors[part], self.x[part]
        if x.device.type == "cpu":
            kernel, settings = self.shape[2:], self.settings
            with torch.no_grad():  # compiled kernels are for first derivatives
                found = [
                    grad_weight(*one, kernel, *settings) for one in zip(errors, x, strict=True)
                ]
            return torch.stack(found)
        errors, cut = self.pair(part)
        return (errors @ cut.mT).reshape(len(errors), *self.shape)

    def square_norms(self, memory: int) -> Tensor:
        fan_out, fan_in = self.shape[0] // self.settings[-1], math.prod(self.shape[1:])
        positions = self.errors.shape[1] * math.prod(self.errors.shape[3:])
        if not fewer_products(positions, fan_out, fan_in):
            return super().square_norms(memory)
        bytes_each = self.settings[-1] * (fan_in + 3 * positions) * positions
        step = max(1, memory // (bytes_each * self.like.element_size()))
        parts = range(0, self.samples, step)
        return torch.cat([ghost_norms(*self.pair(slice(n, n + step))) for n in parts])
