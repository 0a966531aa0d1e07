"""Power-average pooling."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchbp.ops.arithmetic import mul
from torchbp.ops.avg_pool import AvgPool, AvgPool1d, AvgPool2d, AvgPool3d, each
from torchbp.ops.base import Op, vanishes, wide
from torchbp.ops.max_pool import MaxPool1d, MaxPool2d, MaxPool3dAlone, Selection, Size
from torchbp.ops.pointwise import abs as absolute
from torchbp.ops.registry import Maker, Sample, register, sample
from torchbp.ops.relevance import proportional


class LpPool(Op):
    """``y = (Σ xᵖ)^(1/p)`` over each window.

    A subclass gives ``forward(x, p, kernel_size, stride, ceil_mode)`` and the average over the same
    windows, which is ``A xᵖ = yᵖ / k`` for windows of k elements.

    Backward: ``∂x = x^(p-1) ⊙ k Aᵀ(g y^(1-p))``, and zero from a window whose sum is zero.
    Secant: with the slope ``d(a, a₀) = (aᵖ - a₀ᵖ) / (a - a₀)`` between the runs in place of the
    derivative of the power, at both ends: ``d(x, x₀) ⊙ k Aᵀ(m / d(y, y₀))``.
    LRP: shares ``xᵖ / Σ xᵖ``. The powers are added up as in a linear layer (Bach et al. 2015),
    power and root are elementwise; and ``Σ x ∂y/∂x = y``, so these are gradient times input.

    Attributes:
        average: the average over the same windows.
    """

    average: ClassVar[type[AvgPool]]
    relevance = classmethod(proportional)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Build the derivatives, then the op's ``call``."""
        methods: dict[str, Callable[..., Any]] = {
            "setup_context": _setup_context,
            "backward": _backward,
            "jvp": _jvp(cls.average),
            "secant": _secant,
        }
        for name, method in methods.items():
            setattr(cls, name, staticmethod(method))
        super().__init_subclass__(**kwargs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *ctx.settings = inputs
    ctx.save_for_backward(x, output)
    ctx.save_for_forward(x, output)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    x, y = ctx.saved_tensors
    p, *windows = ctx.settings
    through = wide(grad_output) * _of_root(wide(y), p)
    grad = _power(wide(x), p - 1) * _summed(through, x.shape, windows)
    return grad.to(x.dtype), *_CONSTANTS


def _jvp(average: type[AvgPool]) -> Callable[..., Tensor | None]:
    def jvp(ctx: Any, tx: Tensor | None, *_: Any) -> Tensor | None:
        if tx is None:
            return None
        x, y = ctx.saved_tensors
        p, kernel, stride, ceil_mode = ctx.settings
        inner = _power(wide(x), p - 1) * wide(tx)
        summed = average.forward(inner, *_settings(kernel, stride, ceil_mode)) * math.prod(kernel)
        return (_of_root(wide(y), p) * summed).to(x.dtype)

    return jvp


def _secant(
    multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
) -> tuple[Tensor | None, ...]:
    (x, p, *windows), x0 = args, args0[0]
    slope = _slope(output, output0, p)
    nothing = (output == 0) & (output0 == 0)
    through = multiplier / slope.masked_fill(nothing, 1)
    return _slope(x, x0, p) * _summed(through, x.shape, windows), *_CONSTANTS


_CONSTANTS = (None,) * 4  # p, kernel_size, stride, ceil_mode


def _settings(kernel: Any, stride: Any, ceil_mode: bool) -> tuple[Any, ...]:
    """The average's settings."""
    return kernel, stride, (0,) * len(kernel), ceil_mode, True, None


def _summed(g: Tensor, shape: torch.Size, windows: Sequence[Any]) -> Tensor:
    """``k Aᵀ g``."""
    return AvgPool.transposed(g * math.prod(windows[0]), shape, _settings(*windows))


def _power(x: Tensor, exponent: float) -> Tensor:
    return x if exponent == 1 else x**exponent


def _of_root(y: Tensor, p: float) -> Tensor:
    """``y^(1-p)``, p times the derivative of the root; zero where the sum is."""
    if p == 1:
        return y.sign().abs()
    nothing = y == 0 if p > 0 else y.isinf()
    return (y.masked_fill(nothing, 1) ** (1 - p)).masked_fill(nothing, 0)


def _slope(a: Tensor, a0: Tensor, p: float) -> Tensor:
    """``(aᵖ - a₀ᵖ) / (a - a₀)``, and the derivative of the power where both are equal."""
    if p == int(p) and 1 <= p <= 16:  # the quotient multiplied out: Σ aⁱ a₀^(p-1-i)
        total = power = torch.ones_like(a)
        for _ in range(int(p) - 1):
            power = power * a0
            total = total * a + power
        return total
    gap, middle = a - a0, (a + a0) / 2
    # Relative to the numbers, however small: their own scale is what the power bends on.
    near = vanishes(gap, a.abs() + a0.abs())
    quotient = (a**p - a0**p) / gap.masked_fill(near, 1)
    derivative = (p * middle ** (p - 1)).masked_fill(middle == 0, 0)
    return torch.where(near, derivative, quotient)


class LpPool1d(LpPool):
    """:class:`LpPool` of ``(*, C, L)``."""

    average = AvgPool1d

    @staticmethod
    def forward(x: Tensor, p: float, kernel_size: Any, stride: Any, ceil_mode: bool) -> Tensor:
        return F.lp_pool1d(x, p, kernel_size[0], stride, ceil_mode)


class LpPool2d(LpPool):
    """:class:`LpPool` of ``(*, C, H, W)``."""

    average = AvgPool2d

    @staticmethod
    def forward(x: Tensor, p: float, kernel_size: Any, stride: Any, ceil_mode: bool) -> Tensor:
        return F.lp_pool2d(x, p, kernel_size, stride, ceil_mode)


class LpPool3d(LpPool):
    """:class:`LpPool` of ``(*, C, D, H, W)``."""

    average = AvgPool3d
    autocast = {"cpu": "fp32", "cuda": "fp32"}

    @staticmethod
    def forward(x: Tensor, p: float, kernel_size: Any, stride: Any, ceil_mode: bool) -> Tensor:
        return F.lp_pool3d(x, p, kernel_size, stride, ceil_mode)


def _samples(planes: int) -> Callable[[Maker], Iterator[Sample]]:
    def samples(make: Maker) -> Iterator[Sample]:
        size = (5, 4, 3)[:planes]
        yield sample(make(2, 2, *(4, 2, 2)[:planes]), 2, 2)
        yield sample(make(2, *size), 2.0, 3 if planes < 3 else 2, stride=2, ceil_mode=True)
        if planes == 1:
            yield sample(make.positive(1, 2, *size), 3, 2, stride=1)
            yield sample(make.positive(1, 2, *size), 1, 2)
            yield sample(make.positive(1, 2, *size), -1, 2)
        yield sample(make.positive(1, 2, *size), 1.5, (2, 3, 2)[:planes] if planes > 1 else 2)
        yield sample(make(1, 2, *size), math.inf, 2)
        yield sample(make(1, 2, *size), -math.inf, 2, stride=1, ceil_mode=True)
        yield sample(make(0, 2, *(4, 4, 2)[:planes]), 2, 2)

    return samples


def _pooled(
    op: type[LpPool],
    greatest: type[Selection],
    dims: int,
    input: Tensor,
    norm_type: float,
    kernel_size: Size,
    stride: Size | None,
    ceil_mode: bool,
) -> Tensor:
    if norm_type == math.inf:
        output: Tensor = greatest.call(absolute(input), kernel_size, stride, 0, 1, ceil_mode)[0]
        return output
    if norm_type == -math.inf:
        negative = mul(absolute(input), -1)
        return mul(greatest.call(negative, kernel_size, stride, 0, 1, ceil_mode)[0], -1)
    kernel = each(kernel_size, dims)
    step = kernel if stride in (None, (), []) else each(stride, dims)
    return op.call(input, norm_type, kernel, step, ceil_mode)


@register(F.lp_pool1d, modules=[nn.LPPool1d], samples=_samples(1))
def lp_pool1d(
    input: Tensor,
    norm_type: float,
    kernel_size: Size,
    stride: Size | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    """:func:`lp_pool2d` of ``([N,] C, L)``, as :func:`torch.nn.functional.lp_pool1d`."""
    return _pooled(LpPool1d, MaxPool1d, 1, input, norm_type, kernel_size, stride, ceil_mode)


@register(F.lp_pool2d, modules=[nn.LPPool2d], samples=_samples(2))
def lp_pool2d(
    input: Tensor,
    norm_type: float,
    kernel_size: Size,
    stride: Size | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    """``(Σ inputᵖ)^(1/p)`` over windows, as :func:`torch.nn.functional.lp_pool2d`.

    Args:
        input: ``([N,] C, H, W)``.
        norm_type: p; infinity takes the greatest absolute value, minus infinity the least.
        kernel_size: size of the window.
        stride: distance of windows; ``kernel_size`` if ``None``.
        ceil_mode: let windows start that do not fit whole.

    Returns:
        ``([N,] C, H_out, W_out)``; not a number where the sum has no such root.

    Raises:
        ZeroDivisionError: if ``norm_type`` is 0.
        RuntimeError: for settings that torch refuses.
    """
    return _pooled(LpPool2d, MaxPool2d, 2, input, norm_type, kernel_size, stride, ceil_mode)


@register(F.lp_pool3d, modules=[nn.LPPool3d], samples=_samples(3))
def lp_pool3d(
    input: Tensor,
    norm_type: float,
    kernel_size: Size,
    stride: Size | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    """:func:`lp_pool2d` of ``([N,] C, D, H, W)``, as :func:`torch.nn.functional.lp_pool3d`."""
    return _pooled(LpPool3d, MaxPool3dAlone, 3, input, norm_type, kernel_size, stride, ceil_mode)
