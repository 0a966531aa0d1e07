"""What every op does on the way in: autocast, tracing, tensor subclasses."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import torchbp
import torchbp.functional as B


def test_autocast_inside_torch_compile_casts_as_outside():
    torch._dynamo.reset()
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten(), nn.Linear(36, 5)
    model = torchbp.convert(nn.Sequential(*layers))
    x = torch.randn(2, 3, 5, 5)

    def gradients(call):
        with torch.autocast("cpu"):
            y = call(x)
        return y, torch.autograd.grad(y.float().square().sum(), list(model.parameters()))

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradients(compiled), gradients(model))


def test_autocast_leaves_meta_tensors_alone_as_in_torch():
    x, weight = torch.empty(2, 3, device="meta"), torch.empty(4, 3, device="meta")
    with torch.autocast("cpu"):
        assert B.linear(x, weight).dtype == F.linear(x, weight).dtype


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_convolution_of_distributed_tensors(mesh):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    x, weight = torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3)
    leaves = [
        distribute_tensor(t, mesh, [place]).requires_grad_()
        for t, place in ((x, Shard(0)), (weight, Replicate()))
    ]
    ours, theirs = (torch.autograd.grad(f(*leaves).sum(), leaves) for f in (B.conv2d, F.conv2d))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.full_tensor(), b.full_tensor())
