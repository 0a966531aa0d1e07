"""The checks of ``cpp/tests/simt.h`` find what they are for, and nothing in correct kernels."""

from __future__ import annotations

import re

import pytest
import simt
import torch

faults = simt.family("faults")
NAMES = [
    line.strip(" ,")
    for line in re.search(
        r"enum Fault \{(.*?)\}", (simt.CPP / "tests/simt_faults.cpp").read_text(), re.S
    )[1].splitlines()
    if line.strip()
]
COUNT = 150


def sums(faults: simt.Family, fault: str) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randint(-9, 10, (COUNT,)).float()
    out = simt.unwritten(x)
    faults.sums(NAMES.index(fault), x, out, COUNT)
    block_sums = torch.cat([part.sum().expand(len(part)) for part in x.split(64)])
    return out, block_sums - x


def test_a_correct_kernel_passes(faults):
    got, expected = sums(faults, "none")
    assert torch.equal(got, expected)


def test_a_forgotten_element_shows(faults):
    got, expected = sums(faults, "missing_last")
    assert torch.equal(got[:-1], expected[:-1]) and got[-1].isnan()


@pytest.mark.parametrize(
    "fault, message",
    {
        "missing_barrier": "(race|uninitialised): .* reads shared memory",
        "overwritten_early": "race: .* shared memory at byte .*, (read|written) by",
        "uninitialised": "uninitialised: .* reads shared memory",
        "divergent_shuffle": "barrier: .*simt_faults.cpp:[0-9]+ for others",
        "shuffle_of_an_early_end": "barrier: .*simt_faults.cpp:[0-9]+ for others.*have ended",
        "two_shuffles": "barrier: .* waits at",
        "partial_mask": "barrier: .* is not in the mask",
        "divergent_barrier": "barrier: .* waits at .* for others",
        "barrier_after_end": "barrier: .* have ended",
        "past_the_end": "memory: .* reads 4 bytes outside",
        "before_the_start": "memory: .* reads 4 bytes outside",
        "past_dynamic_shared": "memory: .* writes 4 bytes outside",
    }.items(),
)
def test_faults_inside_a_block(faults, fault, message):
    with pytest.raises(simt.SimtError, match=message):
        sums(faults, fault)


@pytest.mark.parametrize(
    "fault, message",
    {
        "uninitialised_scratch": "uninitialised: .* reads scratch",
        "blocks_share_a_cell": "race: .* writes argument 1 at byte 0, written by",
        "block_reads_anothers_result": "race: .* argument 1",
    }.items(),
)
def test_faults_between_blocks(faults, fault, message):
    with pytest.raises(simt.SimtError, match=message):
        faults.blocks(NAMES.index(fault), torch.zeros(3))


def test_syncwarp_orders_memory_and_shuffles_do_not(faults):
    x = torch.arange(32.0)
    faults.reverse(NAMES.index("none"), x)
    assert torch.equal(x, torch.arange(31.0, -1, -1))
    with pytest.raises(simt.SimtError, match=r"race: .* reads shared memory"):
        faults.reverse(NAMES.index("shuffle_is_no_barrier"), x)
