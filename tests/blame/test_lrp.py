"""``lrp`` is conserved, equals known formulas, and says where it has no rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from deep_models import causal_transformer, lstm, residual_cnn, reused
from models import MODELS, mlp
from test_tape import FUNCTIONS, problem
from torch import Tensor, nn

from torchbp import attribute, convert
from torchbp.blame import relevance_tape
from torchbp.ops.relevance import Rule

CE = F.cross_entropy


def logit(output: Tensor, targets: Tensor) -> Tensor:
    return output.gather(1, targets[:, None])[:, 0]


class Encoder(nn.Module):
    """Tokens through torch.nn's own transformer layer, batch second, with a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 8)
        self.first = nn.Parameter(torch.randn(1, 1, 8))
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, activation="gelu")
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens).transpose(0, 1)
        x = torch.cat([self.first.expand(1, x.shape[1], 8), x])
        return self.head(self.layer(x)[0])


def encoder() -> tuple[nn.Module, Tensor, Tensor]:
    return Encoder().double().eval(), torch.randint(9, (4, 5)), torch.randint(3, (4,))


ALL: dict[str, Callable[[], Any]] = {
    **MODELS,
    "residual_cnn": residual_cnn,
    "causal_transformer": causal_transformer,
    "encoder": encoder,
    "lstm": lstm,
    "reused": reused,
}


@pytest.mark.parametrize("converted", [False, True], ids=["plain", "converted"])
@pytest.mark.parametrize("rule", ["epsilon", "gamma"])
@pytest.mark.parametrize("make", ALL.values(), ids=ALL.keys())
def test_conserved_at_every_cut(make: Callable[[], Any], rule: str, converted: bool) -> None:
    model, x, y = make()
    if converted:
        convert(model)
    blame = attribute(model, x, y, CE, "lrp", layers="all", rules=rule)
    assert len(blame.residual) > 1
    blame.check(1e-10)
    with torch.no_grad():
        z = model(x)
        change = blame.losses - blame.reference_losses
        expected = CE(z, y, reduction="none") - CE(0 * z, y, reduction="none")
    torch.testing.assert_close(change, expected.reshape(len(y), -1).sum(1))


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n != "log sum exp"])
def test_functions_in_a_users_forward_are_conserved(name: str) -> None:
    blame = attribute(*problem(FUNCTIONS[name]), CE, "lrp", layers="all")
    assert {"input", "head"} <= blame.residual.keys()
    blame.check(1e-10)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda a, b: torch.einsum("ni,nj->nij", a, b), lambda a, b: a[:, :, None] @ b[:, None]),
        (
            lambda a, b: torch.einsum("ni,ni->n", a, b)[:, None],
            lambda a, b: (a * b).sum(1)[:, None],
        ),
        (lambda a, b: torch.addcmul(a, a, b), lambda a, b: a + a * b),
        (
            lambda a, b: torch.baddbmm(b[:, :, None], a[:, :, None], b[:, None, :1]),
            lambda a, b: b[:, :, None] + a[:, :, None] @ b[:, None, :1],
        ),
        (lambda a, b: -(b - a), lambda a, b: a + b.neg()),
        (lambda a, b: (a + b).mean(1, True), lambda a, b: (a + b).sum(1, True) / 4),
        (lambda a, b: torch.rsub(a, b), lambda a, b: b - a),
    ],
    ids=["outer", "dot", "addcmul", "baddbmm", "neg", "mean", "rsub"],
)
def test_one_function_in_two_forms(one: Any, other: Any) -> None:
    first, second = (
        attribute(*problem(f), CE, "lrp", layers=["a", "b", "input"], rules=Rule(epsilon=0))
        for f in (one, other)
    )
    for name in first:
        torch.testing.assert_close(first[name], second[name])


