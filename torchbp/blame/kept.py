"""Arguments and outputs of calls, safe from what a model writes into them later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

_OPERATORS = {"__setitem__"} | {
    f"__i{name}__"
    for name in "add sub mul matmul truediv floordiv mod pow and or xor lshift rshift".split()
}


class Kept:
    """Arguments and output of one call, detached; which of them require grad can still be told.

    Attributes:
        op: what was called.
        args: its arguments.
        output: what it returned.
    """

    __slots__ = ("__weakref__", "_versions", "args", "op", "output")

    def __init__(self, op: Any, args: tuple[Any, ...], output: Any) -> None:
        self.op = op
        self.args: tuple[Any, ...] = tuple(_detached(a) for a in args)
        self.output = _detached(output)
        self._versions = self._current()

    def tensors(self) -> list[Tensor]:
        """Everything of it that could be overwritten."""
        outputs = self.output if isinstance(self.output, tuple) else (self.output,)
        return [v for v in (*self.args, *outputs) if isinstance(v, Tensor)]

    def secure(self, memory: int) -> None:
        """Take a copy of what lies in this memory."""
        self.args = tuple(_apart(a, memory) for a in self.args)
        self.output = _apart(self.output, memory)
        self._versions = self._current()

    def check(self) -> Kept:
        """Itself.

        Raises:
            RuntimeError: if something was overwritten unseen.
        """
        if self._current() != self._versions:
            raise RuntimeError(
                f"{self.op.__name__}: an argument or its output was overwritten after the call"
            )
        return self

    def _current(self) -> list[int]:
        return [-1 if t.is_inference() else t._version for t in self.tensors()]


class Keeper:
    """Keeps calls, and copies what a write is about to destroy, and no more."""

    def __init__(self) -> None:
        self._by_memory: dict[int, WeakSet[Kept]] = {}

    def keep(self, op: Any, args: tuple[Any, ...], output: Any) -> Kept:
        """Keep a call as long as the result is referred to."""
        kept = Kept(op, args, output)
        for tensor in kept.tensors():
            self._by_memory.setdefault(_memory(tensor), WeakSet()).add(kept)
        return kept

    def before_writing(self, target: Tensor) -> None:
        """Secure all calls that know the target's memory."""
        memory = _memory(target)
        for kept in self._by_memory.pop(memory, ()):
            kept.secure(memory)


def writes(func: Callable[..., Any]) -> bool:
    """Whether a torch function writes into its first argument, by its name."""
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name in _OPERATORS
    return name.endswith("_") and name != "requires_grad_"


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else id(tensor)


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().requires_grad_(value.requires_grad)
    if isinstance(value, tuple):
        return tuple(_detached(v) for v in value)
    return value


def _apart(value: Any, memory: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_apart(v, memory) for v in value)
    if isinstance(value, Tensor) and _memory(value) == memory:
        return value.detach().clone().requires_grad_(value.requires_grad)
    return value
