from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from models import cnn, mlp
from torch import nn

from torchbp import BlameTracker, attribute
from torchbp.blame import Blame

NAMES = ("ant", "bee", "cat", "<dog>")


@pytest.fixture
def blame() -> Blame:
    model, x, y = mlp()
    return attribute(model, x, y, F.cross_entropy, "taylor", class_names=NAMES)


def test_it_is_a_mapping_of_layers(blame):
    assert [*blame] == ["1", "3"] and len(blame) == 2 and "1" in blame
    assert blame["1"].shape == (9, 8)
    with pytest.raises(KeyError, match="unknown name '11'; did you mean '1'"):
        blame["11"]


def test_nothing_keeps_the_graph_alive(blame):
    tensors = [*blame.values(), blame.losses, blame.output, blame.targets]
    assert not any(t.requires_grad for t in tensors)


def test_sums(blame):
    values, y = blame["1"], blame.targets
    torch.testing.assert_close(blame.per_unit("1"), values.sum(0))
    torch.testing.assert_close(blame.per_sample("1"), values.sum(1))
    by_class = torch.stack([values[y == c].sum(0) for c in range(4)])
    torch.testing.assert_close(blame.per_class("1"), by_class)
    predicted = blame.output.argmax(1)
    for true in range(4):
        for guess in range(4):
            expected = values[(y == true) & (predicted == guess)].sum(0)
            torch.testing.assert_close(blame.per_pair("1", true, guess), expected)


def test_top_ranks_culprits_over_all_layers(blame):
    rows = [*blame.top(5)]
    values = sorted(torch.cat([blame.per_unit(n) for n in blame]).tolist(), reverse=True)
    assert [row[2] for row in rows] == pytest.approx(values[:5])
    layer, unit, value, share, hurts = rows[0]
    assert float(blame.per_unit(layer)[unit]) == pytest.approx(value)
    part = value / float(blame.per_unit(layer).abs().sum())
    assert share == f"{100 * part:.1f} %"
    assert hurts == NAMES[int(blame.per_class(layer)[:, unit].argmax())]
    assert {row[0] for row in blame.top(30, layer="3")} == {"3"}
    with pytest.raises(ValueError, match="k: expected an integer >= 1, got 0"):
        blame.top(0)


def test_confusions_are_ranked_by_their_loss(blame):
    y, predicted = blame.targets, blame.predictions()
    expected = {}
    for true, guess, loss in zip(
        y.tolist(), predicted.tolist(), blame.losses.tolist(), strict=True
    ):
        if true != guess:
            n, total = expected.get((NAMES[true], NAMES[guess]), (0, 0.0))
            expected[NAMES[true], NAMES[guess]] = (n + 1, total + loss)
    rows = [*blame.confusions()]
    assert {(r[0], r[1]): r[2] for r in rows} == {k: v[0] for k, v in expected.items()}
    assert [r[3] for r in rows] == pytest.approx(sorted(v[1] for v in expected.values())[::-1])


def test_tables_for_people_and_programs(blame):
    text, page = str(blame), blame._repr_html_()
    assert "taylor: removal" in text and "blame by layer" in text
    assert "&lt;dog&gt;" in page or "<dog>" not in page
    frame = blame.to_pandas()
    assert [*frame.columns] == ["layer", "unit", "blame"] and len(frame) == 8 + 7
    assert frame.blame.sum() == pytest.approx(sum(float(blame[n].sum()) for n in blame))


def test_residuals_come_with_allocation_only(blame):
    assert blame.residual == {} and blame.question == "removal"
    model, x, y = mlp()
    exact = attribute(model, x, y, F.cross_entropy, "secant")
    assert exact.question == "allocation" and [*exact.residual] == ["1", "3"]
    exact.expected["3"] += 1  # a result that does not hold says so
    assert exact.residual["3"] > 0.1


def test_regression_has_no_classes():
    model, x, _ = mlp()
    blame = attribute(model, x, torch.randn(9, 4).double(), F.mse_loss, "taylor")
    assert [*blame.top(2).columns] == ["layer", "unit", "blame", "share"]
    with pytest.raises(ValueError, match="the targets are not class indices"):
        blame.per_class("1")


def test_reports_share_the_views_and_say_what_is_missing():
    model, x, y = mlp()
    with BlameTracker(model, method="taylor", class_names=NAMES) as tracker:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        tracker.step(loss, targets=y)
    report = tracker.report()
    blame = attribute(model, x, y, F.cross_entropy, "taylor", class_names=NAMES)
    for ours, theirs in zip(report.top(6), blame.top(6), strict=True):
        assert ours[:2] == theirs[:2] and ours[3:] == theirs[3:]
    with pytest.raises(ValueError, match="no sample ids were given"):
        report.suspects()
    with pytest.raises(KeyError, match="unknown name"):
        report.per_unit("7")


