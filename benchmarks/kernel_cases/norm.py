"""Norms, forward and backward: torchbp's ops against eager's."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import torchbp.functional as B

Call = Callable[[], object]
Case = tuple[str, str, Call, Call, int]


def _both(function: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor) -> Call:
    return lambda: torch.autograd.grad(function(*leaves), leaves, grad)


def _image(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """As many elements as a matrix of that shape, in 64 channels."""
    side = max(1, int((shape[0] * shape[1] / 64 / 4) ** 0.5))
    return torch.randn(4, 64, side, side, dtype=dtype)


def cases(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Case]:
    """Every norm of about ``shape[0] * shape[1]`` elements.

    Args:
        shape: of a matrix, whose rows are normalised.
        dtype: of all tensors.

    Yields:
        Name, size, a call of ours, one of eager's, and the bytes that have to be moved: forward
        reads the input and writes the output, backward reads the input and its error and writes
        the gradient; the sum and the residual of ``add_norm`` come on top.
    """
    width = shape[-1]
    x, residual, grad = (torch.randn(shape, dtype=dtype) for _ in range(3))
    weight, bias = (torch.randn(width, dtype=dtype).requires_grad_() for _ in range(2))
    image = _image(shape, dtype)
    channel = [torch.randn(64, dtype=dtype).requires_grad_() for _ in range(2)]
    label = f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"
    size = x.numel() * x.element_size()
    for leaf in (x, residual):
        leaf.requires_grad_()

    def rms(h, x, w):  # type: ignore[no-untyped-def]
        return h.rms_norm(x, (width,), w, 1e-6)

    def layer(h, x, w, b):  # type: ignore[no-untyped-def]
        return h.layer_norm(x, (width,), w, b)

    def batch(h, x, w, b):  # type: ignore[no-untyped-def]
        return h.batch_norm(x, None, None, w, b, True)

    def group(h, x, w, b):  # type: ignore[no-untyped-def]
        return h.group_norm(x, 8, w, b)

    for name, function, leaves, error in (
        ("rms_norm", rms, [x, weight], grad),
        ("layer_norm", layer, [x, weight, bias], grad),
    ):
        ours, eager = (_both(lambda *a, f=function, h=h: f(h, *a), leaves, error) for h in (B, F))
        yield name, label, ours, eager, 5 * size
    for layout in (torch.contiguous_format, torch.channels_last):
        given = image.to(memory_format=layout).requires_grad_()
        error = torch.randn_like(given)
        last = " channels_last" if layout is torch.channels_last else ""
        where = f"{'x'.join(map(str, given.shape))} {label.split()[-1]}"
        for name, function in (("batch_norm", batch), ("group_norm", group)):
            ours, eager = (
                _both(lambda *a, f=function, h=h: f(h, *a), [given, *channel], error)
                for h in (B, F)
            )
            bytes_moved = 5 * given.numel() * given.element_size()
            yield name + last, where, ours, eager, bytes_moved

    def chain(x: Tensor, r: Tensor, w: Tensor, norm: str, p: float) -> Tensor:
        return B.add_norm(x, r, (width,), w, norm=norm, p=p)[0]

    def composed(x: Tensor, r: Tensor, w: Tensor, norm: str, p: float) -> Tensor:
        total = F.dropout(x, p) + r
        if norm == "rms":
            return F.rms_norm(total, (width,), w)
        return F.layer_norm(total, (width,), w)

    for norm, p in (("layer", 0.0), ("rms", 0.0), ("layer", 0.1)):
        ours, eager = (
            _both(lambda *a, f=f, n=norm, p=p: f(*a, n, p), [x, residual, weight], grad)
            for f in (chain, composed)
        )
        # Reads branch and residual, writes sum and output; reads sum and error, writes a gradient,
        # and a second one with dropout.
        arrays = 7 if p == 0 else 8
        yield f"add_norm {norm} p={p}", label, ours, eager, arrays * size
