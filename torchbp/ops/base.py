"""What an op is: a ``torch.autograd.Function`` that also knows its secant."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, is_grad_enabled
from torch._C import _are_functorch_transforms_active, _is_any_autocast_enabled
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.overrides import handle_torch_function, has_torch_function

from torchbp import kernels
from torchbp.kernels.reference_common import DTYPES
from torchbp.ops.relevance import Rule

Policy = Literal["low", "fp32"]


class Op(torch.autograd.Function):
    """An operation whose derivatives are written out.

    A subclass gives, side by side:

    * ``forward(*args)``: the value (torch's own forward, so that outputs are bitwise torch's);
    * ``setup_context(ctx, inputs, output)``: what backward and jvp need, and no more;
    * ``backward(ctx, grad_output)``: the tangent, in differentiable torch where
      ``torch.is_grad_enabled()`` (double backward differentiates it again);
    * ``jvp(ctx, *tangents)``: forward mode;
    * ``secant(multiplier, args, args0, output, output0)``: multipliers ``m`` with
      ``sum <m_arg, arg - arg0> = <multiplier, output - output0>`` exactly, one per argument
      (``None`` for constants; an op may leave out costly ones of tensors that do not require
      grad). Where forward returns several tensors, all but the first are
      marked non-differentiable, and ``multiplier`` is the first one's;
    * ``relevance(relevance, rule, args, output)``: the LRP rule; see :mod:`torchbp.ops.relevance`;
    * ``sample_factors(grad_output, args, output)``: what every sample's gradient of a weight is
      made of, if there is a closed form; ``output`` is ``None`` where it is lost. See
      :mod:`torchbp.ops.sample_factors`.

    Attributes:
        autocast: per device type, the list of PyTorch's autocast this op is on: ``"low"`` (runs in
            the autocast dtype) or ``"fp32"``. Devices left out run in the dtype of their inputs.
        samples_in: the argument laid out as the parts of ``sample_factors`` are; the output if
            ``None``.
        no_secant: why there can be no secant, where there is none.
        no_relevance: why there is no LRP rule, where there is none.
    """

    generate_vmap_rule = True
    autocast: ClassVar[dict[str, Policy]] = {}
    no_secant: ClassVar[str | None] = None
    no_relevance: ClassVar[str | None] = None
    samples_in: ClassVar[int | None] = None
    sample_factors: ClassVar[Callable[..., tuple[Any, ...]] | None] = None
    call: ClassVar[Callable[..., Any]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Give the op its ``call``, the one door through which every functional passes."""
        super().__init_subclass__(**kwargs)
        if cls.forward is not torch.autograd.Function.forward:
            cls.call = staticmethod(_door(cls))

    @staticmethod
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        """Multipliers of every argument; see the class. Each op writes its own."""
        raise NotImplementedError

    @classmethod
    def relevance(
        cls, relevance: Tensor, rule: Rule, args: tuple[Any, ...], output: Any
    ) -> tuple[Tensor | None, ...]:
        """Relevance of every argument; see the class. Each op writes its own."""
        raise NotImplementedError(f"{cls.__name__} has no LRP rule: {cls.no_relevance}")


def _door(op: type[Op]) -> Callable[..., Any]:
    # Dynamo refuses a Function that defines jvp, hence a twin without it. Both are closed over,
    # because dynamo cannot look a Function up as an attribute of another one.
    names = ("forward", "setup_context", "backward")
    body: dict[str, Any] = {name: staticmethod(getattr(op, name)) for name in names}
    body["generate_vmap_rule"] = True
    traced: Any = type(f"{op.__name__}Traced", (torch.autograd.Function,), body)
    policies = op.autocast
    direct = eager(op)
    dual = eager(_with_tangents(op))

    def call(*args: Any) -> Any:
        if is_compiling():
            device = args[0].device.type if isinstance(args[0], Tensor) else "meta"
            if device == "meta" or not torch.is_autocast_enabled(device):
                return traced.apply(*args)
            args = _autocast(args, policies.get(device), torch.get_autocast_dtype(device))
            with torch.autocast(device, enabled=False):
                return traced.apply(*args)
        if has_torch_function(args):  # a mode, such as the secant tape, or a Tensor subclass
            return handle_torch_function(call, args, *args)
        if not isinstance(args[0], Tensor):
            return op.forward(*args)  # torch's own error for it
        if _is_any_autocast_enabled():
            device = args[0].device.type
            if device != "meta" and torch.is_autocast_enabled(device):  # which refuses to ask there
                # Backward runs outside autocast, so the cast must be part of the graph: cast the
                # arguments here, then keep autocast away from the inside of the op.
                args = _autocast(args, policies.get(device), torch.get_autocast_dtype(device))
                transformed = _are_functorch_transforms_active()
                with torch.autocast(device, enabled=False):
                    if transformed:
                        return op.apply(*args)
                    return direct(*args) if forward_ad._current_level < 0 else dual(*args)
        if _are_functorch_transforms_active():
            return op.apply(*args)
        if forward_ad._current_level >= 0:
            return dual(*args)
        if not is_grad_enabled():
            return op.forward(*args)  # nobody asks for a derivative
        return direct(*args)

    call.op = op  # type: ignore[attr-defined]  # so that a mode can tell which op this is
    return call


