"""The table of kernels: the operators ``torch.ops.torchbp.*`` with schema, reference and rules.

The compiled extension brings the schemas and its CPU and CUDA kernels. Without it the schemas are
defined here, so that nobody else has to know which of the two is there.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Kernel:
    """One operator.

    Attributes:
        schema: as the C++ source of the kernel states it too.
        reference: the kernel in plain PyTorch, for every backend without a compiled one.
        fake: shapes and dtypes of the results, without computing them.
        vmap: the batching rule, as :func:`torch.library.register_vmap` wants it.
        op: what to call: looking an operator up costs more than the call's own checks.
    """

    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    vmap: Callable[..., Any] | None
    op: Any


def _extension() -> tuple[ModuleType | None, str]:
    """The compiled extension and "", or None and the reason why there is none."""
    if os.environ.get("TORCHBP_REFERENCE") == "1":
        return None, "TORCHBP_REFERENCE=1"
    try:
        return importlib.import_module("torchbp._C"), ""
    except ImportError as error:
        return None, str(error)


extension, why_not = _extension()

KERNELS: dict[str, Kernel] = {}
"""Every kernel by name; tests iterate over it."""

# Operators live as long as their Library.
_definitions = torch.library.Library("torchbp", "FRAGMENT")
_references = torch.library.Library("torchbp", "IMPL")


def add(
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    vmap: Callable[..., Any] | None = None,
) -> Any:
    """Register an operator; see `Kernel` for the arguments, and for what is returned (``op``)."""
    name = schema.partition("(")[0]
    if extension is None:
        _definitions.define(schema, tags=torch.Tag.pt2_compliant_tag)
    _references.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"torchbp::{name}", fake)
    if vmap is not None:
        torch.library.register_vmap(f"torchbp::{name}", vmap)
    op = getattr(torch.ops.torchbp, name).default
    KERNELS[name] = Kernel(schema, reference, fake, vmap, op)
    return op


def vmap_one_by_one(name: str) -> Callable[..., Any]:
    """The rule that calls the kernel, which returns a tensor or some, for every batch entry."""

    def rule(info: Any, in_dims: Sequence[int | None], *args: Any) -> Any:
        call = KERNELS[name].op
        calls = [
            call(
                *(
                    a.select(d, i) if isinstance(d, int) else a
                    for a, d in zip(args, in_dims, strict=True)
                )
            )
            for i in range(info.batch_size)
        ]
        if calls and isinstance(calls[0], Tensor):
            return torch.stack(calls), 0
        results = tuple(torch.stack(parts) for parts in zip(*calls, strict=True))
        return results, (0,) * len(results)

    return rule


def batch_first(t: Tensor, dim: int | None, batch: int) -> Tensor:
    """``t`` with its batch dim in front, expanded where it has none."""
    return t.expand(batch, *t.shape) if dim is None else t.movedim(dim, 0)
