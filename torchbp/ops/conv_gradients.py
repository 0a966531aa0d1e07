"""What convolution and transposed convolution share: sizes, derivatives, the gradients of both."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch.overrides import has_torch_function

from torchbp.kernels.reference_conv import CONV, conv_grad_weight, crop
from torchbp.ops.base import Op, add_tangents, can_use_kernel, midpoint
from torchbp.ops.relevance import weighted

Size = int | Sequence[int]
Sizes = tuple[int, ...]

CONV_TRANSPOSE = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}

#: Gradients of x and of the weight, where they are asked for.
Gradients = tuple[Tensor | None, Tensor | None]


class Convolving(Op):
    """``y = b + A(W) x`` with A linear in the weight: every derivative but the transposed maps.

    A subclass gives ``forward(x, weight, bias, *settings)`` and, in differentiable torch,
    ``transposed``. From these come backward, jvp and the secant: the map is bilinear in (x, W), so
    each factor is weighted by the other's midpoint; ``∂b`` sums g over samples and positions.
    """

    autocast = {"cpu": "low", "cuda": "low"}
    relevance = classmethod(weighted)

    @staticmethod
    def transposed(
        g: Tensor, x: Tensor, weight: Tensor, settings: Sequence[Any], needs: Sequence[bool]
    ) -> Gradients:
        """The error of x and of the weight, each where ``needs`` says so."""
        raise NotImplementedError

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Build the derivatives, then the op's ``call``."""
        if cls.forward is not Op.forward:
            methods: dict[str, Callable[..., Any]] = {
                "setup_context": _setup_context,
                "backward": _backward(cls.transposed),
                "jvp": _jvp(cls.forward),
                "secant": _secant(cls.transposed),
            }
            for name, method in methods.items():
                setattr(cls, name, staticmethod(method))
        super().__init_subclass__(**kwargs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, *ctx.settings = inputs
    ctx.save_for_backward(x, weight)
    ctx.save_for_forward(x, weight)


def _backward(transposed: Callable[..., Gradients]) -> Callable[..., tuple[Tensor | None, ...]]:
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs, settings = ctx.needs_input_grad, ctx.settings
        return (
            *transposed(grad_output, x.conj(), weight.conj(), settings, needs),
            _sum_positions(grad_output, weight.dim() - 2) if needs[2] else None,
            *(None,) * len(settings),
        )

    return backward


def _jvp(forward: Callable[..., Tensor]) -> Callable[..., Tensor | None]:
    def jvp(
        ctx: Any, tx: Tensor | None, tw: Tensor | None, tb: Tensor | None, *_: Any
    ) -> Tensor | None:
        x, weight = ctx.saved_tensors
        if tx is None and tw is None and tb is not None:
            tx = torch.zeros_like(x)  # only for the shape of the result
        out = add_tangents(
            None if tx is None else forward(tx, weight, None, *ctx.settings),
            None if tw is None else forward(x, tw, None, *ctx.settings),
        )
        if out is None or tb is None:
            return out
        return out + tb.reshape(tb.shape[0], *(1,) * (weight.dim() - 2))

    return jvp


def _secant(transposed: Callable[..., Gradients]) -> Callable[..., tuple[Tensor | None, ...]]:
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        (x, weight, bias, *settings), (x0, weight0, *_) = args, args0
        needs_weight, needs_bias = (t is not None and t.requires_grad for t in (weight, bias))
        factors = midpoint(x, x0) if needs_weight else x, midpoint(weight, weight0)
        return (
            *transposed(multiplier, *factors, settings, (True, needs_weight)),
            _sum_positions(multiplier, weight.dim() - 2) if needs_bias else None,
            *(None,) * len(settings),
        )

    return secant


def _sum_positions(tensor: Tensor, dims: int) -> Tensor:
    positions = list(range(-dims, 0))
    return tensor.sum(positions if tensor.dim() == dims + 1 else [0, *positions])


def sizes(value: Size, dims: int) -> Sizes:
    """``value`` for each dimension; a single number means all of them, also in a sequence."""
    if isinstance(value, int):
        return (value,) * dims
    values = tuple(value)  # of any other length: left for torch to refuse
    return values * dims if len(values) == 1 else values


def leading(padding: str | Sizes, kernel: Sequence[int], dilation: Sizes) -> Sizes:
    """Zeros before the first element; "same" has the odd one at the far end."""
    if padding == "same":
        return tuple(d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True))
    return (0,) * len(dilation) if padding == "valid" else padding  # type: ignore[return-value]


