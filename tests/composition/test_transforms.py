"""Converted models under torch.compile, torch.export and torch.func."""

from __future__ import annotations

import pytest
import torch
import torch.nn.attention
from nets import NETS, pair, step
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import torchbp

CLOSE = dict(rtol=1e-9, atol=1e-11)


def unfused():
    """torch's fused attention has no forward mode; ours has."""
    return torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_compile_in_one_graph(name: str, training: bool) -> None:
    theirs, ours, x = pair(name)
    theirs.train(training)
    expected = step(theirs, x)
    torch._dynamo.reset()
    compiled = torch.compile(ours.train(training), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(ours, x, compiled), expected, **CLOSE)
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value)


@pytest.mark.slow
@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_compile_with_inductor(name: str, fullgraph: bool) -> None:
    theirs, ours, x = pair(name)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=fullgraph)
    torch.testing.assert_close(step(ours, x, compiled), step(theirs, x), **CLOSE)


@pytest.mark.parametrize("name", NETS)
def test_one_compiled_graph_takes_any_batch(name: str) -> None:
    theirs, ours, x = pair(name)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (4, 3, 2):
        torch.testing.assert_close(step(ours, x[:n], compiled), step(theirs, x[:n]), **CLOSE)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_export(name: str, strict: bool) -> None:
    theirs, ours, x = pair(name)
    torch._dynamo.reset()
    program = torch.export.export(ours, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), theirs(x))


def loss_of(model: torch.nn.Module):
    def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return functional_call(model, parameters, (x,)).square().sum()

    return loss


@pytest.mark.parametrize("name", NETS)
def test_per_sample_gradients(name: str) -> None:
    theirs, ours, x = pair(name)
    found = []
    for model in (ours, theirs):
        parameters = {n: p.detach() for n, p in model.named_parameters()}
        loss = loss_of(model)
        per_sample = vmap(grad(loss), (None, 0))(parameters, x[:, None])
        looped = [grad(loss)(parameters, row[None]) for row in x]
        for key, value in per_sample.items():
            torch.testing.assert_close(value, torch.stack([g[key] for g in looped]), **CLOSE)
        found.append(per_sample)
    torch.testing.assert_close(*found, **CLOSE)


@pytest.mark.parametrize("transform", [jacrev, jacfwd, hessian], ids=lambda t: t.__name__)
@pytest.mark.parametrize("name", NETS)
def test_jacobians_and_hessians(name: str, transform) -> None:
    theirs, ours, x = pair(name)

    def function(model: torch.nn.Module):
        return lambda v: model(v[None])[0].square().sum(-1)

    found = transform(function(ours))(x[0])
    with unfused():
        expected = transform(function(theirs))(x[0])
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("name", NETS)
def test_forward_mode(name: str) -> None:
    theirs, ours, x = pair(name)
    tangent = torch.randn_like(x)
    found = jvp(ours, (x,), (tangent,))
    with unfused():
        expected = jvp(theirs, (x,), (tangent,))
    torch.testing.assert_close(found, expected, **CLOSE)


def test_functional_calls_compile_too() -> None:
    torch._dynamo.reset()
    x = torch.randn(3, 4, requires_grad=True)
    compiled = torch.compile(
        lambda v: torchbp.functional.softmax(torchbp.functional.gelu(v), -1),
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    torch.testing.assert_close(compiled(x), torch.nn.functional.gelu(x).softmax(-1))
