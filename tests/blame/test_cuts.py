from __future__ import annotations

import pytest
import torch
from deep_models import DEEP
from models import MODELS
from torch import Tensor, nn

from torchbp.blame.capture import Capture, leaves
from torchbp.blame.cuts import complete_cuts


def reaches(node: object, ends: set[int], removed: Tensor) -> bool:
    """Whether a path from the node to an end avoids one edge: that of the removed tensor."""
    stack, seen = [(node, 0)], set()
    while stack:
        at, number = stack.pop()
        if at is None or (at, number) in seen:
            continue
        seen.add((at, number))
        leaf = getattr(at, "variable", None)
        if leaf is removed or (at is removed.grad_fn and number == removed.output_nr):
            continue
        if id(leaf) in ends:
            return True
        stack += at.next_functions
    return False


@pytest.mark.parametrize("make", {**MODELS, **DEEP}.values(), ids={**MODELS, **DEEP}.keys())
def test_a_cut_is_what_no_path_avoids(make) -> None:
    model, x, _ = make()
    x.requires_grad_()
    with Capture(leaves(model)) as capture:
        total = model(x).sum()
    outputs = {str(k): call.output for k, call in enumerate(capture.calls)}
    expected = {
        name for name, output in outputs.items() if not reaches(total.grad_fn, {id(x)}, output)
    }
    assert 0 < len(expected) <= len(outputs)
    assert complete_cuts(total, outputs, [x]) == expected


def test_random_graphs() -> None:
    generator = torch.Generator().manual_seed(1)
    found = 0
    for _ in range(200):
        ends = [torch.ones(2, requires_grad=True) for _ in range(2)]
        made = [end * 1 for end in ends]
        for _ in range(12):
            i, j = torch.randint(max(0, len(made) - 4), len(made), (2,), generator=generator)
            made.append(made[i].exp() if i == j else made[i] + made[j])
        loss = made[-1].sum()
        outputs = {str(k): value for k, value in enumerate([*ends, *made])}
        begins = ends[: 1 + int(torch.randint(2, (), generator=generator))]
        ids = {id(end) for end in begins}
        expected = {n for n, v in outputs.items() if not reaches(loss.grad_fn, ids, v)}
        if reaches(loss.grad_fn, ids, torch.ones(())):
            found += len(expected)
            # What leads nowhere or is led to by no end is no cut, and neither is left out here.
            assert complete_cuts(loss, outputs, begins) == expected
    assert found > 400


def test_another_output_of_the_same_function_leads_past() -> None:
    x = torch.ones(4, requires_grad=True)
    a, b = x.exp().chunk(2)
    outputs = {"x": x, "a": a, "b": b}
    assert complete_cuts((a + b).sum(), outputs, [x]) == {"x"}
    assert complete_cuts(a.sum(), outputs, [x]) == {"x", "a"}


def test_the_state_of_a_recurrent_layer_leads_past_its_output() -> None:
    class State(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            output, (h, _) = self.lstm(x)
            return self.head(output[:, -1] + h[0])

    from torchbp import attribute

    x, y = torch.rand(3, 5, 3, dtype=torch.float64), torch.tensor([0, 1, 1])
    loss = nn.functional.cross_entropy
    blame = attribute(State().double(), x, y, loss, "secant", layers="all")
    assert {*blame.residual} == {"input", "head"}
    blame.check()


def test_where_nothing_begins_nothing_can_be_lost() -> None:
    x, other = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    hidden = x * 2
    assert complete_cuts(hidden.sum(), {"hidden": hidden, "x": x}, [other]) == {"hidden", "x"}
