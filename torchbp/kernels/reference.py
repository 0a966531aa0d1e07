"""The kernels in plain PyTorch: the definition that the compiled ones are tested against.

They serve every device that has no compiled kernel. Sums and intermediate values of ``bfloat16``
and ``float16`` tensors are kept in ``float32``, as the compiled kernels keep them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .reference_conv import check_conv_grad_weight as check_conv_grad_weight
from .reference_conv import conv_grad_weight as conv_grad_weight

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


def _mish_slope(x: Tensor) -> Tensor:
    """By way of ``exp(-|x|)``: ``tanh(log(1 + exp(x))) = n / d``, scaled by its square above 0."""
    e = torch.exp(-x.abs())
    n = torch.where(x < 0, e * (e + 2), 1 + 2 * e)
    d = torch.where(x < 0, n + 2, n + 2 * e * e)
    return n / d + x * torch.where(x < 0, e, e * e) * (4 * (1 + e) / d.square())


def _below(x: Tensor) -> Tensor:
    return torch.exp(x.clamp(max=0))


def _inside(g: Tensor, k: Tensor, low: float, high: float) -> Tensor:
    return g.masked_fill((k <= low) | (k >= high), 0)


_SELU_ALPHA, _SELU_SCALE = 1.6732632423543773, 1.0507009873554805

Tangent = Callable[[Tensor, Tensor, float, float], Tensor]

# name -> grad_x from grad_y, what the op keeps (x; y where said) and two settings.
# In the order of their numbers.
ELEMENTWISE: dict[str, Tangent] = {
    "relu": lambda g, k, a, b: g.masked_fill(k <= 0, 0),
    "leaky_relu": lambda g, k, a, b: torch.where(k > 0, g, a * g),
    "gelu": lambda g, k, a, b: ACTIVATIONS["gelu"][1](g, k, a),
    "gelu_tanh": lambda g, k, a, b: ACTIVATIONS["gelu_tanh"][1](g, k, a),
    "silu": lambda g, k, a, b: ACTIVATIONS["silu"][1](g, k, a),
    "tanh": lambda g, k, a, b: g * (1 - k * k),  # from y
    "sigmoid": lambda g, k, a, b: g * ((1 - k) * k),  # from y
    "softplus": lambda g, k, a, b: torch.where(k * a > b, g, g * torch.sigmoid(k * a)),
    "log_sigmoid": lambda g, k, a, b: g * torch.sigmoid(-k),
    "mish": lambda g, k, a, b: g * _mish_slope(k),
    "softsign": lambda g, k, a, b: g / (1 + k.abs()).square(),
    "tanhshrink": lambda g, k, a, b: g * torch.tanh(k).square(),
    "elu": lambda g, k, a, b: torch.where(k > 0, g, g * (a * _below(k))),
    "celu": lambda g, k, a, b: g * torch.exp(k.clamp(max=0) / a),
    "selu": lambda g, k, a, b: (
        g * torch.where(k > 0, _SELU_SCALE, _SELU_SCALE * _SELU_ALPHA * _below(k))
    ),
    "threshold": lambda g, k, a, b: g.masked_fill(k <= a, 0),
    "hardtanh": _inside,  # from y
    "hardsigmoid": lambda g, k, a, b: _inside(g / 6, k, -3, 3),
    "hardswish": lambda g, k, a, b: torch.where(k < 3, g * (k / 3 + 0.5), g).masked_fill(
        k <= -3, 0
    ),
    "hardshrink": lambda g, k, a, b: g.masked_fill((k >= -a) & (k <= a), 0),
    "softshrink": lambda g, k, a, b: g.masked_fill(k == 0, 0),  # from y
}
_TANGENTS = tuple(ELEMENTWISE.values())


def check_elementwise_backward(grad_output: Tensor, kept: Tensor, function: int) -> None:
    """Raise RuntimeError where an argument of `elementwise_backward` is not as documented."""
    if not 0 <= function < len(_TANGENTS):
        raise RuntimeError(f"function: expected a number below {len(_TANGENTS)}, got {function}")
    check_same(grad_output, "grad_output", kept, "kept")
    _check_dtype(kept, "kept")


def elementwise_backward(
    grad_output: Tensor, kept: Tensor, function: int, a: float, b: float
) -> Tensor:
    """Reference of `torchbp.kernels.elementwise_backward`; same result and errors."""
    check_elementwise_backward(grad_output, kept, function)
    return torch.empty_like(kept).copy_(_TANGENTS[function](up(grad_output), up(kept), a, b))


def softmax_backward(grad_output: Tensor, output: Tensor, logarithm: bool) -> Tensor:
    """Reference of `torchbp.kernels.softmax_backward`; same arguments, result and errors."""
    check_same(grad_output, "grad_output", output, "output")
    _check_dtype(output, "output")
    g, y = up(grad_output), up(output)
    dim = -1 if y.dim() else ()
    if logarithm:
        grad = g - torch.exp(y) * g.sum(dim, keepdim=True)
    else:
        grad = y * (g - (g * y).sum(dim, keepdim=True))
    return torch.empty_like(output, memory_format=torch.contiguous_format).copy_(grad)


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


def _check_values(t: Tensor, name: str, count: int, x: Tensor) -> None:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if t.numel() != count:
        raise RuntimeError(f"{name}: expected {count} values, got {t.numel()}")
    if t.dtype != dtype:
        raise RuntimeError(f"{name}: expected {dtype}, got {t.dtype}")
    if t.device != x.device:
        raise RuntimeError(f"{name}: expected the device of x")


def check_layer_norm(
    grad_output: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    dims: int,
) -> None:
    """Raise RuntimeError where an argument of `layer_norm_backward` is not as documented."""
    _check_dtype(x, "x")
    if not 0 < dims <= x.dim():
        raise RuntimeError(f"dims: expected 1 to {x.dim()}, got {dims}")
    check_same(grad_output, "grad_output", x, "x")
    rows, columns = math.prod(x.shape[:-dims]), math.prod(x.shape[-dims:])
    if mean is not None:
        _check_values(mean, "mean", rows, x)
    _check_values(rstd, "rstd", rows, x)
    if weight is not None:
        _check_values(weight, "weight", columns, x)


def layer_norm_backward(
    grad_output: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    dims: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Reference of `torchbp.kernels.layer_norm_backward`; same arguments, results and errors."""
    check_layer_norm(grad_output, x, mean, rstd, weight, dims)
    shape = x.shape[-dims:]
    rows, columns = rstd.numel(), math.prod(shape)
    g, r = up(grad_output).reshape(rows, columns), rstd.reshape(rows, 1)
    centred = up(x).reshape(rows, columns)
    if mean is not None:
        centred = centred - mean.reshape(rows, 1)
    xhat = centred * r
    v = g if weight is None else g * weight.reshape(columns)
    through = v - xhat * (v * xhat).mean(1, keepdim=True)
    if mean is not None:
        through = through - v.mean(1, keepdim=True)
    of_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    of_x.copy_((r * through).reshape(x.shape))
    return of_x, (g * xhat).sum(0).reshape(shape), g.sum(0).reshape(shape)


