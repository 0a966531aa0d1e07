"""Elements of planes by their position, as pooling with indices names them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor


def pick(x: Tensor, indices: Tensor, dims: int) -> Tensor:
    """The elements of each plane that ``indices`` names, in its shape."""
    planes = x.reshape(*x.shape[:-dims], math.prod(x.shape[-dims:]))
    return planes.gather(-1, flat(indices, dims)).reshape(indices.shape)


def put(values: Tensor, indices: Tensor, shape: Sequence[int], dims: int) -> Tensor:
    """The transpose of :func:`pick`: a plane takes the sum of what is sent to each position."""
    # Zeros that are one number in memory are written once, by the copy scatter_add makes.
    planes = values.new_zeros(()).expand(*shape[:-dims], math.prod(shape[-dims:]))
    return planes.scatter_add(-1, flat(indices, dims), flat(values, dims)).reshape(shape)


def flat(tensor: Tensor, dims: int) -> Tensor:
    """The tensor with each plane in one dimension."""
    return tensor.reshape(*tensor.shape[:-dims], math.prod(tensor.shape[-dims:]))
