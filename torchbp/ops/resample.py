"""Resampling of grids: nearest, linear, cubic, area and the antialiased filters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchbp.ops.base import wide
from torchbp.ops.linear_map import LinearMap
from torchbp.ops.registry import OPS, Maker, Sample, register, sample
from torchbp.ops.relevance import proportional

Size = int | Sequence[int] | None
Scale = float | Sequence[float] | None

# Inputs whose weights form one matrix, if there are more: beyond that it is mostly zeros.
_BAND = 64


class Interpolate(LinearMap):
    """``y = (W_1 ⊗ W_2 ⊗ ...) x``: along each spatial dimension a matrix of weights.

    Row i of W holds the kernel around the source position ``s(i)`` of output i: with σ the ratio of
    sizes (or the inverse of the factor that was given), ``s(i) = σ (i + ½) - ½``, or ``σ i`` with
    corners aligned. Kernels: nearest, linear, cubic convolution (Keys 1981, a = -¾); antialiased
    (stretched by σ when shrinking, normalised): triangle, cubic with a = -½, Lanczos with 3 lobes.

    Backward and secant: ``∂x = (W_1ᵀ ⊗ W_2ᵀ ⊗ ...) g``. LRP: in proportion to the contributions.
    """

    relevance = classmethod(proportional)

    @staticmethod
    def forward(x: Tensor, *settings: Any) -> Tensor:
        return F.interpolate(x, *settings)

    @staticmethod
    def transposed(g: Tensor, shape: torch.Size, settings: Sequence[Any]) -> Tensor:
        size, scale_factor, mode, align_corners, recompute, antialias = settings
        factors = _each(None if size or recompute else scale_factor, len(shape) - 2)
        grad = wide(g)
        # From the last dimension but one on: rows are added faster than columns.
        for dim in (*range(len(shape) - 2, 1, -1), len(shape) - 1):
            n_in, n_out, factor = shape[dim], g.shape[dim], factors[dim - 2]
            axis = _Axis(n_in, n_out, factor, mode, bool(align_corners), antialias, len(shape) - 2)
            grad = axis.spread(grad, dim)
        return grad.to(g.dtype)


def _each(value: Any, count: int) -> Sequence[Any]:
    return value if isinstance(value, Sequence) else (value,) * count


@dataclass(frozen=True)
class _Axis:
    """One dimension: ``n_in`` positions in, ``n_out`` out, and how they lie to each other."""

    n_in: int
    n_out: int
    factor: float | None
    mode: str
    align: bool
    antialias: bool
    dims: int

    @property
    def ratio(self) -> float:
        """σ: how far apart the source positions of neighbouring outputs lie."""
        if self.align:
            return (self.n_in - 1) / (self.n_out - 1) if self.n_out > 1 else 0.0
        return 1 / self.factor if self.factor else self.n_in / self.n_out

    def spread(self, g: Tensor, dim: int) -> Tensor:
        """``Wᵀ g`` along ``dim``."""
        repeats, step = self._repeats(), self._step()
        if repeats:
            return _summed_repeats(g, dim, repeats)
        if step:
            return _spaced_out(g, dim, self.n_in, step, self.mode == "nearest-exact")
        # Weights of small maps take longer to make than to use; tracers must make their own.
        traced = torch.compiler.is_compiling() or type(g) is not Tensor
        make = _bands if traced or torch.is_inference_mode_enabled() else _kept_bands
        bands = make(self, g.dtype, g.device)
        parts = [_times(g.narrow(dim, low, len(w)), w, dim) for low, w in bands]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def _repeats(self) -> int:
        """How often every input is repeated, if that is all that happens; 0 if it is not."""
        repeats = self.n_out // self.n_in
        if repeats * self.n_in != self.n_out:
            return 0
        if self._is_nearest:
            # From 41 on the rounding of 1 / repeats shows: then the inputs are asked for.
            return repeats if self.factor in (None, repeats) and repeats <= 40 else 0
        # Whatever factor was given, these copy if the size stays.
        return 1 if repeats == 1 and (self.antialias or self.mode != "bicubic") else 0

    def _step(self) -> int:
        """Which input is taken, if it is every n-th; 0 if it is not."""
        step = self.n_in // self.n_out
        regular = step * self.n_out == self.n_in and self.factor in (None, 1 / step)
        return step if self._is_nearest and regular else 0

    @property
    def _is_nearest(self) -> bool:
        return self.mode.startswith("nearest")

    def outputs(self, start: int, end: int) -> tuple[int, int]:
        """A range that holds every output with a weight on the inputs from start to end."""
        if not self.ratio:
            return 0, self.n_out
        reach = 3 * max(1.0, self.ratio) + 1 if self.antialias else 3.0
        low = min(max(math.floor((start - reach) / self.ratio) - 1, 0), self.n_out)
        return low, max(min(math.ceil((end + reach) / self.ratio) + 1, self.n_out), low)

    def weights(self, i: Tensor, start: int, end: int) -> Tensor:
        """``W[i, start:end]``."""
        if self.antialias:
            return self._filtered(i)[:, start:end]
        at, taps = self._nearest(i) if self._is_nearest else self._taps(i)
        # Beyond the edges the edge counts; what lies outside the range goes to a last column.
        at = at.long().clamp(0, self.n_in - 1) - start
        at = torch.where((at >= 0) & (at < end - start), at, end - start)
        columns = torch.zeros(len(i), end - start + 1, dtype=i.dtype, device=i.device)
        return columns.scatter_add(1, at, taps)[:, :-1]

    def _nearest(self, i: Tensor) -> tuple[Tensor, Tensor]:
        # torch rounds differently from kernel to kernel, so its forward is asked.
        shape, size = [1] * (self.dims + 2), [1] * self.dims
        shape[2], size[0] = self.n_in, self.n_out
        places = torch.arange(self.n_in, dtype=i.dtype, device=i.device).reshape(shape)
        if self.factor is None:
            picked = F.interpolate(places, size, mode=self.mode)
        else:
            factors = [self.factor, *(1.0,) * (self.dims - 1)]
            picked = F.interpolate(places, scale_factor=factors, mode=self.mode)
        at = picked.reshape(self.n_out, 1)[i.long()]
        return at, torch.ones_like(at)

    def _taps(self, i: Tensor) -> tuple[Tensor, Tensor]:
        """The two or four inputs around each source position, and their weights."""
        source = i * self.ratio if self.align else (i + 0.5) * self.ratio - 0.5
        cubic = self.mode == "bicubic"
        if not cubic:
            source = source.clamp(0, self.n_in - 1)
        offsets = torch.arange(-1, 3) if cubic else torch.arange(2)
        at = source.floor()[:, None] + offsets.to(i.device)
        return at, (_cubic if cubic else _triangle)(source[:, None] - at)

    def _filtered(self, i: Tensor) -> Tensor:
        """Rows of a filter as wide as an output pixel, cut off at the edges and normalised."""
        kernel, radius = _FILTERS[self.mode]
        stretch = max(self.ratio, 1.0)
        # The centre of output pixel i, also with corners aligned.
        centre, support = (i[:, None] + 0.5) * self.ratio, radius * stretch
        start = (centre - support + 0.5).floor().clamp(min=0)
        end = (centre + support + 0.5).floor().clamp(max=self.n_in)
        j = torch.arange(self.n_in, device=i.device)
        inside = (j >= start) & (j < end)
        weights = torch.where(inside, kernel((j + 0.5 - centre) / stretch), 0)
        return weights / weights.sum(1, keepdim=True)


Band = tuple[int, Tensor]


def _bands(axis: _Axis, dtype: torch.dtype, device: torch.device) -> list[Band]:
    """W in bands of inputs: the first output that each one concerns, and the weights."""
    width = axis.n_in if axis.n_in <= 1.5 * _BAND else _BAND
    bands = []
    for start in range(0, axis.n_in, width):
        end = min(start + width, axis.n_in)
        low, high = (0, axis.n_out) if width == axis.n_in else axis.outputs(start, end)
        i = torch.arange(low, high, dtype=dtype, device=device)
        bands.append((low, axis.weights(i, start, end)))
    return bands


_kept_bands = lru_cache(maxsize=32)(_bands)


def _times(g: Tensor, weights: Tensor, dim: int) -> Tensor:
    """``Wᵀ g`` along ``dim``."""
    if dim == g.dim() - 1:
        return g @ weights
    if dim == g.dim() - 2:
        return weights.mT @ g
    *leading, n_out, height, width = g.shape
    planes = weights.mT @ g.reshape(*leading, n_out, height * width)
    return planes.reshape(*leading, weights.shape[1], height, width)


def _every(step: int, start: int, dim: int) -> tuple[slice, ...]:
    return *(slice(None),) * dim, slice(start, None, step)


def _summed_repeats(g: Tensor, dim: int, repeats: int) -> Tensor:
    parts = [g[_every(repeats, start, dim)] for start in range(repeats)]
    return sum(parts[1:], parts[0])


def _spaced_out(g: Tensor, dim: int, size: int, step: int, exact: bool) -> Tensor:
    shape = [*g.shape]
    shape[dim] = size
    spaced = g.new_zeros(shape)
    spaced[_every(step, step // 2 if exact else 0, dim)] = g
    return spaced


def _triangle(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


def _cubic(x: Tensor, a: float = -0.75) -> Tensor:
    x = x.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))


def _smooth_cubic(x: Tensor) -> Tensor:
    return _cubic(x, -0.5)


def _lanczos(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 3, torch.sinc(x) * torch.sinc(x / 3), 0)


_FILTERS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "bilinear": (_triangle, 1),
    "bicubic": (_smooth_cubic, 2),
    "lanczos": (_lanczos, 3),
}


def _samples(make: Maker) -> Iterator[Sample]:
    yield sample(make(1, 2, 3), scale_factor=2)
    yield sample(make(1, 1, 3, 2), 5, mode="nearest")
    yield sample(make(1, 1, 4, 3), scale_factor=(0.6, 1.4), mode="nearest-exact")
    yield sample(make(1, 1, 1, 2, 2), scale_factor=2.0, mode="nearest")
    yield sample(make(1, 2, 3), 5, mode="linear")
    yield sample(make(1, 1, 3, 4), (5, 3), mode="bilinear")
    yield sample(make(1, 1, 3, 4), scale_factor=(1.7, 0.6), mode="bilinear", align_corners=True)
    yield sample(make(1, 1, 3, 2), scale_factor=1.5, mode="bilinear", recompute_scale_factor=True)
    yield sample(make(1, 1, 2, 2, 3), (3, 1, 4), mode="trilinear")
    yield sample(make(1, 1, 3, 4), (5, 3), mode="bicubic")
    yield sample(make(1, 1, 3, 4), scale_factor=1.7, mode="bicubic", align_corners=True)
    yield sample(make(1, 1, 6, 4), (3, 5), mode="bilinear", antialias=True)
    yield sample(make(1, 1, 6, 4), scale_factor=(0.6, 0.8), mode="bicubic", antialias=True)
    yield sample(make(1, 2, 5), 2, mode="area")
    yield sample(make(1, 1, 4, 3), scale_factor=0.5, mode="area")
    yield sample(make(1, 1, 3, 2, 2), (2, 1, 2), mode="area")
    yield sample(make(0, 2, 2, 2), scale_factor=2)


@register(
    F.interpolate,
    modules=[nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d],
    samples=_samples,
)
def interpolate(
    input: Tensor,
    size: Size = None,
    scale_factor: Scale = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Tensor:
    """Resample the spatial dimensions, as :func:`torch.nn.functional.interpolate`.

    Args:
        input: ``(N, C, W)``, ``(N, C, H, W)`` or ``(N, C, D, H, W)``.
        size: the new spatial size.
        scale_factor: what to multiply the spatial size by; this or ``size``.
        mode: ``"nearest"``, ``"nearest-exact"``, ``"linear"``, ``"bilinear"``, ``"trilinear"``,
            ``"bicubic"``, ``"area"`` or, where torch has it, ``"lanczos"``.
        align_corners: let the corner pixels' centres stay where they are, not their corners.
        recompute_scale_factor: take the ratio of the sizes, not ``scale_factor``, for positions.
        antialias: filter before shrinking, for ``"bilinear"``, ``"bicubic"`` and ``"lanczos"``.

    Returns:
        ``input`` with the new spatial size.

    Raises:
        ValueError: if the settings contradict each other.
        NotImplementedError: if the mode does not go with the number of dimensions.
    """
    if mode == "area" and align_corners is None and not antialias:
        averaged = _area(input, size, scale_factor, recompute_scale_factor)
        if averaged is not None:
            return averaged
    return Interpolate.call(
        input, size, scale_factor, mode, align_corners, recompute_scale_factor, antialias
    )


def _area(input: Tensor, size: Size, factor: Scale, recompute: bool | None) -> Tensor | None:
    """Means over adaptive windows; ``None`` for what torch refuses."""
    count = input.dim() - 2
    given = _each(size if factor is None else factor, count)
    settled = (size is None) != (factor is None) and not (recompute and size)
    if not settled or len(given) != count or not 1 <= count <= 3:
        return None
    if factor is not None:
        given = [int(n * f) for n, f in zip(input.shape[2:], given, strict=True)]
    return OPS[f"adaptive_avg_pool{count}d"].functional(input, tuple(given))


def upsample(
    input: Tensor,
    size: Size = None,
    scale_factor: Scale = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
) -> Tensor:
    """The former name of :func:`interpolate`, without its later settings.

    Args:
        input: as there.
        size: as there.
        scale_factor: as there.
        mode: as there.
        align_corners: as there.

    Returns:
        ``input`` with the new spatial size.
    """
    return interpolate(input, size, scale_factor, mode, align_corners)