def check_batch_norm(
    grad_output: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    training: bool,
) -> None:
    """Raise RuntimeError where an argument of `batch_norm_backward` is not as documented."""
    _check_dtype(x, "x")
    if x.dim() < 2:
        raise RuntimeError(f"x: expected samples and channels, at least 2 dims, got {x.dim()}")
    check_same(grad_output, "grad_output", x, "x")
    samples, channels = x.shape[:2]
    count = channels
    if mean.dim() == 2:
        if not training:
            raise RuntimeError("training: statistics of groups are those of the input")
        groups = mean.shape[1]
        if mean.shape[0] != samples or groups == 0 or channels % groups:
            raise RuntimeError(
                f"mean: expected samples x groups that divide the {channels} channels of {samples} "
                f"samples, got {mean.shape[0]} x {groups}"
            )
        if rstd.shape != mean.shape:
            raise RuntimeError("rstd: expected the shape of mean")
        count = samples * groups
    _check_values(mean, "mean", count, x)
    _check_values(rstd, "rstd", count, x)
    if weight is not None:
        _check_values(weight, "weight", channels, x)


def like_channels(x: Tensor) -> Tensor:
    """An empty tensor like ``x`` where that is contiguous or channels last; else contiguous."""
    if x.is_contiguous() or x.movedim(1, -1).is_contiguous():
        return torch.empty_like(x)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def batch_norm_backward(
    grad_output: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Reference of `torchbp.kernels.batch_norm_backward`; same arguments, results and errors."""
    check_batch_norm(grad_output, x, mean, rstd, weight, training)
    samples, channels = x.shape[:2]
    per_sample = mean.dim() == 2
    groups = mean.shape[1] if per_sample else channels
    shape = (samples, groups, channels // max(groups, 1), math.prod(x.shape[2:]))
    over = (2, 3) if per_sample else (0, 2, 3)
    g = up(grad_output).reshape(shape)
    mean, rstd = (t.reshape(samples if per_sample else 1, groups, 1, 1) for t in (mean, rstd))
    xhat = (up(x).reshape(shape) - mean) * rstd
    v = g if weight is None else g * weight.reshape(1, *shape[1:3], 1)
    through = v
    if training:
        product = (v * xhat).mean(over, keepdim=True)
        through = v - v.mean(over, keepdim=True) - xhat * product
    of_weight, of_bias = (t.sum((0, 3)).reshape(channels) for t in (g * xhat, g))
    return like_channels(x).copy_((rstd * through).reshape(x.shape)), of_weight, of_bias