def eager(op: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``op.apply`` outside of transforms, at a third of the overhead.

    ``Function.apply`` binds default arguments by inspecting the signature of every forward that has
    a ``setup_context`` (torch 2.14 does so even in C++), although an op is always called with all
    of its arguments. A Function of the older kind, whose forward takes ``ctx``, is spared that.
    """
    run, prepare = op.forward, op.setup_context

    def forward(ctx: Any, *args: Any) -> Any:
        output = run(*args)
        prepare(ctx, args, output)
        return output

    body: dict[str, Any] = {
        "forward": staticmethod(forward),
        "backward": staticmethod(op.backward),
        "jvp": staticmethod(op.jvp),
    }
    plain: Any = type(op.__name__, (torch.autograd.Function,), body)
    apply: Callable[..., Any] = super(torch.autograd.Function, plain).apply
    return apply


def _with_tangents(op: type[Op]) -> type[Op]:
    """The op for dual tensors: its backward must carry their tangents along.

    With grad mode off, backward may take what it saved for constants and call kernels, neither of
    which has a tangent. It is therefore made to run as for a second derivative.
    """

    def backward(ctx: Any, *grads: Any) -> Any:
        if is_grad_enabled():
            return op.backward(ctx, *grads)
        with torch.enable_grad():
            results = op.backward(ctx, *grads)
        # A clone leaves the graph behind, and unlike detach() takes the tangent along.
        if isinstance(results, Tensor):
            return results.clone()
        return tuple(None if r is None else r.clone() for r in results)

    members = {"backward": staticmethod(backward)}
    for name in ("forward", "setup_context", "jvp"):
        members[name] = staticmethod(getattr(op, name))
    return type(op.__name__, (torch.autograd.Function,), members)


def _autocast(args: tuple[Any, ...], policy: Policy | None, dtype: torch.dtype) -> tuple[Any, ...]:
    if policy is None:
        return args
    target = dtype if policy == "low" else torch.float32
    return tuple(
        a.to(target)
        if isinstance(a, Tensor) and a.is_floating_point() and a.dtype != torch.float64
        else a
        for a in args
    )


def add_tangents(*tangents: Tensor | None) -> Tensor | None:
    """Sum of the tangents that are there; ``None`` when none is."""
    present = [t for t in tangents if t is not None]
    return sum(present[1:], present[0]) if present else None


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32 if its dtype is a half one: sums of many terms need the digits."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


PLAIN = (Tensor, torch.nn.Parameter)


def is_plain(*tensors: Tensor) -> bool:
    """Whether compiled operators take them: no subclass such as DTensor, which brings its own.

    ``has_torch_function`` does not tell in a backward pass that ``DTensor.backward`` has started.
    """
    for tensor in tensors:
        if type(tensor) not in PLAIN:
            return False
    return True


def is_ordinary(*tensors: Tensor | None) -> bool:
    """Whether nobody but autograd's backward follows a call on these.

    That is no mode and no subclass with functions of its own, no transform, no forward mode.
    """
    return not (
        has_torch_function(tensors)
        or _are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


_CPU = frozenset({"cpu"})


def can_use_kernel(grad_output: Tensor, x: Tensor, devices: frozenset[str] = _CPU) -> bool:
    """Whether a compiled backward, which those devices have, takes these: for first derivatives.

    Asked in every backward, where Python runs several times slower than in a loop of its own, so
    that what is cheap comes first, and nothing is asked twice.
    """
    return (
        kernels.HAS_EXT
        and not is_grad_enabled()
        and (x.is_cpu or x.device.type in devices)
        and x.dtype in DTYPES
        and grad_output.dtype is x.dtype
        and type(x) in PLAIN
        and type(grad_output) in PLAIN
        and not is_compiling()
    )


def cast(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """The error of a tensor of that dtype: the real part where the tensor is real."""
    return (grad.real if grad.is_complex() and not dtype.is_complex else grad).to(dtype)


def midpoint(a: Any, a0: Any) -> Any:
    """``(a + a0) / 2``, or ``a`` itself when both runs share it (a parameter, say)."""
    return a if a is a0 else (a + a0) / 2


def vanishes(gap: Tensor, size: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Where ``Δf / gap`` would lose more digits than the slope at the midpoint is wrong by.

    The error of that slope is of third order in the gap.

    Args:
        gap: difference of the two runs.
        size: what the gap is to be compared with.
        dtype: that f is computed in; the gap's by default.
    """
    return gap.abs() <= 0.2 * torch.finfo(dtype or gap.dtype).eps ** (1 / 3) * size


def sum_to(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Undo broadcasting: sum ``tensor`` down to ``shape``."""
    return tensor if tensor.shape == torch.Size(shape) else tensor.sum_to_size(tuple(shape))
