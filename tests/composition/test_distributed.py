"""Converted models in two processes: DistributedDataParallel and fully sharded parameters."""

from __future__ import annotations

import copy
import gc
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from nets import pair
from torch import nn

import torchbp

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"
)


def gradients(model: nn.Module) -> list[torch.Tensor]:
    grads = [p.grad for p in model.parameters()]
    return [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]


def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()


def worker(rank: int, folder: str, kind: str, name: str) -> None:
    sys.path.append(str(Path(__file__).parent))
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    try:
        _, ours, x = pair(name)
        part = x[2 * rank : 2 * rank + 2]
        if kind == "ddp":
            model = nn.parallel.DistributedDataParallel(ours)
        else:
            from torch.distributed.fsdp import fully_shard

            for child in ours.children():
                if next(child.parameters(), None) is not None:
                    fully_shard(child)
            model = fully_shard(ours)
        for _ in range(2):
            model.zero_grad()
            loss(model, part).backward()
        found = [g.cpu() for g in gradients(model)]
        if rank == 0:
            torch.save(found, os.path.join(folder, "found.pt"))
        # Threads of a reducer that outlives the group abort the process, and who leaves early
        # resets the other's connections.
        del model, ours
        gc.collect()
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", ["mlp", "cnn", "encoder"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_average_the_gradients_of_one(kind: str, name: str, tmp_path: Path) -> None:
    mp.spawn(worker, (str(tmp_path), kind, name), nprocs=2)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    theirs, _, x = pair(name)
    total: list[torch.Tensor] = []
    for part in x.split(2):
        model = copy.deepcopy(theirs)
        (loss(model, part) / 2).backward()
        grads = [p.grad for p in model.parameters()]
        total = [a + b for a, b in zip(total, grads, strict=True)] if total else grads
    torch.testing.assert_close(found, total, rtol=1e-10, atol=1e-12)
    assert torchbp.conversion_report(pair(name)[1])
