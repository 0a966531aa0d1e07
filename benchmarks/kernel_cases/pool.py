"""Max pooling, forward and backward: torchbp's op against eager's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

import torchbp.functional as B

Call = Callable[[], object]
Case = tuple[str, str, Call, Call, int]

SETTINGS = {"2x2, stride 2": (2, 2, 0), "3x3, stride 2": (3, 2, 1), "3x3, stride 1": (3, 1, 1)}


def cases(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Case]:
    """Max pooling of about ``shape[0] * shape[1]`` elements in 64 planes.

    Args:
        shape: of a matrix with as many elements as the images have.
        dtype: of all tensors.

    Yields:
        Name, size, a call of ours, one of eager's, and the bytes that have to be moved: forward
        reads the input and writes the maxima, with a byte each for backward; backward reads the
        errors and these bytes, and writes the gradient.
    """
    side = max(8, int((shape[0] * shape[1] / 64) ** 0.5))
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(4, 16, side, side, dtype=dtype).contiguous(memory_format=layout)
        x.requires_grad_()
        for name, settings in SETTINGS.items():
            grad = torch.randn_like(F.max_pool2d(x.detach(), *settings))

            def both(home: Any, x: Any = x, s: Any = settings, g: Any = grad) -> Call:
                return lambda: torch.autograd.grad(home.max_pool2d(x, *s), x, g)

            last = ", channels last" if layout == torch.channels_last else ""
            label = f"4x16x{side}x{side} {str(dtype).removeprefix('torch.')}"
            moved = 2 * (x.numel() + grad.numel()) * x.element_size() + 2 * grad.numel()
            yield f"max_pool2d {name}{last}", label, both(B), both(F), moved
