"""The table of every op: verification, documentation and the secant tape iterate over it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor


class Maker:
    """Makes the tensors of a sample, reproducibly.

    Args:
        dtype: dtype of the floating tensors.
        device: where they live.
        seed: seed of the generator, so that equal makers make equal samples.
        requires_grad: whether the differentiable tensors record gradients.
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.float64,
        device: str | torch.device = "cpu",
        seed: int = 0,
        requires_grad: bool = True,
    ) -> None:
        self.dtype, self.device, self.requires_grad = dtype, torch.device(device), requires_grad
        self._generator = torch.Generator().manual_seed(seed)

    def _normal(self, shape: Sequence[int]) -> Tensor:
        # Drawn in float64 always: every dtype then sees the same numbers, rounded.
        draw = torch.randn(tuple(shape), dtype=torch.float64, generator=self._generator)
        return draw.to(self.device, self.dtype)

    def __call__(self, *shape: int) -> Tensor:
        """A standard normal tensor that is differentiated."""
        return self._normal(shape).requires_grad_(self.requires_grad)

    def positive(self, *shape: int) -> Tensor:
        """A tensor of numbers from 0.2 on that is differentiated."""
        return (self._normal(shape).abs() + 0.2).requires_grad_(self.requires_grad)

    def constant(self, *shape: int, positive: bool = False) -> Tensor:
        """A tensor no derivative is taken of, such as a class weight or a running variance."""
        value = self._normal(shape)
        return value.abs() + 0.5 if positive else value

    def integers(self, high: int, *shape: int) -> Tensor:
        """Class indices in ``[0, high)``."""
        return torch.randint(high, tuple(shape), generator=self._generator).to(self.device)


@dataclass(frozen=True)
class Sample:
    """Arguments of one call of a functional."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


def sample(*args: Any, **kwargs: Any) -> Sample:
    """A sample, written like the call itself."""
    return Sample(args, kwargs)


Samples = Callable[[Maker], Iterator[Sample]]


@dataclass(frozen=True)
class Entry:
    """One registered functional.

    Attributes:
        name: its name in ``torchbp.functional``.
        functional: ours; same signature as ``twin``.
        twin: torch's function, which gives the expected values; a composition of torch's where
            there is none.
        replaces: every torch function, method or operator that means the same; the secant tape
            sends calls of them here.
        modules: the torch.nn classes whose drop-in this op serves.
        samples: yields calls that cover the op's settings, from a :class:`Maker`.
        inplace: torch functions among ``replaces`` that write into their first argument.
    """

    name: str
    functional: Callable[..., Any]
    twin: Callable[..., Any]
    replaces: tuple[Callable[..., Any], ...]
    modules: tuple[type[torch.nn.Module], ...]
    samples: Samples
    inplace: tuple[Callable[..., Any], ...] = ()


OPS: dict[str, Entry] = {}
BY_TORCH_FUNCTION: dict[Callable[..., Any], Entry] = {}

F = TypeVar("F", bound=Callable[..., Any])


def register(
    twin: Callable[..., Any],
    *,
    samples: Samples,
    replaces: Sequence[Callable[..., Any]] = (),
    modules: Sequence[type[torch.nn.Module]] = (),
    inplace: Sequence[Callable[..., Any]] = (),
) -> Callable[[F], F]:
    """Enter a functional into the table; see :class:`Entry` for the arguments."""

    def enter(functional: F) -> F:
        name = functional.__name__
        if name in OPS:
            raise ValueError(f"register: an op named {name!r} is in the registry already")
        entry = Entry(
            name, functional, twin, (twin, *replaces), tuple(modules), samples, tuple(inplace)
        )
        OPS[name] = entry
        for function in (*entry.replaces, *entry.inplace):
            BY_TORCH_FUNCTION[function] = entry
        return functional

    return enter
