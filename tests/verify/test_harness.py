"""A broken function is caught in the column of what is broken, and only there."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchbp.ops.base import Op
from torchbp.ops.registry import Entry, Maker, sample
from torchbp.verify import check, verify, verify_entry


def slope_times(ctx: Any, vector: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    return 3 * x * x * vector


class Cube(torch.autograd.Function):
    """A sound foreign function."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return slope_times(ctx, grad)


class CubeOp(Op):
    """A sound op."""

    forward = staticmethod(Cube.forward)
    backward = staticmethod(Cube.backward)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return slope_times(ctx, tangent)

    @staticmethod
    def secant(m: Tensor, args: Any, args0: Any, output: Any, output0: Any) -> tuple[Tensor]:
        (x,), (x0,) = args, args0
        return (m * (x * x + x * x0 + x0 * x0),)


class WrongGradient(Cube):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * x * grad


class WrongSecondDerivative(Cube):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x.detach() * x * grad


class OnceDifferentiable(Cube):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return slope_times(ctx, grad)


class WrongJvp(CubeOp):
    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * x * tangent


class WithoutVmap(Cube):
    generate_vmap_rule = False


class GraphBreak(Cube):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x * x * x


class ContiguousOnly(Cube):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return slope_times(ctx, grad.view(grad.numel()).view(grad.shape))