def grad_input(
    grad_output: Tensor,
    weight: Tensor,
    size: Sequence[int],
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    groups: int,
) -> Tensor:
    """``∂x[c] = Σ_o W[o, c]`` spread over the windows: the transposed convolution of g with W.

    Args:
        grad_output: error of the convolution's output.
        weight: its weight.
        size: what to return in the last dimensions, those of the input.
        stride: of the convolution.
        padding: zeros before the first element.
        dilation: of the convolution.
        groups: of the convolution.
    """
    dims, one = len(size), (1,) * len(size)
    if weight.shape[2:] == one == stride and groups == 1 and not any(padding) and max(size) > 1:
        # A matrix at every position, transposed: faster than the transposed convolution.
        return CONV[weight.dim()](grad_output, weight.transpose(0, 1))
    # Elements at the far end that no window reached: the transposed convolution adds them back.
    left_over = [
        max(0, n + 2 * p - d * (k - 1) - 1 - (m - 1) * s)
        for n, p, d, k, m, s in zip(
            size, padding, dilation, weight.shape[2:], grad_output.shape[-dims:], stride,
            strict=True,
        )
    ]  # fmt: skip
    transpose = CONV_TRANSPOSE[weight.dim()]
    grad = transpose(grad_output, weight, None, stride, padding, left_over, groups, dilation)
    return crop(grad, size)


def grad_weight(
    grad_output: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    groups: int,
) -> Tensor:
    """``∂W[o, c, k] = Σ_n,p g[n, o, p] x[n, c, s p + d k - padding]``.

    Args:
        grad_output: error of the convolution's output.
        x: the convolution's input; both with or both without samples.
        kernel: the last dimensions of the weight.
        stride: of the convolution.
        padding: zeros before the first element.
        dilation: of the convolution.
        groups: of the convolution.
    """
    if x.dim() == len(kernel) + 1:
        x, grad_output = x.unsqueeze(0), grad_output.unsqueeze(0)
    compute: Any = conv_grad_weight
    if _for_kernel(grad_output, x):
        # The kernel's lanes run along positions; a long window at a few of them is a matrix.
        few = math.prod(kernel) > 16 * math.prod(grad_output.shape[2:]) and groups == 1
        compute = _of_windows if few else _compiled
    return compute(grad_output, x, kernel, stride, padding, dilation, groups)


def _of_windows(
    grad_output: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    groups: int,
) -> Tensor:
    """The weight's gradient as one product of the errors with all windows, laid out in rows."""
    dims, count = len(kernel), grad_output.shape[2:]
    x = windows(x, kernel, count, stride, padding, dilation)
    samples, outputs = grad_output.shape[:2]
    order = (0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims))
    rows = x.permute(order).reshape(samples * math.prod(count), x.shape[1] * math.prod(kernel))
    errors = grad_output.transpose(0, 1).reshape(outputs, samples * math.prod(count))
    return (errors @ rows).reshape(outputs, x.shape[1], *kernel)


def windows(
    x: Tensor,
    kernel: Sequence[int],
    count: Sequence[int],
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
) -> Tensor:
    """Every window of ``x``, as a view of it (padded, if need be).

    Args:
        x: ``(N, C, *size)``.
        kernel: size of a window.
        count: how many windows there are in each dimension.
        stride: from one window to the next.
        padding: zeros before the first element; behind the last one, as many as are needed.
        dilation: from one element of a window to the next.

    Returns:
        ``(N, C, *count, *kernel)``.
    """
    dims = len(kernel)
    for i in range(dims):
        length = dilation[i] * (kernel[i] - 1) + 1
        missing = (count[i] - 1) * stride[i] + length - x.shape[2 + i] - padding[i]
        after = 2 * (dims - 1)  # F.pad counts from the last dimension; i is the first one left
        x = F.pad(x, [0] * after + [padding[i], max(missing, 0)])
        x = x.unfold(2 + i, length, stride[i])[..., :: dilation[i]].narrow(2 + i, 0, count[i])
    return x


_compiled: Any = torch.ops.torchbp.conv_grad_weight.default


def _for_kernel(grad_output: Tensor, x: Tensor) -> bool:
    return (
        can_use_kernel(grad_output, x)
        and (x.dtype == torch.float32 or x.dtype == torch.float64)
        and not _are_functorch_transforms_active()
        and not has_torch_function((grad_output, x))  # a mode
    )
