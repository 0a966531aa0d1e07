"""The one door to the kernels: compiled where the extension is there, PyTorch otherwise.

Every function calls an operator of ``torch.ops.torchbp``. An operator runs compiled code on the
CPU, and on CUDA if the extension was built with it; any other device, or a torchbp without the
extension, gets `torchbp.kernels.reference`. Nothing here is differentiable: derivatives belong to
``torchbp.ops``.

Environment, read on import:
    ``TORCHBP_REFERENCE=1`` leaves a built extension unused.
    ``TORCHBP_CPU_CAPABILITY=base|avx2|avx512`` caps the instruction set of the CPU kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import registration
from .add_norm import add_norm, add_norm_backward
from .bernoulli import bernoulli_bits
from .cross_entropy import (
    REDUCTIONS,
    cross_entropy,
    cross_entropy_backward,
    cross_entropy_in_place,
)
from .dropout import dropout_apply, dropout_bits
from .gated import GATES, gated, gated_backward
from .linear import linear_backward
from .max_pool import max_pool as max_pool
from .max_pool import max_pool_backward as max_pool_backward
from .reference import BLAME_KINDS, ELEMENTWISE
from .table import KERNELS, extension, why_not

__all__ = [
    "GATES",
    "HAS_EXT",
    "KERNELS",
    "REDUCTIONS",
    "add_norm",
    "add_norm_backward",
    "batch_norm_backward",
    "bernoulli_bits",
    "bias_act",
    "bias_act_backward",
    "blame_reduce",
    "blame_reduce_into",
    "blame_settle",
    "conv_grad_weight",
    "cross_entropy",
    "cross_entropy_backward",
    "cross_entropy_in_place",
    "dropout_apply",
    "dropout_bits",
    "elementwise_backward",
    "gated",
    "gated_backward",
    "layer_norm_backward",
    "linear_backward",
    "max_pool",
    "max_pool_backward",
    "softmax_backward",
    "status",
]

HAS_EXT: bool = extension is not None
"""Whether the compiled kernels are in use."""

_kind_number = {name: number for number, name in enumerate(BLAME_KINDS)}
_function_number = {name: number for number, name in enumerate(ELEMENTWISE)}


def batch_norm_backward(
    grad_output: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None = None,
    training: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of batch, group or instance norm; see `torchbp.ops.norm`.

    Args:
        grad_output: The gradient of the result; shape, dtype and device of ``x``.
        x: Shape ``[N, C, *]``; float32, float64, bfloat16 or float16. Contiguous and channels-last
            tensors are read where they are.
        mean: Shape ``[C]`` for batch norm, ``[N, groups]`` for group norm; float64 for float64
            ``x``, float32 for all others.
        rstd: ``1 / sqrt(variance + eps)``; shape and dtype of ``mean``.
        weight: Shape ``[C]``, dtype of ``x`` or ``mean``; None for ones.
        training: The statistics are those of ``x``; otherwise they are constants.

    Returns:
        ``grad_input``, of the shape and dtype of ``x``, and ``grad_weight`` and ``grad_bias``,
        ``[C]``, of the dtype of ``mean``. They do not depend on the number of threads.

    Raises:
        RuntimeError: An argument is not as described.
    """
    return registration.batch_norm_backward(grad_output, x, mean, rstd, weight, training)


def bias_act(
    x: Tensor, bias: Tensor | None = None, act: str = "identity", alpha: float = 0.01
) -> Tensor:
    """Compute ``act(x + bias)`` in one pass.

    Args:
        x: Any shape; float32, float64, bfloat16 or float16.
        bias: Shape ``[x.shape[-1]]``, dtype and device of ``x``; None adds nothing.
        act: ``identity``, ``relu``, ``leaky_relu``, ``gelu`` (the exact one), ``gelu_tanh``
            (Hendrycks and Gimpel, 2016), ``silu``, ``tanh`` or ``sigmoid``.
        alpha: The negative slope of ``leaky_relu``; the others ignore it.

    Returns:
        Shape and dtype of ``x``; contiguous with a bias, otherwise strides as of
        ``torch.empty_like(x)``.

    Raises:
        RuntimeError: An argument is not as described.
    """
    return registration.bias_act(x, bias, act, alpha)