@pytest.mark.parametrize(
    ("kind", "name", "function"),
    [
        ("SUMS", "sum", lambda a, b: a + b.sum(1, keepdim=True)),
        ("FILLS", "masked_fill", lambda a, b: a.masked_fill(b > 0, 0.7)),
    ],
)
def test_what_a_function_loses_on_the_way_is_found_out(
    kind: str, name: str, function: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ops took is measured: relevance that torch's own backward multiplies or drops shows."""
    attribute(*problem(function), CE, "lrp", layers="all").check(1e-10)
    kept = frozenset(f for f in getattr(relevance_tape, kind) if f.__name__ != name)
    monkeypatch.setattr(relevance_tape, kind, kept)
    blame = attribute(*problem(function), CE, "lrp", layers="all")
    with pytest.raises(RuntimeError, match="'input'"):
        blame.check()


@pytest.mark.parametrize("loss_fn", [CE, logit], ids=["cross entropy", "logit"])
def test_without_bias_and_epsilon_it_is_gradient_times_input(loss_fn: Any) -> None:
    """Holds for a piecewise linear network (Ancona et al. 2018)."""
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3, bias=False), nn.ReLU(), nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(5, 6, bias=False), nn.LeakyReLU(0.0), nn.Linear(6, 4, bias=False),
    ).double()  # fmt: skip
    x, y = torch.randn(3, 2, 6, 6, dtype=torch.float64), torch.randint(4, (3,))
    blame = attribute(
        model, x, y, loss_fn, "lrp", layers="all", of="elements", rules=Rule(epsilon=0)
    )
    # The loss linear, with the multipliers of its secant from the uniform prediction for a slope.
    acts = [x.clone().requires_grad_()]
    for module in model:
        acts.append(module(acts[-1]))
    z = acts[-1]
    slope = F.one_hot(y, 4).double()
    if loss_fn is CE:
        p = z.detach().softmax(1)
        mean = (p - 0.25) / (4 * p).log()
        slope = mean / mean.sum(1, keepdim=True) - slope
    grads = torch.autograd.grad((z * slope).sum(), acts)
    for name, a, grad in zip(["input", *"01234567"], acts, grads, strict=True):
        torch.testing.assert_close(blame[name], (a * grad).detach(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(blame.absorbed[name], torch.zeros(3, dtype=torch.float64))


def test_each_element_and_what_is_absorbed_follow_the_epsilon_rule() -> None:
    """``R_i = Σ_j x_i w_ji R_j / (z_j + ε)``, and the layer keeps the rest (Bach et al. 2015)."""
    model, x, y = mlp()
    epsilon = 0.3
    blame = attribute(model, x, y, logit, "lrp", layers="all", rules=Rule(epsilon=epsilon))
    acts = [x]
    for module in model:
        acts.append(module(acts[-1]).detach())
    relevance = acts[-1] * F.one_hot(y, 4)
    absorbed = torch.zeros(len(x), dtype=torch.float64)
    for k in range(4, -1, -1):
        torch.testing.assert_close(blame[str(k)], relevance, rtol=1e-9, atol=1e-13)
        torch.testing.assert_close(blame.absorbed[str(k)], absorbed, rtol=1e-9, atol=1e-13)
        if isinstance(model[k], nn.Linear):
            z, sign = acts[k + 1], torch.where(acts[k + 1] < 0, -epsilon, epsilon).double()
            sign = epsilon * sign.sign()
            absorbed = absorbed + (relevance * (model[k].bias + sign) / (z + sign)).sum(1).detach()
            relevance = acts[k] * ((relevance / (z + sign)) @ model[k].weight).detach()
    torch.testing.assert_close(blame["input"], relevance, rtol=1e-9, atol=1e-13)


def test_a_layer_used_three_times_has_three_entries() -> None:
    model, x, y = reused()
    blame = attribute(model, x, y, CE, "lrp", layers="all")
    assert {"inner", "inner#2", "inner#3", "head"} <= {*blame}

    class Copies(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))
            self.head = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.a(x))
            x = x + torch.sigmoid(self.b(x))
            return self.head(torch.relu(self.c(x)))

    copies = Copies().double()
    for name in "abc":
        getattr(copies, name).load_state_dict(model.inner.state_dict())
    copies.head.load_state_dict(model.head.state_dict())
    expected = attribute(copies, x, y, CE, "lrp", layers="all")
    for ours, theirs in zip(
        ["inner", "inner#2", "inner#3", "input"], [*"abc", "input"], strict=True
    ):
        torch.testing.assert_close(blame[ours], expected[theirs])


