"""Every registered functional under activation checkpointing and offloaded saved tensors."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import torchbp.ops  # noqa: F401  fills the registry
from torchbp.ops.registry import OPS
from torchbp.verify.cases import Outcome, gradients, of_entry
from torchbp.verify.properties import close


@pytest.mark.parametrize("name", OPS)
def test_checkpointed(name: str) -> None:
    """Checkpointing unpacks every saved tensor once, and runs the forward a second time."""
    for case in of_entry(OPS[name]):
        inputs = case.inputs
        plain = case.call(*inputs)
        expected = Outcome(plain, gradients(plain, inputs))
        again = checkpoint(case.call, *inputs, use_reentrant=False)
        close(Outcome(again, gradients(again, inputs)), expected, "checkpoint", 1e-12)


@pytest.mark.parametrize("name", OPS)
def test_saved_tensors_are_all_declared(name: str) -> None:
    """What backward reads went through save_for_backward: hooks that move it see everything."""
    for case in of_entry(OPS[name]):
        inputs = case.inputs
        plain = case.call(*inputs)
        expected = Outcome(plain, gradients(plain, inputs))
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
            moved = case.call(*inputs)
        close(Outcome(moved, gradients(moved, inputs)), expected, "offloaded", 1e-12)
