"""A published sentence transformer: which words make it misjudge how alike two sentences are?

Pairs with a similarity that people would give; the loss is the squared error of the cosine. Blame
goes to every word of both sentences (`secant`, conserved) and to the layers of the network.

    python experiments/sentences.py
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from _pretrained import Similarity, sentence_model
from torch import Tensor

from torchbp import attribute
from torchbp.blame import Blame
from torchbp.tables import Table

#: Two sentences, and how alike they are in meaning from 0 to 1.
PAIRS = (
    ("The bank raised its interest rates again.", "We had a picnic on the bank of the river.", 0.0),
    ("The film was not good at all.", "The film was good.", 0.1),
    ("He turned the light off before leaving.", "He turned the light on before leaving.", 0.2),
    ("The cat chased the dog through the garden.", "The dog chased the cat in the garden.", 0.4),
    ("She kicked the bucket last year.", "She died last year.", 1.0),
    ("A man is playing a guitar on stage.", "Someone performs music for an audience.", 0.8),
)


def encode(tokenizer: Any) -> tuple[tuple[Tensor, ...], list[list[str]]]:
    """Token ids and masks of first and second sentences, and the tokens' texts."""
    inputs: list[Tensor] = []
    words = []
    for side in (0, 1):
        found = tokenizer([p[side] for p in PAIRS], return_tensors="pt", padding=True)
        inputs += [found["input_ids"], found["attention_mask"]]
        words.append([tokenizer.convert_ids_to_tokens(row) for row in found["input_ids"]])
    return tuple(inputs), [a + b for a, b in zip(*words, strict=True)]


def words_to_blame(blame: Blame, words: list[list[str]], k: int) -> Table:
    """Per pair, the ``k`` words of either sentence that raise the loss most."""
    values = torch.cat([*blame.values()], 1)
    rows = []
    for n, (first, second, alike) in enumerate(PAIRS):
        assert blame.output is not None
        best = values[n].topk(k).indices.tolist()
        named = ", ".join(f"{words[n][i]} {float(values[n, i]):+.3f}" for i in best)
        said = float(blame.output[n])
        rows.append((f"{first} / {second}", alike, said, float(blame.losses[n]), named))
    columns = ("pair", "alike", "model says", "loss", "words that raise it")
    return Table(columns, rows, title="words to blame (secant from zero embeddings)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--words", type=int, default=3, metavar="K", help="how many per pair")
    options = parser.parse_args()
    found = sentence_model()
    model: Similarity = found[0]
    inputs, words = encode(found[1])
    targets = torch.tensor([p[2] for p in PAIRS])
    table = "body.embeddings.word_embeddings"
    tokens = attribute(model, inputs, targets, F.mse_loss, layers=[table], of="positions")
    print(words_to_blame(tokens, words, options.words), "\n")
    removal = attribute(model, inputs, targets, F.mse_loss, "link")
    print(removal.top(10))


if __name__ == "__main__":
    main()
