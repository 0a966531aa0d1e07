"""Products, quotients and powers of two tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from torchbp.ops.base import Op, add_tangents, cast, midpoint, sum_to, vanishes
from torchbp.ops.registry import Maker, Sample, register, sample
from torchbp.ops.relevance import Rule, Shares, only_epsilon, quotient
from torchbp.ops.sample_factors import Factors, Outer, Rows


def _reduced(grad: Tensor, like: Tensor) -> Tensor:
    return cast(sum_to(grad, like.shape), like.dtype)


def halves(relevance: Tensor, a: Any, b: Any) -> tuple[Tensor | None, Tensor | None]:
    """Equal shares for the factors that carry a signal; all to one if it is the only one."""
    factors = [isinstance(t, Tensor) and t.is_floating_point() for t in (a, b)]
    recorded = [f and t.requires_grad for f, t in zip(factors, (a, b), strict=True)]
    takes = recorded if any(recorded) else factors
    share = relevance / max(sum(takes), 1)
    return tuple(share if t else None for t in takes)  # type: ignore[return-value]


class Mul(Op):
    """``y = a b`` with broadcasting.

    Backward: ``∂a = g b``, ``∂b = g a``. Secant: each factor weighted by the other's midpoint, the
    two-player Shapley value. LRP: halves, summed over broadcast dimensions (Achtibat et al. 2024).
    """

    @staticmethod
    def forward(a: Tensor, b: Any) -> Tensor:
        return torch.mul(a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, b = inputs
        ctx.number = None if isinstance(b, Tensor) else b
        tensors = (a, b) if ctx.number is None else (a,)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        a, b = _operands(ctx)
        needs_a, needs_b = ctx.needs_input_grad
        return (
            _reduced(grad_output * _conj(b), a) if needs_a else None,
            _reduced(grad_output * a.conj(), b) if needs_b else None,
        )

    @staticmethod
    def jvp(ctx: Any, ta: Tensor | None, tb: Tensor | None) -> Tensor | None:
        a, b = _operands(ctx)
        return add_tangents(None if ta is None else ta * b, None if tb is None else a * tb)

    @staticmethod
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        (a, b), (a0, b0) = args, args0
        of_a = _reduced(multiplier * midpoint(b, b0), a)
        return of_a, _reduced(multiplier * midpoint(a, a0), b) if isinstance(b, Tensor) else None

    @staticmethod
    def sample_factors(grad_output: Tensor, args: tuple[Any, ...], output: Any) -> Factors:
        a, b = args
        of_b = Rows(grad_output * a, b.shape, b) if isinstance(b, Tensor) else None
        return Rows(grad_output * b, a.shape, a), of_b

    @classmethod
    def relevance(
        cls, relevance: Tensor, rule: Rule, args: tuple[Any, ...], output: Any
    ) -> tuple[Tensor | None, ...]:
        return _halved(relevance, args)


def _halved(relevance: Tensor, args: tuple[Any, ...]) -> Shares:
    shares = zip(halves(relevance, *args), args, strict=True)
    return tuple(None if s is None else sum_to(s, a.shape) for s, a in shares)


def _operands(ctx: Any) -> tuple[Tensor, Any]:
    a, *rest = ctx.saved_tensors
    return a, rest[0] if rest else ctx.number


def _conj(b: Any) -> Any:
    if isinstance(b, complex):
        return b.conjugate()
    return b.conj() if isinstance(b, Tensor) else b


def _mul_samples(make: Maker) -> Iterator[Sample]:
    yield sample(make(3, 4), make(3, 4))
    yield sample(make(2, 3, 4), make(4))
    yield sample(make(3, 1), make(1, 4))
    yield sample(make(3, 4), 2.5)
    yield sample(make(0, 4), make(4))


@register(
    torch.mul,
    replaces=[torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__],
    inplace=[Tensor.mul_, Tensor.multiply_, Tensor.__imul__],
    samples=_mul_samples,
)
def mul(input: Tensor, other: Tensor | float) -> Tensor:
    """``input * other``, as :func:`torch.mul`.

    Args:
        input: any shape.
        other: a number, or a tensor of a shape that broadcasts with ``input``.

    Returns:
        The product, in the broadcast shape.
    """
    return Mul.call(*_tensor_first(input, other))


def _tensor_first(a: Any, b: Any) -> tuple[Any, Any]:
    return (a, b) if isinstance(a, Tensor) else (b, a)


class Div(Op):
    """``y = a / b`` with broadcasting.

    Backward: ``∂a = g / b``, ``∂b = -g y / b``. Secant: of the product ``a · (1/b)``, with
    ``1/b - 1/b₀ = -(b - b₀) / (b b₀)``. LRP: the numerator takes all, for the denominator only
    scales (Achtibat et al. 2024 treat normalisers so).
    """

    @staticmethod
    def forward(a: Tensor, b: Any) -> Tensor:
        return torch.div(a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, b = inputs
        ctx.number = None if isinstance(b, Tensor) else b
        tensors = (a, b) if ctx.number is None else (a,)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        a, b = _operands(ctx)
        needs_a, needs_b = ctx.needs_input_grad
        of_a = grad_output / _conj(b)
        return (
            _reduced(of_a, a) if needs_a else None,
            _reduced(-of_a * (a / b).conj(), b) if needs_b else None,
        )

    @staticmethod
    def jvp(ctx: Any, ta: Tensor | None, tb: Tensor | None) -> Tensor | None:
        a, b = _operands(ctx)
        return add_tangents(
            None if ta is None else ta / b, None if tb is None else -tb * (a / b) / b
        )

    @staticmethod
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        (a, b), (a0, b0) = args, args0
        if not isinstance(b, Tensor):
            return _reduced(multiplier / b, a), None
        of_b = -multiplier * (midpoint(a, a0) / b) / b0
        return _reduced(multiplier * midpoint(1 / b, 1 / b0), a), _reduced(of_b, b)

    @classmethod
    def relevance(
        cls, relevance: Tensor, rule: Rule, args: tuple[Any, ...], output: Any
    ) -> tuple[Tensor | None, ...]:
        return sum_to(relevance, args[0].shape), None


def _div_samples(make: Maker) -> Iterator[Sample]:
    yield sample(make(3, 4), make.positive(3, 4))
    yield sample(make(2, 3, 4), make.positive(4))
    yield sample(make(3, 1), make.positive(1, 4))
    yield sample(make(3, 4), 2.5)
    yield sample(make(0, 4), make.positive(4))


@register(
    torch.div,
    replaces=[torch.divide, torch.true_divide, Tensor.div, Tensor.divide, Tensor.true_divide,
              Tensor.__truediv__],
    inplace=[Tensor.div_, Tensor.__itruediv__],
    samples=_div_samples,
)  # fmt: skip
def div(input: Tensor, other: Tensor | float, *, rounding_mode: str | None = None) -> Tensor:
    """``input / other``, as :func:`torch.div`.

    Args:
        input: any shape; or a number.
        other: a number, or a tensor of a shape that broadcasts with ``input``.
        rounding_mode: ``None``, ``"trunc"`` or ``"floor"``; a rounded quotient is piecewise
            constant: no gradient.

    Returns:
        The quotient, in the broadcast shape.
    """
    if rounding_mode is not None:
        return torch.div(input, other, rounding_mode=rounding_mode)
    return Div.call(tensor_beside(other, input), other)


def tensor_beside(other: Any, value: Any) -> Any:
    """A number as a tensor that promotes with ``other`` as the number does."""
    if isinstance(value, Tensor) or not isinstance(other, Tensor):
        return value
    return torch.as_tensor(value, dtype=torch.result_type(value, other), device=other.device)


class Pow(Op):
    """``y = a ^ b`` with broadcasting.

    Backward: ``∂a = g b a^(b-1)``, ``∂b = g y log a``; a power of zero has no slope in a, one of
    the base zero none in b. Secant: the changes of a and of b in both orders, averaged (the
    two-player Shapley value, Shapley 1953). LRP: as for a product.
    """

    autocast = {"cuda": "fp32"}

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return torch.pow(a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        needs_a, needs_b = ctx.needs_input_grad
        return (
            _reduced(grad_output * _slope_in_base(a, b).conj(), a) if needs_a else None,
            _reduced(grad_output * _slope_in_exponent(a, b).conj(), b) if needs_b else None,
        )

    @staticmethod
    def jvp(ctx: Any, ta: Tensor | None, tb: Tensor | None) -> Tensor | None:
        a, b = ctx.saved_tensors
        return add_tangents(
            None if ta is None else ta * _slope_in_base(a, b),
            None if tb is None else tb * _slope_in_exponent(a, b),
        )

    @staticmethod
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        (a, b), (a0, b0) = args, args0
        of_a = midpoint(_chord_in_base(a, a0, b), _chord_in_base(a, a0, b0))
        of_b = midpoint(_chord_in_exponent(a, b, b0), _chord_in_exponent(a0, b, b0))
        return _reduced(multiplier * of_a, a), _reduced(multiplier * of_b, b)

    @classmethod
    def relevance(
        cls, relevance: Tensor, rule: Rule, args: tuple[Any, ...], output: Any
    ) -> tuple[Tensor | None, ...]:
        return _halved(relevance, args)


def _slope_in_base(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b == 0, 0, b * a.pow(b - 1))


def _slope_in_exponent(a: Tensor, b: Tensor) -> Tensor:
    real = b.real if b.is_complex() else b
    return torch.where((a == 0) & (real >= 0), 0, a.pow(b) * a.log())


def _chord_in_base(a: Tensor, a0: Tensor, b: Tensor) -> Tensor:
    slope, size = _slope_in_base((a + a0) / 2, b), torch.maximum(a.abs(), a0.abs())
    return _chord(a - a0, a.pow(b) - a0.pow(b), slope, size)


def _chord_in_exponent(a: Tensor, b: Tensor, b0: Tensor) -> Tensor:
    slope = _slope_in_exponent(a, (b + b0) / 2)
    return _chord(b - b0, a.pow(b) - a.pow(b0), slope, torch.ones_like(b))


def _chord(gap: Tensor, change: Tensor, slope: Tensor, size: Tensor) -> Tensor:
    """``change / gap``; the slope midway where the gap is lost in digits."""
    near = vanishes(gap, size, change.dtype)
    return torch.where(near, slope, change / gap.masked_fill(near, 1))


class MatMul(Op):
    """``y = A B`` over the last two dimensions, the others broadcast; vectors as in torch.matmul.

    Backward: ``∂A = g Bᵀ``, ``∂B = Aᵀ g``, summed over broadcast dimensions. Secant: each factor
    weighted by the other's midpoint. LRP: half of the epsilon rule's share for each factor
    (Achtibat et al. 2024).
    """

    autocast = {"cpu": "low", "cuda": "low"}

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return torch.matmul(a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        needs_a, needs_b = ctx.needs_input_grad
        return _matmul_back(grad_output, a.conj(), b.conj(), needs_a, needs_b)

    @staticmethod
    def jvp(ctx: Any, ta: Tensor | None, tb: Tensor | None) -> Tensor | None:
        a, b = ctx.saved_tensors
        return add_tangents(
            None if ta is None else torch.matmul(ta, b), None if tb is None else torch.matmul(a, tb)
        )

    @staticmethod
    def secant(
        multiplier: Tensor, args: tuple[Any, ...], args0: tuple[Any, ...], output: Any, output0: Any
    ) -> tuple[Tensor | None, ...]:
        (a, b), (a0, b0) = args, args0
        return _matmul_back(multiplier, midpoint(a, a0), midpoint(b, b0), True, True)

    @staticmethod
    def sample_factors(grad_output: Tensor, args: tuple[Any, ...], output: Any) -> Factors:
        a, b = args
        if a.dim() < 2 or b.dim() != 2:
            return None, None
        return None, Outer(a, grad_output)

    @classmethod
    def relevance(
        cls, relevance: Tensor, rule: Rule, args: tuple[Any, ...], output: Any
    ) -> tuple[Tensor | None, ...]:
        a, b = args
        takes = halves(torch.ones(()), a, b)
        if rule.name != "epsilon" and None in takes:
            only_epsilon(cls.__name__, rule)
        per_factor = quotient(relevance, output, rule.epsilon)
        of_a, of_b = _matmul_back(per_factor, a, b, True, True)
        return tuple(
            None if t is None or g is None else t * v * g
            for t, v, g in zip(takes, args, (of_a, of_b), strict=True)
        )


def _matmul_back(g: Tensor, a: Tensor, b: Tensor, needs_a: bool, needs_b: bool) -> Shares:
    # Vectors become matrices of one row or one column, and so does the error.
    rows, columns = a.dim() > 1, b.dim() > 1
    full_a, full_b = a if rows else a.unsqueeze(0), b if columns else b.unsqueeze(1)
    if not columns:
        g = g.unsqueeze(-1)
    if not rows:
        g = g.unsqueeze(-2)
    of_a = sum_to(g @ full_b.mT, full_a.shape).reshape(a.shape) if needs_a else None
    of_b = sum_to(full_a.mT @ g, full_b.shape).reshape(b.shape) if needs_b else None
    return of_a, of_b


def _matmul_samples(make: Maker) -> Iterator[Sample]:
    yield sample(make(3, 4), make(4, 2))
    yield sample(make(2, 3, 4), make(2, 4, 2))
    yield sample(make(2, 1, 3, 4), make(2, 4, 2))
    yield sample(make(2, 3, 4), make(4))
    yield sample(make(4), make(2, 4, 2))
    yield sample(make(4), make(4))
    yield sample(make(0, 4), make(4, 2))


@register(
    torch.matmul,
    replaces=[torch.mm, torch.bmm, torch.mv, torch.linalg.matmul, Tensor.matmul, Tensor.mm,
              Tensor.bmm, Tensor.mv, Tensor.__matmul__],
    samples=_matmul_samples,
)  # fmt: skip
def matmul(input: Tensor, other: Tensor) -> Tensor:
    """Matrix product, as :func:`torch.matmul`.

    Args:
        input: ``(*, n, k)``, or a vector ``(k,)``.
        other: ``(*, k, m)``, or a vector ``(k,)``; leading dimensions broadcast.

    Returns:
        ``(*, n, m)``, without the dimension that a vector lacks.
    """
    return MatMul.call(input, other)
