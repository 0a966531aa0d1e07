"""From torch.nn layers to torchbp's and back, in place."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from torchbp.nn import DROP_INS
from torchbp.tables import Table

_TWINS = {ours: twin for twin, ours in DROP_INS.items()}


def convert(model: nn.Module) -> nn.Module:
    """Have torchbp compute the backward pass of every layer that has a drop-in.

    Only the class of each module changes: parameters, buffers and hooks stay the same objects.
    :func:`conversion_report` tells what was swapped and what was left, and why.

    Args:
        model: any module; changed in place.

    Returns:
        The same model.

    Raises:
        TypeError: if ``model`` is no module.

    Warns:
        UserWarning: if the model has no layer with a drop-in.
    """
    changed = _swap(model, DROP_INS)
    if not changed and not any(type(m) in _TWINS for m in model.modules()):
        kinds = sorted({type(m).__name__ for m in model.modules()})
        warnings.warn(
            f"convert: no layer of the model has a drop-in (it consists of {', '.join(kinds)}); "
            "nothing was changed. Blame works without conversion",
            UserWarning,
            stacklevel=2,
        )
    return model


def revert(model: nn.Module) -> nn.Module:
    """Undo :func:`convert`: every drop-in becomes its torch.nn twin again, in place.

    Args:
        model: any module; changed in place.

    Returns:
        The same model.

    Raises:
        TypeError: if ``model`` is no module.
    """
    _swap(model, _TWINS)
    return model


def _swap(model: nn.Module, classes: dict[type[nn.Module], type[nn.Module]]) -> int:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    done: list[tuple[nn.Module, type[nn.Module]]] = []
    try:
        for module in model.modules():
            old, new = type(module), _counterpart(type(module), classes)
            if new is not None and "forward" not in vars(module):
                module.__class__ = new
                done.append((module, old))
    except BaseException:
        for module, old in reversed(done):
            module.__class__ = old
        raise
    return len(done)


def _counterpart(
    kind: type[nn.Module], classes: dict[type[nn.Module], type[nn.Module]]
) -> type[nn.Module] | None:
    """The class to put in the place of ``kind``, if there is one."""
    if kind in classes:
        return classes[kind]
    base = _parametrised(kind)
    if base not in classes:
        return None
    # A parametrised module has a class of its own, which adds properties to the layer's.
    properties = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
    return type(kind.__name__, (classes[base],), properties)


def _parametrised(kind: type[nn.Module]) -> type[nn.Module]:
    """The layer's class below the one that :mod:`torch.nn.utils.parametrize` made of it."""
    base = kind.__bases__[0]
    made = kind.__module__ == "torch.nn.utils.parametrize"
    return base if made and kind.__name__ == f"Parametrized{base.__name__}" else kind


def conversion_report(model: nn.Module) -> Table:
    """Module by module: is it torchbp's, and if not, why not.

    Args:
        model: any module.

    Returns:
        A table with the columns layer, class, status (``torchbp``, ``torch`` or ``left``) and
        reason; containers are left out.

    Raises:
        TypeError: if ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    rows: list[tuple[Any, ...]] = []
    for name, module in model.named_modules():
        status, reason = _status(module)
        if status != "container":
            rows.append((name or "(model)", type(module).__name__, status, reason))
    swapped = sum(row[2] == "torchbp" for row in rows)
    title = f"{swapped} of {len(rows)} layers are torchbp's"
    return Table(("layer", "class", "status", "reason"), rows, title=title)


def _status(module: nn.Module) -> tuple[str, str | None]:
    kind = _parametrised(type(module))
    if "forward" in vars(module) and (kind in DROP_INS or kind in _TWINS):
        return "left", "its forward was replaced on the instance"
    if kind in _TWINS:
        return "torchbp", None
    if kind in DROP_INS:
        return "torch", "convert() would swap it"
    home = kind.__module__
    if home.startswith(("torch.jit", "torch.ao", "torch.quantized")):
        return "left", "scripted or quantised"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "left", "lazy: its shapes are not known yet"
    for twin in DROP_INS:
        if isinstance(module, twin):
            return "left", f"a subclass of torch.nn.{twin.__name__} that may compute otherwise"
    if next(module.children(), None) is not None or not home.startswith("torch.nn"):
        own = next(module.parameters(recurse=False), None) is not None
        return ("left", "it computes with parameters of its own") if own else ("container", None)
    return "left", f"torch.nn.{kind.__name__} has no drop-in yet"