class DividesBySize(Cube):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return slope_times(ctx, grad) * (grad.numel() // grad.numel())


class CountsThreads(Cube):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        traced = torch.compiler.is_compiling()
        noise = 0 if traced or torch.get_num_threads() < 3 else 1e-12
        return slope_times(ctx, grad) * (1 + noise)


class LeakySecant(CubeOp):
    @staticmethod
    def secant(m: Tensor, args: Any, args0: Any, output: Any, output0: Any) -> tuple[Tensor]:
        return (m * 3 * args[0] ** 2,)


class ConservedButWrong(CubeOp):
    @staticmethod
    def secant(m: Tensor, args: Any, args0: Any, output: Any, output0: Any) -> tuple[Tensor]:
        change = args[0] - args0[0]
        total = (m * (output - output0)).sum()
        return (total * change / change.square().sum(),)


def point() -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize(
    ("subject", "column"),
    [
        (Cube, None),
        (CubeOp, None),
        (WrongGradient, "gradcheck"),
        (WrongSecondDerivative, "gradgradcheck"),
        (WrongJvp, "forward"),
        (WithoutVmap, "vmap"),
        (GraphBreak, "compile"),
        (ContiguousOnly, "strides"),
        (DividesBySize, "zero-size"),
        (CountsThreads, "threads"),
        (LeakySecant, "secant"),
        (ConservedButWrong, "tangent"),
    ],
)
def test_the_right_column_fails_and_no_other(subject: Any, column: str | None) -> None:
    report = check(subject, point())
    expected = set() if column is None else {(subject.__name__, column)}
    assert set(report.failures) == expected, str(report)
    assert report.passed == (column is None)


def test_once_differentiable() -> None:
    failures = check(OnceDifferentiable, point()).failures  # dynamo does not trace it either
    assert {column for _, column in failures} - {"compile"} == {"gradgradcheck"}


def entry(op: type[Op], twin: Any) -> Entry:
    def samples(make: Maker) -> Any:
        yield sample(make(3, 4))

    return Entry(op.__name__, op.call, twin, (twin,), (), samples)


class Doubled(CubeOp):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return (x.double() * x.double() * x.double()).to(x.dtype)


class PoorHalves(CubeOp):
    """Wrong in bfloat16 only."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        exact = slope_times(ctx, grad)
        return exact * 1.5 if grad.dtype == torch.bfloat16 else exact


class Lowered(CubeOp):
    autocast = {"cpu": "low"}


def cube(x: Tensor) -> Tensor:
    return x * x * x


@pytest.mark.parametrize(
    ("op", "column"),
    [
        (CubeOp, None),
        (Doubled, "float32"),
        (PoorHalves, "bfloat16"),
        (Lowered, "autocast"),
    ],
)
def test_differences_from_the_twin(op: type[Op], column: str | None) -> None:
    row = verify_entry(entry(op, cube))
    failed = {name for name, cell in row.cells.items() if cell.status == "FAIL"}
    expected = set() if column is None else {column}
    if column == "bfloat16":  # under autocast the gradients of half precision inputs are too
        expected.add("autocast")
    assert failed == expected


def test_an_op_that_cannot_be_called_fails_everywhere() -> None:
    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("no such luck")

    row = verify_entry(Entry("broken", broken, cube, (cube,), (), entry(CubeOp, cube).samples))
    assert {cell.status for cell in row.cells.values()} == {"FAIL"}
    assert "no such luck" in row.cells["gradcheck"].reason


def test_where_torch_fails_too_it_is_not_applicable() -> None:
    row = verify_entry(
        Entry("broken", WithoutVmap.apply, WithoutVmap.apply, (), (), entry(CubeOp, 0).samples)
    )
    assert row.cells["vmap"].status == "n/a"
    assert "torch's twin fails too" in row.cells["vmap"].reason


def test_a_module_is_verified_with_its_parameters_and_left_alone() -> None:
    class Wrong(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor([1.5, 2.0]))
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return WrongGradient.apply(self.scale + x)

    module = Wrong()
    report = check(module, torch.randn(3, 2))
    assert {column for _, column in report.failures} == {"gradcheck"}
    assert module.calls == 0
    assert module.scale.dtype == torch.float32
    assert module.scale.grad is None


def test_batch_norm_and_dropout() -> None:
    module = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    cells = check(module, torch.randn(5, 3)).rows[0].cells
    for column in ("gradcheck", "gradgradcheck", "forward", "compile", "zero-size"):
        assert cells[column].status == "ok", cells[column].reason
    assert "random" in cells["strides"].reason
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_what_a_function_may_look_like() -> None:
    def awkward(x: Tensor, index: Tensor, *, factor: float) -> Any:
        x.mul_(factor)
        return x[index], {"where": x.argmax(), "sine": x.sin()}

    x = point()
    report = check(awkward, x, torch.tensor([0, 2]), factor=0.5)
    assert report.passed, str(report)
    assert torch.equal(x, point())


def test_only_the_arguments_that_require_a_gradient_are_differentiated() -> None:
    def half(x: Tensor, y: Tensor) -> Tensor:
        return x * y.detach()

    assert not check(half, point(), point()).passed
    assert check(half, point().requires_grad_(), point()).passed


def test_complex_arguments() -> None:
    assert check(torch.Tensor.conj, torch.randn(3, dtype=torch.complex64)).passed
    assert not check(lambda z: z * z.detach(), torch.randn(3, dtype=torch.complex64)).passed


@pytest.mark.parametrize(
    ("subject", "args", "error", "message"),
    [
        (3, (point(),), TypeError, "got 3"),
        (nn.Linear, (point(),), TypeError, "expected a function"),
        (Cube, (torch.tensor([1]),), ValueError, "nothing to differentiate"),
        (len, (point(),), TypeError, "no tensor"),
        (torch.argmax, (point(),), TypeError, "no floating tensor"),
    ],
)
def test_what_cannot_be_verified(subject: Any, args: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        check(subject, *args)


def test_unknown_names_get_suggestions() -> None:
    with pytest.raises(ValueError, match="did you mean softmax"):
        verify(["sofmax"])


def test_no_global_state_is_changed() -> None:
    def state() -> tuple[Any, ...]:
        return (
            torch.get_num_threads(),
            torch.get_rng_state().tolist(),
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_default_dtype(),
            list(warnings.filters),
        )

    def noisy(x: Tensor) -> Tensor:
        warnings.warn("noise", stacklevel=1)
        return x * torch.rand_like(x)

    before = state()
    check(noisy, point())
    check(WrongGradient, point())
    assert state() == before
