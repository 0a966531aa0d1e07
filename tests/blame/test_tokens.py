"""Token-to-token blame against Jacobians and against the loss itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchbp import attribute


class Causal(nn.Module):
    """A small causal attention model: position t sees positions up to t."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 9)

    def body(self, h):
        mask = torch.ones(h.shape[1], h.shape[1], dtype=torch.bool).triu(1)
        return self.out(h + self.attend(h, h, h, attn_mask=mask, need_weights=False)[0])

    def forward(self, tokens):
        return self.body(self.embed(tokens)).transpose(1, 2)


@pytest.fixture
def problem():
    model = Causal().double().eval()
    tokens = torch.randint(9, (3, 5))
    return model, tokens, tokens.roll(-1, 1)


def test_taylor_is_embedding_times_jacobian(problem):
    model, tokens, targets = problem
    found = attribute(model, tokens, targets, F.cross_entropy, of="tokens", layer="embed",
                      method="taylor")  # fmt: skip
    for n in range(3):
        h = model.embed(tokens[n]).detach()
        jacobian = torch.autograd.functional.jacobian(
            lambda h, n=n: F.cross_entropy(model.body(h[None])[0], targets[n], reduction="none"), h
        )  # [T, S, E]
        torch.testing.assert_close(found.matrix[n], (jacobian * h).sum(2))
    assert float(found.matrix.triu(1).abs().max()) == 0  # nobody is blamed by the past
    assert found.residual is None


def test_secant_rows_sum_to_each_tokens_loss(problem):
    model, tokens, targets = problem
    found = attribute(model, tokens, targets, F.cross_entropy, of="tokens", layer="embed",
                      baseline=torch.zeros_like(tokens))  # fmt: skip
    change = found.losses - found.reference_losses
    torch.testing.assert_close(found.matrix.sum(2), change)
    assert found.complete and found.residual < 1e-12
    assert float(found.matrix.triu(1).abs().max()) == 0
    whole = attribute(model, tokens, targets, F.cross_entropy, layers=["embed"], of="positions",
                      baseline=torch.zeros_like(tokens))  # fmt: skip
    torch.testing.assert_close(found.matrix.sum(1), whole["embed"])


def test_the_input_of_a_floating_model_is_a_layer():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(2, 6, 3, dtype=torch.float64), torch.randint(2, (2, 6))

    def loss(z, y):
        return F.cross_entropy(z.transpose(1, 2), y, reduction="none")

    found = attribute(model, x, y, loss, of="tokens")
    assert found.layer == "input" and found.residual < 1e-12
    off = found.matrix - torch.diag_embed(found.matrix.diagonal(dim1=1, dim2=2))
    assert float(off.abs().max()) == 0  # no position sees another


def test_tables_name_tokens(problem):
    model, tokens, targets = problem
    found = attribute(
        model, tokens, targets, F.cross_entropy, of="tokens", layer="embed", method="taylor"
    )
    words = ["a", "b", "c", "d", "e"]
    source, target, value = next(iter(found.top(1, sample=1, tokens=words)))
    t, s = divmod(int(found.matrix[1].argmax()), 5)
    assert (source, target) == (f"{s} {words[s]}", f"{t} {words[t]}")
    assert value == pytest.approx(float(found.matrix[1].max()))


@pytest.mark.parametrize("method", ["taylor", "secant"])
def test_one_call_of_a_layer_that_runs_twice_is_named_by_number(method):
    act = nn.Tanh()
    model = nn.Sequential(nn.Conv1d(2, 3, 1), act, nn.Conv1d(3, 3, 3, padding=1), act).double()
    x, y = torch.randn(4, 2, 5).double(), torch.randint(3, (4, 5))
    args = model.eval(), x, y, F.cross_entropy
    units = attribute(*args, method=method, layers=["1"], of="positions")
    for call, name in (("1#1", "1"), ("1#2", "1#2")):
        found = attribute(*args, of="tokens", layer=call, method=method)
        assert found.layer == name
        torch.testing.assert_close(found.matrix.sum(1), units[name])
    for wrong in ("1", "1#3", act):
        with pytest.raises(ValueError, match=r"'1' is called 2 times; expected .*'1#1' to '1#2'"):
            attribute(*args, of="tokens", layer=wrong, method=method)


def test_bad_arguments(problem):
    model, tokens, targets = problem
    with pytest.raises(ValueError, match=r"one loss per sample and position, \[N, T\]"):
        attribute(model, tokens, targets, lambda z, y: F.cross_entropy(z, y), of="tokens",
                  layer="embed")  # fmt: skip
    with pytest.raises(ValueError, match="method: unknown name 'link'"):
        attribute(model, tokens, targets, F.cross_entropy, of="tokens", layer="embed",
                  method="link")  # fmt: skip
