"""What the ledger hands out does not change with the steps that follow."""

from __future__ import annotations

import torch

from torchbp.blame.ledger import SampleLedger


def test_a_state_is_not_written_to_by_later_steps():
    ledger, ids = SampleLedger(), torch.tensor([0, 1])

    def add(value: float) -> None:
        labels = torch.tensor([int(value), 0])
        blame = torch.full((2, 1), value)
        ledger.add(ids, torch.full((2,), value), ("layer",), blame, labels, 1 - labels)

    add(1.0)
    state = ledger.state_dict()
    before = {k: v.clone() for k, v in state.items() if k != "blame"}
    blame = state["blame"]["layer"].clone()
    add(0.5)
    assert all(torch.equal(state[k], v) for k, v in before.items())
    assert torch.equal(state["blame"]["layer"], blame)
