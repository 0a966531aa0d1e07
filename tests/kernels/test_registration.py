"""The operators as PyTorch sees them: schemas, fake tensors, vmap, dispatch, errors."""

from __future__ import annotations

import pytest
import torch
from calls import IMAGE, B, X, sample
from torch.func import vmap

from torchbp import kernels
from torchbp.kernels import reference

OPS = torch.ops.torchbp


def test_schemas_are_the_documented_ones():
    for kernel in kernels.KERNELS.values():
        assert str(kernel.op._schema) == f"torchbp::{kernel.schema}"


@pytest.mark.parametrize("in_dims", [(0, None), (1, None), (0, 0), (None, 1), (2, 1)], ids=str)
@pytest.mark.parametrize("act", ["gelu", "leaky_relu"])
def test_vmap_bias_act(in_dims, act):
    def insert(t, dim):
        return t if dim is None else torch.stack([t, 2 * t, -t], dim)

    x = insert(sample(4, 5, dtype=torch.float64), in_dims[0])
    b = insert(sample(5, dtype=torch.float64), in_dims[1])
    g = sample(4, 5, dtype=torch.float64)
    got = vmap(lambda x, b: OPS.bias_act(x, b, act, 0.1), in_dims)(x, b)
    torch.testing.assert_close(
        got, vmap(lambda x, b: reference.ACTIVATIONS[act][0](x + b, 0.1), in_dims)(x, b)
    )
    grads = vmap(lambda x, b: OPS.bias_act_backward(g, x, b, act, 0.1), in_dims)(x, b)
    for i in range(3):
        xi = x if in_dims[0] is None else x.select(in_dims[0], i)
        bi = b if in_dims[1] is None else b.select(in_dims[1], i)
        for ours, theirs in zip(grads, OPS.bias_act_backward(g, xi, bi, act, 0.1), strict=True):
            torch.testing.assert_close(ours[i], theirs)


def test_vmap_without_bias_and_over_vectors():
    x, g = sample(3, 5), sample(3, 5)
    plain = vmap(lambda g, x: OPS.bias_act_backward(g, x, None, "silu", 0.1)[0], (1, 1), 1)(g, x)
    assert torch.equal(plain, OPS.bias_act_backward(g, x, None, "silu", 0.1)[0])
    grad, grad_bias = vmap(lambda g, x: OPS.bias_act_backward(g, x, B, "silu", 0.1))(g, x)
    torch.testing.assert_close(grad, grad_bias)
    torch.testing.assert_close(grad, OPS.bias_act_backward(g, x, B, "silu", 0.1)[0])


@pytest.mark.parametrize("in_dims", [(0, 0), (1, None), (None, 2)], ids=str)
def test_vmap_blame_reduce(in_dims):
    tensors = [sample(4, 5) if d is None else sample(4, 5, 3).movedim(-1, d) for d in in_dims]
    got = vmap(lambda a, d: OPS.blame_reduce(a, d, -1, False), in_dims)(*tensors)
    for i in range(3):
        pair = [t if d is None else t.select(d, i) for t, d in zip(tensors, in_dims, strict=True)]
        for ours, theirs in zip(got, OPS.blame_reduce(*pair, -1, False), strict=True):
            torch.testing.assert_close(ours[i], theirs)


def test_other_devices_get_the_reference():
    """Meta tensors follow the fake rule; every other backend has a kernel to fall back to."""
    y = kernels.bias_act(X.to("meta"), B.to("meta"), "gelu")
    assert y.shape == X.shape and y.device.type == "meta"
    for name in ("bias_act", "bias_act_backward", "blame_reduce", "blame_settle"):
        for backend in ("CUDA", "MPS", "XPU"):
            assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(
                f"torchbp::{name}", backend
            )


BAD = {
    "act": (lambda m: m.bias_act(X, B, "swish", 0.1), "act: expected .*sigmoid, got swish"),
    "bias length": (lambda m: m.bias_act(X, sample(4), "relu", 0.1), "bias: expected one value"),
    "bias dims": (lambda m: m.bias_act(X, sample(1, 5), "relu", 0.1), "bias: expected one value"),
    "bias of a scalar": (
        lambda m: m.bias_act(torch.tensor(1.0), sample(1), "relu", 0.1),
        "bias: expected one value",
    ),
    "bias dtype": (
        lambda m: m.bias_act(X, B.double(), "relu", 0.1),
        "bias: expected the dtype of x",
    ),
    "integers": (lambda m: m.bias_act(X.int(), None, "relu", 0.1), "x: expected float32.*"),
    "grad shape": (
        lambda m: m.bias_act_backward(X[:5], X, B, "relu", 0.1),
        "grad_output: expected the shape of x",
    ),
    "grad dtype": (
        lambda m: m.bias_act_backward(X.double(), X, B, "relu", 0.1),
        "grad_output: expected the dtype of x",
    ),
    "one dim": (lambda m: m.blame_reduce(B, B, 0, False), "activation: expected .* got 1"),
    "unit_dim": (lambda m: m.blame_reduce(IMAGE, IMAGE, 2, False), "unit_dim: expected 1 .* got 2"),
    "unit_dim 0": (lambda m: m.blame_reduce(X, X, -2, False), "unit_dim: expected 1 .* got -2"),
    "error shape": (lambda m: m.blame_reduce(X, X[:, :4], 1, False), "error: expected the shape"),
    "error dtype": (lambda m: m.blame_reduce(X, X.half(), 1, False), "error: expected the dtype"),
    "contribution shape": (
        lambda m: m.blame_reduce_into(X, X, 1, False, sample(5, 5), sample(3, 5)),
        r"contribution: expected shape \[6, 5\]",
    ),
    "stats shape": (
        lambda m: m.blame_reduce_into(X, X, 1, False, sample(6, 5), sample(15)),
        r"stats: expected shape \[3, 5\]",
    ),
    "contribution dtype": (
        lambda m: m.blame_reduce_into(X, X, 1, False, sample(6, 5).double(), sample(3, 5)),
        "contribution: expected float64 for a float64 activation, float32 for others",
    ),
    "stats layout": (
        lambda m: m.blame_reduce_into(X, X, 1, False, sample(6, 5), sample(5, 3).t()),
        "stats: expected a contiguous tensor",
    ),
    "complex": (
        lambda m: m.blame_reduce(X.to(torch.complex64), X.to(torch.complex64), 1, False),
        "activation: expected float32",
    ),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("module", [kernels, reference], ids=["kernel", "reference"])
def test_bad_arguments_are_named(name, module):
    call, message = BAD[name]
    with pytest.raises(RuntimeError, match=message):
        call(module)


def test_status_tells_what_is_in_use():
    status = kernels.status()
    assert status["extension"] == kernels.HAS_EXT
    assert bool(status["reason"]) != kernels.HAS_EXT
    assert status["isa"] in (("base", "avx2", "avx512") if kernels.HAS_EXT else ("reference",))
    assert status["torch"] == torch.__version__