def bias_act_backward(
    grad_output: Tensor,
    x: Tensor,
    bias: Tensor | None = None,
    act: str = "identity",
    alpha: float = 0.01,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of `bias_act` in one pass.

    At their kinks relu has slope 0 and leaky_relu ``alpha``, as in PyTorch.

    Args:
        grad_output: The gradient of the result; shape, dtype and device of ``x``.
        x: As given to `bias_act`.
        bias: As given to `bias_act`.
        act: As given to `bias_act`.
        alpha: As given to `bias_act`.

    Returns:
        ``grad_input``, shaped like ``x``, and ``grad_bias``, shaped like ``bias`` (shape ``[0]``
        without a bias), both of the dtype of ``x``. The bias gradient is summed in float32 or wider
        and does not depend on the number of threads.

    Raises:
        RuntimeError: An argument is not as described.
    """
    return registration.bias_act_backward(grad_output, x, bias, act, alpha)


def blame_reduce(
    activation: Tensor, error: Tensor, unit_dim: int = -1, gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """Reduce an activation and its error signal to sums per unit, reading each of them once.

    Dim 0 counts samples and ``unit_dim`` units; all other dims are positions, which are summed.

    Args:
        activation: ``a``, shape ``[N, U, *]`` or ``[N, *, U]``; float32, float64, bfloat16 or
            float16. Channels-last and row-strided tensors are read where they are.
        error: ``delta = dL/da``; shape, dtype and device of ``activation``.
        unit_dim: 1 or the last dim; negative values count from the end.
        gradient: Sum ``delta`` instead of ``a * delta``.

    Returns:
        ``contribution`` ``[N, U]``, the sum of ``a * delta`` over positions, and ``stats``
        ``[3, U]``: over samples and positions, how many ``a`` are zero, the sum of ``a ** 2`` and
        the sum of ``delta ** 2``. float64 for float64 inputs, float32 for all others; they do not
        depend on the number of threads.

    Raises:
        RuntimeError: An argument is not as described.
    """
    return registration.blame_reduce(activation, error, unit_dim, gradient)


def blame_reduce_into(
    activation: Tensor,
    error: Tensor,
    unit_dim: int,
    gradient: bool,
    contribution: Tensor,
    stats: Tensor,
) -> None:
    """Write what `blame_reduce` returns into memory that is there.

    A caller that does this at every step keeps the memory: new pages cost more than the sums.

    Args:
        activation: As `blame_reduce` takes it.
        error: As `blame_reduce` takes it.
        unit_dim: As `blame_reduce` takes it.
        gradient: As `blame_reduce` takes it.
        contribution: Contiguous, shape ``[N, U]``, of the dtype of the result.
        stats: Contiguous, shape ``[3, U]``, of the dtype of the result.

    Raises:
        RuntimeError: An argument is not as described.
    """
    registration.blame_reduce_into(activation, error, unit_dim, gradient, contribution, stats)


def blame_settle(
    contributions: Sequence[Tensor],
    stats: Sequence[Tensor],
    losses: Tensor,
    labels: Tensor | None = None,
    n_classes: int = 0,
    scale: float = 1.0,
    kinds: Sequence[str] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Turn the contributions of all layers into blame and sum it every way, without storing it.

    With ``t = contribution / scale`` and ``l`` the loss of the sample, the blame of a unit is

    - ``taylor``: ``b = t``;
    - ``log_odds``: ``b = min(-log1p(r * expm1(-t / r)), l)`` with ``r = 1 - exp(-l)``, evaluated so
      that it neither overflows nor cancels; 0 where ``l`` is 0. See
      `torchbp.blame.definitions.log_odds_blame`;
    - ``squared``: ``b = t - t ** 2 / (4 * l)``; ``t`` where ``l`` is 0. See
      `torchbp.blame.definitions.squared_error_blame`.

    In ``log_odds``, losses between 0 and 1e-30 (float64: 1e-290) count as that. NaN and infinity
    stay in the sums that they belong to.

    Args:
        contributions: Of each of ``L`` layers, ``[N, U_i]``; float32 or float64.
        stats: Of each layer, ``[3, U_i]`` as `blame_reduce` returns them; dtype and device of
            ``contributions``.
        losses: ``l``, shape ``[N]``; dtype and device of ``contributions``.
        labels: True classes, int64, shape ``[N]``; None for none. A label outside
            ``[0, n_classes)`` counts in no class.
        n_classes: How many classes there are.
        scale: Divides the contributions, and its square the squares of error signals; not 0.
        kinds: Of each layer, ``taylor``, ``log_odds`` or ``squared``; empty for ``taylor``.

    Returns:
        ``rows`` ``[6, U]``, all layers side by side: over samples, the sum of ``b``, of ``|b|`` and
        of ``b ** 2``; then the stats. ``per_class`` ``[n_classes, U]`` (``[0, U]`` without labels):
        the sum of ``b`` over the samples of each class. ``per_sample`` ``[N, L]``: the sum of ``b``
        over the units of each layer. All of the dtype of ``contributions``; they do not depend on
        the number of threads.

    Raises:
        RuntimeError: An argument is not as described.
    """
    try:
        numbers = [_kind_number[kind] for kind in kinds] or [0] * len(contributions)
    except KeyError as unknown:
        raise RuntimeError(
            f"kinds: expected {', '.join(BLAME_KINDS)}, got {unknown.args[0]}"
        ) from None
    return registration.blame_settle(
        contributions, stats, losses, labels, n_classes, scale, numbers
    )


def conv_grad_weight(
    grad_output: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    r"""Compute the gradient of a convolution's weight.

    ``grad_weight[o, c, k]`` is the sum over samples n and positions p of
    ``grad_output[n, o, p] * x[n, c, stride p + dilation k - padding]``; elements outside of x
    count as zero, however many a position asks for.

    Args:
        grad_output: The gradient of the convolution's output, ``[N, O, *]``; dtype and device of
            ``x``.
        x: The convolution's input, ``[N, C, *]`` with 1 to 3 dims at the end; float32 or float64
            (the reference takes any dtype).
        kernel: Size of the kernel, one number per dim at the end, as all that follow.
        stride: Of the convolution.
        padding: Zeros before the first element.
        dilation: Of the convolution.
        groups: Blocks of channels that are convolved apart.

    Returns:
        Shape ``[O, C / groups, *kernel]``, contiguous. It does not depend on the number of threads.

    Raises:
        RuntimeError: An argument is not as described.
    """
    return registration.conv_grad_weight(grad_output, x, kernel, stride, padding, dilation, groups)


def elementwise_backward(
    grad_output: Tensor, kept: Tensor, function: str, a: float = 0.0, b: float = 0.0
) -> Tensor:
    """Compute ``grad_output f'(x)`` in one pass.

    Args:
        grad_output: Shape, dtype and device of ``kept``.
        kept: x, or ``f(x)`` in its place for ``tanh``, ``sigmoid`` and ``softshrink`` (either will
            do for ``relu``, ``leaky_relu``, ``hardtanh`` and ``hardshrink``); any shape; float32,
            float64, bfloat16 or float16.
        function: ``relu``, ``leaky_relu`` (slope ``a``), ``gelu``, ``gelu_tanh``, ``silu``,
            ``tanh``, ``sigmoid``, ``softplus`` (sharpness ``a``, threshold ``b``), ``log_sigmoid``,
            ``mish``, ``softsign``, ``tanhshrink``, ``elu`` (``a``), ``celu`` (``a``), ``selu``,
            ``threshold`` (``a``), ``hardtanh`` (from ``a`` to ``b``), ``hardsigmoid``,
            ``hardswish``, ``hardshrink`` (``a``) or ``softshrink``.
        a: The first setting of the function.
        b: The second one.

    Returns:
        Shape and dtype of ``kept``, strides as of ``torch.empty_like(kept)``.

    Raises:
        KeyError: There is no such function.
        RuntimeError: An argument is not as described.
    """
    return registration.elementwise_backward(grad_output, kept, _function_number[function], a, b)


def softmax_backward(grad_output: Tensor, output: Tensor, logarithm: bool = False) -> Tensor:
    """Compute the gradient of softmax, or of its logarithm, along the last dim.

    Args:
        grad_output: Shape, dtype and device of ``output``.
        output: What softmax or log-softmax gave; any shape; float32, float64, bfloat16 or float16.
        logarithm: Whether ``output`` is the logarithm.

    Returns:
        The gradient, contiguous, of the shape and dtype of ``output``.

    Raises:
        RuntimeError: An argument is not as described.
    """
    return registration.softmax_backward(grad_output, output, logarithm)


def layer_norm_backward(
    grad_output: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None = None,
    dims: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of layer norm or RMS norm, row by row; see `torchbp.ops.norm`.

    Args:
        grad_output: The gradient of the result; shape, dtype and device of ``x``.
        x: Any shape; float32, float64, bfloat16 or float16.
        mean: One value for each row, in any shape; float64 for float64 ``x``, float32 for all
            others. None for RMS norm, which subtracts none.
        rstd: ``1 / sqrt(variance + eps)``; likewise.
        weight: One value for each entry of a row, dtype as ``x`` or ``rstd``; None for
            ones.
        dims: How many dims at the end make a row, over which ``x`` is normalised.

    Returns:
        ``grad_input``, of the shape and dtype of ``x``, and ``grad_weight`` and ``grad_bias``, of
        the shape of a row and the dtype of ``rstd``. They do not depend on the number of threads.

    Raises:
        RuntimeError: An argument is not as described.
    """
    return registration.layer_norm_backward(grad_output, x, mean, rstd, weight, dims)


def status() -> dict[str, str | bool]:
    """Tell which kernels are in use, and why.

    Returns:
        ``extension`` (is it in use), ``reason`` (why not; empty if it is), ``isa`` (the instruction
        set of the CPU kernels, or ``reference``), ``cuda`` (were CUDA kernels compiled),
        ``built_with`` and ``torch`` (the torch versions of the build and of this process).
    """
    return {
        "extension": HAS_EXT,
        "reason": why_not,
        "isa": "reference" if extension is None else extension.isa,
        "cuda": extension is not None and bool(extension.with_cuda),
        "built_with": "" if extension is None else extension.built_with,
        "torch": str(torch.__version__),
    }