def attention_by_hand(model: nn.MultiheadAttention, x: Tensor, arriving: Tensor) -> Tensor:
    """AttnLRP through one head, epsilon 0, written out from Achtibat et al. (2024)."""

    def linear(r: Tensor, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return x * ((r / (x @ w.T + b)) @ w)

    weights, biases = model.in_proj_weight.chunk(3), model.in_proj_bias.chunk(3)
    q, k, v = (x @ w.T + b for w, b in zip(weights, biases, strict=True))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    a = scores.softmax(-1)
    r = linear(arriving, a @ v, model.out_proj.weight, model.out_proj.bias)
    per_output = r / (2 * (a @ v))
    r_a, r_v = a * (per_output @ v.mT), v * (a.mT @ per_output)
    r_scores = scores * (r_a - a * r_a.sum(-1, keepdim=True))
    per_score = r_scores / (2 * (q @ k.mT))
    r_q, r_k = q * (per_score @ k), k * (per_score.mT @ q)
    shares = zip((r_q, r_k, r_v), weights, biases, strict=True)
    return sum(linear(r, x, w, b) for r, w, b in shares)


@pytest.mark.parametrize("need_weights", [False, True])
def test_attention_follows_attn_lrp(need_weights: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(6, 1, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=need_weights)[0]

    model = Model().double()
    nn.init.normal_(model.attention.in_proj_bias)
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    blame = attribute(
        model, x, None, lambda z, _: z.sum((1, 2)), "lrp", layers=["input"], of="elements",
        rules=Rule(epsilon=0),
    )  # fmt: skip
    with torch.no_grad():
        expected = attention_by_hand(model.attention, x, model(x))
    torch.testing.assert_close(blame["input"], expected, rtol=1e-8, atol=1e-10)


def test_a_shift_of_all_logits_changes_nothing_below_them() -> None:
    model, x, y = mlp()
    before = attribute(model, x, y, CE, "lrp", layers="all", rules=Rule(epsilon=0))
    with torch.no_grad():
        model[4].bias += 3.0
        model[4].weight += torch.randn(7, dtype=torch.float64)
    after = attribute(model, x, y, CE, "lrp", layers="all", rules=Rule(epsilon=0))
    for name in ["input", *"0123"]:
        torch.testing.assert_close(after[name], before[name], rtol=1e-8, atol=1e-12)


def test_the_reference_is_a_prediction() -> None:
    model, x, y = mlp()
    prior = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log()
    blame = attribute(model, x, y, CE, "lrp", layers="all", reference=prior)
    torch.testing.assert_close(blame.reference_losses, -prior[y])
    torch.testing.assert_close(blame.per_sample("4"), blame.losses + prior[y])
    blame.check()


def test_outputs_in_a_dict_are_seeded_one_by_one() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(5, 1)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            h = torch.relu(self.body(x))
            return {"classes": self.a(h), "value": self.b(h)}

    _, x, y = mlp()

    def loss(output: dict[str, Tensor], targets: Tensor) -> Tensor:
        return CE(output["classes"], targets, reduction="none") + output["value"][:, 0] ** 2

    blame = attribute(Two().double(), x, y, loss, "lrp", layers="all")
    assert {"input", "body"} <= blame.residual.keys()
    blame.check(1e-10)


def test_positions_and_elements_add_up_to_units() -> None:
    model, x, y = causal_transformer()
    layer = "1.up"
    units, positions, elements = (
        attribute(model, x, y, CE, "lrp", layers=[layer], of=of)[layer]
        for of in ("units", "positions", "elements")
    )
    torch.testing.assert_close(elements.sum(1), units)
    torch.testing.assert_close(elements.sum(2), positions)


@pytest.mark.parametrize(
    ("given", "error", "what"),
    [
        (dict(reference="uniform"), TypeError, "reference: expected a number or a tensor, got str"),
        (dict(reference=torch.zeros(3)), ValueError, r"output's \(9, 4\), got \(3,\)"),
        (dict(baseline=0.0), ValueError, "give that as reference="),
    ],
)
def test_references_that_make_no_sense_are_refused(
    given: dict[str, Any], error: type[Exception], what: str
) -> None:
    model, x, y = mlp()
    with pytest.raises(error, match=what):
        attribute(model, x, y, CE, "lrp", **given)


class Calls(nn.Module):
    """Calls a function, on the path or beside it."""

    def __init__(self, function: Callable[[Tensor], Tensor], beside: bool) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 4)
        self.function, self.beside = function, beside

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        found = self.function(x)
        return self.head(x if self.beside else found)


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (lambda x: torch.fft.fft(x).real, r"lrp: no rule for torch.fft.fft, called in module 'c'"),
        (lambda x: x.log_softmax(1), r"lrp: module 'c' \(test_lrp.py, line \d+\): LogSoftmax has"),
        (lambda x: x.sort(1)[0], "lrp: no rule for torch.Tensor.sort, called in module 'c'"),
    ],
    ids=["fft", "log_softmax", "sort"],
)
def test_functions_without_a_rule_are_refused_on_the_path(
    function: Callable[[Tensor], Tensor], what: str
) -> None:
    class Model(nn.Module):
        def __init__(self, beside: bool) -> None:
            super().__init__()
            self.c = Calls(function, beside)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(x)

    _, x, y = mlp()
    with pytest.raises(NotImplementedError, match=what):
        attribute(Model(beside=False).double(), x, y, CE, "lrp", layers="all")
    attribute(Model(beside=True).double(), x, y, CE, "lrp", layers="all").check()


def test_in_place_functions_are_followed() -> None:
    class InPlace(nn.Module):
        def __init__(self, writes: bool) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
            self.writes = writes

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            if not self.writes:
                return self.head(-F.relu((h + self.b(x) - 0.5).masked_fill(x > 1, 0.3)))
            h += self.b(x)
            h -= 0.5
            return self.head(F.relu(h.masked_fill_(x > 1, 0.3), inplace=True).neg_())

    _, x, y = mlp()
    found = []
    for writes in (True, False):
        torch.manual_seed(2)
        model = InPlace(writes).double()
        found.append(attribute(model, x, y, CE, "lrp", layers=["input", "a", "b", "head"]))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name])
    found[0].check(1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conserved_in_other_dtypes(dtype: torch.dtype) -> None:
    model, x, y = residual_cnn()
    attribute(model.to(dtype), x.to(dtype), y, CE, "lrp", layers="all").check()
