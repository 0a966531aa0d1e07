"""Functions inside a user's own forward: attributed by tangents, and by secants exactly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchbp import attribute

CE = F.cross_entropy


class Forward(nn.Module):
    """Two linear layers, whose outputs a function of the user's combines."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.LazyLinear(3)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self.a(x), self.b(x)).flatten(1))


def attention(a: Tensor, b: Tensor) -> Tensor:
    q, k = a.view(-1, 2, 2), b.view(-1, 2, 2)
    weights = (q @ k.transpose(1, 2) / 2**0.5).softmax(-1)
    return weights @ k


def rms(a: Tensor, b: Tensor) -> Tensor:
    return a * torch.rsqrt(a.pow(2).mean(-1, keepdim=True) + 1e-6) * b


FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "F.relu, +": lambda a, b: F.relu(a) + torch.tanh(b),
    "cat, chunk": lambda a, b: torch.cat([a, b.sigmoid()], 1).chunk(2, 1)[0],
    "gate": lambda a, b: a * torch.sigmoid(b),
    "self product": lambda a, b: a * a + b.square(),
    "@": attention,
    "rms norm": rms,
    "einsum": lambda a, b: torch.einsum("ni,nj->nij", a, b),
    "einsum with one": lambda a, b: torch.einsum("ni,ni->n", a, a)[:, None] + b,
    "bmm": lambda a, b: torch.bmm(a[:, :, None], b[:, None]),
    "addcmul": lambda a, b: torch.addcmul(a, a, b, value=0.5),
    "baddbmm": lambda a, b: torch.baddbmm(b[:, :, None], a[:, :, None], b[:, None]),
    "var": lambda a, b: a - b.var(1, keepdim=True),
    "div": lambda a, b: a / (1 + b.abs()),
    "number / tensor": lambda a, b: a + 1 / (2 + b**2) + 2 / b.exp(),
    "number - tensor": lambda a, b: 1 - a + (2.0 - b) * 3,
    "number ** tensor": lambda a, b: a + 2.0**b,
    "log sum exp": lambda a, b: a - torch.logsumexp(b, 1, keepdim=True),
    "log, sqrt": lambda a, b: torch.log(1 + a.exp()) + torch.sqrt(b * b + 1),
    "clamp": lambda a, b: a.clamp(-0.3, 0.3) + b.clamp(min=0.1) + a.clone().clamp_(max=0.2),
    "where": lambda a, b: torch.where(torch.tensor([True, False] * 2), a, b.erf()),
    "masked_fill": lambda a, b: a.masked_fill(torch.tensor([True, False] * 2), 0.0) + b,
    "maximum": lambda a, b: torch.maximum(a, b) + torch.minimum(a, b * b),
    "amax": lambda a, b: a - b.amax(1, keepdim=True),
    "in place": lambda a, b: a.clone().mul_(b).add_(a).relu_(),
    "sin, cos": lambda a, b: torch.stack([a.sin(), b.cos()], -1),
    "pad, roll": lambda a, b: F.pad(a, (1, 1)).roll(1, 1)[:, :4] + b.cumsum(1),
    "index": lambda a, b: a[:, [2, 0, 1, 3]] + b[:, :1] ** 3,
    "layer_norm": lambda a, b: F.layer_norm(a * b, (4,)),
    "gelu, silu": lambda a, b: F.gelu(a) * F.silu(b),
    "out of place sub": lambda a, b: torch.sub(a, b, alpha=2) * a,
}


def problem(function: Callable[[Tensor, Tensor], Tensor]) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = Forward(function)
    x, y = torch.randn(5, 4), torch.randint(3, (5,))
    model(x)
    return model.double(), x.double(), y


