"""Backward passes that may not use the compiled kernels, nor take for constant what was saved."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.autograd import forward_ad

import torchbp.functional as B

FUNCTIONS = {
    "silu": B.silu,
    "tanh": B.tanh,
    "glu": B.glu,
    "softmax": lambda x: B.softmax(x, -1),
    "log_softmax": lambda x: B.log_softmax(x, -1),
    "layer_norm": lambda x: B.layer_norm(x, (6,)),
    "rms_norm": lambda x: B.rms_norm(x, (6,)),
    "batch_norm": lambda x: B.batch_norm(x, None, None, training=True),
    "group_norm": lambda x: B.group_norm(x, 2),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_of_dual_tensors_have_tangents(name):
    """Forward over reverse without a graph of the gradient: the tangent is ``H t``."""
    x, t = torch.randn(2, 4, 6, dtype=torch.float64)
    x.requires_grad_()

    def loss(x):
        y = FUNCTIONS[name](x)
        return (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)).sum()

    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, t)
        (grad,) = torch.autograd.grad(loss(dual), dual)
        assert not grad.requires_grad
        tangent = forward_ad.unpack_dual(grad).tangent
    (first,) = torch.autograd.grad(loss(x), x, create_graph=True)
    (expected,) = torch.autograd.grad(first, x, t)
    torch.testing.assert_close(tangent, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_distributed_tensors_have_gradients():
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for name in ("silu", "glu", "softmax", "layer_norm", "rms_norm"):
            x = torch.randn(4, 6, requires_grad=True)
            spread = distribute_tensor(x.detach(), mesh, [Shard(0)]).requires_grad_()
            for leaf in (x, spread):
                FUNCTIONS[name](leaf).square().sum().backward()
            torch.testing.assert_close(spread.grad.full_tensor(), x.grad, rtol=1e-5, atol=1e-5)
    finally:
        dist.destroy_process_group()
