"""The kernels in plain PyTorch: the definition that the compiled ones are tested against.

They serve every device that has no compiled kernel. Sums and intermediate values of ``bfloat16``
and ``float16`` tensors are kept in ``float32``, as the compiled kernels keep them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def up(t: Tensor) -> Tensor:
    """``t`` in the dtype its sums are kept in: float64 stays, anything else becomes float32."""
    return t if t.dtype == torch.float64 else t.float()


def _logistic_slope(z: Tensor) -> Tensor:
    """``s(z) (1 - s(z))`` by way of ``exp(-|z|)``, which does not cancel where s is close to 1."""
    e = torch.exp(-z.abs())
    return e / (1 + e).square()


def _normal_cdf(z: Tensor) -> Tensor:
    return 0.5 * torch.erfc(z * -math.sqrt(0.5))


def _normal_pdf(z: Tensor) -> Tensor:
    return torch.exp(-0.5 * z * z) * (1 / math.sqrt(2 * math.pi))


_TANH_SCALE = 2 * math.sqrt(2 / math.pi)


def _gelu_tanh_inner(z: Tensor) -> Tensor:
    """The ``w`` of ``gelu_tanh(z) = z s(w(z))`` (Hendrycks and Gimpel, 2016)."""
    return _TANH_SCALE * z * (1 + 0.044715 * z * z)


def _gelu_tanh_backward(g: Tensor, z: Tensor, alpha: float) -> Tensor:
    w = _gelu_tanh_inner(z)
    slope = _logistic_slope(w) * (_TANH_SCALE * (1 + 0.134145 * z * z))
    return g * (torch.sigmoid(w) + z * slope)


Forward = Callable[[Tensor, float], Tensor]
Backward = Callable[[Tensor, Tensor, float], Tensor]

# name -> (y from z, grad_z from grad_y and z)
ACTIVATIONS: dict[str, tuple[Forward, Backward]] = {
    "identity": (lambda z, alpha: z, lambda g, z, alpha: g),
    "relu": (
        lambda z, alpha: torch.relu(z),
        lambda g, z, alpha: torch.where(z <= 0, 0.0, g),
    ),
    "leaky_relu": (
        lambda z, alpha: torch.where(z > 0, z, alpha * z),
        lambda g, z, alpha: torch.where(z > 0, g, alpha * g),
    ),
    "gelu": (
        lambda z, alpha: z * _normal_cdf(z),
        lambda g, z, alpha: g * (_normal_cdf(z) + z * _normal_pdf(z)),
    ),
    "gelu_tanh": (
        lambda z, alpha: z * torch.sigmoid(_gelu_tanh_inner(z)),
        _gelu_tanh_backward,
    ),
    "silu": (
        lambda z, alpha: z * torch.sigmoid(z),
        lambda g, z, alpha: g * (torch.sigmoid(z) + z * _logistic_slope(z)),
    ),
    "tanh": (
        lambda z, alpha: torch.tanh(z),
        lambda g, z, alpha: g * (4 * _logistic_slope(2 * z)),
    ),
    "sigmoid": (
        lambda z, alpha: torch.sigmoid(z),
        lambda g, z, alpha: g * _logistic_slope(z),
    ),
}


def _check_alike(t: Tensor, name: str, like: Tensor, like_name: str) -> None:
    if t.dtype != like.dtype:
        raise RuntimeError(
            f"{name}: expected the dtype of {like_name}, {like.dtype}, got {t.dtype}"
        )
    if t.device != like.device:
        raise RuntimeError(f"{name}: expected the device of {like_name}")


def _check_dtype(t: Tensor, name: str) -> None:
    if t.dtype not in DTYPES:
        raise RuntimeError(f"{name}: expected float32, float64, bfloat16 or float16, got {t.dtype}")


def check_bias_act(x: Tensor, bias: Tensor | None, act: str) -> None:
    """Raise RuntimeError where an argument of `bias_act` is not as documented."""
    _check_dtype(x, "x")
    if act not in ACTIVATIONS:
        raise RuntimeError(f"act: expected one of {', '.join(ACTIVATIONS)}, got {act}")
    if bias is None:
        return
    if x.dim() == 0 or bias.dim() != 1 or bias.shape[0] != x.shape[-1]:
        raise RuntimeError(
            "bias: expected one value for each entry of the last dim of x, got shapes "
            f"{tuple(bias.shape)} and {tuple(x.shape)}"
        )
    _check_alike(bias, "bias", x, "x")


def check_same(t: Tensor, name: str, like: Tensor, like_name: str) -> None:
    """Raise RuntimeError unless both have one shape, dtype and device."""
    if t.shape != like.shape:
        raise RuntimeError(
            f"{name}: expected the shape of {like_name}, {tuple(like.shape)}, got {tuple(t.shape)}"
        )
    _check_alike(t, name, like, like_name)


def check_blame_reduce(activation: Tensor, error: Tensor, unit_dim: int) -> int:
    """Raise RuntimeError where an argument of `blame_reduce` is not as documented.

    Returns:
        ``unit_dim`` counted from the front.
    """
    _check_dtype(activation, "activation")
    dims = activation.dim()
    if dims < 2:
        raise RuntimeError(f"activation: expected samples and units, at least 2 dims, got {dims}")
    dim = unit_dim + dims if unit_dim < 0 else unit_dim
    if dim not in (1, dims - 1):
        raise RuntimeError(f"unit_dim: expected 1 or the last dim of {dims}, got {unit_dim}")
    check_same(error, "error", activation, "activation")
    return dim


def like_input(x: Tensor, bias: Tensor | None) -> Tensor:
    """An empty tensor with the strides that `bias_act` gives its result."""
    if bias is None:
        return torch.empty_like(x)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _preactivation(x: Tensor, bias: Tensor | None) -> Tensor:
    return up(x) if bias is None else up(x) + up(bias)


def bias_act(x: Tensor, bias: Tensor | None, act: str, alpha: float) -> Tensor:
    """Reference of `torchbp.kernels.bias_act`; same arguments, result and errors."""
    check_bias_act(x, bias, act)
    y = ACTIVATIONS[act][0](_preactivation(x, bias), alpha)
    return like_input(x, bias).copy_(y)


def bias_act_backward(
    grad_output: Tensor, x: Tensor, bias: Tensor | None, act: str, alpha: float
) -> tuple[Tensor, Tensor]:
    """Reference of `torchbp.kernels.bias_act_backward`; same arguments, result and errors."""
    check_bias_act(x, bias, act)
    check_same(grad_output, "grad_output", x, "x")
    grad = ACTIVATIONS[act][1](up(grad_output), _preactivation(x, bias), alpha)
    grad_input = like_input(x, bias).copy_(grad)
    if bias is None:
        return grad_input, x.new_empty(0)
    return grad_input, grad.sum_to_size(bias.shape).to(x.dtype, copy=True)


def blame_reduce(
    activation: Tensor, error: Tensor, unit_dim: int, gradient: bool
) -> tuple[Tensor, Tensor]:
    """Reference of `torchbp.kernels.blame_reduce`; same arguments, result and errors."""
    dim = check_blame_reduce(activation, error, unit_dim)
    # Samples, units, positions; no position dim counts as one position.
    a = up(activation).movedim(dim, 1)[..., None].flatten(2)
    delta = up(error).movedim(dim, 1)[..., None].flatten(2)
    contribution = (delta if gradient else a * delta).sum(2)
    zeros = (a == 0).sum((0, 2)).to(a.dtype)
    return contribution, torch.stack([zeros, a.square().sum((0, 2)), delta.square().sum((0, 2))])


# In the order of their numbers.
BLAME_KINDS = ("taylor", "log_odds", "squared")


def _check_one_per_sample(t: Tensor, name: str, samples: int) -> None:
    if t.dim() != 1 or t.shape[0] != samples:
        raise RuntimeError(
            f"{name}: expected one for each of {samples} samples, got shape {tuple(t.shape)}"
        )


def check_blame_settle(
    contribution: Tensor,
    losses: Tensor,
    labels: Tensor | None,
    n_classes: int,
    scale: float,
    kind: int,
    sizes: Sequence[int],
) -> None:
    """Raise RuntimeError where an argument of `blame_settle` is not as documented."""
    if contribution.dtype not in (torch.float32, torch.float64):
        raise RuntimeError(f"contribution: expected float32 or float64, got {contribution.dtype}")
    if contribution.dim() != 2:
        raise RuntimeError(f"contribution: expected samples x units, got {contribution.dim()} dims")
    samples, units = contribution.shape
    _check_one_per_sample(losses, "losses", samples)
    _check_alike(losses, "losses", contribution, "contribution")
    if labels is not None:
        _check_one_per_sample(labels, "labels", samples)
        if labels.dtype != torch.int64:
            raise RuntimeError(f"labels: expected int64, got {labels.dtype}")
        if labels.device != contribution.device:
            raise RuntimeError("labels: expected the device of contribution")
    if n_classes < 0:
        raise RuntimeError(f"n_classes: expected 0 or more, got {n_classes}")
    if scale == 0:
        raise RuntimeError("scale: expected a number other than 0")
    if kind not in range(len(BLAME_KINDS)):
        raise RuntimeError(f"kind: expected 0 (taylor), 1 (log_odds) or 2 (squared), got {kind}")
    if any(size < 0 for size in sizes):
        raise RuntimeError(f"sizes: expected 0 or more columns in a layer, got {min(sizes)}")
    if len(sizes) > 0 and sum(sizes) != units:
        raise RuntimeError(
            f"sizes: expected a sum of {units}, the columns of contribution, got {sum(sizes)}"
        )


def settled_blame(taylor: Tensor, losses: Tensor, kind: int) -> Tensor:
    """Blame ``[N, U]`` of one of `BLAME_KINDS`, from its first order and the losses ``[N]``."""
    loss = losses[:, None]
    if BLAME_KINDS[kind] == "taylor":
        return taylor
    if BLAME_KINDS[kind] == "squared":
        return torch.where(loss > 0, taylor - taylor * taylor / (4 * loss), taylor)
    r = -torch.expm1(-loss)
    gain = torch.where(r > 0, -taylor / r, 0 * taylor)
    blame = -torch.log1p(r * torch.expm1(gain.clamp(max=80)))
    # Where the first form overflows, or cancels. Both are of log(exp(-l) + r exp(gain)).
    far = (gain > 80) | ((gain < -4) & (loss > 4))
    blame = torch.where(far, -torch.logaddexp(-loss, r.log() + gain), blame)
    return torch.minimum(blame, loss)


def blame_settle(
    contribution: Tensor,
    losses: Tensor,
    labels: Tensor | None,
    n_classes: int,
    scale: float,
    kind: int,
    sizes: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Reference of `torchbp.kernels.blame_settle`; same results and errors, ``kind`` a number."""
    check_blame_settle(contribution, losses, labels, n_classes, scale, kind, sizes)
    blame = settled_blame(contribution * (1 / scale), losses, kind)
    rows = torch.stack([blame.sum(0), blame.abs().sum(0), blame.square().sum(0)])
    per_class = blame.new_zeros(0 if labels is None else n_classes, blame.shape[1])
    if labels is not None:
        # One row more takes the labels out of range.
        row = torch.where((labels >= 0) & (labels < n_classes), labels, n_classes)
        wide = blame.new_zeros(n_classes + 1, blame.shape[1]).index_add_(0, row, blame)
        per_class = wide[:n_classes].clone()
    per_sample = blame.new_zeros(len(blame), len(sizes))
    if len(sizes) > 0:
        per_sample = torch.stack([part.sum(1) for part in blame.split(list(sizes), 1)], 1)
    return rows, per_class, per_sample