def test_players_of_a_layer_are_units_positions_or_elements():
    model, x, y = cnn()
    found = {
        of: attribute(model, x, y, F.cross_entropy, "taylor", layers=["2"], of=of)
        for of in ("units", "positions", "elements")
    }
    elements = found["elements"]["2"]
    assert elements.shape == (7, 4, 9, 9)
    torch.testing.assert_close(found["units"]["2"], elements.sum((2, 3)))
    torch.testing.assert_close(found["positions"]["2"], elements.sum(1))
    torch.testing.assert_close(found["elements"].per_sample("2"), found["units"].per_sample("2"))
    assert found["positions"].per_unit("2").shape == (81,)
    with pytest.raises(ValueError, match="of: unknown name 'neurons'"):
        attribute(model, x, y, F.cross_entropy, of="neurons")


def test_inputs_are_blamed_element_by_element():
    model, x, y = cnn()
    blame = attribute(model, x, y, F.cross_entropy, of="inputs").check()
    assert blame["input"].shape == x.shape
    torch.testing.assert_close(blame.per_sample("input"), blame.losses - blame.reference_losses)
    with pytest.raises(ValueError, match="layers: of='inputs' names the layers itself"):
        attribute(model, x, y, F.cross_entropy, of="inputs", layers=["2"])


def test_tokens_are_blamed_where_they_enter():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 3)).double()
    tokens, y = torch.randint(7, (5, 3)), torch.randint(3, (5,))
    blame = attribute(model, tokens, y, F.cross_entropy, "taylor", of="inputs")
    assert blame["0"].shape == (5, 3)
    with pytest.raises(ValueError, match=r"has no torch\.nn\.Embedding"):
        attribute(nn.Sequential(OneHot(), nn.Linear(7, 3)), tokens[:, 0], y, F.cross_entropy,
                  "taylor", of="inputs")  # fmt: skip


class OneHot(nn.Module):
    def forward(self, tokens):
        return F.one_hot(tokens, 7).float()


def test_conservation_is_part_of_the_result():
    model, x, y = mlp()
    blame = attribute(model, x, y, F.cross_entropy, "secant", layers="all")
    assert blame.check() is blame
    rows = [*blame.conservation()]
    assert [row[0] for row in rows] == [*blame]
    change = float((blame.losses - blame.reference_losses).sum())
    for _, total, absorbed, expected, residual in rows:
        assert total == pytest.approx(change) == expected and absorbed == 0 and residual < 1e-12
    blame.units["3"][2, 1] += 1e-3
    with pytest.raises(RuntimeError, match=r"not conserved within 1\.0e-09 .* at layer '3' by"):
        blame.check()
    blame.check(1.0)
    blame.units["3"][2, 1] = float("nan")
    with pytest.raises(RuntimeError, match="at layer '3' by nan"):
        blame.check(1.0)


def test_what_was_absorbed_counts():
    model, x, y = mlp()
    blame = attribute(model, x, y, F.cross_entropy, "secant", layers=["3"])
    blame.units["3"] -= 0.5
    blame.absorbed["3"] = torch.full((9,), 0.5 * 7, dtype=torch.float64)
    blame.check()
    assert next(iter(blame.conservation()))[2] == pytest.approx(0.5 * 7 * 9)


def test_nothing_to_check_is_said():
    model, x, y = mlp()
    with pytest.raises(ValueError, match="check: method 'taylor' answers removal"):
        attribute(model, x, y, F.cross_entropy, "taylor").check()


@pytest.mark.parametrize("ignored", [-100, 255])
def test_ignored_targets_are_of_no_class(ignored):
    model, x, y = mlp()
    y[:4] = ignored
    loss_fn = functools.partial(F.cross_entropy, ignore_index=ignored)
    blame = attribute(model, x, y, loss_fn, "taylor")
    rest = attribute(model, x[4:], y[4:], F.cross_entropy, "taylor")
    torch.testing.assert_close(blame.per_class("1"), rest.per_class("1"))
    assert blame.confusions().rows == rest.confusions().rows
    attribute(model, x, y, loss_fn, "logits", rivals=1)


@pytest.mark.parametrize("first", ["word", "place"])
@pytest.mark.parametrize("samples", [1, 3])
def test_the_embedding_of_the_tokens_is_found_whatever_comes_first(first, samples):
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(first, nn.Embedding(9, 4))
            self.add_module("place" if first == "word" else "word", nn.Embedding(9, 4))
            self.head = nn.Linear(4, 3)

        def forward(self, tokens):
            places = torch.arange(tokens.shape[1])[None]
            return self.head((self.place(places) + self.word(tokens)).tanh().mean(1))

    tokens, y = torch.randint(9, (samples, 5)), torch.randint(3, (samples,))
    blame = attribute(Tokens(), tokens, y, F.cross_entropy, "taylor", of="inputs")
    assert [*blame] == ["word"] and blame["word"].shape == (samples, 5)