@pytest.mark.parametrize("n_steps", [1, 3])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_conserved_and_the_gradient_in_the_limit(name: str, n_steps: int) -> None:
    model, x, y = problem(FUNCTIONS[name])
    x0 = torch.randn_like(x)
    blame = attribute(model, x, y, CE, "secant", layers=["input"], baseline=x0, n_steps=n_steps)
    change = blame.losses - blame.reference_losses
    torch.testing.assert_close(blame["input"].sum(1), change, rtol=1e-10, atol=1e-12)
    cut = attribute(model, x, y, CE, "secant", layers=["a", "b"], baseline=x0, n_steps=n_steps)
    total = cut.per_sample("a") + cut.per_sample("b")
    torch.testing.assert_close(total, change, rtol=1e-10, atol=1e-12)
    step = 1e-6 * torch.randn_like(x)
    near = attribute(model, x, y, CE, "secant", layers=["input"], baseline=x - step)["input"]
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(CE(model(leaf), y, reduction="sum"), leaf)
    expected = gradient * step
    torch.testing.assert_close(near, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_tangent_methods_need_no_rule(name: str) -> None:
    model, x, y = problem(FUNCTIONS[name])
    found = attribute(model, x, y, CE, "gradient", layers=["input", "a"])
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(CE(model(leaf), y, reduction="sum"), leaf)
    torch.testing.assert_close(found["input"], gradient)


def test_each_element_of_a_product_is_weighted_by_the_midpoint_of_the_other() -> None:
    model, x, y = problem(lambda a, b: a * b)
    x0 = torch.randn_like(x)
    blame = attribute(model, x, y, CE, "secant", layers=["a", "b"], baseline=x0)
    with torch.no_grad():
        (a, b), (a0, b0) = ((model.a(v), model.b(v)) for v in (x, x0))
        p, p0 = (model.head(u).softmax(1) for u in (a * b, a0 * b0))
        mean = (p - p0) / (p / p0).log()
        m = (mean / mean.sum(1, keepdim=True) - F.one_hot(y, 3)) @ model.head.weight
    torch.testing.assert_close(blame["a"], m * (a - a0) * (b + b0) / 2)
    torch.testing.assert_close(blame["b"], m * (b - b0) * (a + a0) / 2)


class Inner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.digamma(x.exp())


def test_a_function_without_a_rule_is_named_with_its_module() -> None:
    model = nn.Sequential(nn.Linear(4, 3), Inner())
    with pytest.raises(NotImplementedError, match=r"no rule for torch\.digamma, called in module"):
        attribute(model, torch.rand(2, 4), torch.tensor([0, 1]), CE, "secant")


@pytest.mark.parametrize(
    "function",
    [
        lambda a: torch.where(a > 0, a, 0.1 * a),
        lambda a: a * (a > 0),
        lambda a: a.masked_fill(a < 0, 0.0),
        lambda a: a.gather(1, a.argsort(1)),
    ],
    ids=["where", "product", "masked_fill", "gather"],
)
def test_masks_and_indices_that_depend_on_values_are_refused(
    function: Callable[[Tensor], Tensor],
) -> None:
    """With another mask in each run a linear function has no secant: blame would not add up."""
    model, x, y = problem(lambda a, b: function(a) + b)
    with pytest.raises(RuntimeError, match="a mask or indices that differ between the input and"):
        attribute(model, x, y, CE, "secant", baseline=-x)
    attribute(model, x, y, CE, "secant", baseline=x)


def test_a_product_of_three_by_einsum_is_refused() -> None:
    """Its difference between two runs is not its derivative midway."""
    model, x, y = problem(lambda a, b: torch.einsum("ni,ni,ni->ni", a, b, a))
    with pytest.raises(NotImplementedError, match=r"no rule for torch.*einsum"):
        attribute(model, x, y, CE, "secant", baseline=-x)


def test_a_rounded_quotient_is_refused() -> None:
    model, x, y = problem(lambda a, b: torch.div(a, 0.1, rounding_mode="floor") + b)
    with pytest.raises(NotImplementedError, match=r"no rule for torch\.div"):
        attribute(model, x, y, CE, "secant", baseline=-x)


@pytest.mark.parametrize(
    "function",
    [
        lambda a: a * (a > 0).to(a.dtype),
        lambda a: a + a.detach().square(),
        lambda a: a / a.detach().norm(dim=1, keepdim=True),
        lambda a: torch.where(torch.tensor([True, False] * 2), a, a.detach() ** 2),
        lambda a: F.linear(a, a.detach()[:4].T),
    ],
    ids=["comparison", "sum", "quotient", "where", "an op's argument"],
)
def test_numbers_without_a_derivative_that_differ_are_refused(
    function: Callable[[Tensor], Tensor],
) -> None:
    """What they do to the loss would be missing from every cut."""
    model, x, y = problem(lambda a, b: function(a) + b)
    with pytest.raises(RuntimeError, match="takes numbers that differ between the input and the"):
        attribute(model, x, y, CE, "secant", baseline=-x)
    attribute(model, x, y, CE, "secant", baseline=x)


def test_a_mask_of_an_op_that_differs_is_refused() -> None:
    def masked(a: Tensor, b: Tensor) -> Tensor:
        q, k = a.view(-1, 2, 2), b.view(-1, 2, 2)
        mask = (k > 0).any(-1)[:, None].expand(-1, 2, -1) | torch.eye(2, dtype=torch.bool)
        return F.scaled_dot_product_attention(q, k, k, attn_mask=mask)

    model, x, y = problem(masked)
    with pytest.raises(RuntimeError, match="takes a mask or indices that differ"):
        attribute(model, x, y, CE, "secant", baseline=-x)


def test_memory_that_is_written_over_may_hold_anything() -> None:
    held = iter((1.0, 2.0, 3.0, 4.0, 5.0, 6.0))

    def written(a: Tensor, b: Tensor) -> Tensor:
        out = torch.full((len(a), 8), next(held), dtype=a.dtype)
        out[:, :4] = a
        out[:, 4:].copy_(b.tanh())
        return out

    model, x, y = problem(lambda a, b: torch.cat([a, b], 1))
    model.function = written
    blame = attribute(model, x, y, CE, "secant", ["input"], baseline=-x)
    assert blame.residual["input"] < 1e-10
