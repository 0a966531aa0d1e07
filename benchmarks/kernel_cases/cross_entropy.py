"""Cross-entropy, log-softmax and NLL: forward and backward, through autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from torchbp import functional as TF

Case = tuple[str, str, Callable[[], object], Callable[[], object], int]


def cases(shape: tuple[int, int], dtype: torch.dtype) -> Iterator[Case]:
    """Rows x classes; the bytes are logits read twice and a gradient written."""
    z = torch.randn(shape).to(dtype).requires_grad_()
    target = torch.randint(shape[1], shape[:1])
    weight = torch.rand(shape[1]).to(dtype) + 0.5
    size = f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"
    moved = 3 * z.numel() * z.element_size()

    def both(loss: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(z), z)

    for name, settings in (
        ("cross_entropy", {}),
        ("cross_entropy weighted, smoothed", {"weight": weight, "label_smoothing": 0.1}),
    ):
        yield (
            name,
            size,
            both(lambda z, s=settings: TF.cross_entropy(z, target, **s)),
            both(lambda z, s=settings: F.cross_entropy(z, target, **s)),
            moved,
        )
